"""A second instance of gpt2.py, from its own source: functions of it can be replaced while the first stays as it is."""

import importlib.util


def new_instance():
    """The module gpt2 once more, executed anew."""
    spec = importlib.util.find_spec("gpt2")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    return model


def recording(function, results):
    """The function, which also appends each of its results to a list."""

    def recorded(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return recorded
