"""training/autograd.py and training/fused.py against finite differences in float64 and against PyTorch."""

import itertools
import weakref

import numpy as np
import pytest
import torch

import gpt2
import gpt2_pico
from engines.instance import recording
from tests import gradients
from tests.random_model import random_tensors
from training import fused, kernels
from training.autograd import OPERATIONS, Tensor, fuse
from training.loss import estimate_loss, lm_loss, loss_and_gradients
from weights.names import nest

HPARAMS = gradients.HPARAMS | {"n_layer": 2}
WIDE = HPARAMS | {"n_vocab": 301, "n_head": 3}  # heads of 16 elements, for which attention is compiled
MODELS = ["gpt2", "fused", "compiled"]


def rand(*shape):
    """Float64, away from 0 and positive, so that every function below is smooth there."""
    return np.random.default_rng(len(shape) + sum(shape)).uniform(0.5, 1.5, shape)


def numeric_gradient(function, arrays, i, step=1e-6):
    """d sum(weighted(function)) / d arrays[i], element by element."""
    gradient, move = np.zeros((2, *arrays[i].shape))
    for index in np.ndindex(gradient.shape):
        move[index] = step
        ends = [[*arrays[:i], moved, *arrays[i + 1 :]] for moved in (arrays[i] + move, arrays[i] - move)]
        above, below = (np.sum(weighted(function(*end))) for end in ends)
        gradient[index], move[index] = (above - below) / (2 * step), 0
    return gradient


def weighted(y):
    """y with another weight for each element: the gradient of a plain sum is 1 everywhere."""
    return y * np.cos(np.arange(y.size)).reshape(y.shape)


def in_place(x):
    y = np.exp(x)
    y += x
    y -= 1
    y *= x
    y /= 2.0
    return y


