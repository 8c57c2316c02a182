"""Save matplotlib figures as PNG, SVG or PDF, and check beforehand that this will work."""

import io
import os

from weights.errors import UserError
from weights.files import atomic_write, check_writable

REMEDY = "choose another path for the figure"


def check_figure_path(path):
    """Raise UserError if save_figure would fail for this path."""
    try:
        import matplotlib.figure  # noqa: F401 (imported to see whether it is installed)
    except ImportError as error:
        raise UserError(f"drawing {path} needs matplotlib ({error}); pip install matplotlib") from None
    if extension(path) not in ("png", "svg", "pdf"):
        raise UserError(f"{path!r} does not end in .png, .svg or .pdf; choose a name that does")
    check_writable(path, REMEDY)


def new_figure(width, height):
    """Return an empty matplotlib figure. width, height: inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, remedy=REMEDY):
    """Write the figure in the format of the path's extension. Raises UserError if the path cannot be written."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=extension(path), dpi=120)
    with atomic_write(path, remedy) as f:
        f.write(drawn.getbuffer())


def extension(path):
    return os.path.splitext(path)[1][1:].lower()
