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

TILE = 4  # queries that are computed at a time, and vectors of their results: 16 sums fit into the registers


@njit
def multiply(x, w, y):  # [n_rows, n], [n_blocks, n, LANES] -> y: [n_rows, n_blocks*LANES]
    """Write the product of x, at most TILE rows, and a matrix stored in blocks of LANES columns to y."""
    last_row, last_block = x.shape[0] - 1, w.shape[0] - 1
    r1, r2, r3 = min(1, last_row), min(2, last_row), min(3, last_row)  # rows beyond the last repeat it, as do blocks
    for b0 in range(0, last_block + 1, TILE):
        b1, b2, b3 = min(b0 + 1, last_block), min(b0 + 2, last_block), min(b0 + 3, last_block)
        s0 = s1 = s2 = s3 = (zero(), zero(), zero(), zero())
        for k in range(x.shape[1]):
            four = load(w, (b0, k, 0)), load(w, (b1, k, 0)), load(w, (b2, k, 0)), load(w, (b3, k, 0))
            s0 = fma4(splat(x[0, k]), four, s0)
            if last_row > 0:
                s1 = fma4(splat(x[r1, k]), four, s1)
                s2 = fma4(splat(x[r2, k]), four, s2)
                s3 = fma4(splat(x[r3, k]), four, s3)
        blocks = b0, b1, b2, b3
        if last_row > 0:
            write_row(y, r3, blocks, s3)
            write_row(y, r2, blocks, s2)
            write_row(y, r1, blocks, s1)
        write_row(y, 0, blocks, s0)


@njit
def write_row(y, i, blocks, sums):
    store(y, (i, blocks[0] * LANES), sums[0])
    store(y, (i, blocks[1] * LANES), sums[1])
    store(y, (i, blocks[2] * LANES), sums[2])
    store(y, (i, blocks[3] * LANES), sums[3])


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
    n_blocks = -(-n_keys // LANES)
    scores = scores[:n_q, : n_blocks * LANES]
    multiply(q, keys[:n_blocks], scores)
    for i in range(n_q):
        softmax(scores[i], n_keys - n_q + i + 1, 1 / math.sqrt(d))
    multiply(scores[:, :n_keys], values[:, :n_keys], out)


@intrinsic
def pointer(typing_context, address):
    """pointer(address): an integer as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


SIGNATURE = "void(float32[:,:,:,:], float32[:,:,:,:], float32[:,:,:,:], int64[:,::1], float32[:,:,:,::1])"


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
        n_max = n_blocks * LANES
        kv = carray(pointer(address), (n_head, 2, n_max * d), np.float32)[head]
        keys, values = kv[0].reshape(n_blocks, d, LANES), kv[1].reshape(d // LANES, n_max, LANES)
        for p in range(n_new):
            block, lane = divmod(n_past + p, LANES)
            for j in range(d):
                keys[block, j, lane] = k[row, head, p, j]
            for j in range(0, d, LANES):
                store(values, (j // LANES, n_past + p, 0), load(v, (row, head, p, j)))
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
    n_rows = batch // len(caches)
    for cache in caches:
        cache.reserve(n_rows, *k.shape[1:])
    rows = np.array([row for cache in caches for row in cache.rows()])
    out = np.empty((batch, n_q, n_head, d), np.float32)
    attend(q, k, v, rows, out)
    for cache in caches:
        cache.n_past += k.shape[2]
    return np.swapaxes(out, 1, 2)


def attention(q, k, v):  # [..., n_q, d], [..., n_k, d], [..., n_k, d] -> [..., n_q, d]
    """gpt2.attention."""
    return KVCache(k.shape[-2]).attend(q, k, v)


class KVCache(gpt2.KVCache):
    """gpt2.KVCache with the keys and values in the order in which the kernel reads them.

    kv: [b, n_head, 2, n_blocks*LANES*d], per head the keys as [n_blocks, d, LANES], of LANES positions per block, and
    the values as [d/LANES, n_blocks*LANES, LANES].
    """

    kv = None

    def reserve(self, batch, n_head, n_new, d):
        """Check that n_new positions fit; allocate memory for batch rows if this has not been done."""
        gpt2.check_context(self.n_past, n_new, self.n_max)
        if self.kv is None:
            self.n_blocks = -(-self.n_max // LANES)
            self.kv = np.empty((batch, n_head, 2, self.n_blocks * LANES * d), np.float32)
            self.address = self.kv.ctypes.data

    def __setstate__(self, state):
        """Restore a copy, whose keys and values have another address."""
        self.__dict__.update(state)
        if self.kv is not None:
            self.address = self.kv.ctypes.data

    def rows(self):
        """Return the address, n_past and n_blocks of each row."""
        stride = self.kv.strides[0]
        return [(self.address + i * stride, self.n_past, self.n_blocks) for i in range(len(self.kv))]

    def attend(self, q, k, v):  # [..., n_seq, d], [..., n_seq, d], [..., n_seq, d] -> [..., n_seq, d]
        """Append k and v, then attend from the new positions q to all positions."""
        if not is_supported(q):
            return super().attend(q, k, v)
        rows = (a.reshape(-1, *a.shape[-3:]) for a in (q, k, v))  # [..., n_head, n_seq, d] -> [b, n_head, n_seq, d]
        return attend_rows([self], *rows).reshape(q.shape)


class RowCaches(batching.RowCaches):
    """batching.RowCaches that attends in all rows at once."""

    def attend(self, q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
        return attend_rows(self.caches, q, k, v) if is_supported(q) else super().attend(q, k, v)
