"""The compiled counterparts of linear, layer_norm and gelu in gpt2.py, for float32 arrays.

A row of a result has the same bits whatever other rows are computed with it, and whatever the number of threads: every
sum is taken in the same order. Arrays whose last axis is not a multiple of LANES go to gpt2.py's functions.
"""

import functools
import math

import numpy as np
from numba import njit, prange

import gpt2
from engines.vectors import LANES, exp, fma, fma4, kernel, load, prefetch, splat, store, total, zero

MANY = 2**14  # elements from which a function of single rows or elements is worth a parallel region
ROWS = 256  # rows of x that a product takes at a time: they stay in the processor's cache
TILE, WIDTH = 4, 6  # rows of x and of the transposed w that are multiplied at a time: 24 sums fit into the registers


@njit
def multiply_tile(x, i, w, j, b, y, ahead, ahead_end):
    """Compute y[i : i+TILE, j : j+WIDTH] of product(), and prefetch the rows of w from ahead to ahead_end.

    Rows of x beyond the last one repeat it.
    """
    last = x.shape[0] - 1
    i0, i1, i2, i3 = i, min(i + 1, last), min(i + 2, last), min(i + 3, last)
    s0 = s1 = s2 = s3 = (zero(), zero(), zero(), zero(), zero(), zero())
    for k in range(0, w.shape[1], LANES):
        for row in range(ahead, ahead_end):
            prefetch(w, (row, k))
        three = load(w, (j, k)), load(w, (j + 1, k)), load(w, (j + 2, k))
        six = (*three, load(w, (j + 3, k)), load(w, (j + 4, k)), load(w, (j + 5, k)))
        s0 = fma6(load(x, (i0, k)), six, s0)
        s1 = fma6(load(x, (i1, k)), six, s1)
        s2 = fma6(load(x, (i2, k)), six, s2)
        s3 = fma6(load(x, (i3, k)), six, s3)
    write_sums(y, i0, j, b, s0)
    write_sums(y, i1, j, b, s1)
    write_sums(y, i2, j, b, s2)
    write_sums(y, i3, j, b, s3)


@njit
def fma6(x, w, sums):
    return (*fma4(x, w[:4], sums[:4]), fma(x, w[4], sums[4]), fma(x, w[5], sums[5]))


@njit
def write_sums(y, i, j, b, sums):
    y[i, j], y[i, j + 1], y[i, j + 2] = total(sums[0]) + b[j], total(sums[1]) + b[j + 1], total(sums[2]) + b[j + 2]
    j += 3
    y[i, j], y[i, j + 1], y[i, j + 2] = total(sums[3]) + b[j], total(sums[4]) + b[j + 1], total(sums[5]) + b[j + 2]


