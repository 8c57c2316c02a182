"""The model against Hugging Face transformers, and against itself along its different paths."""

import functools
import inspect
import math

import numpy as np
import pytest

import gpt2
import gpt2_pico
from encoder import END_OF_TEXT
from tests.conftest import N_HEAD, PROMPTS, TINY, their_greedy_ids, their_logits
from weights.names import flatten, nest, tensor_shapes


@pytest.fixture(scope="module")
def model(model_and_params):
    """The module gpt2, or the instance of it that an engine made."""
    return model_and_params[0]


@pytest.fixture(scope="module")
def logits_of(model_and_params):
    """The function gpt2 with the tiny model's weights."""
    model, params = model_and_params
    return functools.partial(model.gpt2, **params, n_head=N_HEAD)


@pytest.fixture(scope="module")
def generate(model_and_params):
    """The function generate with the tiny model's weights."""
    model, params = model_and_params
    return functools.partial(model.generate, params=params, n_head=N_HEAD)


def prompt_ids(encoder, prompt):
    return encoder.encode(prompt) or [encoder.encoder[END_OF_TEXT]]


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, TINY["n_vocab"], shape)


def assert_same_ids(ours, expected, logits_of):
    """Equal, or a message with the two largest logits at the first difference, by which a near tie is known."""
    if ours != expected:
        i = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b)
        logits = logits_of(i)
        top = np.argsort(-logits)[:2]
        pytest.fail(f"token {i}: {ours[i]} is not {expected[i]}; top two {top} with logits {logits[top]}")


# The layers


def test_the_layers_give_the_figures_of_gpt_in_60_lines_of_numpy():
    """Its softmax example is printed with the result of [[2, 10], [-1, 0]]."""
    x = np.array([[1, 2], [-2, 0.5]], dtype=np.float32)
    np.testing.assert_allclose(gpt2.gelu(x), [[0.84119, 1.9546], [-0.0454, 0.34571]], atol=5e-5)
    x = np.array([[2, 10], [-1, 0]], dtype=np.float32)
    np.testing.assert_allclose(gpt2.softmax(x), [[0.00034, 0.99966], [0.26894, 0.73106]], atol=5e-6)
    np.testing.assert_array_equal(gpt2.softmax(np.array([1e4, 0, -1e4], dtype=np.float32)), [1, 0, 0])  # no overflow
    x = np.array([[2, 2, 3], [-5, 0, 1]], dtype=np.float32)
    expected = [[-0.70709, -0.70709, 1.41418], [-1.397, 0.508, 0.889]]
    np.testing.assert_allclose(gpt2.layer_norm(x, g=np.float32(1), b=np.float32(0)), expected, atol=5e-4)


@pytest.mark.parametrize("n_q", [1, 3, 7])
@pytest.mark.parametrize("d", [4, 16])
def test_attention_is_that_of_torch(model, n_q, d):
    import torch

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, d), dtype=np.float32) for n in (n_q, 7, 7))
    visible = torch.tril(torch.ones(n_q, 7, dtype=torch.bool), 7 - n_q)
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), attn_mask=visible)
    np.testing.assert_allclose(model.attention(q, k, v), expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (48,), (5, 36), (2, 3, 5, 48)])
def test_gelu_softmax_and_layer_norm_are_those_of_torch(model, shape):
    from torch import nn, tensor

    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32) * 3
    g, b = rng.standard_normal((2, shape[-1]), dtype=np.float32)
    gelu = nn.functional.gelu(tensor(x), approximate="tanh")
    layer_norm = nn.functional.layer_norm(tensor(x), shape[-1:], tensor(g), tensor(b))
    np.testing.assert_allclose(model.gelu(x), gelu.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.softmax(x), tensor(x).softmax(-1).numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(model.layer_norm(x, g, b), layer_norm.numpy(), rtol=1e-4, atol=1e-5)


# The whole model against transformers


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_and_64_greedy_ids_are_those_of_transformers(tiny, model_and_params, theirs, prompt):
    ids = prompt_ids(tiny[0], prompt)
    logits, expected = their_logits(theirs, [ids])[0], their_greedy_ids(theirs, ids, 64)
    assert len(set(expected)) > 8, "too much repetition to show a difference"
    for module, params in (model_and_params, (gpt2_pico, tiny[2])):
        ours = module.gpt2(ids, **params, n_head=N_HEAD)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-5)
        ours = module.generate(ids, params, N_HEAD, 64)
        assert_same_ids(ours, expected, lambda i: their_logits(theirs, [ids + expected[:i]])[0, -1])


