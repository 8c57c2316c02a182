"""Operations of compiled functions: one at a time, or a recorded forward pass in a single parallel region.

A pass over one token consists of about 120 operations, some of which take less than a microsecond. Starting each of
them from Python, and waiting until all threads have finished it, takes a tenth of the pass. Therefore the first pass of
a shape records its operations, with the addresses of their arrays, and later passes of this shape run the recorded
program, as a CUDA graph does.

An operation has parts. The threads take parts until none is left and then wait until all parts are finished. Each
thread begins with a segment of its own, so that it reads the weights in one stream; a thread that has finished its
segment helps with the others.
"""

import collections
import contextlib
import functools
import math
import os
import threading
import weakref

import numpy as np
from llvmlite import binding
from numba import carray, from_dtype, get_num_threads, int64, njit, prange, types

import gpt2
from engines.kernels import (
    BLOCK,
    GROUP,
    PANEL,
    activate,
    add,
    address_of,
    attend_head,
    int4_product,
    int4_product_of_row,
    int8_product,
    int8_product_of_row,
    matrix,
    normalize,
    product,
)
from engines.vectors import LANES, fetch, fetch_add, kernel

NORMALIZE, ACTIVATE, ADD, ATTEND, FLOAT32_PRODUCT, INT8_PRODUCT, INT4_PRODUCT = range(7)
ROWS = 8  # rows of layer_norm per part
ELEMENTS = 2**12  # elements of gelu, or of a sum, per part
EPS = 1e-5  # the eps of layer_norm that is compiled
LINE = 8  # int64 elements of a cache line, which a counter has for itself
SPINS = 500  # polls of a waiting thread before it yields the processor

# Arrays are given by their addresses. w is also the gain of layer_norm and the second addend of a sum; n_in is also the
# number of elements of gelu and of a sum. x_batch to k_row are strides in elements.
FIELDS = ("kind", "n_parts", "x", "w", "scales", "b", "y", "n_rows", "n_in", "n_out")
FIELDS += ("k", "v", "rows", "batch", "n_head", "n_new", "x_batch", "x_head", "x_row", "k_batch", "k_head", "k_row")
Operation = collections.namedtuple("Operation", FIELDS, defaults=[0] * (len(FIELDS) - 2))
OPERATION = np.dtype([(name, np.int64) for name in FIELDS])

if os.name == "nt":
    binding.load_library_permanently("kernel32.dll")
yield_processor = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())


@njit
def normalize_part(op, part):  # x: [n_rows, n_in], w (the gain): [n_in], b: [n_in] -> y: [n_rows, n_in]
    first, stop, n = part * ROWS, min((part + 1) * ROWS, op.n_rows), op.n_in
    x, y = matrix(op.x, op.n_rows, n), matrix(op.y, op.n_rows, n)
    normalize(x[first:stop], matrix(op.w, 1, n)[0], matrix(op.b, 1, n)[0], EPS, y[first:stop])


@njit
def elements(address, part, n):
    return matrix(address, 1, n)[0, part * ELEMENTS : (part + 1) * ELEMENTS]


@njit
def product_part(op, p):  # x: [n_rows, n_in], w: panels, b: [n_out] -> y: [n_rows, n_out]
    """Compute panel p. The last panel may have columns that y lacks: it is computed in an array of its own."""
    first, n = p * PANEL, min(PANEL, op.n_out - p * PANEL)
    x = matrix(op.x, op.n_rows, op.n_in)[:, :]  # sliced, so that numba compiles product() for one type of x
    b, y = matrix(op.b, 1, op.n_out)[0, first : first + n], matrix(op.y, op.n_rows, op.n_out)[:, first : first + n]
    sums = y if n == PANEL else np.zeros((op.n_rows, PANEL), np.float32)[:, :PANEL]  # of the type of y
    for i in range(op.n_rows):
        for j in range(n):
            sums[i, j] = b[j]
    if op.kind == FLOAT32_PRODUCT:
        product(x, matrix(op.w + 4 * p * op.n_in * PANEL, op.n_in, PANEL), matrix(op.scales, 1, PANEL)[0], sums)
    elif op.kind == INT8_PRODUCT:
        int8_product(x, *int8_panel(op, p), sums)
    else:
        int4_product(x, *int4_panel(op, p), sums)
    if n < PANEL:
        y[:] = sums[:, :n]