@kernel(parallel=True)
def product(x, w, b, y):  # [rows, n_in], [n_out, n_in], [n_out] -> y: [rows, n_out]
    """Write x @ w.T + b to y; n_out is at least WIDTH.

    Each tile of w is read from memory once, while the tiles of x go over it, and the next tile is prefetched.
    """
    n_out, groups = w.shape[0], -(-x.shape[0] // TILE)
    share = -(-WIDTH // groups)  # rows of the next tile of w that each tile of x prefetches
    for block in prange(-(-n_out // WIDTH)):
        j = min(WIDTH * block, n_out - WIDTH)
        for group in range(groups):
            first, stop = min(group * share, WIDTH), min((group + 1) * share, WIDTH)
            multiply_tile(x, TILE * group, w, j, b, y, j + WIDTH + first, j + WIDTH + stop)


@kernel(parallel=True)
def product_of_row(x, w, b, y):  # [1, n_in], [n_out, n_in], [n_out] -> y: [1, n_out]
    """product() for one row of x: reading one row of w at a time, a thread reads memory in one stream."""
    for j in prange(w.shape[0]):
        s = zero()
        for k in range(0, w.shape[1], LANES):
            s = fma(load(x, (0, k)), load(w, (j, k)), s)
        y[0, j] = total(s) + b[j]


@functools.cache
def no_bias(n_out):
    return read_only(np.zeros(n_out, np.float32))


def is_supported(x):
    """Return whether the kernels can compute with x."""
    return x.shape[-1] % LANES == 0 and x.dtype == np.float32


def read_only(a):
    """Return a view that cannot be written to: numba compiles one version for writable and one for other arrays."""
    view = a.view()
    view.flags.writeable = False
    return view


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """gpt2.linear for a w in Fortran order, such as wte.T; b may be 0."""
    n_in, n_out = w.shape
    if not is_supported(x) or n_out < WIDTH or not w.flags.f_contiguous:
        return gpt2.linear(x, w, b)
    x, lead = np.ascontiguousarray(x).reshape(-1, n_in), x.shape[:-1]
    y = np.empty((len(x), n_out), np.float32)
    run = product_of_row if len(x) == 1 else product
    for i in range(0, len(x), ROWS):
        run(x[i : i + ROWS], w.T, b if np.ndim(b) else no_bias(n_out), y[i : i + ROWS])
    return y.reshape(*lead, n_out)


@njit
def mean_and_scale(x, i, eps):
    """Return the mean of row i and 1 / sqrt(variance + eps), each as a vector."""
    n = x.shape[1]
    s = zero()
    for k in range(0, n, LANES):
        s = s + load(x, (i, k))
    mean = splat(total(s) / n)
    s = zero()
    for k in range(0, n, LANES):
        d = load(x, (i, k)) - mean
        s = fma(d, d, s)
    return mean, splat(1.0 / math.sqrt(total(s) / n + eps))


@njit
def normalize_row(x, i, g, b, eps, y):
    mean, scale = mean_and_scale(x, i, eps)
    for k in range(0, x.shape[1], LANES):
        store(y, (i, k), fma((load(x, (i, k)) - mean) * scale, load(g, k), load(b, k)))


@kernel()
def normalize(x, g, b, eps, y):  # [rows, n], [n], [n] -> y: [rows, n]
    """Write layer_norm(x, g, b) to y."""
    for i in range(x.shape[0]):
        normalize_row(x, i, g, b, eps, y)


@kernel(parallel=True)
def normalize_parallel(x, g, b, eps, y):  # [rows, n], [n], [n] -> y: [rows, n]
    """normalize() for many rows."""
    for i in prange(x.shape[0]):
        normalize_row(x, i, g, b, eps, y)


def layer_norm(x, g, b, eps=1e-5):  # [..., n], [n], [n] -> [..., n]
    """gpt2.layer_norm."""
    if not is_supported(x):
        return gpt2.layer_norm(x, g, b, eps)
    x, y = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
    run = normalize_parallel if x.size >= MANY else normalize
    run(x.reshape(-1, x.shape[-1]), g, b, eps, y.reshape(-1, x.shape[-1]))
    return y


@njit
def activate_part(x, start, stop, y):
    for k in range(start, stop, LANES):
        v = load(x, k)
        z = fma(splat(0.044715) * v * v, v, v) * splat(-2 * math.sqrt(2 / math.pi))
        store(y, k, v / (splat(1.0) + exp(z)))


@kernel()
def activate(x, y):  # [n] -> y: [n]
    """Write gelu(x) to y, as x / (1 + exp(-2 z)): 1 + tanh(z) is 2 / (1 + exp(-2 z))."""
    activate_part(x, 0, x.size, y)


@kernel(parallel=True)
def activate_parallel(x, y):  # [n] -> y: [n]
    """activate() for many elements."""
    part = 256 * LANES
    for i in prange(-(-x.size // part)):
        activate_part(x, i * part, min((i + 1) * part, x.size), y)


def gelu(x):  # [..., n] -> [..., n]
    """gpt2.gelu."""
    if not is_supported(x):
        return gpt2.gelu(x)
    x, y = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
    run = activate_parallel if x.size >= MANY else activate
    run(x.reshape(-1), y.reshape(-1))
    return y


@kernel(parallel=True)
def transpose(w, y):  # [n_in, n_out] -> y: [n_out, n_in]
    """Write w.T to y, in blocks of LANES x LANES elements: both are read and written in whole cache lines."""
    n_in, n_out = w.shape
    for block in prange(-(-n_out // LANES)):
        stop = min((block + 1) * LANES, n_out)
        for start in range(0, n_in, LANES):
            for j in range(block * LANES, stop):
                for k in range(start, min(start + LANES, n_in)):
                    y[j, k] = w[k, j]


def in_layout(params):
    """Return the parameters for these functions: the weights of the blocks in Fortran order, all arrays read-only."""
    layers = [layer for block in params["blocks"] for part in ("attn", "mlp") for layer in block[part].values()]
    arena = huge_pages(sum(layer["w"].size for layer in layers))
    end = 0

    def laid_out(value):
        if isinstance(value, dict):
            return {name: copied(a) if name == "w" else laid_out(a) for name, a in value.items()}
        return [laid_out(a) for a in value] if isinstance(value, list) else read_only(value)

    def copied(w):
        nonlocal end
        end += w.size
        return transposed(w, arena[end - w.size : end])

    return laid_out(params)


def huge_pages(n):
    """Return an array of n float32 elements, aligned to a huge page, for which Linux uses huge pages where it can."""
    page = 2**21
    arena = np.empty(4 * n + page, np.uint8)
    start = -arena.ctypes.data % page
    return arena[start : start + 4 * n].view(np.float32)


def transposed(w, arena=None):  # [n_in, n_out] -> [n_in, n_out]
    """Return a copy of w in Fortran order, in the array arena if there is one."""
    copy = (np.empty(w.size, np.float32) if arena is None else arena).reshape(w.shape[::-1])
    transpose(read_only(w), copy)
    return read_only(copy).T