def test_every_position_and_every_tensor_matters(engine, params, logits_of, theirs):
    """The logits of a full context are those of transformers; with any tensor changed they are not."""
    ids = random_ids(TINY["n_ctx"]).tolist()
    expected = their_logits(theirs, [ids])[0]
    np.testing.assert_allclose(logits_of(ids), expected, rtol=1e-4, atol=1e-5)
    for name in tensor_shapes(**TINY):
        tensors = flatten(params, TINY)
        tensors[name] = np.roll(tensors[name], 1, axis=-1)
        model, changed = engine(nest(tensors, TINY["n_layer"]))
        difference = np.max(np.abs(model.gpt2(ids, **changed, n_head=N_HEAD) - expected))
        assert difference > 1e-3 or math.isnan(difference), name


# Batches, the cache, prefill


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 1, 5], [1, 10]])
def test_batches_the_cache_and_last_only_give_the_logits_of_one_pass_over_one_row(model, logits_of, batch, pieces):
    ids = random_ids(*batch, 11)
    whole, cache = np.empty((*batch, 11, TINY["n_vocab"])), [model.KVCache(11) for _ in range(TINY["n_layer"])]
    for row in np.ndindex(batch):
        whole[row] = logits_of(ids[row])
    parts = [logits_of(part, cache=cache) for part in np.split(ids, np.cumsum(pieces)[:-1], axis=-1)]
    last = logits_of(ids, last_only=True), whole[..., -1:, :]
    for logits, expected in ((logits_of(ids), whole), (np.concatenate(parts, axis=-2), whole), last):
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_prefill_in_chunks_gives_the_same_ids(model, generate, params, monkeypatch, chunk):
    ids = random_ids(50).tolist()
    monkeypatch.setattr(model, "PREFILL_CHUNK", chunk)
    assert generate(ids, n_tokens_to_generate=16) == gpt2_pico.generate(ids, params, N_HEAD, 16)


def test_the_cache_returns_views_and_copies_only_the_new_rows():
    cache = gpt2.KVCache(5)
    first = np.ones((2, 3, 4), dtype=np.float32)
    k, v = cache.append(first, 2 * first)
    assert cache.n_past == 3
    again, _ = cache.append(3 * first[:, :1], first[:, :1])
    assert np.shares_memory(k, again)
    assert np.shares_memory(v, cache.v)
    np.testing.assert_array_equal(again[0, :, 0], [1, 1, 1, 3])


# float32, purity, JAX


def test_every_activation_is_float32(model, logits_of, monkeypatch):
    """What each function of gpt2.py returns, with and without a cache."""
    seen, cache = [], [model.KVCache(9) for _ in range(TINY["n_layer"])]
    for name, function in inspect.getmembers(model, inspect.isfunction):

        def wrapper(*args, name=name, function=function, **kwargs):
            result = function(*args, **kwargs)
            seen.extend((name, a.dtype) for a in (result if isinstance(result, tuple) else (result,)) if a is not None)
            return result

        if "generate" not in name:
            monkeypatch.setattr(model, name, wrapper)
    for ids in ([3, 1, 4], [1]):
        for options in ({}, {"cache": cache}):
            seen.append(("gpt2", logits_of(ids, **options).dtype))
    names = "gelu layer_norm linear ffn attention split_heads mha transformer_block embed gpt2"
    assert {name for name, _ in seen} - {"softmax"} == set(names.split())
    in_cache = [a.dtype for layer in cache for a in vars(layer).values() if isinstance(a, np.ndarray)]
    assert in_cache and {*(dtype for _, dtype in seen), *in_cache} == {np.dtype(np.float32)}


