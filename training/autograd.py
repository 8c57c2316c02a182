"""Reverse-mode automatic differentiation on NumPy arrays: what f(x) does to x is recorded, and walked back for df/dx.

A Tensor is an array that remembers which operation made it. Its operators are NumPy's functions, and NumPy hands each
of its functions that meets a Tensor to the Tensor (NEP 13, __array_ufunc__; NEP 18, __array_function__). Code written
for arrays runs on Tensors as it stands: gpt2.gpt2() with Tensors for weights gives Tensors of logits.

    w = Tensor(np.ones((3, 2), np.float32))
    loss = np.mean(np.tanh(x @ w))      # x is an array: a constant
    loss.backward()
    w.grad                              # d loss / d w, [3, 2]

The dtype of the data is kept: float32 stays float32, float64 (for checks against finite differences) float64.
"""

import functools
import inspect
import itertools
from typing import NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

numbers = itertools.count()


class Tensor(NDArrayOperatorsMixin):
    """A differentiable array. data: the array. grad: after backward(), for a Tensor that no operation made, the
    gradient, of the same shape; the backward() of another result adds to it."""

    def __init__(self, data, parents=(), pull_back=None):
        self.data, self.grad = np.asarray(data), None
        self.parents, self.pull_back = parents, pull_back  # what it was made of; from its gradient to theirs
        self.number = next(numbers)  # a result has a higher number than what it was made of

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    T = property(np.transpose)

    # x += y makes a new x, and leaves the one that other operations may have kept for their derivatives as it was
    __iadd__, __isub__ = NDArrayOperatorsMixin.__add__, NDArrayOperatorsMixin.__sub__
    __imul__, __itruediv__ = NDArrayOperatorsMixin.__mul__, NDArrayOperatorsMixin.__truediv__

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        return f"Tensor({self.data!r})"

    def __getitem__(self, index):
        return apply(getitem, "getitem", (self, index), {})

    def reshape(self, *shape):
        return np.reshape(self, shape[0] if len(shape) == 1 else shape)

    def item(self):
        return self.data.item()

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
        if method != "__call__" or ufunc not in OPERATIONS:
            raise unsupported(name)
        return apply(OPERATIONS[ufunc], name, inputs, options)

    def __array_function__(self, function, types, inputs, options):
        if function is np.split:
            return split(*inputs, **options)
        if function not in OPERATIONS:
            raise unsupported(function.__name__)
        return apply(OPERATIONS[function], function.__name__, inputs, options)

    def __array__(self, *_, **__):
        raise TypeError("a Tensor becomes no array by itself, for its gradient would be lost; take its .data")

    def backward(self):
        """Computes d self / d t for every Tensor t that self depends on and no operation made, and adds it to t.grad.

        self is one number. What was recorded is dropped on the way, and its memory with it, so this runs only once.
        Raises ValueError for more than one number, and for what has been walked back before.
        """
        if self.size != 1:
            raise ValueError(f"backward() starts from one number, not from shape {self.shape}; take np.mean of it")
        nodes = sorted(ancestors(self), key=lambda node: node.number)
        gradients = {self.number: Gradient(np.ones_like(self.data))}
        while nodes:  # from the last made to the first: each comes when all that was made of it has added its share
            node = nodes.pop()
            gradient = gradients.pop(node.number)
            if node.pull_back is None:
                node.grad = np.asarray(gradient.own()) if node.grad is None else node.grad + gradient.total
                continue
            for parent, share in zip(node.parents, node.pull_back(gradient.total), strict=True):
                if parent.number not in gradients:
                    gradients[parent.number] = Gradient()
                gradients[parent.number].add(share, parent.data, gradient.total)
            node.parents, node.pull_back = (), used_up


def value_and_gradients(function, tensors):
    """(value, gradients by name) of a function that makes one number of Tensors by name; tensors: arrays by name."""
    leaves = {name: Tensor(array) for name, array in tensors.items()}
    value = function(leaves)
    value.backward()
    return value.item(), {name: leaf.grad for name, leaf in leaves.items()}


