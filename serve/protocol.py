"""OpenAI's protocol for completions: errors, the fields of a request, their checks."""

import json
import types

from gpt2 import check_context
from weights.errors import UserError, quote

MAX_CHOICES, MAX_STOPS, MAX_STOP_LENGTH = 128, 4, 200  # prompts times n; stop strings, characters


class ApiError(Exception):
    """An error that the client receives in OpenAI's shape."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def number(low, high, types=(int, float)):
    """Return a check for numbers from low to high, which NaN and booleans fail, and its description."""
    kind = "an integer" if types == (int,) else "a number"
    return lambda x: type(x) in types and low <= x <= high, f"{kind} from {low} to {high}"


def as_list(value):
    """Return a list of prompts or of stop strings; one alone becomes a list of one."""
    return value if isinstance(value, list) and not is_ids(value) else [value]


def is_ids(value):
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)


def is_prompt(value):
    return value != [] and all(isinstance(prompt, str) or is_ids(prompt) for prompt in as_list(value))


def is_stop(value):
    stops = as_list(value)
    return len(stops) <= MAX_STOPS and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops)


STRING, BOOLEAN = (lambda x: isinstance(x, str), "a string"), (lambda x: isinstance(x, bool), "true or false")
USAGE = "an object with include_usage, true or false"
FIELDS = {  # the default of each field, whether a value is valid, and the description of valid values
    "model": (None, *STRING),
    "prompt": ("", is_prompt, "a string, an array of strings, an array of token ids, or an array of those"),
    "max_tokens": (16, *number(0, 2**31, (int,))),
    "temperature": (1, *number(0, 2)),
    "top_p": (1, *number(0, 1)),
    "top_k": (0, *number(0, 2**31, (int,))),
    "n": (1, *number(1, MAX_CHOICES, (int,))),
    "seed": (None, *number(-(2**63), 2**63 - 1, (int,))),
    "stop": ([], is_stop, f"up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"),
    "logprobs": (None, *number(0, 20, (int,))),
    "echo": (False, *BOOLEAN),
    "stream": (False, *BOOLEAN),
    "stream_options": ({}, lambda x: x in ({}, {"include_usage": True}, {"include_usage": False}), USAGE),
    "user": ("", *STRING),  # has no effect
}


def parse_request(body, encoder, limits):
    """Return the fields of a request as attributes, and prompts, a list of lists of ids. Raises ApiError.

    limits: the model's hparams, and n_bytes of its longest token. Null is the default of a field. A field that is not
    in FIELDS may be null, 0, false or empty: it then asks for nothing.
    """
    try:
        given = {name: value for name, value in json.loads(body).items() if value is not None}
    except (ValueError, RecursionError, AttributeError):
        raise ApiError(400, "the body is not a JSON object") from None
    if unsupported := [name for name, value in given.items() if name not in FIELDS and value]:
        names = ", ".join(map(quote, unsupported[:10]))
        raise ApiError(400, f"this server does not support {names}; leave it out", unsupported[0][:60])
    for name in given.keys() & FIELDS.keys():
        _, is_valid, description = FIELDS[name]
        if not is_valid(given[name]):
            raise ApiError(400, f"{name} is {quote(given[name])}; it must be {description}", name)
    request = types.SimpleNamespace(**{name: default for name, (default, *_) in FIELDS.items()} | given)
    request.stop, prompts = as_list(request.stop), as_list(request.prompt)
    if len(prompts) * request.n > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts times n = {request.n} are more than {MAX_CHOICES}", "n")
    request.prompts = [prompt_ids(prompt, request.max_tokens, encoder, limits) for prompt in prompts]
    return request


def prompt_ids(prompt, n_new, encoder, limits):
    """Return the token ids of a prompt, which n_new will follow. Raises ApiError if it is invalid or too long."""
    try:
        if isinstance(prompt, str):
            check_context(len(prompt) // limits["n_bytes"], 0, limits["n_ctx"])  # a much longer one takes seconds
            prompt = encoder.encode(prompt) or encoder.start_ids()
        check_context(len(prompt), n_new, limits["n_ctx"])
    except UserError as error:
        raise ApiError(400, str(error), "prompt") from None
    except ValueError as error:
        raise ApiError(400, str(error), "max_tokens", "context_length_exceeded") from None
    if wrong := [i for i in prompt if not 0 <= i < limits["n_vocab"]]:
        raise ApiError(400, f"{quote(wrong[0])} is not a token id, 0 to {limits['n_vocab'] - 1}", "prompt")
    return prompt
