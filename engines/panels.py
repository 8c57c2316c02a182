"""Weights in the layout of the kernels: float32, or codes of 8 or 4 bits, which take less time to read.

A weight [n_in, n_out] lies in panels of PANEL columns; zeros fill up the last one. A kernel reads a panel in order,
once per tile of rows.

The codes are lossy. A weight is its code times a scale: for int8 each column has a scale, for int4 each GROUP elements
of a column. The products are of float32.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from engines.kernels import GROUP, PANEL
from engines.vectors import LANES, kernel


class Panels(NamedTuple):
    """A weight [n_in, n_out] for functions.linear().

    codes: [n_panels, n_in, PANEL], float32 or int8 from -127 to 127; or [n_panels, n_in, PANEL/2] uint8 of two codes
    from 0 to 15, which stand for -8 to 7: the lower half of byte j is that of column j, the upper half that of column
    j + PANEL/2.
    scales: [n_panels, 1, PANEL] for int8, [n_panels, n_in/GROUP, PANEL] for int4, [PANEL] ones for float32.
    """

    codes: np.ndarray
    scales: np.ndarray
    n_out: int

    @property
    def shape(self):
        return self.codes.shape[1], self.n_out


class Embedding(NamedTuple):
    """Stands for wte: indexing looks tokens up, and T has the panels of the output layer."""

    wte: np.ndarray  # [n_vocab, n_embd]
    T: Panels

    @property
    def shape(self):
        return self.wte.shape

    def __getitem__(self, ids):
        return self.wte[ids]


# Layout


@kernel(parallel=True)
def pack(w, panels):  # [n_in, n_out] -> panels: [n_panels, n_in, PANEL]
    """Write a weight in C order in panels."""
    n_in, n_out = w.shape
    for p in prange(len(panels)):
        first, n = p * PANEL, min(PANEL, n_out - p * PANEL)
        for k in range(n_in):
            for j in range(n):
                panels[p, k, j] = w[k, first + j]
            for j in range(n, PANEL):
                panels[p, k, j] = 0


@kernel(parallel=True)
def pack_transpose(w, panels):  # [n_out, n_in] -> panels: [n_panels, n_in, PANEL]
    """Write the transpose of w in panels, in blocks of LANES x PANEL: both are read and written in cache lines."""
    n_out, n_in = w.shape
    for p in prange(len(panels)):
        first, n = p * PANEL, min(PANEL, n_out - p * PANEL)
        for start in range(0, n_in, LANES):
            for k in range(start, min(start + LANES, n_in)):
                for j in range(n):
                    panels[p, k, j] = w[first + j, k]
                for j in range(n, PANEL):
                    panels[p, k, j] = 0


ONES = np.ones(PANEL, np.float32)


def packed(w, memory=None):  # [n_in, n_out]
    """Return a float32 weight in panels, in memory of that size if it is given."""
    n_in, n_out = w.shape
    shape = -(-n_out // PANEL), n_in, PANEL
    panels = np.empty(shape, np.float32) if memory is None else memory.reshape(shape)
    if w.flags.c_contiguous:
        pack(read_only(w), panels)
    else:
        pack_transpose(read_only(np.ascontiguousarray(w.T)), panels)
    return Panels(panels, ONES, n_out)


def read_only(a):
    """Return a view that cannot be written to: numba compiles one version for writable and one for other arrays."""
    view = a.view()
    view.flags.writeable = False
    return view


# Quantization


@kernel(parallel=True)
def quantize_int8(w, codes, scales):  # [m, n_in, PANEL] -> codes: [m, n_in, PANEL], scales: [m, 1, PANEL]
    """Write the codes and scales of w. The largest element of a column becomes 127 or -127."""
    for p in prange(len(w)):
        absmax, inverse = np.zeros(PANEL, np.float32), np.empty(PANEL, np.float32)
        for k in range(w.shape[1]):
            for j in range(PANEL):
                absmax[j] = larger(abs(w[p, k, j]), absmax[j])
        for j in range(PANEL):
            scales[p, 0, j], inverse[j] = absmax[j] / np.float32(127), reciprocal(absmax[j] / np.float32(127))
        for k in range(w.shape[1]):
            for j in range(PANEL):
                codes[p, k, j] = np.int8(np.rint(w[p, k, j] * inverse[j]))


@kernel(parallel=True)
def quantize_int4(w, codes, scales):  # [m, n, PANEL] -> codes: [m, n, PANEL/2], scales: [m, n/GROUP, PANEL]
    """Write the codes and scales of w. The largest element of a group, of either sign, becomes -8."""
    half = PANEL // 2
    for p in prange(len(w)):
        for g in range(scales.shape[1]):
            highest, lowest = np.zeros(PANEL, np.float32), np.zeros(PANEL, np.float32)
            inverse = np.empty(PANEL, np.float32)
            for k in range(g * GROUP, (g + 1) * GROUP):
                for j in range(PANEL):
                    highest[j], lowest[j] = larger(w[p, k, j], highest[j]), larger(-w[p, k, j], lowest[j])
            for j in range(PANEL):
                scale = (highest[j] if highest[j] > lowest[j] else -lowest[j]) / np.float32(-8)
                scales[p, g, j], inverse[j] = scale, reciprocal(scale)
            for k in range(g * GROUP, (g + 1) * GROUP):
                for j in range(half):
                    lower = code_of_4_bits(w[p, k, j] * inverse[j])
                    upper = code_of_4_bits(w[p, k, j + half] * inverse[j + half])
                    codes[p, k, j] = np.uint8(lower + 16 * upper)


@njit
def larger(a, b):
    """Return the larger one, or NaN if a is NaN or infinite, or if b is NaN."""
    a = a + a * np.float32(0)
    return a if a > b or a != a else b  # noqa: PLR0124 (NaN differs from itself)


@njit
def reciprocal(scale):
    return np.float32(1) / scale if scale != 0 else np.float32(0)


@njit
def code_of_4_bits(v):
    return np.int32(min(np.rint(v) + np.float32(8), np.float32(15)))


def quantized(w, dtype):
    """Return float32 Panels as panels of codes; unchanged for int4 if n_in is no multiple of GROUP."""
    n_panels, n_in, _ = w.codes.shape
    if dtype == "int8":
        found = np.empty(w.codes.shape, np.int8), np.empty((n_panels, 1, PANEL), np.float32)
        quantize_int8(w.codes, *found)
    elif n_in % GROUP == 0:
        found = np.empty((n_panels, n_in, PANEL // 2), np.uint8), np.empty((n_panels, n_in // GROUP, PANEL), np.float32)
        quantize_int4(w.codes, *found)
    else:
        return w
    return Panels(*found, w.n_out)


# Parameters


def in_panels(params):
    """Return the parameters for compiled functions: weights as Panels, in one array, and wte as Embedding."""
    sizes = [PANEL * -(-w.shape[1] // PANEL) * w.shape[0] for w in weights_of(params)]
    parts = iter(np.split(huge_pages(sum(sizes)), np.cumsum(sizes)[:-1]))
    return with_weights(params, lambda w: packed(w, next(parts)))


def quantize(params, dtype):
    """Return parameters with the weights quantized to "int8" or "int4".

    params: as they are in the file, or as in_panels() returns them.
    """
    return with_weights(params, lambda w: quantized(w if isinstance(w, Panels) else packed(w), dtype))


def with_weights(params, function):
    """Return the parameters with function(w) in place of each weight w and of wte.T; other arrays stay as they are."""

    def converted(value):
        if isinstance(value, dict):
            return {name: function(a) if name == "w" else converted(a) for name, a in value.items()}
        return [converted(a) for a in value] if isinstance(value, list) else value

    wte = params["wte"]
    return converted(params) | {"wte": Embedding(wte.wte if isinstance(wte, Embedding) else wte, function(wte.T))}


def weights_of(params):
    """Return all weights, wte.T included."""
    found = []
    with_weights(params, found.append)
    return found


def huge_pages(n):
    """Return an array of n float32 elements, aligned to a huge page, for which Linux uses huge pages where it can."""
    page = 2**21
    arena = np.empty(4 * n + page, np.uint8)
    start = -arena.ctypes.data % page
    return arena[start : start + 4 * n].view(np.float32)
