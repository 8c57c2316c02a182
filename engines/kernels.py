"""The compiled functions of the engine. Each computes a part of an operation in the thread that calls it (program.py).

A row of a result has the same bits whatever other rows are computed with it, and whichever thread computes it: every
sum is taken in the same order.
"""

import math

import numpy as np
from llvmlite import binding
from numba import carray, njit

from engines.vectors import (
    LANES,
    address_of,
    exp,
    fma,
    fma_tuples,
    fmas,
    kernel,
    largest,
    load,
    load4,
    loads,
    lower,
    maximum,
    splat,
    store,
    store4,
    stores,
    total,
    upper,
    zero,
    zero4,
    zeros,
)

PANEL = 4 * LANES  # columns of a weight that lie side by side
GROUP = 32  # rows of a panel that share a scale (int4)
# A tile of a product has up to 6 rows of x. It is as wide as a panel where its sums, 6 x 4 vectors, fit into the
# registers. Elsewhere, tiles of one vector are faster unless x has few rows.
HAS_AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
FEW_ROWS = 32
BLOCK = 4 * LANES  # keys that lie side by side
QUERIES = 4  # queries that are attended from at a time, with 4 vectors of each


@njit
def matrix(address, n_rows, n):
    """The float32 array [n_rows, n] at an address."""
    return carray(address_of(address), (n_rows, n), np.float32)


# Products. A weight [n_in, n_out] lies in panels of PANEL columns, [n_in, PANEL] each; see panels.py.


def product_of_tile(n_rows, width):
    """Return a function that computes n_rows rows of a product, and `width` vectors of each."""
    load_row, load_tile, store_tile, fma_tile = loads(width), loads(width, n_rows), stores(width, n_rows), fmas(n_rows)
    zero_tile = zeros(n_rows * width)

    @njit
    def tile(x, i, panel, scales, y):  # [rows, n], [n, columns], [columns] -> y: [rows, columns]
        sums = zero_tile()
        for k in range(panel.shape[0]):
            sums = fma_tile(x, (i, k), load_row(panel, (k, 0)), sums)
        store_tile(y, (i, 0), fma_tuples(load_row(scales, 0), sums, load_tile(y, (i, 0))))

    return tile


def product_of_columns(width):
    """Return a function that computes `width` vectors of each row: six rows at a time, then those that are left."""
    one, two, three, four, five, six = (product_of_tile(n_rows, width) for n_rows in range(1, 7))

    @njit
    def columns(x, panel, scales, y):  # [rows, n], [n, columns], [columns] -> y: [rows, columns]
        """Add (x @ panel) * scales to y."""
        n_left = x.shape[0] % 6
        last = x.shape[0] - n_left
        for i in range(0, last, 6):
            six(x, i, panel, scales, y)
        if n_left == 1:
            one(x, last, panel, scales, y)
        elif n_left == 2:
            two(x, last, panel, scales, y)
        elif n_left == 3:
            three(x, last, panel, scales, y)
        elif n_left == 4:
            four(x, last, panel, scales, y)
        elif n_left == 5:
            five(x, last, panel, scales, y)

    return columns


