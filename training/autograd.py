"""Reverse-mode automatic differentiation on NumPy arrays.

A Tensor is an array that records which operation made it and from which Tensors. backward() goes through the recorded
operations from the last to the first and applies the chain rule. When a function of NumPy gets a Tensor as an argument,
NumPy calls the Tensor's __array_ufunc__ (NEP 13) or __array_function__ (NEP 18) instead, so code written for arrays
runs on Tensors unchanged: gpt2.gpt2() with Tensors as parameters returns logits as a Tensor.

    w = Tensor(np.ones((3, 2), np.float32))
    loss = np.mean(np.tanh(x @ w))      # x is an array: a constant
    loss.backward()
    w.grad                              # d loss / d w, [3, 2]

Gradients have the dtype of the data: float32, or float64 for checks against finite differences.
"""

import functools
import inspect
import itertools
from typing import NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

serial_numbers = itertools.count()


class Tensor(NDArrayOperatorsMixin):
    """A differentiable array.

    data: the array. grad: None until backward() is called on a result that depends on this Tensor, then the gradient,
    an array of the same shape; further calls add to it. Only leaves, Tensors that no operation made, get a grad.
    """

    def __init__(self, data, parents=(), pull_back=None):
        self.data, self.grad = np.asarray(data), None
        self.parents, self.pull_back = parents, pull_back  # the operands; function from dy to their gradients
        self.number = next(serial_numbers)  # a result has a higher number than its operands

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    T = property(np.transpose)

    # x += y makes a new Tensor: the derivatives of earlier operations may still need the old data
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
        raise TypeError("a Tensor is not converted to an array, because its gradient would be lost; take its .data")

    def backward(self):
        """Compute d self / d t for every leaf t that self depends on, and add it to t.grad.

        The recorded operations, and the arrays they hold, are freed on the way, so this runs only once.
        Raises ValueError if self is not a scalar, or if its operations have been freed already.
        """
        if self.size != 1:
            raise ValueError(f"backward() needs a scalar, not a Tensor of shape {self.shape}; take np.mean of it")
        nodes = sorted(ancestors(self), key=lambda node: node.number)
        gradients = {self.number: Gradient(np.ones_like(self.data))}
        while nodes:  # newest first: a Tensor's gradient is complete when all results that use it have been visited
            node = nodes.pop()
            gradient = gradients.pop(node.number)
            if node.pull_back is None:
                node.grad = np.asarray(gradient.own()) if node.grad is None else node.grad + gradient.total
                continue
            shared = gradient.total if len(node.parents) > 1 or not gradient.owned else None
            for parent, part in zip(node.parents, node.pull_back(gradient.total), strict=True):
                if parent.number not in gradients:
                    gradients[parent.number] = Gradient()
                gradients[parent.number].add(part, parent.data, shared)
            node.parents, node.pull_back = (), freed


def value_and_gradients(function, tensors):
    """Return the value and the gradients by name of a scalar function of a dict of Tensors. tensors: arrays by name."""
    leaves = {name: Tensor(array) for name, array in tensors.items()}
    value = function(leaves)
    value.backward()
    return value.item(), {name: leaf.grad for name, leaf in leaves.items()}


def ancestors(tensor):
    """Return the Tensor and all Tensors that it depends on. (Recursion would fail at Python's limit of 1000 levels.)"""
    found, stack = {tensor.number: tensor}, [tensor]
    while stack:
        for parent in stack.pop().parents:
            if parent.number not in found:
                found[parent.number] = parent
                stack.append(parent)
    return found.values()


def freed(_):
    raise ValueError("backward() has already run and freed the recorded operations; compute the result again")


class At(NamedTuple):
    """The gradient of x[index] with respect to x: `values` at index, 0 elsewhere."""

    index: object
    values: np.ndarray


class Gradient:
    """The sum of the gradients that one Tensor gets from the operations that use it.

    owned: whether nothing else refers to the array `total`, so that it can be added to in place.
    """

    def __init__(self, total=None):
        self.total, self.owned = total, True

    def own(self):
        if not self.owned:
            self.total, self.owned = self.total.copy(), True
        return self.total

    def add(self, part, x, shared):
        """Add a gradient. x: the array whose gradient this is; shared: an array in use of which part may be a view."""
        if isinstance(part, At):
            self.total = np.zeros_like(x) if self.total is None else self.total
            add_at(self.own(), *part)
            return
        part = np.asarray(unbroadcast(part, x.shape), x.dtype)
        if self.total is None:
            is_view = shared is not None and np.may_share_memory(part, shared)
            self.total, self.owned = part, part.flags.writeable and not is_view
        elif self.owned:
            self.total += part
        else:
            self.total, self.owned = np.asarray(self.total + part), True


