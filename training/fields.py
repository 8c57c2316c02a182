"""Dataclasses read from JSON: types with a range of values, and a check of every field against its annotation."""

import dataclasses
import sys
import types
import typing
from typing import Annotated

from weights.errors import quote

LARGEST = 10**100  # the command line takes whole numbers of up to 100 digits
LARGEST_FLOAT = sys.float_info.max

Step = Annotated[int, lambda n: -1 <= n < LARGEST]  # -1: none
Count = Annotated[int, lambda n: 0 <= n < LARGEST]
Positive = Annotated[int, lambda n: 1 <= n < LARGEST]
Number = Annotated[float, lambda x: abs(x) <= LARGEST_FLOAT]
Rate = Annotated[float, lambda x: 0 <= x <= LARGEST_FLOAT]
PositiveRate = Annotated[float, lambda x: 0 < x <= LARGEST_FLOAT]
Fraction = Annotated[float, lambda x: 0 <= x < 1]
Loss = Annotated[float, lambda x: x >= 0]  # infinite: none yet


def known_fields(cls, values):
    """Return the items of a dict that are fields of a dataclass: files of other versions may have more."""
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}


def from_json(cls, values, use_defaults=True):
    """Return an instance of a dataclass with the values of a JSON object.

    use_defaults: whether missing fields get their defaults. Raises ValueError, which names the field, for one that is
    missing otherwise, and for a value that its annotation excludes.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    values = known_fields(cls, values)
    for field in dataclasses.fields(cls):
        if field.name not in values and not (use_defaults and field.default is not dataclasses.MISSING):
            raise ValueError(f"no {field.name}")
        if field.name in values and not has_type(values[field.name], field.type):
            raise ValueError(f"{field.name} is {quote(values[field.name])}")
    return cls(**values)


def has_type(value, kind):
    """Return whether a value from JSON has the type of an annotation; a whole number is also a float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return has_type(value, arguments[0]) and arguments[1](value)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, part) for part in arguments)
    if origin is dict:
        return type(value) is dict and all(has_type(v, arguments[1]) for v in value.values())
    return type(value) in ((int, float) if kind is float else (kind,))