IDS = np.array([[2, 0, 2], [1, 2, 2]])
CASES = {
    "add, broadcast": (np.add, rand(4, 2, 3), rand(2, 1)),
    "subtract": (np.subtract, rand(2, 3), rand(3)),
    "negative": (np.negative, rand(3)),
    "multiply, broadcast twice": (np.multiply, rand(4, 1, 3), rand(2, 1)),
    "divide": (np.divide, rand(2, 3), rand(1, 3)),
    "power": (np.power, rand(2, 3), rand(3)),
    "square": (lambda x: x**2, rand(2, 3)),
    "sqrt": (np.sqrt, rand(2, 3)),
    "exp": (np.exp, rand(2, 3)),
    "log": (np.log, rand(2, 3)),
    "tanh": (np.tanh, rand(2, 3)),
    "matmul": (np.matmul, rand(2, 3), rand(3, 4)),
    "matmul, stacked": (np.matmul, rand(5, 2, 3), rand(5, 3, 4)),
    "matmul, transposed": (lambda a, b: a @ b.T, rand(2, 3), rand(4, 3)),
    "sum": (np.sum, rand(2, 3)),
    "sum, axes": (lambda x: np.sum(x, axis=(0, 2), keepdims=True), rand(2, 3, 4)),
    "mean, axis": (lambda x: np.mean(x, axis=-1, keepdims=True), rand(2, 3)),
    "max, axis": (lambda x: np.max(x, axis=-1, keepdims=True), rand(2, 3)),
    "reshape": (lambda x: x.reshape(3, -1), rand(2, 6)),
    "swapaxes": (lambda x: np.swapaxes(x, 0, -1), rand(2, 3, 4)),
    "T": (lambda x: x.T, rand(2, 3)),
    "slice": (lambda x: x[..., 1:3], rand(2, 4)),
    "slice and integer": (lambda x: x[:, 1], rand(2, 4, 3)),
    "rows by ids": (lambda x: x[IDS], rand(3, 4)),
    "ids from the end": (lambda x: x[IDS - 3], rand(3, 4)),
    "ids of the second axis": (lambda x: x[:, IDS], rand(2, 3)),
    "a mask": (lambda x: x[np.array([True, False, True])], rand(3, 4)),
    "new axis": (lambda x: x[:, None, 1:], rand(3, 4)),
    "split": (lambda x: np.multiply(*np.split(x, 2, axis=-1)), rand(3, 4)),
    "split, first axis": (lambda x: np.multiply(*np.split(x, 2)), rand(4, 3)),
    "used unchanged and broadcast": (lambda x, y: x + y * x, rand(3), rand(2, 3)),
    "operators": (lambda x: 1 - (2 / x) * 3 + x / 2 - x - 1 + -x, rand(3)),
    "in place": (in_place, rand(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_finite_differences_and_float32_stays_float32(case):
    function, *arrays = CASES[case]
    tensors = [Tensor(a.copy()) for a in arrays]
    y = function(*tensors)
    np.testing.assert_array_equal(y.data, function(*[a.copy() for a in arrays]))
    np.sum(weighted(y)).backward()
    for i, tensor in enumerate(tensors):
        assert tensor.grad.shape == tensor.shape
        np.testing.assert_allclose(tensor.grad, numeric_gradient(function, arrays, i), rtol=1e-6, atol=1e-8)
    tensors = [Tensor(a.astype(np.float32)) for a in arrays]
    y = function(*tensors)
    np.mean(y).backward()
    assert {y.dtype, *(t.grad.dtype for t in tensors)} == {np.dtype(np.float32)}


def test_every_operation_is_among_the_cases(monkeypatch):
    operations, used = dict(OPERATIONS), set()
    for key, f in operations.items():
        monkeypatch.setitem(OPERATIONS, key, lambda *args, key=key, f=f, **named: (used.add(key), f(*args, **named))[1])
    for function, *arrays in CASES.values():
        function(*map(Tensor, arrays))
    assert used == operations.keys()


def test_constants_are_not_differentiated():
    a, x = rand(2, 3), Tensor(rand(2, 3))
    for y in (a + x, a - x, a * x, a / x, 2.0**x, np.swapaxes(a, 0, 1) @ x):
        assert [parent is x for parent in y.parents] == [True]


def test_corner_cases():
    x = Tensor(np.array([0.0, 2.0]))
    np.sum(x**0 + x**1 + x**2).backward()
    np.testing.assert_array_equal(x.grad, [1, 5])
    x = Tensor(np.array(3.0))
    (np.sum(x[None]) * x).backward()
    assert x.grad == 6
    x = Tensor(np.ones((300, 2), np.float32))
    np.sum(x[np.array([7, 7], np.uint8)] * np.ones((2, 2))).backward()  # multiplied by float64
    assert x.grad.dtype == np.float32 and x.grad[7].tolist() == [2, 2] and np.sum(x.grad) == 4
    x = Tensor(np.array([1.0, 3, 3, 2]))
    np.max(x).backward()
    np.testing.assert_array_equal(x.grad, [0, 0.5, 0.5, 0])  # equal maxima share the gradient


def test_a_long_chain_needs_no_recursion():
    x = y = Tensor(np.ones(1))
    for _ in range(2000):
        y = y + x
    y.backward()
    assert x.grad == 2001


def test_gradients_add_up_and_share_no_memory():
    x = Tensor(rand(3))
    np.sum(x).backward()
    np.sum(x * 2).backward()  # a second result
    np.testing.assert_allclose(x.grad, [3, 3, 3])
    a, b = Tensor(rand(3)), Tensor(rand(3))
    y = a + b
    np.sum(y + y).backward()
    a.grad *= 0
    np.testing.assert_array_equal(b.grad, [2, 2, 2])
    a, b = Tensor(rand(3)), Tensor(rand(3))
    left, right = a * 1, b * 1
    np.sum((left + right) * 3 + left * 5).backward()  # left gets more after both got the same array
    np.testing.assert_allclose([a.grad, b.grad], [[8, 8, 8], [3, 3, 3]])


def test_memory_is_freed_while_backward_runs():
    """When the gradient arrives at the first operation, the arrays of the last are freed."""
    x, alive = Tensor(rand(3)), []
    y = np.tanh(fuse(lambda x: x * 1, lambda dy, y, x: [alive.append(last()) or dy])(x))
    z = np.exp(y)
    last = weakref.ref(z.data)
    total = np.sum(z * y)
    del z
    assert last() is not None
    total.backward()
    assert alive == [None]
    with pytest.raises(ValueError, match="already run"):
        total.backward()


def without_derivative(name):
    return NotImplementedError, f"^{name} .*autograd.py"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (np.sin, *without_derivative("np.sin")),
        (np.add.reduce, *without_derivative("np.add.reduce")),
        (lambda x: np.sum(x, where=x.data > 0), *without_derivative("np.sum with where")),
        (lambda x: np.add(x, x, out=x.data), *without_derivative("np.add with out")),
        (lambda x: np.sum(x, 0, np.float64), *without_derivative("np.sum with such arguments")),
        (lambda x: np.split(x, [1]), *without_derivative("np.split with indices")),
        (lambda x: np.concatenate([x, x]), *without_derivative("np.concatenate")),
        (lambda x: x @ rand(3), *without_derivative("np.matmul with a vector")),
        (lambda x: np.add(x, "a"), TypeError, "ufunc 'add'"),  # not for want of a derivative
        (np.asarray, TypeError, r"take its \.data"),
        (np.float64, TypeError, r"take its \.data"),
        (lambda x: np.zeros(3).__setitem__(slice(None), x), TypeError, r"take its \.data"),
        (lambda x: np.exp(x).backward(), ValueError, r"a scalar, not a Tensor of shape \(3,\)"),
        (lambda x: np.split(x, 2), ValueError, "cannot be split into 2 equal parts"),
    ],
)
def test_impossible_calls_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(Tensor(rand(3)))


BINARY = [  # m is numpy or torch
    lambda m, a, b: a + b,
    lambda m, a, b: a * b,
    lambda m, a, b: a - b,
    lambda m, a, b: a / (b * b + 1.0),
    lambda m, a, b: m.exp(m.tanh(a)) - b,
    lambda m, a, b: m.mean(a) * b,
    lambda m, a, b: m.sum(a) * 0.1 + b,
]


@pytest.mark.parametrize("seed", range(20))
def test_random_expressions_have_pytorchs_gradients(seed):
    """Ten random operations, with broadcasting, each on random results of those before."""
    rng = np.random.default_rng(seed)
    values = [rng.uniform(0.5, 1.5, shape) for shape in [(2, 3), (3,), (1, 3), (2, 1), (), (4, 2, 3)]]
    ours, theirs = [Tensor(v) for v in values], [torch.tensor(v, requires_grad=True) for v in values]
    leaves = list(zip(ours, theirs, strict=True))
    for _ in range(10):
        function, (i, j) = BINARY[rng.integers(len(BINARY))], rng.integers(len(ours), size=2)
        ours.append(function(np, ours[i], ours[j]))
        theirs.append(function(torch, theirs[i], theirs[j]))
    np.mean(ours[-1] + ours[-2] * ours[-3]).backward()
    torch.mean(theirs[-1] + theirs[-2] * theirs[-3]).backward()
    for mine, other in leaves:
        assert (mine.grad is None) == (other.grad is None)
        if other.grad is not None:
            np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-8, atol=1e-10)


