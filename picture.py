"""A figure of matplotlib's into a file, in the format that its ending names, and the mistakes there are."""

import os

from errors import UserError
from files import replacing


def check_picture(path):
    """Raises UserError where save_figure would fail, before there is work to lose."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError(f"drawing {path} takes matplotlib ({error}); pip install matplotlib") from None
    if ending(path) not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"{path!r} has no ending that names a picture; choose a name with .png, .svg or .pdf")
    if os.path.isdir(path):
        raise UserError(f"cannot write {path} (it is a folder); choose another name for the picture")
    with writing(path + ".try"):
        pass
    os.remove(path + ".try")


def new_figure(width, height):
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    with writing(path) as f:
        figure.savefig(f, format=ending(path), dpi=120)


def writing(path):
    return replacing(path, "make room, or choose another place for the picture")


def ending(path):
    return os.path.splitext(path)[1][1:].lower()
