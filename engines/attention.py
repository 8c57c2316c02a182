"""The compiled counterparts of gpt2.attention and of its key/value cache, which has another layout.

A query's scores, weights and result are computed in the same order whatever other queries are beside it. Its result has
the same bits alone, in a prompt and in a batch.
"""

import math

import numpy as np

import gpt2
from engines import batching
from engines.functions import is_supported
from engines.kernels import BLOCK
from engines.program import ATTEND, address, contiguous, current, empty, execute, require_recorded


def attend(cache, q, k, v):  # [b, h, n_q, d], [b, h, n_new, d], [b, h, n_new, d] -> [b, h, n_q, d]
    """Append k and v to a cache, then attend from the last n_q positions to all positions within each row."""
    (batch, n_head, n_q, d), n_new = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape != (batch, n_head, n_new, d) or n_q > n_new or not k.dtype == v.dtype == q.dtype:
        raise ValueError(f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}")
    q, k, v = map(with_row_stride, (q, k, v))
    if k.strides != v.strides:
        k, v = contiguous(k), contiguous(v)
    rows = np.array(cache.rows(batch, n_head, n_new, d), np.int64).reshape(batch, 3)
    out = empty((batch, n_q, n_head, d))
    strides = [stride // 4 for a in (q, k) for stride in a.strides[:3]]
    names = "x_batch", "x_head", "x_row", "k_batch", "k_head", "k_row"
    execute(
        ATTEND,
        batch * n_head,
        x=address(q),
        k=address(k),
        v=address(v),
        y=address(out),
        rows=address(rows),
        batch=batch,
        n_head=n_head,
        n_rows=n_q,
        n_new=n_new,
        n_in=d,
        **dict(zip(names, strides, strict=True)),
    )
    if current.program:
        current.program.tables.append((rows, (batch, n_head, n_new, d)))
    cache.advance(n_new)
    return np.swapaxes(out, 1, 2)


def with_row_stride(a):  # [b, h, n, d] -> [b, h, n, d]
    """Return the array, or a copy of it if its rows of d elements are not contiguous or overlap."""
    is_usable = a.strides[-1] == a.itemsize and a.strides[-2] >= a.shape[-1] * a.itemsize
    return require_recorded(a) if is_usable else contiguous(a)


def attention(q, k, v):  # [..., n_q, d], [..., n_k, d], [..., n_k, d] -> [..., n_q, d]
    """gpt2.attention."""
    return KVCache(k.shape[-2]).attend(q, k, v) if is_compiled(q) else gpt2.attention(q, k, v)


def is_compiled(q):
    """Return whether the kernel can attend from such queries."""
    return q.ndim > 2 and is_supported(q)


class KVCache(gpt2.KVCache):
    """gpt2.KVCache with the keys and values in the order in which the kernel reads them.

    kv: [b, n_head, 2, n_blocks*BLOCK*d], per head the keys as [n_blocks, d, BLOCK], then the values as
    [n_blocks*BLOCK, d]. Only hold() replaces it: the kernel works with its addresses.
    """

    kv = None

    def rows(self, batch, n_head, n_new, d):
        """Return the address, n_past and n_blocks of each row of the batch, and allocate the memory in the first call.

        Raises ValueError if n_new positions do not fit, or if the shape is not that of the first call: the kernel works
        with addresses.
        """
        gpt2.check_context(self.n_past, n_new, self.n_max)
        shape = batch, n_head, d, self.n_max
        if self.kv is None:
            self.shape, self.n_blocks = shape, -(-self.n_max // BLOCK)
            self.hold(np.empty((batch, n_head, 2, self.n_blocks * BLOCK * d), np.float32))
        elif self.shape != shape:
            raise ValueError(f"(batch, n_head, d, n_max) is {shape} in a cache of {self.shape}")
        return [(row, self.n_past, self.n_blocks) for row in self.addresses]

    def hold(self, kv):
        """Use the memory kv, and keep the addresses of its rows: asking NumPy for one takes longer than rows()."""
        self.kv, first = kv, address(kv)
        self.addresses = [first + i * kv.strides[0] for i in range(len(kv))]

    def __setstate__(self, state):
        """Copy the attributes, when a copy is made: its memory has other addresses."""
        vars(self).update(state)
        if self.kv is not None:
            self.hold(self.kv)

    def advance(self, n_new):
        """Count the positions that the kernel has written."""
        self.n_past += n_new

    def attend(self, q, k, v):  # [..., n_q, d], [..., n_new, d], [..., n_new, d] -> [..., n_q, d]
        """Append k and v, then attend from the last n_q positions to all positions."""
        if not is_compiled(q):
            return super().attend(q, k, v)
        batch = math.prod(q.shape[:-3])
        return attend(self, *(a.reshape(batch, *a.shape[-3:]) for a in (q, k, v))).reshape(q.shape)


class RowCaches(batching.RowCaches):
    """batching.RowCaches that attends in all rows at once. Each of the caches has an equal number of the rows."""

    def rows(self, batch, *shape):
        return [row for cache in self.caches for row in cache.rows(batch // len(self.caches), *shape)]

    def advance(self, n_new):
        for cache in self.caches:
            cache.advance(n_new)

    def attend(self, q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
        return attend(self, q, k, v) if is_compiled(q) else super().attend(q, k, v)
