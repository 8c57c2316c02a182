"""Weights of 8 or 4 bits and products with them: lossy, but read from memory in a quarter or a sixth of the time.

A weight is its code times a scale: for int8 each row of the transposed weight has a scale, for int4 each group of
GROUP elements of a row. All sums are of float32. A row of a result has the same bits whatever other rows are computed
with it, as in kernels.py.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from engines import kernels
from engines.kernels import ROWS, TILE, WIDTH, multiply_tile, no_bias, read_only
from engines.vectors import (
    FLOATS,
    INTS,
    LANES,
    fma,
    fma4,
    kernel,
    largest,
    load,
    maximum,
    nearest,
    pointer,
    prefetch,
    splat,
    store,
    total,
    vector,
    zero,
)

GROUP = 2 * LANES  # int4 weights that share a scale
LINE = 64  # bytes of a cache line
AHEAD = 2 * TILE  # distance in rows between the codes that are multiplied and those that are prefetched
PARTS = 64  # of a product of several rows, each with its own scratch memory
BYTES = ir.VectorType(ir.IntType(8), LANES)


class Int8(NamedTuple):
    """A weight [n_in, n_out] for linear(): the codes of its transpose, -127 to 127."""

    codes: np.ndarray  # [n_out, n_in] int8
    scales: np.ndarray  # [n_out]


class Int4(NamedTuple):
    """A weight [n_in, n_out] for linear(): the codes of its transpose, 0 to 15, which stand for -8 to 7.

    The lower half of byte i of a group is the code of its element i, the upper half that of element i + LANES.
    """

    codes: np.ndarray  # [n_out, n_in/2] uint8
    scales: np.ndarray  # [n_out, n_in/GROUP]


class Embedding(NamedTuple):
    """Stands for wte: indexing looks tokens up in float32, and T is quantized, for the output layer."""

    wte: np.ndarray  # [n_vocab, n_embd]
    T: Int8 | Int4

    @property
    def shape(self):
        return self.wte.shape

    def __getitem__(self, ids):
        return self.wte[ids]


def byte_pointer(context, builder, array_type, array, index_type, index):
    return builder.bitcast(pointer(context, builder, array_type, array, index_type, index), BYTES.as_pointer())


@intrinsic
def store_bytes(typing_context, a, index, v):
    """store_bytes(a, index, v): write v, whole numbers, to LANES contiguous bytes of the array a, from a[index] on."""

    def generate(context, builder, signature, args):
        integers = builder.trunc(builder.fptosi(args[2], INTS), BYTES)
        builder.store(integers, byte_pointer(context, builder, a, args[0], index, args[1]), align=1)
        return context.get_dummy_value()

    return types.void(a, index, v), generate


def loads_halves(instruction, operand):
    """An intrinsic f(a, index): half of each of LANES contiguous bytes of the array a, from a[index] on."""

    @intrinsic
    def load_halves(typing_context, a, index):
        def generate(context, builder, signature, args):
            elements = builder.load(byte_pointer(context, builder, a, args[0], index, args[1]), align=1)
            half = getattr(builder, instruction)(builder.zext(elements, INTS), ir.Constant(INTS, [operand] * LANES))
            return builder.sitofp(half, FLOATS)

        return vector(a, index), generate

    return load_halves


lower_halves, upper_halves = loads_halves("and_", 15), loads_halves("lshr", 4)


# Quantization


@kernel(parallel=True)
def quantize_int8(w, codes, scales):  # [n_out, n_in] -> codes: [n_out, n_in], scales: [n_out]
    """Write the codes and scales of w. The largest element of a row becomes 127 or -127."""
    for j in prange(w.shape[0]):
        most = unfit = zero()
        for k in range(0, w.shape[1], LANES):
            v = load(w, (j, k))
            most, unfit = maximum(maximum(v, zero() - v), most), fma(v, zero(), unfit)
        scale = largest(most) / np.float32(127)
        inverse = splat(1 / scale if scale > 0 else 0)
        for k in range(0, w.shape[1], LANES):
            store_bytes(codes, (j, k), nearest(load(w, (j, k)) * inverse))
        scales[j] = scale + total(unfit)  # NaN if an element is NaN or infinite


@kernel(parallel=True)
def quantize_int4(w, codes, scales):  # [n_out, n_in] -> codes: [n_out, n_in/2], scales: [n_out, n_in/GROUP]
    """Write the codes and scales of w. The largest element of a group, of either sign, becomes -8."""
    for j in prange(w.shape[0]):
        for k in range(0, w.shape[1], GROUP):
            v0, v1 = load(w, (j, k)), load(w, (j, k + LANES))
            highest, lowest = largest(maximum(v0, v1)), -largest(maximum(zero() - v0, zero() - v1))
            scale = (highest if highest > -lowest else lowest) / np.float32(-8)
            inverse = splat(1 / scale if scale != 0 else 0)
            lower, upper = code_of_4_bits(v0 * inverse), code_of_4_bits(v1 * inverse)
            store_bytes(codes, (j, k // 2), fma(upper, splat(16), lower))
            scales[j, k // GROUP] = scale + total(fma(v0, zero(), v1 * zero()))


@njit
def code_of_4_bits(v):
    return zero() - maximum(zero() - (nearest(v) + splat(8)), splat(-15))


def quantized(w, dtype):  # [n_in, n_out]
    """Return a weight as Int8 or Int4; as kernels.transposed() does if the kernels do not fit its shape."""
    w = w.T if w.flags.f_contiguous else kernels.transposed(w).T  # [n_in, n_out] -> [n_out, n_in]
    n_out, n_in = w.shape
    if n_in % {"int8": LANES, "int4": GROUP}[dtype] or n_out < WIDTH:
        return read_only(w).T
    if dtype == "int8":
        found = Int8(np.empty((n_out, n_in), np.int8), np.empty(n_out, np.float32))
        quantize_int8(read_only(w), *found)
    else:
        found = Int4(np.empty((n_out, n_in // 2), np.uint8), np.empty((n_out, n_in // GROUP), np.float32))
        quantize_int4(read_only(w), *found)
    return type(found)(*map(read_only, found))


def quantize(params, dtype):
    """Return the parameters for linear(), with the weights and the output layer as "int8" or "int4".

    params: as they are in the file, or in the layout of compiled_model().
    """

    def converted(value):
        if isinstance(value, dict):
            return {name: quantized(a, dtype) if name == "w" else converted(a) for name, a in value.items()}
        return [converted(a) for a in value] if isinstance(value, list) else read_only(value)

    head = quantized(params["wte"].T, dtype)
    wte = read_only(params["wte"])
    return converted(params) | {"wte": wte if isinstance(head, np.ndarray) else Embedding(wte, head)}


# Products


@njit
def multiply_int8(x, w, j, scales, b, y):
    """Compute y[0, j : j+TILE] of product_of_row_int8()."""
    sums = (zero(), zero(), zero(), zero())
    for k in range(0, w.shape[1], LANES):
        if k % LINE == 0:
            for row in range(j + AHEAD, j + AHEAD + TILE):
                prefetch(w, (row, k))
        four = load(w, (j, k)), load(w, (j + 1, k)), load(w, (j + 2, k)), load(w, (j + 3, k))
        sums = fma4(load(x, (0, k)), four, sums)
    y[0, j], y[0, j + 1] = total(sums[0]) * scales[j] + b[j], total(sums[1]) * scales[j + 1] + b[j + 1]
    y[0, j + 2], y[0, j + 3] = total(sums[2]) * scales[j + 2] + b[j + 2], total(sums[3]) * scales[j + 3] + b[j + 3]


@kernel(parallel=True)
def product_of_row_int8(x, w, scales, b, y):  # [1, n_in], [n_out, n_in], [n_out], [n_out] -> y: [1, n_out]
    """product_int8() for one row of x."""
    n_out = w.shape[0]
    for block in prange(-(-n_out // TILE)):
        multiply_int8(x, w, min(TILE * block, n_out - TILE), scales, b, y)


@kernel(parallel=True)
def product_int8(x, w, scales, b, y):  # [rows, n_in], [n_out, n_in], [n_out], [n_out] -> y: [rows, n_out]
    """Write x @ (w * scales).T + b to y, w being codes: WIDTH rows of them at a time as floats."""
    rows, (n_out, n_in) = x.shape[0], w.shape
    n_blocks = -(-n_out // WIDTH)
    for part in prange(PARTS):
        floats, zeros = np.empty((WIDTH, n_in), np.float32), np.zeros(WIDTH, np.float32)
        sums = np.empty((rows, WIDTH), np.float32)
        for block in range(part * n_blocks // PARTS, (part + 1) * n_blocks // PARTS):
            j = min(WIDTH * block, n_out - WIDTH)
            for row in range(WIDTH):
                for k in range(0, n_in, LANES):
                    prefetch(w, (j + AHEAD + row, k))
                    store(floats, (row, k), load(w, (j + row, k)))
            for i in range(0, rows, TILE):
                multiply_tile(x, i, floats, 0, zeros, sums, 0, 0)
            for i in range(rows):
                for column in range(WIDTH):
                    y[i, j + column] = sums[i, column] * scales[j + column] + b[j + column]


@njit
def add_group(x0, x1, offset, low, high, scale, s):
    """Add the products of a group to the sums s: the codes minus 8, times the scale."""
    return fma(fma(x1, high, fma(x0, low, offset)), splat(scale), s)


@njit
def multiply_int4(x, i, w, j, scales, b, y):
    """Compute y[i, j : j+TILE] of product_int4()."""
    s0 = s1 = s2 = s3 = zero()
    for k in range(0, w.shape[1], LANES):
        if k % LINE == 0:
            for row in range(j + AHEAD, j + AHEAD + TILE):
                prefetch(w, (row, k))
        x0, x1 = load(x, (i, 2 * k)), load(x, (i, 2 * k + LANES))
        offset, g = (x0 + x1) * splat(-8), k // LANES
        s0 = add_group(x0, x1, offset, lower_halves(w, (j, k)), upper_halves(w, (j, k)), scales[j, g], s0)
        s1 = add_group(x0, x1, offset, lower_halves(w, (j + 1, k)), upper_halves(w, (j + 1, k)), scales[j + 1, g], s1)
        s2 = add_group(x0, x1, offset, lower_halves(w, (j + 2, k)), upper_halves(w, (j + 2, k)), scales[j + 2, g], s2)
        s3 = add_group(x0, x1, offset, lower_halves(w, (j + 3, k)), upper_halves(w, (j + 3, k)), scales[j + 3, g], s3)
    y[i, j], y[i, j + 1] = total(s0) + b[j], total(s1) + b[j + 1]
    y[i, j + 2], y[i, j + 3] = total(s2) + b[j + 2], total(s3) + b[j + 3]


@kernel(parallel=True)
def product_int4(x, w, scales, b, y):  # [rows, n_in], [n_out, n_in/2], [n_out, n_in/GROUP], [n_out] -> y: [rows, n_out]
    """product_int8() with the codes and scales of Int4."""
    n_out = w.shape[0]
    for block in prange(-(-n_out // TILE)):
        for i in range(x.shape[0]):
            multiply_int4(x, i, w, min(TILE * block, n_out - TILE), scales, b, y)


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """gpt2.linear for a w that may be quantized."""
    if isinstance(w, np.ndarray):
        return kernels.linear(x, w, b)
    n_out, lead = len(w.codes), x.shape[:-1]
    x = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
    y = np.empty((len(x), n_out), np.float32)
    run = product_int4 if isinstance(w, Int4) else product_of_row_int8 if len(x) == 1 else product_int8
    for i in range(0, len(x), ROWS):
        run(x[i : i + ROWS], *w, b if np.ndim(b) else no_bias(n_out), y[i : i + ROWS])
    return y.reshape(*lead, n_out)
