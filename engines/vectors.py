"""Vectors of float32 for numba: a SIMD register as a type, and the operations on it that kernels need.

A kernel written with them states the order of every addition but for those within a vector, which are pairwise. Its
results do not depend on how a compiler vectorizes a loop. LLVM maps a vector to the processor's registers (one of
AVX-512, two of AVX2, four of NEON).
"""

import operator
import pathlib
import sys
import zlib

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, event
from numba.extending import intrinsic, models, overload, register_model

LANES = 16  # elements of a vector
FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)

UNCACHED = []  # why kernels are not kept on disk
SHARED = [pathlib.Path(__file__).with_name(name).read_bytes() for name in ("vectors.py", "kernels.py")]
VERSION = f"{zlib.crc32(b''.join(SHARED)):08x}"  # of the code that kernels in several files are compiled from


def kernel(signature=None, parallel=False):
    """Return a decorator that compiles a function when it is first called, and keeps the result on disk if possible.

    With a signature it is compiled at import, for these types only. numba keeps the result in NUMBA_CACHE_DIR,
    __pycache__ or the user's cache folder, and compiles again when the function's own file changes, but not when a file
    changes whose functions it calls. The name therefore ends in VERSION, a checksum of the shared files.
    """

    def decorate(function):
        function.__qualname__ += f"_{VERSION}"
        try:
            return njit(signature, parallel=parallel, nogil=True, cache=True)(function)
        except RuntimeError as error:  # there is no folder that it can write to
            UNCACHED.append(str(error))
            return njit(signature, parallel=parallel, nogil=True)(function)

    return decorate


class Announcement(event.Listener):
    """Prints a line when a function is compiled for the first time, which loading it from the disk is not."""

    announced = False

    def on_start(self, _):
        if not self.announced:
            print("note: compiling kernels for this processor, which takes some seconds once", file=sys.stderr)
        self.announced = True

    def on_end(self, _):
        pass


event.register("numba:compile", Announcement())


class Vector(types.Type):
    """The numba type of a vector of LANES elements."""

    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


vector = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector in LLVM's intermediate representation."""

    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, FLOATS)


def constant(value):
    return ir.Constant(FLOATS, [float(value)] * LANES)


def call(builder, name, *args):
    """Call an LLVM intrinsic on vectors that returns a vector, for example llvm.fma."""
    function_type = ir.FunctionType(FLOATS, [FLOATS] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"{name}.v{LANES}f32"), args)


def broadcast(builder, x):
    """A vector whose elements are all x."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, x, INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))


@intrinsic
def address_of(typing_context, address):
    """address_of(i): the integer i as a pointer, for carray()."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def pointer(context, builder, array_type, array, index_type, index):
    """The address of an element; index is an integer or a tuple of integers, one per axis, none negative."""
    array = context.make_array(array_type)(context, builder, array)
    indices = cgutils.unpack_tuple(builder, index) if isinstance(index_type, types.BaseTuple) else [index]
    return cgutils.get_item_pointer(context, builder, array_type, array, indices, wraparound=False)


def pointers(context, builder, array_type, array, index_type, index, n_rows):
    """The addresses of an element and of those below it: n_rows along the first axis."""
    first = pointer(context, builder, array_type, array, index_type, index)
    stride = builder.extract_value(context.make_array(array_type)(context, builder, array).strides, 0)
    return [cgutils.pointer_add(builder, first, builder.mul(stride, stride.type(r))) for r in range(n_rows)]


