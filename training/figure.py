"""A figure of matplotlib's into a file, in the format that its ending names, and the mistakes there are."""

import os

from weights.errors import UserError
from weights.files import atomic_write, check_writable

REMEDY = "choose another place for the picture"


def check_picture(path, remedy=REMEDY):
    """Raises UserError where save_figure would fail, before there is work to lose."""
    try:
        import matplotlib.figure  # noqa: F401 (whether it can be)
    except ImportError as error:
        raise UserError(f"drawing {path} takes matplotlib ({error}); pip install matplotlib") from None
    if ending(path) not in ("png", "svg", "pdf"):
        raise UserError(f"{path!r} has no ending that names a picture; choose a name with .png, .svg or .pdf")
    check_writable(path, remedy)


def new_figure(width, height):
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, remedy=REMEDY):
    with atomic_write(path, remedy) as f:
        figure.savefig(f, format=ending(path), dpi=120)


def ending(path):
    return os.path.splitext(path)[1][1:].lower()
