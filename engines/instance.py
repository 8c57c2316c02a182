"""Further instances of the module gpt2, whose functions can be replaced without changing gpt2 itself."""

import functools
import importlib.util


def new_instance():
    """Return a new instance of the module gpt2, made from the same source."""
    spec = importlib.util.find_spec("gpt2")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    return model


def recording(function, results):
    """Return a function that calls `function` and appends each of its results to the list `results`."""

    @functools.wraps(function)  # keeps the attributes of a sampler
    def recorded(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return recorded