def unbroadcast(dy, shape):
    """Sum dy over the axes along which an array of this shape was broadcast to dy's shape."""
    if dy.shape == shape:
        return dy
    dy = dy.sum(axis=tuple(range(dy.ndim - len(shape))))
    return dy.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 < dy.shape[i]), keepdims=True)


def add_at(total, index, values):
    """Compute total[index] += values, adding every value where an index occurs twice.

    np.add.at does that for any index, ten times slower.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, int | slice | type(...) | None) for part in parts):  # no index occurs twice
        total[index] += values
    elif isinstance(index, np.ndarray) and index.dtype.kind in "iu" and index.size:  # token ids
        ids = index.reshape(-1).astype(np.intp) % len(total)  # -1 is the last
        order = np.argsort(ids, kind="stable")  # equal ids become neighbors; their rows are summed
        ids, starts = np.unique(ids[order], return_index=True)
        total[ids] += np.add.reduceat(values.reshape(order.size, *total.shape[1:])[order], starts)
    else:
        np.add.at(total, index, values)


# An operation takes arrays. It returns its value and, for each argument, a function that turns dy, the gradient of the
# value, into the gradient of that argument (Griewank & Walther 2008, section 3.2).

OPERATIONS = {}  # by the function of NumPy that each replaces when an argument is a Tensor


def operation(function):
    def register(ours):
        OPERATIONS[function] = ours
        return ours

    return register


def unsupported(name, options=()):
    name = f"np.{name}" + (f" with {', '.join(options)}" if options else "")
    remedy = "add it to training/autograd.py, or take the Tensor's .data"
    return NotImplementedError(f"{name} has no derivative here; {remedy}")


def array_of(x):
    return x.data if isinstance(x, Tensor) else x


def takes(function, inputs, options):
    """Return whether a function has parameters for these arguments."""
    try:
        inspect.signature(function).bind(*inputs, **options)
    except TypeError:
        return False
    return True


def apply(ours, name, inputs, options):
    """Apply one of OPERATIONS to arrays and Tensors; return a Tensor that records which Tensors it depends on."""
    try:
        value, *derivatives = ours(*map(array_of, inputs), **options)
    except TypeError as error:
        if takes(ours, inputs, options):
            raise
        raise unsupported(name, options or ["such arguments"]) from error
    parents = [(x, derivative) for x, derivative in zip(inputs, derivatives, strict=False) if isinstance(x, Tensor)]
    return Tensor(value, [x for x, _ in parents], lambda dy: (derivative(dy) for _, derivative in parents))


def fuse(forward, backward):
    """Return forward, a function of arrays, as a single operation that also takes Tensors.

    backward(dy, y, *arrays), where y is forward(*arrays), returns the gradients of all arguments in their order: new
    arrays, or None for an argument without a gradient.
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
    return y, lambda dy: dy * b * a ** (b - (b != 0)), lambda dy: dy * y * np.log(a)  # a**0 has derivative 0, at 0 too


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
        if b.strides[-1] <= b.strides[-2]:  # in C order; so is its gradient, to be added up fast
            return np.swapaxes(a, -1, -2) @ dy
        return np.swapaxes(np.swapaxes(dy, -1, -2) @ a, -1, -2)

    return a @ b, lambda dy: dy @ np.swapaxes(b, -1, -2), derivative_of_b


@operation(np.sum)
def sum_(x, axis=None, *, keepdims=False):
    return np.sum(x, axis=axis, keepdims=keepdims), lambda dy: np.broadcast_to(restore(dy, axis, keepdims), x.shape)


@operation(np.mean)
def mean(x, axis=None, *, keepdims=False):
    y = np.mean(x, axis=axis, keepdims=keepdims)
    return y, lambda dy: np.broadcast_to(restore(dy / (x.size // y.size), axis, keepdims), x.shape)


@operation(np.max)
def max_(x, axis=None, *, keepdims=False):
    highest = x == np.max(x, axis=axis, keepdims=True)  # equal maxima share the gradient
    weight = highest / np.sum(highest, axis=axis, keepdims=True, dtype=x.dtype)
    return np.max(x, axis=axis, keepdims=keepdims), lambda dy: restore(dy, axis, keepdims) * weight


def restore(dy, axis, keepdims):
    """Return dy with the axes that a sum removed, each with length 1."""
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
    """np.split into n equal parts, as n slices."""
    if not isinstance(n, int):
        raise unsupported("split", ["indices"])
    if x.shape[axis] % n:
        raise ValueError(f"an axis of length {x.shape[axis]} cannot be split into {n} equal parts")
    length, before = x.shape[axis] // n, (slice(None),) * (axis % x.ndim)
    return [x[(*before, slice(i * length, (i + 1) * length))] for i in range(n)]