def ancestors(tensor):
    """The Tensor and every one it was made of. A loop over a stack: a recursion would end at Python's depth of 1000."""
    found, stack = {tensor.number: tensor}, [tensor]
    while stack:
        for parent in stack.pop().parents:
            if parent.number not in found:
                found[parent.number] = parent
                stack.append(parent)
    return found.values()


def used_up(_):
    raise ValueError("backward() has walked through this before; compute it anew")


class At(NamedTuple):
    """The gradient of x[index]: `values` there, 0 elsewhere."""

    index: object
    values: np.ndarray


class Gradient:
    """The sum of the shares that come to one Tensor. ours: nothing else holds that array, so it may be added to."""

    def __init__(self, total=None):
        self.total, self.ours = total, True

    def own(self):
        if not self.ours:
            self.total, self.ours = self.total.copy(), True
        return self.total

    def add(self, share, x, dy):
        """x: the array whose gradient this is; dy: the gradient that the share was computed from."""
        if isinstance(share, At):
            self.total = np.zeros_like(x) if self.total is None else self.total
            add_at(self.own(), *share)
            return
        share = np.asarray(unbroadcast(share, x.shape), x.dtype)
        if self.total is None:
            self.total, self.ours = share, share.flags.writeable and not np.may_share_memory(share, dy)
        elif self.ours:
            self.total += share
        else:
            self.total, self.ours = np.asarray(self.total + share), True


def unbroadcast(dy, shape):
    """Sums over the axes along which an array of this shape was repeated to become one of dy's."""
    if dy.shape == shape:
        return dy
    dy = dy.sum(axis=tuple(range(dy.ndim - len(shape))))
    return dy.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 < dy.shape[i]), keepdims=True)