# GPT-2 itself


@pytest.mark.parametrize("model", [gpt2, fused.training_model(), kernels.training_model()], ids=MODELS)
def test_gradients_of_every_parameter_are_pytorchs_and_the_finite_differences(model):
    """Within 1e-4 of PyTorch's in float32, and within 1e-6 of central differences in float64."""
    rows = list(gradients.table(WIDE, model, (2, 37)))
    assert len(rows) == 4 + 12 * WIDE["n_layer"]
    for name, _, to_pytorch, to_differences in rows:
        assert to_pytorch < 1e-4, name
        assert to_differences < 1e-6, name


@pytest.mark.parametrize(
    "model", [gpt2, fused.training_model(), kernels.training_model(), gpt2_pico], ids=[*MODELS, "pico"]
)
def test_losses_are_pytorchs_and_gradients_float32(model):
    """gpt2_pico, which is differentiable unchanged, takes one sequence."""
    inputs, targets = gradients.batch(shape=(20,) if model is gpt2_pico else (3, 20))
    tensors, batch = random_tensors(HPARAMS), np.array([np.atleast_2d(inputs), np.atleast_2d(targets)])
    params, n_head = nest(tensors, HPARAMS["n_layer"]), HPARAMS["n_head"]
    expected, theirs = gradients.torch_gradients(HPARAMS, tensors, *batch)
    loss, found = loss_and_gradients(tensors, HPARAMS, inputs, targets, model)
    np.testing.assert_allclose([loss, lm_loss(params, inputs, targets, n_head, model)], expected, rtol=1e-5)
    for name in tensors:
        assert found[name].dtype == np.float32
        assert gradients.relative_error(found[name], theirs[name]) < 1e-4, name
    batches = [part for part in np.split(batch, [1], axis=1) if part.size]  # of different sizes
    found = estimate_loss(lambda inputs: gpt2.gpt2(inputs, **params, n_head=n_head), batches)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# The fused functions, one by one


