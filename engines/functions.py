"""The compiled counterparts of functions in gpt2.py, for float32 arrays.

Sizes that the kernels cannot compute with go to gpt2.py's functions: those that are no multiples of LANES.
"""

import functools

import numpy as np

import gpt2
from engines.panels import Panels
from engines.program import (
    ACTIVATE,
    ELEMENTS,
    EPS,
    FLOAT32_PRODUCT,
    INT4_PRODUCT,
    INT8_PRODUCT,
    NORMALIZE,
    ROWS,
    address,
    as_input,
    contiguous,
    empty,
    execute,
    parameter,
    vector_of,
)
from engines.vectors import LANES

PRODUCTS = {np.float32: FLOAT32_PRODUCT, np.int8: INT8_PRODUCT, np.uint8: INT4_PRODUCT}


def is_supported(x):
    return x.shape[-1] % LANES == 0 and x.dtype == np.float32


def embed(inputs, wte, wpe, n_past=0):  # [..., n_seq] -> [..., n_seq, n_embd]
    """gpt2.embed."""
    return as_input(gpt2.embed(inputs, wte, wpe, n_past))


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """gpt2.linear for a weight in panels; b may be 0."""
    if not isinstance(w, Panels):
        return gpt2.linear(x, w, b)
    x, (n_in, n_out) = contiguous(x), w.shape
    if x.shape[-1] != n_in:
        raise ValueError(f"x has rows of {x.shape[-1]} elements, and w takes {n_in}")
    y, n_rows = empty((*x.shape[:-1], n_out)), x.size // n_in
    b = vector_of(b if np.ndim(b) else no_bias(n_out), n_out)
    kind, n_parts = PRODUCTS[w.codes.dtype.type], len(w.codes)
    if n_rows == 1 and kind != FLOAT32_PRODUCT:
        n_parts = -(-n_parts // 2)  # two panels each
    arrays = x, parameter(w.codes), parameter(w.scales), b, y
    execute(kind, n_parts, *map(address, arrays), n_rows, n_in, n_out)
    return y


@functools.cache
def no_bias(n_out):
    return np.zeros(n_out, np.float32)


def layer_norm(x, g, b, eps=EPS):  # [..., n], [n], [n] -> [..., n]
    """gpt2.layer_norm."""
    if not is_supported(x) or eps != EPS:
        return gpt2.layer_norm(x, g, b, eps)
    x, y, n = contiguous(x), empty(x.shape), x.shape[-1]
    g, b, n_rows = vector_of(g, n), vector_of(b, n), x.size // n
    fields = {"w": address(g), "b": address(b), "y": address(y), "n_rows": n_rows, "n_in": n}
    execute(NORMALIZE, -(-n_rows // ROWS), address(x), **fields)
    return y


def gelu(x):  # [..., n] -> [..., n]
    """gpt2.gelu."""
    if not is_supported(x):
        return gpt2.gelu(x)
    x, y = contiguous(x), empty(x.shape)
    execute(ACTIVATE, -(-x.size // ELEMENTS), address(x), y=address(y), n_in=x.size)
    return y