def add_at(total, index, values):
    """total[index] += values, also where an index occurs twice. np.add.at does that for all, ten times slower."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, int | slice | type(...) | None) for part in parts):  # nothing can occur twice
        total[index] += values
    elif isinstance(index, np.ndarray) and index.dtype.kind in "iu" and index.size:  # token ids
        ids = index.reshape(-1).astype(np.intp) % len(total)  # -1 is the last
        order = np.argsort(ids, kind="stable")  # equal ids side by side: their rows are summed in one go
        ids, starts = np.unique(ids[order], return_index=True)
        total[ids] += np.add.reduceat(values.reshape(order.size, *total.shape[1:])[order], starts)
    else:
        np.add.at(total, index, values)


# An operation is a function from arrays to its value and, argument by argument, the function from dy, the gradient of
# the value, to the gradient of the argument (Griewank & Walther 2008, section 3.2).

OPERATIONS = {}  # by the function of NumPy that each stands for when that meets a Tensor


def operation(function):
    def register(ours):
        OPERATIONS[function] = ours
        return ours

    return register


def unsupported(name, options=()):
    name = f"np.{name}" + (f" with {', '.join(options)}" if options else "")
    return NotImplementedError(f"{name} has no derivative in autograd.py; add it there, or take the Tensor's .data")


def array_of(x):
    return x.data if isinstance(x, Tensor) else x


def apply(ours, name, inputs, options):
    """The value of an operation of ours on arrays, as a Tensor that knows which Tensors it was made of."""
    try:
        value, *derivatives = ours(*map(array_of, inputs), **options)
    except TypeError as error:  # an argument that NumPy's function has and ours lacks
        raise unsupported(name, options or ["such arguments"]) from error
    made_of = [(x, derivative) for x, derivative in zip(inputs, derivatives, strict=False) if isinstance(x, Tensor)]
    return Tensor(value, [x for x, _ in made_of], lambda dy: (derivative(dy) for _, derivative in made_of))


def fuse(forward, backward):
    """forward, a function of arrays, as one operation, recorded when an argument is a Tensor.

    backward(dy, y, *arrays) returns the gradients of all arguments in their order, each an array of its own, None for
    one that has none; y is forward(*arrays).
    """
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def fused(*args, **kwargs):
        inputs = signature.bind(*args, **kwargs).arguments.values()
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not tensors:
            return forward(*args, **kwargs)
        arrays = [array_of(x) for x in inputs]
        y = forward(*arrays)

        def pull_back(dy):
            gradients = zip(inputs, backward(dy, y, *arrays), strict=True)
            return [gradient for x, gradient in gradients if isinstance(x, Tensor)]

        return Tensor(y, tensors, pull_back)

    return fused


@operation(np.add)
def add(a, b):
    return a + b, lambda dy: dy, lambda dy: dy


@operation(np.subtract)
def subtract(a, b):
    return a - b, lambda dy: dy, lambda dy: -dy


@operation(np.negative)
def negative(x):
    return -x, lambda dy: -dy


@operation(np.multiply)
def multiply(a, b):
    return a * b, lambda dy: dy * b, lambda dy: dy * a


@operation(np.divide)
def divide(a, b):
    y = a / b
    return y, lambda dy: dy / b, lambda dy: -dy * y / b


@operation(np.power)
def power(a, b):
    y = a**b
    return y, lambda dy: dy * b * a ** (b - (b != 0)), lambda dy: dy * y * np.log(a)  # a**0 has none at 0 either


@operation(np.sqrt)
def sqrt(x):
    y = np.sqrt(x)
    return y, lambda dy: dy / (2 * y)


@operation(np.exp)
def exp(x):
    y = np.exp(x)
    return y, lambda dy: dy * y


@operation(np.log)
def log(x):
    return np.log(x), lambda dy: dy / x


@operation(np.tanh)
def tanh(x):
    y = np.tanh(x)
    return y, lambda dy: dy * (1 - y * y)


@operation(np.matmul)
def matmul(a, b):
    if min(np.ndim(a), np.ndim(b)) < 2:
        raise unsupported("matmul", ["a vector"])

    def derivative_of_b(dy):
        if b.strides[-1] <= b.strides[-2]:  # rows are contiguous, and the gradient's too, or adding them up is slow
            return np.swapaxes(a, -1, -2) @ dy
        return np.swapaxes(np.swapaxes(dy, -1, -2) @ a, -1, -2)

    return a @ b, lambda dy: dy @ np.swapaxes(b, -1, -2), derivative_of_b


@operation(np.sum)
def sum_(x, axis=None, keepdims=False):
    return np.sum(x, axis=axis, keepdims=keepdims), lambda dy: np.broadcast_to(restore(dy, axis, keepdims), x.shape)


@operation(np.mean)
def mean(x, axis=None, keepdims=False):
    y = np.mean(x, axis=axis, keepdims=keepdims)
    return y, lambda dy: np.broadcast_to(restore(dy / (x.size // y.size), axis, keepdims), x.shape)


@operation(np.max)
def max_(x, axis=None, keepdims=False):
    highest = x == np.max(x, axis=axis, keepdims=True)  # equals share the gradient
    share = highest / np.sum(highest, axis=axis, keepdims=True, dtype=x.dtype)
    return np.max(x, axis=axis, keepdims=keepdims), lambda dy: restore(dy, axis, keepdims) * share


def restore(dy, axis, keepdims):
    """dy with the axes that a sum removed, each of length 1."""
    return dy if keepdims or axis is None else np.expand_dims(dy, axis)


@operation(np.reshape)
def reshape(x, shape):
    return np.reshape(x, shape), lambda dy: dy.reshape(x.shape)


@operation(np.swapaxes)
def swapaxes(x, axis1, axis2):
    return np.swapaxes(x, axis1, axis2), lambda dy: np.swapaxes(dy, axis1, axis2)


@operation(np.transpose)
def transpose(x):
    return np.transpose(x), np.transpose


def getitem(x, index):
    return x[index], lambda dy: At(index, dy)


def split(x, n, axis=0):
    """np.split into n equal parts: as many slices."""
    if not isinstance(n, int):
        raise unsupported("split", ["indices"])
    if x.shape[axis] % n:
        raise ValueError(f"an axis of length {x.shape[axis]} has no {n} equal parts")
    length, before = x.shape[axis] // n, (slice(None),) * (axis % x.ndim)
    return [x[(*before, slice(i * length, (i + 1) * length))] for i in range(n)]
