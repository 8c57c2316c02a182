"""engines/quantized.py against NumPy: the codes and scales, the products with them, and the quality of a real model."""

import numpy as np
import pytest

import gpt2
from engines import batching, compiled
from tests.conftest import INPUTS, N_HEAD, ROOT, TINY, one_line_error
from tests.random_model import random_tensors
from utils import load_encoder_hparams_and_params
from weights.names import nest

pytest.importorskip("numba")

from engines import kernels, quantized
from engines.quantized import GROUP, Embedding, Int8, linear

DTYPES = ["int8", "int4"]
ROUNDING = 2.0**-24  # largest relative error of one float32 operation
SHAPES = [(32, 6), (96, 7), (768, 131), (3072, 66)]  # of weights: [n_in, n_out]
OTHER_SHAPES = [(36, 108), (48, 5), (5, 1)]  # that stay float32


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def dequantized(w):
    """The weight [n_in, n_out] that codes and scales stand for, in float64."""
    if isinstance(w, Int8):
        return (w.codes.astype(np.float64) * w.scales[:, None]).T
    groups = w.codes.reshape(*w.scales.shape, GROUP // 2)
    codes = np.concatenate([groups % 16, groups // 16], axis=-1) - 8.0
    return (codes * w.scales[..., None]).reshape(len(codes), -1).T


def steps(w):
    """The scale of each element of a weight [n_in, n_out]."""
    return np.broadcast_to(w.scales[:, None], w.codes.shape).T if isinstance(w, Int8) else w.scales.repeat(GROUP, 1).T


@pytest.fixture(scope="module")
def shakespeare():
    _, hparams, params = load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))
    return hparams, params


# Quantization


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_a_weight_is_off_by_at_most_half_a_step(dtype, n_in, n_out):
    w = random(n_in, n_out) * random(1, n_out)
    found = quantized.quantized(w, dtype)
    error = np.abs(dequantized(found) - w) / np.abs(steps(found))
    limit = 0.5 if dtype == "int8" else 1  # an element may be the opposite of the largest: 8 steps, of at most 7
    assert np.max(error) <= limit + 1e-4
    assert np.mean(error) < 0.27
    largest = np.abs(w).max(axis=0) if dtype == "int8" else np.abs(w).reshape(-1, GROUP, n_out).max(axis=1).T
    np.testing.assert_allclose(np.abs(found.scales) * (127 if dtype == "int8" else 8), largest, rtol=1e-6)
    assert found.codes.nbytes == n_in * n_out * (8 if dtype == "int8" else 4) // 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_elements_does_not_matter(dtype):
    """A weight as it is in the file, and in the layout of the compiled engine."""
    w = random(96, 64)
    for a, b in zip(quantized.quantized(w, dtype), quantized.quantized(np.asfortranarray(w), dtype), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_nan_stays_nan(dtype):
    w = np.zeros((96, 8), np.float32)
    w[:, 1:] = random(96, 7)
    w[3, 5], w[90, 6] = np.nan, -np.inf
    x, b = random(2, 96), random(1, 8)[0]
    y = linear(x, quantized.quantized(w, dtype), b)
    np.testing.assert_array_equal(y[:, 0], b[[0, 0]])
    assert np.isnan(y).any(axis=0).tolist() == [False] * 5 + [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), OTHER_SHAPES)
def test_other_shapes_stay_float32(dtype, n_in, n_out):
    w, x = random(n_in, n_out), random(3, n_in)
    found = quantized.quantized(w, dtype)
    np.testing.assert_array_equal(found, w)
    np.testing.assert_allclose(linear(x, found, 0), x @ w, rtol=1e-5, atol=1e-5)


# Products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_dequantized_weight(dtype, n_in, n_out, bias):
    w, x = quantized.quantized(random(n_in, n_out), dtype), random(9, n_in)
    b = random(1, n_out)[0] if bias else 0
    exact = x.astype(np.float64) @ dequantized(w) + b
    size = np.abs(x) @ np.abs(dequantized(w)) + np.abs(x).sum(axis=1, keepdims=True) * 8 * np.abs(w.scales).max()
    for rows in (1, 2, 4, 5, 9):
        y = linear(x[:rows], w, b)
        assert (y.dtype, y.shape) == (np.float32, (rows, n_out))
        assert np.all(np.abs(y - exact[:rows]) <= n_in / kernels.LANES * ROUNDING * size[:rows])
        np.testing.assert_array_equal(y, linear(x, w, b)[:rows])  # a row's bits depend on that row alone
    np.testing.assert_array_equal(linear(x.reshape(3, 3, -1), w, b), linear(x, w, b).reshape(3, 3, -1))


# The model


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logits_are_those_of_the_dequantized_parameters(params, dtype):
    model, lossy = compiled.compiled_model(params, dtype)
    plain = {name: dequantize(value) for name, value in lossy.items()}
    found = model.gpt2(INPUTS[2], **lossy, n_head=N_HEAD)
    np.testing.assert_allclose(found, gpt2.gpt2(INPUTS[2], **plain, n_head=N_HEAD), rtol=1e-4, atol=1e-5)


def dequantize(value):
    """Parameters without quantized weights; the embedding's lookup and the output layer become one matrix again."""
    if isinstance(value, Embedding):
        return Tied(value.wte, dequantize(value.T))
    if isinstance(value, tuple):
        return dequantized(value)
    if isinstance(value, dict):
        return {name: dequantize(inner) for name, inner in value.items()}
    return [dequantize(inner) for inner in value] if isinstance(value, list) else value


class Tied:
    def __init__(self, wte, head):
        self.wte, self.T = wte, head

    def __getitem__(self, ids):
        return self.wte[ids]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_and_a_text_alone_have_the_same_tokens(shakespeare, dtype):
    hparams, params = shakespeare
    model, params = compiled.compiled_model(params, dtype)
    prompts = [[5, 9, 20], [7], list(range(40))]
    alone = [model.generate(ids, params, hparams["n_head"], 20) for ids in prompts]
    requests = [(i, ids, [np.argmax]) for i, ids in enumerate(prompts)]
    batch = batching.generate_batch(requests, params, hparams["n_head"], 20, model=model)
    assert {key: ids for (key, _), ids, _ in batch} == dict(enumerate(alone))


@pytest.mark.parametrize(("dtype", "most", "least"), [("int8", 0.02, 0.9), ("int4", 0.2, 0.75)])
def test_a_trained_model_keeps_its_predictions(shakespeare, dtype, most, least):
    """The loss on its own greedy text rises little, and most of the chosen tokens stay."""
    hparams, params = shakespeare
    text = np.array(gpt2.generate([5], params, hparams["n_head"], hparams["n_ctx"] - 1))
    model, lossy = compiled.compiled_model(params, dtype)
    exact, found = (m.gpt2(text, **p, n_head=hparams["n_head"]) for m, p in ((gpt2, params), (model, lossy)))
    losses = [-np.log(gpt2.softmax(a)[np.arange(len(text) - 1), text[1:]]).mean() for a in (exact, found)]
    assert abs(losses[1] - losses[0]) < most
    assert np.mean(exact.argmax(-1) == found.argmax(-1)) > least
    assert np.any(exact != found)


@pytest.mark.parametrize(("dtype", "n_bits"), [("float32", 32), ("int8", 8), ("int4", 4)])
def test_memory_of_the_weights(dtype, n_bits):
    """No float32 copy of a quantized weight stays in the parameters."""
    sizes = TINY | {"n_embd": 96, "n_head": 6}
    _, params = compiled.compiled_model(nest(random_tensors(sizes), sizes["n_layer"]), dtype)
    for block in params["blocks"]:
        for layer in (*block["attn"].values(), *block["mlp"].values()):
            arrays = layer["w"] if isinstance(layer["w"], tuple) else [layer["w"]]
            assert arrays[0].nbytes == len(layer["b"]) * n_in(layer["w"], n_bits) * n_bits // 8
            assert sum(a.nbytes for a in arrays) <= 1.3 * arrays[0].nbytes
            assert all(not a.flags.writeable for a in arrays)


def n_in(w, n_bits):
    return len(w) if n_bits == 32 else w.codes.shape[1] * 8 // n_bits


def test_short_memory_is_an_error(monkeypatch, params):
    monkeypatch.setattr("weights.resources.available_memory", lambda: 1000)
    for dtype in DTYPES:
        with one_line_error(dtype, "memory"):
            compiled.compiled_model(params, dtype)
