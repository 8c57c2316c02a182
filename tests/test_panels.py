"""engines/panels.py against NumPy: layout, codes and scales, the products with them, the quality of a real model."""

import numpy as np
import pytest

import gpt2
from engines import batching, compiled
from tests.conftest import INPUTS, N_HEAD, ROOT, TINY, one_line_error
from tests.random_model import random_tensors
from utils import load_encoder_hparams_and_params
from weights.names import nest

pytest.importorskip("numba")

from engines import panels
from engines.functions import linear
from engines.kernels import GROUP, PANEL
from engines.panels import Embedding, Panels, packed

DTYPES = ["int8", "int4"]
ROUNDING = 2.0**-24  # largest relative error of one float32 operation
# Of weights: [n_in, n_out]. Less than a panel of columns, one to five panels, whole ones and partial ones
SHAPES = [(32, 7), (96, 64), (768, 131), (32, 128), (64, 192), (3072, 66), (128, 257)]
OTHER_SHAPES = [(36, 108), (48, 5), (5, 1)]  # that stay float32 for int4


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def columns(a, n_out):  # [n_panels, n, PANEL] -> [n, n_out]
    """Panels side by side, without the columns that fill up the last one."""
    return np.concatenate(list(a), axis=1)[:, :n_out]


def unpacked(w):
    """The weight [n_in, n_out] that Panels stand for; codes and scales in float64."""
    if w.codes.dtype == np.float32:
        return columns(w.codes, w.n_out)
    codes = w.codes if w.codes.dtype == np.int8 else np.concatenate([w.codes % 16, w.codes // 16], axis=-1) - 8.0
    return columns(codes.astype(np.float64), w.n_out) * steps(w)


def steps(w):
    """The scale of each element of a weight [n_in, n_out]."""
    return columns(w.scales, w.n_out).repeat(w.codes.shape[1] // w.scales.shape[1], axis=0)


def quantized(w, dtype):
    return panels.quantized(packed(w), dtype)


@pytest.fixture(scope="module")
def shakespeare():
    _, hparams, params = load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))
    return hparams, params


# The layout


@pytest.mark.parametrize("shape", [(16, 16), (48, 131), (1, 5), (37, 53), (768, 64), (33, 192)])
def test_a_weight_is_copied_into_panels(shape):
    """In C order, as the transpose of one, and as a part of one; also into memory that held something else."""
    w = random(*shape)
    wide = np.repeat(w, 2, axis=1)[:, ::2]
    memory = np.full(2 * w.size + shape[0] * PANEL, np.nan, np.float32)
    for view in (w, np.asfortranarray(w), wide):
        for found in (packed(view), packed(view, memory[: -(-shape[1] // PANEL) * PANEL * shape[0]])):
            np.testing.assert_array_equal(unpacked(found), w)
            assert (found.shape, found.n_out) == (shape, shape[1])
            assert found.codes.dtype == np.float32 and found.codes.flags.c_contiguous
            assert found.codes.shape == (-(-shape[1] // PANEL), shape[0], PANEL)
            filling = np.concatenate(list(found.codes), axis=1)[:, shape[1] :]
            np.testing.assert_array_equal(filling, 0)
            assert not np.shares_memory(found.codes, view)


def test_a_weight_may_be_read_only():
    w = random(48, 70)
    w.flags.writeable = False
    for view in (w, w.T):
        np.testing.assert_array_equal(unpacked(packed(view)), view)


# Quantization


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_a_weight_is_off_by_at_most_half_a_step(dtype, n_in, n_out):
    w = random(n_in, n_out) * random(1, n_out)
    found = quantized(w, dtype)
    assert isinstance(found, Panels) and found.shape == (n_in, n_out)
    error = np.abs(unpacked(found) - w) / np.abs(steps(found))
    limit = 0.5 if dtype == "int8" else 1  # an element may be the opposite of the largest: 8 steps, of at most 7
    assert np.max(error) <= limit + 1e-4
    assert np.mean(error) < 0.27
    largest = np.abs(w).reshape(-1, n_in if dtype == "int8" else GROUP, n_out).max(axis=1)
    scales = np.abs(columns(found.scales, n_out)) * (127 if dtype == "int8" else 8)
    np.testing.assert_allclose(scales, largest, rtol=1e-6)
    assert found.codes.nbytes == n_in * -(-n_out // PANEL) * PANEL * (8 if dtype == "int8" else 4) // 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_out", [8, 70])
def test_zeros_stay_zeros_and_nan_stays_nan(dtype, n_out):
    """Whatever follows it in its column."""
    w = np.zeros((96, n_out), np.float32)
    w[:, 1:] = random(96, n_out - 1)
    w[3, -3], w[95, -2], w[0, -1] = np.nan, -np.inf, np.inf
    x, b = random(2, 96), random(1, n_out)[0]
    for n_rows in (1, 2):
        y = linear(x[:n_rows], quantized(w, dtype), b)
        np.testing.assert_array_equal(y[:, 0], b[[0] * n_rows])
        np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(np.arange(n_out) >= n_out - 3, y.shape))


@pytest.mark.parametrize(("n_in", "n_out"), OTHER_SHAPES)
def test_int8_takes_any_shape_and_int4_whole_groups(n_in, n_out):
    w = packed(random(n_in, n_out))
    assert panels.quantized(w, "int4") is w
    assert panels.quantized(w, "int8").codes.dtype == np.int8


# Products


QUANTIZED = [(dtype, *shape) for dtype in DTYPES for shape in SHAPES] + [("int8", *shape) for shape in OTHER_SHAPES]


@pytest.mark.parametrize(("dtype", "n_in", "n_out"), QUANTIZED)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_dequantized_weight(dtype, n_in, n_out, bias):
    """One rounding for each product that is added, and one where a sum is multiplied by its scale and added."""
    w, x = quantized(random(n_in, n_out), dtype), random(15, n_in)
    b = random(1, n_out)[0] if bias else np.zeros(n_out, np.float32)
    exact = x.astype(np.float64) @ unpacked(w) + b
    size = np.abs(x.astype(np.float64)) @ np.abs(unpacked(w)) + np.abs(b)
    n_roundings = min(n_in, 6 * n_in**0.5) + 1  # as in test_kernels.py
    for rows in (1, 2, 4, 5, 6, 7, 13, 15):
        y = linear(x[:rows], w, b if bias else 0)
        assert (y.dtype, y.shape) == (np.float32, (rows, n_out))
        assert np.all(np.abs(y - exact[:rows]) <= 1.001 * n_roundings * ROUNDING * size[:rows])
        np.testing.assert_array_equal(y, linear(x, w, b)[:rows])  # a row's bits depend on that row alone
        np.testing.assert_array_equal(linear(x[rows - 1], w, b), y[-1])
    np.testing.assert_array_equal(linear(x.reshape(3, 5, -1), w, b), linear(x, w, b).reshape(3, 5, -1))


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
    if isinstance(value, Panels):
        return unpacked(value)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_in_panels_can_be_quantized(params, dtype):
    """As a model that drafts for itself does: the same codes and scales as from the file."""
    _, in_panels = compiled.compiled_model(params)
    before = [w.codes.copy() for w in panels.weights_of(in_panels)]
    pairs = [panels.weights_of(panels.quantize(p, dtype)) for p in (params, in_panels)]
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scales, b.scales)
    for w, codes in zip(panels.weights_of(in_panels), before, strict=True):
        np.testing.assert_array_equal(w.codes, codes)


@pytest.mark.parametrize(("dtype", "n_bits"), [("float32", 32), ("int8", 8), ("int4", 4)])
def test_memory_of_the_weights(dtype, n_bits):
    """No float32 copy of a quantized weight stays in the parameters, and none of the embedding's lookup."""
    sizes = TINY | {"n_embd": 96, "n_head": 6}
    plain = nest(random_tensors(sizes), sizes["n_layer"])
    _, params = compiled.compiled_model(plain, dtype)
    layers = [layer for block in params["blocks"] for part in ("attn", "mlp") for layer in block[part].values()]
    for w, n_out in (*((layer["w"], len(layer["b"])) for layer in layers), (params["wte"].T, sizes["n_vocab"])):
        assert w.codes.nbytes == w.codes.shape[1] * -(-n_out // PANEL) * PANEL * n_bits // 8
        assert w.codes.nbytes + w.scales.nbytes <= 1.3 * w.codes.nbytes
        assert dtype == "float32" or (w.codes.base is None and w.scales.base is None)  # they keep no other array alive
    assert np.shares_memory(params["wte"].wte, plain["wte"])


def test_short_memory_is_an_error(monkeypatch, params):
    monkeypatch.setattr("weights.resources.available_memory", lambda: 1000)
    for dtype in DTYPES:
        with one_line_error(dtype, "memory"):
            compiled.compiled_model(params, dtype)
