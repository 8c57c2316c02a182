"""Causal attention, compiled with numba, and the key/value cache in the layout that it reads.

A query's scores, weights and result are computed in the same order whatever other queries are beside it, and whatever
the number of threads. Its result has the same bits alone, in a prompt and in a batch.
"""

import math

import numpy as np
from numba import carray, int64, njit, prange, types
from numba.extending import intrinsic

import gpt2
from engines import batching
from engines.vectors import LANES, exp, fma4, kernel, largest, load, maximum, splat, store, total, zero

TILE = 4  # queries that are computed at a time, with 4 vectors of each: 16 sums fit into the registers
BLOCK = 4 * LANES  # keys that are stored side by side


@njit
def multiply(x, w, y):  # [n_rows, n], [n, >= n_columns] -> y: [n_rows, n_columns]
    """Write x @ w to y, for 1 to TILE rows and a multiple of LANES columns; those of w beyond y's are not read."""
    last_row, last = x.shape[0] - 1, y.shape[1] - LANES
    r1, r2, r3 = min(1, last_row), min(2, last_row), min(3, last_row)  # beyond the last row, it is repeated
    for j0 in range(0, last + 1, BLOCK):
        j1, j2, j3 = min(j0 + LANES, last), min(j0 + 2 * LANES, last), min(j0 + 3 * LANES, last)
        s0 = s1 = s2 = s3 = (zero(), zero(), zero(), zero())
        for k in range(x.shape[1]):
            four = load(w, (k, j0)), load(w, (k, j1)), load(w, (k, j2)), load(w, (k, j3))
            s0 = fma4(splat(x[0, k]), four, s0)
            if last_row > 0:
                s1 = fma4(splat(x[r1, k]), four, s1)
                s2 = fma4(splat(x[r2, k]), four, s2)
                s3 = fma4(splat(x[r3, k]), four, s3)
        columns = j0, j1, j2, j3
        if last_row > 0:
            store4(y, r3, columns, s3)
            store4(y, r2, columns, s2)
            store4(y, r1, columns, s1)
        store4(y, 0, columns, s0)