@pytest.mark.parametrize("shape", [(500,), (2, 3, 4, 5), (400, 300), (48,), (2, 3, 4, 48)])
@pytest.mark.parametrize("make", [fused.training_model, kernels.training_model])
def test_fused_functions_are_gpt2s_forward_and_pytorchs_backward(shape, make):
    model, rng = make(), np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), dtype=np.float32)
    g, b = rng.standard_normal((2, shape[-1]), dtype=np.float32)
    functional, leaves = torch.nn.functional, [torch.tensor(a, requires_grad=True) for a in (x, g, b)]
    cases = [
        ("gelu", [x], functional.gelu(leaves[0], approximate="tanh")),
        ("softmax", [x], torch.softmax(leaves[0], -1)),
        ("layer_norm", [x, g, b], functional.layer_norm(leaves[0], shape[-1:], *leaves[1:])),
    ]
    for name, arrays, theirs in cases:
        tensors = list(map(Tensor, arrays))
        y = getattr(model, name)(*tensors)
        np.testing.assert_allclose(y.data, getattr(gpt2, name)(*arrays), rtol=1e-5, atol=1e-6)
        np.sum(y * dy).backward()
        leaves[0].grad = None
        (theirs * torch.from_numpy(dy)).sum().backward()
        for tensor, leaf, atol in zip(tensors, leaves, (2e-5, 1e-4, 1e-4), strict=False):
            np.testing.assert_allclose(tensor.grad, leaf.grad.numpy(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("functions", [fused, kernels])
@pytest.mark.parametrize("shape", [(7, 11), (4, 5, 3, 37)])
def test_cross_entropy_is_pytorchs_and_finite_for_extreme_logits(shape, functions):
    *lead, n = shape
    rng, cross_entropy = np.random.default_rng(0), functions.training_model().cross_entropy
    logits, targets = 5 * rng.standard_normal(shape, dtype=np.float32), rng.integers(0, n, lead)
    ours, theirs = Tensor(logits), torch.tensor(logits, requires_grad=True)
    loss = cross_entropy(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs.reshape(-1, n), torch.from_numpy(targets).reshape(-1))
    loss.backward()
    expected.backward()
    np.testing.assert_allclose([loss.data, cross_entropy(logits, targets)], expected.item(), rtol=1e-6)
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=1e-4, atol=1e-8)
    logits = np.array([[1e4, 0, -1e4], [-1e4, 0, 1e4]], dtype=np.float32)
    np.testing.assert_allclose(functions.token_losses(logits, np.array([0, 1])), [0, 1e4])


@pytest.mark.parametrize("shape", [(3, 1, 16), (2, 3, 70, 48), (1, 2, 32, 64)])
def test_compiled_attention_is_gpt2s_forward_and_pytorchs_backward(shape):
    q, k, v, dy = np.random.default_rng(0).standard_normal((4, *shape), dtype=np.float32)
    tensors, leaves = list(map(Tensor, (q, k, v))), [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    y = kernels.training_model().attention(*tensors)
    np.testing.assert_allclose(y.data, gpt2.attention(q, k, v), rtol=1e-4, atol=1e-5)
    np.sum(y * dy).backward()
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    (theirs * torch.from_numpy(dy)).sum().backward()
    for tensor, leaf in zip(tensors, leaves, strict=True):
        np.testing.assert_allclose(tensor.grad, leaf.grad.numpy(), rtol=1e-3, atol=2e-5)


def test_both_engines_have_the_same_loss_and_gradients_with_dropout():
    """They sample the same masks in the same order; 37 positions are not a multiple of a vector."""
    tensors, (inputs, targets) = random_tensors(WIDE), gradients.batch(WIDE, (2, 37))
    results = []
    for make in (fused.training_model, kernels.training_model):
        model = make(0.3)
        model.drop.seed(5)
        results.append(loss_and_gradients(tensors, WIDE, inputs, targets, model))
    (expected, theirs), (loss, found) = results
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name in tensors:
        assert gradients.relative_error(found[name], theirs[name]) < 1e-4, name


# Dropout


def apply_dropout(p, *seed, x):
    drop = fused.Dropout(p)
    drop.seed(*seed)
    return drop.after(lambda x: x)(x)


def test_dropout_zeroes_a_fraction_and_keeps_the_mean_and_depends_on_its_seed_alone():
    x = np.ones((200, 300), np.float32)
    for p in (0.1, 0.5):
        y = apply_dropout(p, 1, x=x)
        assert abs(np.mean(y == 0) - p) < 0.01 and y.dtype == np.float32
        np.testing.assert_allclose(y[y != 0], 1 / (1 - p), rtol=1e-4)
    leaf = Tensor(x)
    np.sum(apply_dropout(0.5, 1, 2, x=leaf)).backward()
    np.testing.assert_array_equal(leaf.grad, apply_dropout(0.5, 1, 2, x=x))
    differing = [apply_dropout(0.5, *seed, x=x) for seed in ((1, 2), (1, 3), (2, 2), (1, 2, 1))]
    assert all(np.any(a != b) for a, b in itertools.combinations(differing, 2))


def test_dropout_is_where_the_paper_has_it():
    """After embed, softmax, mha and ffn of the training model; gpt2 itself is unchanged."""
    params, ids = nest(random_tensors(HPARAMS), HPARAMS["n_layer"]), gradients.batch()[0]
    names = ("gelu", "softmax", "layer_norm", "embed", "mha", "ffn")
    before, results = {name: getattr(gpt2, name) for name in names}, {name: [] for name in names}
    model = fused.training_model(0.5)
    for name in names:
        setattr(model, name, recording(getattr(model, name), results[name]))
    model.gpt2(ids, **params, n_head=HPARAMS["n_head"])
    for name, fraction in zip(names, (0, 0.75, 0, 0.5, 0.5, 0.5), strict=True):  # half of the weights are masked anyway
        assert results[name]
        for y in results[name]:
            assert abs(np.mean(y == 0) - fraction) < 0.05, name
    assert all(getattr(gpt2, name) is function for name, function in before.items())