def test_nothing_writes_into_its_inputs(model, model_and_params):
    """params are read-only views, so any write to them would raise; the activations are frozen here."""
    x = np.random.default_rng(0).standard_normal((5, TINY["n_embd"]), dtype=np.float32)
    x.flags.writeable = False
    before, block = x.tobytes(), model_and_params[1]["blocks"][0]
    model.transformer_block(x, **block, n_head=N_HEAD)
    model.gelu(x), model.softmax(x), model.layer_norm(x, **block["ln_1"])
    model.attention(*[model.split_heads(x, 3)] * 3)
    assert x.tobytes() == before


@pytest.mark.parametrize("module", [gpt2, gpt2_pico])
def test_the_same_source_runs_on_jax(params, module):
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    namespace, ids = {"__name__": "on_jax"}, [3, 1, 4, 1, 5]
    exec(inspect.getsource(module).replace("import numpy as np", "import jax.numpy as np"), namespace)
    on_jax = functools.partial(namespace["gpt2"], n_head=N_HEAD)
    for logits in (on_jax(ids, **params), jax.jit(on_jax)(jnp.array(ids), **params)):
        assert isinstance(logits, jax.Array) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, gpt2.gpt2(ids, **params, n_head=N_HEAD), rtol=1e-3, atol=1e-4)


# Generation


def test_generate_does_not_modify_its_argument_and_takes_any_sequence(generate):
    ids = [3, 1, 4]
    new = generate(ids, n_tokens_to_generate=5)
    assert ids == [3, 1, 4]
    assert len(new) == 5 and {type(i) for i in new} == {int}
    for same in (tuple(ids), np.array(ids)):
        assert generate(same, n_tokens_to_generate=5) == new


def test_tokens_come_one_by_one(model_and_params, monkeypatch):
    """Each new token costs one position, after one pass over the prompt."""
    lengths, (model, params) = [], model_and_params
    logits_of = model.gpt2
    monkeypatch.setattr(model, "gpt2", lambda ids, **rest: (lengths.append(len(ids)), logits_of(ids, **rest))[1])
    tokens = model.generate_tokens([3, 1, 4], params, N_HEAD, 4)
    assert lengths == []
    next(tokens)
    assert lengths == [3]
    list(tokens)
    assert lengths == [3, 1, 1, 1]


def test_stop_id_ends_the_sequence_and_is_not_returned(generate):
    ids = generate([7, 8, 9], n_tokens_to_generate=20)
    stop = next(i for i in ids if i != ids[0])
    assert generate([7, 8, 9], n_tokens_to_generate=20, stop_id=stop) == ids[: ids.index(stop)]
    assert generate([7, 8, 9], n_tokens_to_generate=20, stop_id=-1) == ids


def test_the_context_may_be_filled_but_not_exceeded_and_a_prompt_not_be_empty(model, logits_of, generate):
    n_ctx = TINY["n_ctx"]
    assert len(generate([1] * (n_ctx - 2), n_tokens_to_generate=2)) == 2
    assert generate([1] * n_ctx, n_tokens_to_generate=0) == []
    with pytest.raises(ValueError, match=rf"{n_ctx - 2} tokens \+ 3 more = {n_ctx + 1}.*context of {n_ctx}"):
        generate([1] * (n_ctx - 2), n_tokens_to_generate=3)
    with pytest.raises(ValueError, match="at least one token"):
        generate([], n_tokens_to_generate=3)
    with pytest.raises(ValueError, match="context"):
        logits_of([1] * (n_ctx + 1))
    for n_max, n_filled in ((n_ctx + 1, n_ctx), (3, 3)):
        cache = [model.KVCache(n_max) for _ in range(TINY["n_layer"])]
        logits_of([1] * n_filled, cache=cache)
        with pytest.raises(ValueError, match=rf"{n_filled} tokens \+ 1 more"):
            logits_of([1], cache=cache)


def test_the_model_stays_short():
    assert len(inspect.getsource(gpt2).splitlines()) <= 175