def load_at(context, builder, array_type, address):
    """Load LANES elements, float32 or int8, and convert them to float32."""
    element = context.get_data_type(array_type.dtype)
    address = builder.bitcast(address, ir.VectorType(element, LANES).as_pointer())
    elements = builder.load(address, align=array_type.dtype.bitwidth // 8)
    return elements if element == FLOAT else builder.sitofp(elements, FLOATS)


def store_at(builder, v, address):
    builder.store(v, builder.bitcast(address, FLOATS.as_pointer()), align=4)


@intrinsic
def load(typing_context, a, index):
    """load(a, index): LANES contiguous elements of the array a, float32 or int8, from a[index] on."""

    def generate(context, builder, signature, args):
        return load_at(context, builder, a, pointer(context, builder, a, args[0], index, args[1]))

    return vector(a, index), generate


def loads(n, n_rows=1):
    """An intrinsic f(a, index): n contiguous vectors from a[index] on, then those below them, of n_rows rows in all."""

    @intrinsic
    def load_vectors(typing_context, a, index):
        def generate(context, builder, signature, args):
            rows = pointers(context, builder, a, args[0], index, args[1], n_rows)
            vectors = [
                load_at(context, builder, a, builder.gep(row, [INT(i * LANES)])) for row in rows for i in range(n)
            ]
            return context.make_tuple(builder, signature.return_type, vectors)

        return types.UniTuple(vector, n_rows * n)(a, index), generate

    return load_vectors


def stores(n, n_rows=1):
    """An intrinsic f(a, index, vectors): write vectors to the float32 array a, where loads(n, n_rows) reads them."""

    @intrinsic
    def store_vectors(typing_context, a, index, vectors):
        def generate(context, builder, signature, args):
            rows = pointers(context, builder, a, args[0], index, args[1], n_rows)
            addresses = [builder.gep(row, [INT(i * LANES)]) for row in rows for i in range(n)]
            for v, address in zip(cgutils.unpack_tuple(builder, args[2]), addresses, strict=True):
                store_at(builder, v, address)
            return context.get_dummy_value()

        return types.void(a, index, vectors), generate

    return store_vectors


load4, store4 = loads(4), stores(4)


def fmas(n_rows):
    """An intrinsic f(x, index, ws, sums): add x[index] * ws to sums, tuples of vectors.

    sums has the vectors of n_rows rows; x[index] and the elements below it, one per row, are multiplied by ws.
    """

    @intrinsic
    def fma_rows(typing_context, x, index, ws, sums):
        def generate(context, builder, signature, args):
            ws, old = (cgutils.unpack_tuple(builder, arg) for arg in args[2:])
            elements = map(builder.load, pointers(context, builder, x, args[0], index, args[1], n_rows))
            factors = [(broadcast(builder, element), w) for element in elements for w in ws]
            new = [call(builder, "llvm.fma", *pair, v) for pair, v in zip(factors, old, strict=True)]
            return context.make_tuple(builder, signature.return_type, new)

        return sums(x, index, ws, sums), generate

    return fma_rows


@intrinsic
def store(typing_context, a, index, v):
    """store(a, index, v): write v to LANES contiguous elements of the float32 array a, from a[index] on."""

    def generate(context, builder, signature, args):
        store_at(builder, args[2], pointer(context, builder, a, args[0], index, args[1]))
        return context.get_dummy_value()

    return types.void(a, index, v), generate


def code_of_half(is_upper):
    """An intrinsic f(a, index): the codes, 0 to 15, in half of each of LANES contiguous bytes, minus 8.

    The half is put, in its place, into the lowest bits of the float `base`, whose value the code then raises: faster
    than converting integers, and as exact.
    """
    mask, base = (0xF0, 2**19) if is_upper else (0x0F, 2**23)

    @intrinsic
    def code(typing_context, a, index):
        def generate(context, builder, signature, args):
            address = builder.bitcast(
                pointer(context, builder, a, args[0], index, args[1]), ir.VectorType(ir.IntType(8), LANES).as_pointer()
            )
            bits = builder.and_(builder.zext(builder.load(address, align=1), INTS), ir.Constant(INTS, [mask] * LANES))
            floats = builder.bitcast(builder.or_(bits, builder.bitcast(constant(base), INTS)), FLOATS)
            return builder.fsub(floats, constant(base + 8))

        return vector(a, index), generate

    return code


lower, upper = code_of_half(is_upper=False), code_of_half(is_upper=True)


@intrinsic
def splat(typing_context, x):
    """splat(x): a vector whose elements are all x."""

    def generate(context, builder, signature, args):
        return broadcast(builder, context.cast(builder, args[0], x, types.float32))

    return vector(x), generate


@intrinsic
def zero(typing_context):
    """zero(): a vector of zeros."""
    return vector(), lambda context, builder, signature, args: constant(0)


@intrinsic
def fma(typing_context, a, b, c):
    """fma(a, b, c): a * b + c, rounded once."""
    return vector(a, b, c), lambda context, builder, signature, args: call(builder, "llvm.fma", *args)


@intrinsic
def maximum(typing_context, a, b):
    """maximum(a, b): the larger elements; b's where a's is NaN."""

    def generate(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return vector(a, b), generate


def reduction(name, start, flags):
    """An intrinsic that reduces a vector to a float32 with an LLVM reduction."""

    @intrinsic
    def reduce(typing_context, v):
        def generate(context, builder, signature, args):
            operands = [*start, args[0]]
            function_type = ir.FunctionType(FLOAT, [operand.type for operand in operands])
            function = cgutils.get_or_insert_function(builder.module, function_type, f"{name}.v{LANES}f32")
            return builder.call(function, operands, fastmath=flags)

        return types.float32(v), generate

    return reduce


total = reduction("llvm.vector.reduce.fadd", [ir.Constant(FLOAT, -0.0)], ["reassoc"])  # pairwise: the order is fixed
largest = reduction("llvm.vector.reduce.fmax", [], ["nnan"])


def arithmetic(operation, instruction):
    """Give vectors an operator."""

    @intrinsic
    def apply(typing_context, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return vector(a, b), generate

    @overload(operation)
    def overloaded(a, b):
        return (lambda a, b: apply(a, b)) if a == b == vector else None  # noqa: PLW0108 (numba wants these names)


for symbol, instruction in {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}.items():
    arithmetic(getattr(operator, symbol), instruction)


@intrinsic
def times_power_of_two(typing_context, v, n):
    """times_power_of_two(v, n): v * 2**n for whole numbers n from -127 to 127; 0 where n is -127."""

    def generate(context, builder, signature, args):
        bits = builder.add(builder.fptosi(args[1], INTS), ir.Constant(INTS, [127] * LANES))
        power = builder.bitcast(builder.shl(bits, ir.Constant(INTS, [23] * LANES)), FLOATS)
        return builder.fmul(args[0], power)

    return vector(v, n), generate


@intrinsic
def nearest(typing_context, v):
    """nearest(v): the elements rounded to whole numbers."""
    return vector(v), lambda context, builder, signature, args: call(builder, "llvm.rint", *args)


@intrinsic
def fma_tuples(typing_context, a, b, c):
    """fma_tuples(a, b, c): fma of each vector of three tuples; a shorter a is repeated."""

    def generate(context, builder, signature, args):
        a, b, c = (cgutils.unpack_tuple(builder, arg) for arg in args)
        results = [call(builder, "llvm.fma", *each) for each in zip(a * (len(b) // len(a)), b, c, strict=True)]
        return context.make_tuple(builder, signature.return_type, results)

    return c(a, b, c), generate


def zeros(n):
    """An intrinsic f(): a tuple of n vectors of zeros."""

    @intrinsic
    def zero_vectors(typing_context):
        def generate(context, builder, signature, args):
            return context.make_tuple(builder, signature.return_type, [constant(0)] * n)

        return types.UniTuple(vector, n)(), generate

    return zero_vectors


zero4 = zeros(4)


# Atomic operations on elements of an int64 array


@intrinsic
def fetch_add(typing_context, a, index, n):
    """fetch_add(a, index, n): add n to a[index] and return what it was before."""

    def generate(context, builder, signature, args):
        address = pointer(context, builder, a, args[0], index, args[1])
        return builder.atomic_rmw("add", address, context.cast(builder, args[2], n, types.int64), "acq_rel")

    return types.int64(a, index, n), generate


@intrinsic
def fetch(typing_context, a, index):
    """fetch(a, index): a[index], and see what other threads wrote before they changed it."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(pointer(context, builder, a, args[0], index, args[1]), "acquire", align=8)

    return types.int64(a, index), generate


@njit(inline="always")
def exp(x):
    """exp(x) with an error of at most 2 units in the last place; 0 below -87.7 and at most exp(88).

    x = n log 2 + r with |r| <= log(2)/2, and a polynomial for exp(r) (Cephes, expf).
    """
    x = maximum(splat(-88.0), x)
    x = splat(0.0) - maximum(splat(-88.0), splat(0.0) - x)
    n = nearest(x * splat(1.44269504))
    r = fma(n, splat(-0.693359375), x)
    r = fma(n, splat(2.12194440e-4), r)
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    p = fma(p, r * r, r) + splat(1.0)
    return times_power_of_two(p, n)