@njit
def int8_panel(op, p):
    codes = carray(address_of(op.w + p * op.n_in * PANEL), (op.n_in, PANEL), np.int8)
    return codes, matrix(op.scales + 4 * p * PANEL, 1, PANEL)


@njit
def int4_panel(op, p):
    codes = carray(address_of(op.w + p * op.n_in * PANEL // 2), (op.n_in, PANEL // 2), np.uint8)
    n_groups = op.n_in // GROUP
    return codes, matrix(op.scales + 4 * p * n_groups * PANEL, n_groups, PANEL)


@njit
def pair_part(op, part):  # x: [n_in], w: panels of codes, b: [n_out] -> y: [n_out]
    """Multiply a single row by panels 2*part and 2*part + 1. The last panel of an odd number is multiplied twice."""
    first, n = 2 * part * PANEL, min(2 * PANEL, op.n_out - 2 * part * PANEL)
    x, y = matrix(op.x, 1, op.n_in)[0], np.zeros(2 * PANEL, np.float32)
    y[:n] = matrix(op.b, 1, op.n_out)[0, first : first + n]
    p, other = 2 * part, 2 * part + (n > PANEL)
    if op.kind == INT8_PRODUCT:
        (a, a_scales), (b, b_scales) = int8_panel(op, p), int8_panel(op, other)
        int8_product_of_row(x, (a, b), (a_scales, b_scales), y)
    else:
        (c, c_scales), (d, d_scales) = int4_panel(op, p), int4_panel(op, other)
        int4_product_of_row(x, (c, d), (c_scales, d_scales), y)
    matrix(op.y, 1, op.n_out)[0, first : first + n] = y[:n]


@njit
def attend_part(op, part):
    """x (the queries): [batch, n_head, n_rows, n_in], k and v: [batch, n_head, n_new, n_in] -> y: as x.

    Heads of n_in elements; y is in memory [batch, n_rows, n_head, n_in]. rows: the address of each row's keys and
    values (see attention.KVCache), n_past and n_blocks, [batch, 3].
    """
    row, head = part % op.batch, part // op.batch  # a thread has the same heads of every row
    n_q, d, n_head = op.n_rows, op.n_in, op.n_head
    address, n_past, n_blocks = carray(address_of(op.rows), (op.batch, 3), np.int64)[row]
    size = n_blocks * BLOCK * d
    kv = carray(address_of(address + 8 * size * head), (2, size), np.float32)
    offset = 4 * (op.k_batch * row + op.k_head * head)
    attend_head(
        matrix(op.x + 4 * (op.x_batch * row + op.x_head * head), n_q, op.x_row)[:, :d],
        matrix(op.k + offset, op.n_new, op.k_row)[:, :d],
        matrix(op.v + offset, op.n_new, op.k_row)[:, :d],
        n_past,
        kv[0].reshape(n_blocks, d, BLOCK),
        kv[1].reshape(n_blocks * BLOCK, d),
        matrix(op.y + 4 * d * (head + n_head * n_q * row), n_q, n_head * d)[:, :d],
    )


@njit
def perform(op, part):
    if op.kind > FLOAT32_PRODUCT and op.n_rows == 1:
        pair_part(op, part)
    elif op.kind >= FLOAT32_PRODUCT:
        product_part(op, part)
    elif op.kind == NORMALIZE:
        normalize_part(op, part)
    elif op.kind == ACTIVATE:
        activate(elements(op.x, part, op.n_in), elements(op.y, part, op.n_in))
    elif op.kind == ADD:
        add(elements(op.x, part, op.n_in), elements(op.w, part, op.n_in), elements(op.y, part, op.n_in))
    else:
        attend_part(op, part)


@kernel(types.void(from_dtype(OPERATION)[::1], types.int64[:, :, ::1], types.int64), parallel=True)
def run(operations, counters, n_threads):  # counters: [n_operations, n_threads + 1, LINE], all 0
    """Perform the operations one after another, each in all threads.

    The counters of an operation are the parts taken from each segment, and the parts finished. A thread that does not
    get a processor delays only the part that it has taken.
    """
    for thread in prange(n_threads):
        for i in range(len(operations)):
            op = operations[i]
            for turn in range(n_threads):
                segment = (int64(thread) + turn) % n_threads
                first, stop = op.n_parts * segment // n_threads, op.n_parts * (segment + 1) // n_threads
                part = first + fetch_add(counters, (i, segment, 0), 1)
                while part < stop:
                    perform(op, part)
                    fetch_add(counters, (i, n_threads, 0), 1)
                    part = first + fetch_add(counters, (i, segment, 0), 1)
            spins = 0
            while fetch(counters, (i, n_threads, 0)) < op.n_parts:
                spins += 1
                if spins > SPINS:
                    yield_processor()


def start(operations):
    n_threads = get_num_threads()
    run(operations, np.zeros((len(operations), n_threads + 1, LINE), np.int64), n_threads)


def address(a):
    return a.__array_interface__["data"][0]


def parameter(a):
    """Return a parameter, which the program that is being recorded keeps alive."""
    if current.program:
        current.program.params.append(a)
    return a


def vector_of(a, n):  # [n] -> [n]
    """Return a gain or a bias as a parameter, contiguous and float32; raise ValueError unless it has n elements."""
    if np.shape(a) != (n,):
        raise ValueError(f"a gain or a bias has shape {np.shape(a)} instead of ({n},)")
    return parameter(np.ascontiguousarray(a, np.float32))


# Recording


class Current(threading.local):
    """The program that this thread records, if any."""

    program = None


current = Current()


class Block(np.ndarray):
    """Memory of a program. Its type differs from that of the arrays in it, so that NumPy keeps their views apart."""


class Recorded(np.ndarray):
    """An array of a pass that is being recorded: adding two of them is an operation, too."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        is_sum = ufunc is np.add and method == "__call__" and not out and not kwargs
        if is_sum and all(map(is_addend, inputs)) and inputs[0].shape == inputs[1].shape:
            return sum_of(*inputs)
        abandon()
        if out:
            kwargs["out"] = tuple(map(np.asarray, out))
        return getattr(ufunc, method)(*map(np.asarray, inputs), **kwargs)

    def __setitem__(self, index, value):
        abandon()
        super().__setitem__(index, value)


def is_addend(a):
    return is_recorded(a) and a.flags.c_contiguous and a.size % LANES == 0


def is_recorded(a):
    """Return whether an array lies in the memory of a program. A copy does not: it would not be made again."""
    while isinstance(a, np.ndarray) and not isinstance(a, Block):
        a = a.base
    return isinstance(a, Block)


class Program:
    """The operations of a pass.

    input, output: its embedded tokens and its logits. tables: for each block the array of rows that its attention
    reads, and the arguments of cache.rows that fill it. is_complete: whether all that the pass computed is recorded.
    params: what the addresses in the operations belong to. memory: a list of arrays that the operations may use; more
    are added to it.
    """

    def __init__(self, params, memory):
        self.params, self.memory = list(params), memory
        self.operations, self.tables, self.is_complete = [], [], True
        self.free = collections.defaultdict(list)  # by size
        for block in memory:
            self.free[block.size].append(block)

    def empty(self, shape):
        """Return an array in memory that is used again as soon as Python has freed the array."""
        n = 2 ** (math.prod(shape) - 1).bit_length()  # so that passes over other numbers of tokens use it as well
        free = self.free[n]
        if not free:
            free.append(np.empty(n, np.float32).view(Block))
            self.memory.append(free[0])
        block = free.pop()
        a = Recorded(shape, np.float32, block)
        weakref.finalize(a, free.append, block).atexit = False
        return a

    @contextlib.contextmanager
    def recording(self):
        before, current.program = current.program, self
        try:
            yield
        finally:
            current.program = before
        if self.is_complete:
            self.operations = np.concatenate(self.operations)

    def replay(self, x, cache):  # [..., n_seq, n_embd] -> [..., n_seq, n_vocab]
        """Return the logits after the embedded tokens x, which are appended to the cache."""
        self.input[:] = x
        for layer, (table, shape) in zip(cache, self.tables, strict=True):
            table[:] = layer.rows(*shape)
        start(self.operations)
        for layer in cache:
            layer.advance(x.shape[-2])
        return np.array(self.output)


def as_input(x):
    """Return the embedded tokens of a pass as the input of the program that is being recorded."""
    if current.program:
        current.program.input = empty(x.shape)
        np.asarray(current.program.input)[:] = x
        return current.program.input
    return x


def execute(*fields, **others):
    """Perform an operation, and record it if a program is being recorded."""
    operation = np.array([Operation(*fields, **others)], OPERATION)
    start(operation)
    if current.program:
        current.program.operations.append(operation)


def empty(shape):
    """Return an array for the result of an operation."""
    return current.program.empty(shape) if current.program else np.empty(shape, np.float32)


def contiguous(a):
    """Return a as a contiguous float32 array. A copy is not recorded, so it makes the program incomplete."""
    if a.flags.c_contiguous and a.dtype == np.float32:
        return require_recorded(a)
    abandon()
    return np.ascontiguousarray(a, np.float32)


def require_recorded(a):
    """Return a. Unless it lies in the memory of a program, the one that is being recorded is incomplete."""
    if not is_recorded(a):
        abandon()
    return a


def abandon():
    if current.program:
        current.program.is_complete = False


def sum_of(x, y):  # [..., n], [..., n] -> [..., n]
    z = empty(x.shape)
    execute(ADD, -(-x.size // ELEMENTS), address(x), address(y), y=address(z), n_in=x.size)
    return z


# Replaying

MAX_TOKENS = 64  # of a pass that is recorded; in longer ones the operations take much longer than their start
MAX_PROGRAMS = 32  # kept, the most recently used: one for each number of draft tokens, and for each size of a batch


class Replayed:
    """The function gpt2 of an instance of the module, which records the first pass of a shape and replays it later.

    What is recorded depends on the parameters and on the shape of the tokens, but not on what the cache holds. All
    programs use the same memory, so one pass runs at a time. Functions of the instance and entries of the parameters
    must be replaced before the first pass.
    """

    def __init__(self, function):
        self.function, self.programs = function, collections.OrderedDict()
        self.memory, self.lock = [], threading.Lock()

    def __call__(self, inputs, wte, wpe, blocks, ln_f, n_head, cache=None, last_only=False):
        inputs, params = np.asarray(inputs, dtype=int), (wte, wpe, blocks, ln_f)
        forward = functools.partial(self.function, inputs, *params, n_head, cache, last_only)
        has_rows = cache and hasattr(cache[0], "rows")  # a cache of attention.py
        if not has_rows or not 0 < inputs.size <= MAX_TOKENS:
            return forward()
        key = (*map(id, params), n_head, type(cache[0]), last_only, inputs.shape)
        with self.lock:
            if key not in self.programs:
                self.programs[key], logits = self.record(forward, params)
                if len(self.programs) > MAX_PROGRAMS:
                    self.programs.popitem(last=False)
                return logits
            self.programs.move_to_end(key)  # now the most recently used
            if not self.programs[key].is_complete:
                return forward()
            return self.programs[key].replay(gpt2.embed(inputs, wte, wpe, cache[0].n_past), cache)

    def record(self, forward, params):
        """Return a program and the logits of the pass that it was recorded from."""
        program = Program(params, self.memory)
        with program.recording():
            program.output = require_recorded(forward())
        return program, np.array(program.output)
