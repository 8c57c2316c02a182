"""The picture of gpt2.py --explain out.png: every head's attention map, a row of them a layer."""

import io

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

DPI = 100
ACROSS = 2400  # pixels that the maps of a layer may take together
TICKS = (0, 0.01, 0.1, 0.25, 0.5, 1)  # of the scale: a colour stands for the square root of a share


def as_picture(tokens, attention):
    """A PNG as bytes. tokens: [n_seq] texts; attention: [n_layer, n_head, n_seq, n_seq]."""
    buffer = io.BytesIO()
    draw(tokens, attention).savefig(buffer, format="png")
    return buffer.getvalue()


def draw(tokens, attention):
    """The same as a Figure. Each share is a square of whole pixels; tokens are named where there is room for it."""
    n_layer, n_head, n_seq, _ = attention.shape
    side = min(max(ACROSS // (n_head * n_seq), 1), 16)  # pixels
    gap = max(10 // side, 64 // side - n_seq, 1)  # shares that would fit between two maps
    shares, labels = tiled(attention, gap), drawable(tokens) if side >= 8 else []
    height, width = (side * n for n in shares.shape)
    room = 12 + side * max(map(len, labels), default=0) // 2  # pixels for the labels
    left, down = room + 26, 60 + max(height, 200) + room  # 60 for the title and the names of the heads
    across = left + max(width + 90, 640)  # for the scale, and at least for the title
    figure = Figure((across / DPI, down / DPI), dpi=DPI)

    def add_axes(x, y, width, height, **options):  # pixels from the top left
        return figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down), **options)

    axes = add_axes(left, 60, width, height, frame_on=False)
    image = axes.imshow(shares, "YlGnBu", PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    scale = add_axes(left + width + 20, 60, 16, 200)
    figure.colorbar(image, cax=scale, ticks=TICKS, format="{x:.0%}")
    title = "Attention: how much each token (row) takes of itself and of those before it (columns)"
    figure.text(left / across, 1 - 20 / down, title, va="center")
    name_maps(axes, n_layer, n_head, n_seq, gap, room)
    name_tokens(axes, labels, n_layer, n_head, n_seq + gap, side)
    return figure


def tiled(attention, gap):  # [n_layer, n_head, n_seq, n_seq] -> [n_layer*(n_seq+gap)-gap, n_head*(n_seq+gap)-gap]
    """The maps side by side; nan between them, and where no position looks, ahead."""
    n_layer, n_head, n_seq, _ = attention.shape
    pitch = n_seq + gap
    tiles = np.full((n_layer, pitch, n_head, pitch), np.nan, dtype=np.float32)
    tiles[:, :n_seq, :, :n_seq] = np.swapaxes(np.where(np.tri(n_seq, dtype=bool), attention, np.nan), 1, 2)
    return tiles.reshape(n_layer * pitch, n_head * pitch)[:-gap, :-gap]


def name_maps(axes, n_layer, n_head, n_seq, gap, room):
    middle, pitch = (n_seq - 1) / 2, n_seq + gap
    for i in range(n_head):
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 6), "textcoords": "offset pixels"}
        axes.annotate(f"head {i + 1}", (i * pitch + middle, 1), **place, ha="center", va="bottom")
    for i in range(n_layer):
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-room, 0), "textcoords": "offset pixels"}
        axes.annotate(f"layer {i + 1}", (0, i * pitch + middle), **place, ha="right", va="center", rotation=90)


def name_tokens(axes, labels, n_layer, n_head, pitch, side):
    """Beside the first map of each layer, and below the last one of each head."""
    style = {"fontsize": 0.6 * side, "fontfamily": "DejaVu Sans Mono", "parse_math": False}
    axes.set_yticks([i * pitch + j for i in range(n_layer) for j in range(len(labels))], labels * n_layer, **style)
    axes.set_xticks(
        [i * pitch + j for i in range(n_head) for j in range(len(labels))], labels * n_head, rotation=90, **style
    )
    axes.tick_params(length=0, pad=3)


def drawable(tokens):
    """The tokens, in ASCII where the font lacks a character."""
    font = get_font(findfont("DejaVu Sans Mono"))
    return [t if all(font.get_char_index(ord(c)) for c in t) else ascii(t)[1:-1] for t in tokens]