fma_row = fmas(1)
wide_columns, narrow_columns = product_of_columns(PANEL // LANES), product_of_columns(1)


@njit
def product(x, panel, scales, y):  # [rows, n], [n, PANEL], [PANEL] -> y: [rows, PANEL]
    """Add (x @ panel) * scales to y."""
    if HAS_AVX512 or x.shape[0] <= FEW_ROWS:
        wide_columns(x, panel, scales, y)
    else:
        for j in range(0, PANEL, LANES):
            narrow_columns(x, panel[:, j:], scales[j:], y[:, j:])


@njit
def row_int8(panel, k):  # [n_in, PANEL] int8 -> 4 vectors
    return load4(panel, (k, 0))


@njit
def row_int4(panel, k):  # [n_in, PANEL/2] uint8 -> 4 vectors
    return lower(panel, (k, 0)), lower(panel, (k, LANES)), upper(panel, (k, 0)), upper(panel, (k, LANES))


def product_of_codes(row_of, n):
    """Return functions for one row of x and for several. row_of(panel, k) has the codes of row k of a panel as floats.

    n codes of a column at a time, which share a scale: their products are summed, and the sum is multiplied by it.
    """

    @njit
    def of_row(x, panels, scales, y):  # [n_in], two panels, their scales -> y: [2*PANEL]
        """Add the products of a single row to y. With one panel each sum would wait for the previous one."""
        y0, y1 = load4(y, 0), load4(y, PANEL)
        for start in range(0, x.size, n):
            s0 = s1 = zero4()
            for k in range(start, min(start + n, x.size)):
                s0 = fma_row(x, k, row_of(panels[0], k), s0)
                s1 = fma_row(x, k, row_of(panels[1], k), s1)
            group = start * len(scales[0]) // x.size
            y0 = fma_tuples(load4(scales[0], (group, 0)), s0, y0)
            y1 = fma_tuples(load4(scales[1], (group, 0)), s1, y1)
        store4(y, 0, y0)
        store4(y, PANEL, y1)

    @njit
    def of_rows(x, panel, scales, y):  # [rows, n_in], a panel, its scales -> y: [rows, PANEL]
        """Add the products of several rows to y."""
        n_in = x.shape[1]
        floats = np.empty((n, PANEL), np.float32)  # small enough for the first-level cache
        for start in range(0, n_in, n):
            stop = min(start + n, n_in)
            for k in range(start, stop):
                store4(floats, (k - start, 0), row_of(panel, k))
            product(x[:, start:stop], floats[: stop - start], scales[start * len(scales) // n_in], y)

    return of_row, of_rows


int8_product_of_row, int8_product = product_of_codes(row_int8, 64)
int4_product_of_row, int4_product = product_of_codes(row_int4, GROUP)


# Functions of single rows and elements


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


@kernel()
def normalize(x, g, b, eps, y):  # [rows, n], [n], [n] -> y: [rows, n]
    """Write layer_norm(x, g, b) to y."""
    for i in range(x.shape[0]):
        mean, scale = mean_and_scale(x, i, eps)
        for k in range(0, x.shape[1], LANES):
            store(y, (i, k), fma((load(x, (i, k)) - mean) * scale, load(g, k), load(b, k)))


@kernel()
def activate(x, y):  # [n] -> y: [n]
    """Write gelu(x) to y, as x / (1 + exp(-2 z)): 1 + tanh(z) is 2 / (1 + exp(-2 z))."""
    for k in range(0, x.size, LANES):
        v = load(x, k)
        z = fma(splat(0.044715) * v * v, v, v) * splat(-2 * math.sqrt(2 / math.pi))
        store(y, k, v / (splat(1.0) + exp(z)))


@njit
def add(x, y, z):  # [n], [n] -> z: [n]
    """Write x + y to z."""
    for k in range(0, x.size, LANES):
        store(z, k, load(x, k) + load(y, k))


# Attention


@njit
def multiply_rows(x, w, y):  # [n_rows, n], [n, >= n_columns] -> y: [n_rows, n_columns]
    """Write x @ w to y, for 1 to QUERIES rows and a multiple of LANES columns; those of w beyond y's are not read."""
    last_row, last = x.shape[0] - 1, y.shape[1] - LANES
    r1, r2, r3 = min(1, last_row), min(2, last_row), min(3, last_row)  # beyond the last row, it is repeated
    for j0 in range(0, last + 1, 4 * LANES):
        j1, j2, j3 = min(j0 + LANES, last), min(j0 + 2 * LANES, last), min(j0 + 3 * LANES, last)
        s0 = s1 = s2 = s3 = zero4()
        for k in range(x.shape[1]):
            four = load(w, (k, j0)), load(w, (k, j1)), load(w, (k, j2)), load(w, (k, j3))
            s0 = fma_row(x, (0, k), four, s0)
            if last_row > 0:
                s1 = fma_row(x, (r1, k), four, s1)
                s2 = fma_row(x, (r2, k), four, s2)
                s3 = fma_row(x, (r3, k), four, s3)
        columns = j0, j1, j2, j3
        store_columns(y, 0, columns, s0)
        if last_row > 0:
            store_columns(y, r1, columns, s1)
            store_columns(y, r2, columns, s2)
            store_columns(y, r3, columns, s3)


@njit
def store_columns(y, i, columns, sums):
    store(y, (i, columns[0]), sums[0])
    store(y, (i, columns[1]), sums[1])
    store(y, (i, columns[2]), sums[2])
    store(y, (i, columns[3]), sums[3])


@njit
def softmax(scores, n_keys, scale):  # [n] -> scores: [n]
    """Replace the scores of the first n_keys keys by softmax(scale * scores), those of the others by 0."""
    scores[n_keys:] = -math.inf
    highest, sums = splat(-math.inf), zero()
    for j in range(0, scores.size, LANES):
        highest = maximum(load(scores, j), highest)  # which a NaN never becomes; its exponential is NaN
    highest = splat(largest(highest))
    for j in range(0, scores.size, LANES):
        exp_x = exp((load(scores, j) - highest) * splat(scale))
        store(scores, j, exp_x)
        sums = sums + exp_x
    factor = splat(1.0 / total(sums))
    for j in range(0, scores.size, LANES):
        store(scores, j, load(scores, j) * factor)


@njit
def attend_tile(q, keys, values, n_keys, scores, out):  # [n_q, d] -> out: [n_q, d]
    """Attend from up to QUERIES queries, the last of which sees n_keys keys; scores: [QUERIES, >= n_keys], scratch."""
    n_q, d = q.shape
    scores = scores[:n_q, : -(-n_keys // LANES) * LANES]
    for block in range(-(-n_keys // BLOCK)):
        multiply_rows(q, keys[block], scores[:, block * BLOCK : (block + 1) * BLOCK])
    for i in range(n_q):
        softmax(scores[i], n_keys - n_q + i + 1, 1 / math.sqrt(d))
    multiply_rows(scores[:, :n_keys], values, out)


@njit
def attend_head(q, k, v, n_past, keys, values, out):  # [n_q, d], [n_new, d], [n_new, d] -> out: [n_q, d]
    """Append k and v to the keys [n_blocks, d, BLOCK] and the values [n_blocks*BLOCK, d] of a head, then attend."""
    (n_q, d), n_new = q.shape, k.shape[0]
    for p in range(n_new):
        block, lane = divmod(n_past + p, BLOCK)
        for j in range(d):
            keys[block, j, lane] = k[p, j]
            values[n_past + p, j] = v[p, j]
    first = n_past + n_new - n_q  # position of the first query
    scores = np.empty((QUERIES, len(values)), np.float32)
    for p in range(0, n_q, QUERIES):
        stop = min(p + QUERIES, n_q)
        attend_tile(q[p:stop], keys, values, first + stop, scores, out[p:stop])
