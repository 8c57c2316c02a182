"""A weight cut into blocks of columns: the layout in which a few rows cost little more than one.

BLAS copies a matrix into an order of its own before it multiplies (it packs it). For the hundreds of rows of a prompt
that is nothing; for 2 to 16 rows it takes longer than the product, and two tokens cost 2.5 times one. OpenBLAS has
kernels that do without for products of at most 10^6 multiplications, so the weight is stored as many small matrices of
64 columns, each contiguous, and np.matmul goes over them: every number is read once, in the order it lies in memory.

A row of a product has the same bits whichever rows are beside it, and however many below MANY_ROWS: a test insists.
"""

import math

import numpy as np

WIDTH = 64  # columns a block: a row of it is four of the vectors that AVX-512 loads
FEW_ROWS = 16  # that many at a time; more go over each block in turns, while it is in the processor's cache
LEAST_ROWS = 4  # fewer take as long as four, and one alone would be summed by another kernel, in another order
MANY_ROWS = 128  # from this many up, packing pays
SMALL_PRODUCT = 10**6  # multiplications; above that OpenBLAS packs


def n_parts(n_in):
    """In how few equal parts a sum of n_in products can be cut so that FEW_ROWS rows times a part of a block are small.

    0 if only in parts shorter than a block is wide.
    """
    return next((n for n in range(1, n_in // WIDTH + 2) if n_in % n == 0 and fits(n_in // n)), 0)


def fits(n_in):
    return FEW_ROWS * n_in * WIDTH <= SMALL_PRODUCT


class Columns:
    """A matrix [n_in, n_out] stored as [n_block, n_part, n_in/n_part, WIDTH], to multiply with as `x @ columns`."""

    __array_ufunc__ = None  # so that NumPy leaves `x @ columns` to __rmatmul__

    def __init__(self, w, empty=np.empty):  # [n_in, n_out]
        """empty: makes the array to store it in."""
        n_in, n_out = self.shape = w.shape
        whole = n_out // WIDTH
        self.blocks = empty((-(-n_out // WIDTH), n_parts(n_in), n_in // n_parts(n_in), WIDTH), w.dtype)
        blocks = self.blocks.reshape(-1, n_in, WIDTH)
        blocks[:whole] = np.swapaxes(w[:, : whole * WIDTH].reshape(n_in, whole, WIDTH), 0, 1)
        if whole < len(blocks):  # the last columns do not fill a block: zeros beside them
            blocks[whole] = 0
            blocks[whole, :, : n_out % WIDTH] = w[:, whole * WIDTH :]

    def __rmatmul__(self, x):  # [rows, n_in] -> [rows, n_out]
        return self.product(x) if len(x) < MANY_ROWS else x @ self.whole()

    def product(self, x):  # [n_rows, n_in] -> [n_rows, n_out]
        n_block, n_part, n_in_part, _ = self.blocks.shape
        x, n_rows = padded(x), len(x)
        turns, rows, _ = x.shape
        x = np.swapaxes(x.reshape(turns, rows, n_part, n_in_part), 1, 2)  # -> [turns, n_part, rows, n_in_part]
        y = np.empty((turns * rows, n_block * WIDTH), x.dtype)
        y_blocks = np.moveaxis(y.reshape(turns, rows, n_block, WIDTH), 2, 0)  # -> [n_block, turns, rows, WIDTH]
        blocks = self.blocks[:, None]  # -> [n_block, 1, n_part, n_in_part, WIDTH]
        if n_part == 1:
            np.matmul(x, blocks, out=y_blocks[:, :, None])
        else:
            np.add.reduce(np.matmul(x, blocks), axis=2, out=y_blocks)
        return y[:n_rows, : self.shape[1]]

    def whole(self):  # -> [n_in, n_out]
        """The matrix as it was, made anew: for many rows BLAS packs it in any case."""
        n_in, n_out = self.shape
        return np.swapaxes(self.blocks.reshape(-1, n_in, WIDTH), 0, 1).reshape(n_in, -1)[:, :n_out]

    def take(self, ids):  # [...] -> [..., n_in]
        """The columns of these numbers."""
        return self.blocks.reshape(len(self.blocks), -1, WIDTH)[ids // WIDTH, :, ids % WIDTH]


def in_columns(w, empty=np.empty):
    """w as Columns, or as a contiguous copy where its rows cannot be cut into parts that are small enough."""
    return Columns(w, empty) if n_parts(w.shape[0]) else np.array(w, order="C")


class Room:
    """np.empty for several arrays in one, from 4 MiB up in pages of 2 MiB: NumPy asks Linux for them only for arrays of
    that size, and most weights alone are smaller."""

    def __init__(self, n_bytes):
        self.bytes, self.n_used = np.empty(n_bytes, np.uint8), 0

    def empty(self, shape, dtype):
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.n_used += n_bytes
        return self.bytes[self.n_used - n_bytes : self.n_used].view(dtype).reshape(shape)


class Table:
    """A matrix of which Columns hold the transpose: what gpt2() does with wte works, rows by number and `x @ wte.T`."""

    def __init__(self, columns):
        self.T = columns

    def __getitem__(self, ids):  # [...] -> [..., n_in]
        return self.T.take(ids)


def padded(x):  # [n, n_in] -> [turns, rows, n_in]
    """Rows in as few equal turns as FEW_ROWS allows, with rows of zeros where they do not come out even."""
    turns = max(1, -(-len(x) // FEW_ROWS))
    rows = max(LEAST_ROWS, -(-len(x) // turns))
    if turns * rows > len(x):
        x = np.concatenate([x, np.zeros((turns * rows - len(x), x.shape[1]), x.dtype)])
    return x.reshape(turns, rows, -1)