@njit
def store4(y, i, columns, sums):
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
    """Attend from up to TILE queries, the last of which sees n_keys keys; scores is [TILE, >= n_keys] of scratch."""
    n_q, d = q.shape
    scores = scores[:n_q, : -(-n_keys // LANES) * LANES]
    for block in range(-(-n_keys // BLOCK)):
        multiply(q, keys[block], scores[:, block * BLOCK : (block + 1) * BLOCK])
    for i in range(n_q):
        softmax(scores[i], n_keys - n_q + i + 1, 1 / math.sqrt(d))
    multiply(scores[:, :n_keys], values, out)


@intrinsic
def pointer(typing_context, address):
    """pointer(address): an integer as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


STRIDED = types.Array(types.float32, 4, "A", readonly=True)  # takes arrays that can be written to as well
SIGNATURE = types.void(STRIDED, STRIDED, STRIDED, types.int64[:, ::1], types.float32[:, :, :, ::1])


@kernel(SIGNATURE, parallel=True)
def attend(q, k, v, rows, out):  # [b, h, n_q, d], [b, h, n_new, d], [b, h, n_new, d], [b, 3] -> out: [b, n_q, h, d]
    """Append k and v to the caches of b rows, then attend from the last n_q positions to all positions.

    rows: the address of each row's keys and values (see KVCache), n_past and n_blocks.
    """
    batch, n_head, n_q, d = q.shape
    n_new = k.shape[2]
    for i in prange(batch * n_head):
        row, head = int64(i) % batch, int64(i) // batch  # a thread has the same heads of every row
        address, n_past, n_blocks = rows[row]
        n_max = n_blocks * BLOCK
        kv = carray(pointer(address), (n_head, 2, n_max * d), np.float32)[head]
        keys, values = kv[0].reshape(n_blocks, d, BLOCK), kv[1].reshape(n_max, d)
        for p in range(n_new):
            block, lane = divmod(n_past + p, BLOCK)
            for j in range(d):
                keys[block, j, lane] = k[row, head, p, j]
                values[n_past + p, j] = v[row, head, p, j]
        first = n_past + n_new - n_q  # position of the first query
        scores = np.empty((TILE, n_max), np.float32)
        for p in range(0, n_q, TILE):
            stop = min(p + TILE, n_q)
            attend_tile(q[row, head, p:stop], keys, values, first + stop, scores, out[row, p:stop, head])


def is_supported(q):
    """Return whether the kernel can compute with such queries."""
    return q.ndim > 2 and q.shape[-1] % LANES == 0 and q.dtype == np.float32


def attend_rows(caches, q, k, v):  # [b, h, n_q, d], [b, h, n_new, d], [b, h, n_new, d] -> [b, h, n_q, d]
    """Append k and v to the caches, each of which has an equal number of the rows, and attend within each row."""
    batch, n_head, n_q, d = q.shape
    if k.shape != v.shape or k.shape != (batch, n_head, k.shape[2], d) or n_q > k.shape[2]:
        raise ValueError(f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}")
    n_rows = batch // len(caches)
    rows = [row for cache in caches for row in cache.rows(n_rows, *k.shape[1:])]
    out = np.empty((batch, n_q, n_head, d), np.float32)
    attend(q, k, v, np.array(rows, np.int64).reshape(batch, 3), out)
    for cache in caches:
        cache.n_past += k.shape[2]
    return np.swapaxes(out, 1, 2)


def attention(q, k, v):  # [..., n_q, d], [..., n_k, d], [..., n_k, d] -> [..., n_q, d]
    """gpt2.attention."""
    return KVCache(k.shape[-2]).attend(q, k, v) if is_supported(q) else gpt2.attention(q, k, v)


class KVCache(gpt2.KVCache):
    """gpt2.KVCache with the keys and values in the order in which the kernel reads them.

    kv: [b, n_head, 2, n_blocks*BLOCK*d], per head the keys as [n_blocks, d, BLOCK], then the values as
    [n_blocks*BLOCK, d].
    """

    kv = None

    def rows(self, batch, n_head, n_new, d):
        """Return the address, n_past and n_blocks of each row of the batch, and allocate the memory in the first call.

        Raises ValueError if n_new positions do not fit, or if the shape is not that of the first call: the kernel works
        with addresses.
        """
        gpt2.check_context(self.n_past, n_new, self.n_max)
        n_blocks = -(-self.n_max // BLOCK)
        shape = (batch, n_head, 2, n_blocks * BLOCK * d)
        if self.kv is None:
            self.kv = np.empty(shape, np.float32)
            self.address = self.kv.ctypes.data
        elif self.kv.shape != shape:
            raise ValueError(f"keys and values of shape {shape} for a cache of shape {self.kv.shape}")
        return [(self.address + i * self.kv.strides[0], self.n_past, n_blocks) for i in range(batch)]

    def __setstate__(self, state):
        """Restore a copy, whose keys and values have another address."""
        self.__dict__.update(state)
        if self.kv is not None:
            self.address = self.kv.ctypes.data

    def attend(self, q, k, v):  # [..., n_seq, d], [..., n_seq, d], [..., n_seq, d] -> [..., n_seq, d]
        """Append k and v, then attend from the new positions q to all positions."""
        if not is_supported(q):
            return super().attend(q, k, v)
        batch = math.prod(q.shape[:-3])
        return attend_rows([self], *(a.reshape(batch, *a.shape[-3:]) for a in (q, k, v))).reshape(q.shape)


class RowCaches(batching.RowCaches):
    """batching.RowCaches that attends in all rows at once."""

    def attend(self, q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
        return attend_rows(self.caches, q, k, v) if is_supported(q) else super().attend(q, k, v)
