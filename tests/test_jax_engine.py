"""--engine jax: the ids of transformers and of NumPy on several devices and processes, samples as in sampling.py."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import evaluate
import gpt2
import sampling
from cli import evaluate as evaluate_cli
from tests.conftest import INPUTS, N_HEAD, N_NEW, PROMPTS, ROOT, TINY, need
from tests.programs import (
    SECONDS,
    assert_mistake,
    assert_runs_on_8_devices,
    command,
    free_port,
    on_devices,
    run,
    started,
)
from tests.random_model import DATA, copy_vocabulary, random_tensors, write_safetensors
from tests.test_sampling import HALVES, HUGE, JUST_ABOVE, kept, random_logits
from utils import load_encoder_hparams_and_params
from weights.names import nest

pytest.importorskip("jax")

import jax

from engines import jax_engine, jax_model, jax_sampling

pytestmark = pytest.mark.usefixtures("compilation")
JAX = ["--engine", "jax"]


@pytest.fixture(scope="session")
def on_jax(params):
    """(engine, params) of the tiny model."""
    return jax_engine.jax_engine(params, N_HEAD)


@pytest.fixture(scope="session")
def shakespeare():
    return load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))


def generate(on_jax, ids, n=N_NEW, **options):
    engine, params = on_jax
    return engine.generate(ids, params, N_HEAD, n, **options)


def generate_batch(on_jax, requests, batch_size, n=N_NEW, stop_id=None):
    engine, params = on_jax
    return engine.generate_batch(requests, params, N_HEAD, n, batch_size, stop_id)


def greedy(inputs):
    return [(i, ids, [jax_sampling.Sampler()]) for i, ids in enumerate(inputs)]


# Greedy


def test_greedy_ids_are_those_of_transformers(on_jax, expected):
    assert [generate(on_jax, ids) for ids in INPUTS] == expected


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_rows_of_a_batch_are_what_transformers_generate_alone(on_jax, expected, batch_size):
    results = generate_batch(on_jax, greedy(INPUTS), batch_size)
    assert sorted(results) == [((i, 1), ids, "length") for i, ids in enumerate(expected)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_that_end_are_replaced(on_jax, expected, batch_size):
    """By a longer prompt, too, for which the caches have to grow; the id that ends a row is not part of it."""
    stop = next(i for i in range(TINY["n_vocab"]) if 4 <= sum(i in ids for ids in expected) <= 7)
    for n in (10, N_NEW):
        alone = [[*ids[:n], stop] for ids in expected]
        alone = [(ids[: ids.index(stop)], "end_of_text" if stop in ids[:n] else "length") for ids in alone]
        assert len({reason for _, reason in alone}) == 2
        inputs = sorted(range(len(INPUTS)), key=lambda i: len(INPUTS[i]))
        requests = [(i, INPUTS[i], [jax_sampling.Sampler()]) for i in inputs]
        found = sorted(generate_batch(on_jax, requests, batch_size, n, stop))
        assert found == [((i, 1), *row) for i, row in enumerate(alone)]
        assert [generate(on_jax, ids, n, stop_id=stop) for ids in INPUTS] == [ids for ids, _ in alone]


def test_greedy_ids_of_the_bundled_model_are_those_of_numpy(shakespeare):
    encoder, hparams, params = shakespeare
    engine, on_device = jax_engine.jax_engine(params, hparams["n_head"])
    for prompt in ("ROMEO:", "\n"):
        ids = encoder.encode(prompt)
        n = hparams["n_ctx"] - len(ids)
        assert engine.generate(ids, on_device, hparams["n_head"], n) == gpt2.generate(ids, params, hparams["n_head"], n)


def test_a_full_context_works_and_what_gpt2_refuses_is_refused(on_jax, params):
    ids = INPUTS[4] + INPUTS[5]
    assert generate(on_jax, ids, TINY["n_ctx"] - len(ids)) == gpt2.generate(
        ids, params, N_HEAD, TINY["n_ctx"] - len(ids)
    )
    assert generate(on_jax, [], 0) == []
    assert list(generate_batch(on_jax, greedy([[]]), 8, n=0)) == [((0, 1), [], "length")]
    assert list(generate_batch(on_jax, [], 8)) == []
    for requests, batch_size, message in (
        (greedy([[]]), 8, "at least one token"),
        (greedy([[1] * 120]), 8, "120 tokens .* 24 more .* 144.* 128"),
        (greedy(INPUTS), 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            list(generate_batch(on_jax, requests, batch_size))


def test_tokens_come_in_chunks_that_double(on_jax, expected, monkeypatch):
    steps, advance = [], jax_engine.Batch.advance
    monkeypatch.setattr(jax_engine.Batch, "advance", lambda b, rows, n: (steps.append(n), advance(b, rows, n))[1])
    engine, params = on_jax
    tokens = engine.generate_tokens(INPUTS[0], params, N_HEAD, N_NEW)
    assert (next(tokens), steps) == (expected[0][0], [1])
    assert [*tokens] == expected[0][1:] and steps == [1, 2, 4, 8, 16]


def test_few_shapes_are_compiled(on_jax):
    """Prompts and caches of any length: powers of two from SHORTEST, and the context."""
    for n in (*range(1, 100, 9), 120):
        generate(on_jax, [1] * n, 5)
    sizes = on_jax[0].decode._cache_size(), on_jax[0].prefill._cache_size()
    for n in (30, 60, 90):
        generate(on_jax, [1] * n, 7)
    assert sizes == (on_jax[0].decode._cache_size(), on_jax[0].prefill._cache_size())


# Logits


@pytest.mark.parametrize("n_head", [1, 3])
def test_logits_are_those_of_numpy(n_head):
    hparams = TINY | {"n_head": n_head}
    params, ids = nest(random_tensors(hparams), TINY["n_layer"]), np.array([INPUTS[4], INPUTS[4][::-1]])
    engine, on_device = jax_engine.jax_engine(params, n_head)
    logits = engine.gpt2(ids, **on_device, n_head=n_head)
    expected = gpt2.gpt2(ids, **params, n_head=n_head)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    losses = evaluate.fused.token_losses(expected[:, :-1], ids[:, 1:])
    np.testing.assert_allclose(engine.token_losses(logits[:, :-1], ids[:, 1:]), losses, rtol=1e-4, atol=1e-5)


def test_a_cache_gives_the_logits_of_one_pass(on_jax, params):
    """Rows at different positions, the rest of the cache full of numbers that are not theirs."""
    engine, on_device = on_jax
    ids, starts = np.array([INPUTS[4][:40], INPUTS[7][:40]]), np.array([[0], [9]])
    expected = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    full = np.full((2, N_HEAD, 40, TINY["n_embd"] // N_HEAD), 7, np.float32)

    @jax.jit
    def forward(params, kv, n_past, new):
        caches = [jax_model.KVCache(k, v, n_past) for k, v in kv]
        return engine.forward(new, N_HEAD, **params, cache=caches), [(cache.k, cache.v) for cache in caches]

    kv = [(full, full) for _ in range(TINY["n_layer"])]
    _, kv = forward(on_device, kv, 0 * starts, ids[:, :9])
    for n in (9, 1, 1, 9, 1):
        places = [[0], [1]], starts + np.arange(n)
        logits, kv = forward(on_device, kv, starts, ids[places])
        np.testing.assert_allclose(logits, expected[places], rtol=1e-4, atol=1e-4)
        starts = starts + n


def test_damaged_weights_are_an_error(params):
    damaged = params | {"ln_f": {name: x * np.nan for name, x in params["ln_f"].items()}}
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(jax_engine.jax_engine(damaged, N_HEAD), [1, 2, 3], 5)


# bfloat16


def test_bfloat16_is_close(params):
    ids = np.array([INPUTS[4]])
    engine, on_device = jax_engine.jax_engine(params, N_HEAD, "bfloat16")
    dtypes = {str(x.dtype) for x in jax.tree.leaves(on_device)}
    assert dtypes == {"bfloat16", "float32"} and on_device["wte"].dtype == "bfloat16"
    logits, expected = engine.gpt2(ids, **on_device, n_head=N_HEAD), gpt2.gpt2(ids, **params, n_head=N_HEAD)
    error = np.abs(logits - expected).mean() / np.abs(expected).mean()
    assert logits.dtype == np.float32 and 1e-3 < error < 0.03
    assert len(engine.generate(INPUTS[0], on_device, N_HEAD, N_NEW)) == N_NEW


def test_the_perplexity_of_bfloat16_is_that_of_float32(shakespeare):
    text = need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")[-8_000:]
    encoder, hparams, params = shakespeare
    ids, n_head, losses = encoder.encode(text), hparams["n_head"], []
    for dtype in ("float32", "bfloat16"):
        engine, on_device = jax_engine.jax_engine(params, n_head, dtype)
        losses.append(evaluate.total_loss(ids, on_device, n_head, 128, 128, model=engine) / (len(ids) - 1))
    expected = evaluate.total_loss(ids, params, n_head, 128, 128) / (len(ids) - 1)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[1] and np.exp(losses[1]) == pytest.approx(np.exp(losses[0]), rel=0.005)


# Samples


def test_samples_follow_from_the_seed_alone_and_in_a_batch(on_jax):
    seeds = [3, 4, 3, 2**100, 2**100 % 2**64]
    make = lambda seed: jax_sampling.Sampler(1.0, 50, 0.9, seed)  # noqa: E731
    inputs = [ids for ids in INPUTS if len(ids) < 8]
    requests = [(i, ids, map(make, seeds)) for i, ids in enumerate(inputs)]
    found = {key: ids for key, ids, _ in generate_batch(on_jax, requests, 3)}
    for i, ids in enumerate(inputs):
        alone = [generate(on_jax, ids, sample=make(seed)) for seed in seeds]
        assert [found[i, j] for j in range(1, 6)] == alone
        assert alone[0] == alone[2] != alone[1] and alone[3] == alone[4]
    assert generate(on_jax, INPUTS[0], sample=make(None)) != generate(on_jax, INPUTS[0], sample=make(None))


def test_the_key_is_that_of_jax():
    for seed in (0, 7, 2**32 - 1):
        key = jax_sampling.Sampler(1.0, seed=seed).key
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(np.uint32(seed), impl="threefry2x32")))


def samples(logits, n, **options):
    sampler = jax_sampling.Sampler(**{"temperature": 1.0, "seed": 1} | options)
    logits, keys = np.tile(np.float32(logits), (n, 1)), np.tile(sampler.key, (n, 1))
    return np.asarray(jax_sampling.choose(logits, keys, np.arange(n), **sampler.options)).tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}])
def test_samples_pass_a_chi_square_test(options):
    """The one of test_sampling.py."""
    logits, options = np.linspace(0, 3, 10, dtype=np.float32), {"temperature": 1.0} | options
    probs = sampling.distribution(logits, **options)
    counts = np.bincount(samples(logits, 3000, **options), minlength=10)
    assert list(np.flatnonzero(counts)) == kept(probs)
    counts, expected = counts[probs > 0], 3000 * probs[probs > 0]
    assert stats.chisquare(counts, expected).pvalue > 1e-3 > stats.chisquare(counts, np.roll(expected, 1)).pvalue


def kept_by_jax(logits, top_k=0, top_p=1.0, temperature=1.0):
    options = jax_sampling.Sampler(temperature, top_k, top_p).options
    scores = np.float32(logits)[None] / options["temperature"]
    return np.flatnonzero(
        np.isfinite(jax_sampling.keep_top_p(jax_sampling.keep_top_k(scores, top_k), options["top_p"]))
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 40, 5000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.95, 0.9999, 1.0])
def test_the_tokens_kept_are_those_of_sampling(temperature, top_k, top_p):
    for seed in range(2):
        logits = random_logits(seed)
        expected = kept(sampling.distribution(logits, temperature, top_k, top_p))
        assert kept_by_jax(logits, top_k, top_p, temperature).tolist() == expected


def test_ties_with_the_last_token_kept_are_kept():
    for k, expected in ((1, [1]), (2, [0, 1, 3, 4]), (4, [0, 1, 3, 4])):
        assert kept_by_jax([2.0, 3.0, 1.0, 2.0, 2.0], top_k=k).tolist() == expected
    for p, expected in ((0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (np.float32(JUST_ABOVE), [0, 1]), (0.9, range(5))):
        assert kept_by_jax(np.log(HALVES), top_p=p).tolist() == list(expected)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e300])
def test_extreme_temperatures_and_logits(temperature):
    """At temperature 0 the first of the most likely tokens."""
    found = samples([1.0, 2.0, -300.0, 2.0], 200, temperature=temperature)
    assert set(found) == ({1} if temperature == 0 else {1, 3} if temperature < 1 else {0, 1, 2, 3})
    assert set(samples([-HUGE, HUGE, 0, -HUGE], 50, temperature=min(temperature, 1))) == {1}


# Several devices


ON_8_DEVICES = """
import re
import jax
import numpy as np
import gpt2
from engines import jax_engine, jax_model, jax_sampling
from tests.random_model import random_tensors
from weights.names import nest

jax_engine.use_compilation_cache()
hparams = {"n_vocab": 97, "n_ctx": 32, "n_embd": 64, "n_head": 8, "n_layer": 2}
params, rng = nest(random_tensors(hparams), 2), np.random.default_rng(0)
prompts = [rng.integers(0, 97, n).tolist() for n in (7, 1, 20, 3, 12)]
expected = [((i, 1), gpt2.generate(ids, params, 8, 12), "length") for i, ids in enumerate(prompts)]
greedy, sample, sampled = (0.0,), (1.0, 20, 0.9, 3), []
for shape in [(1, 1), (1, 2), (1, 8), (8, 1), (2, 4)]:
    engine, on_device = jax_engine.jax_engine(params, 8, shape=shape)
    for options in [greedy] if shape in [(1, 2), (1, 8)] else [greedy, sample]:
        requests = [(i, ids, [jax_sampling.Sampler(*options)]) for i, ids in enumerate(prompts)]
        found = sorted(engine.generate_batch(requests, on_device, 8, 12))
        sampled.append(found) if options == sample else None
        assert options == sample or found == expected, shape

    batch, n_data, n_model = jax_engine.Batch(engine, on_device, 8, 5), *shape
    batch.reserve(32)
    state = batch.kv, batch.n_past, batch.newest, batch.keys
    program = engine.decode.lower(on_device, *state, 1, n_head=8, temperature=None, top_k=0, top_p=None).compile()
    found = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute)\\(", program.as_text())
    all_reduces = 2 * ["all-reduce"] * 2 if n_model > 1 else []  # two per block
    all_gathers = 2 * ["all-gather"] if n_data > 1 else []  # the tokens and flags of all rows, for the host
    assert sorted(found) == sorted(all_reduces + all_gathers), (shape, found)
    w, k = on_device["blocks"][0]["mlp"]["c_fc"]["w"], batch.kv[0][0]
    assert w.sharding.shard_shape(w.shape) == (64, 256 // n_model)
    assert k.sharding.shard_shape(k.shape) == (batch.n_rows // n_data, 8 // n_model, 32, 8)
assert all(found == sampled[0] for found in sampled) and len({str(ids) for _, ids, _ in sampled[0]}) == 5
assert [dict(jax_model.make_mesh(params, n_head).shape) for n_head in (8, 12)] == [
    {"data": 1, "model": 8}, {"data": 2, "model": 4}
]
"""


def test_ids_are_equal_on_1_to_8_devices_and_a_block_takes_two_all_reduces():
    assert_runs_on_8_devices(ON_8_DEVICES)


@pytest.fixture(scope="session")
def two_heads(tmp_path_factory, vocabulary_dir, tiny_tensors):
    """A models_dir with the tiny model in the folder "tiny", of two heads, which divide by two devices."""
    path = tmp_path_factory.mktemp("two_heads")
    (path / "tiny").mkdir()
    copy_vocabulary(path / "tiny", vocabulary_dir)
    write_safetensors(path / "tiny", TINY | {"n_head": 2}, tiny_tensors)
    return str(path)


@pytest.mark.parametrize("devices", [[], ["--devices", "2x1"]])
def test_two_processes_of_which_the_first_prints(devices, two_heads, tmp_path):
    """A batch and samples under a random seed, which has to be the same in both."""
    (tmp_path / "prompts").write_text("ROMEO:\nO\nJULIET:\n", encoding="utf-8")
    options = ["--prompts_file", tmp_path / "prompts", "--n_tokens_to_generate", 9, "--temperature", 1, "--top_k", 1]
    if not devices:
        options = ["ROMEO:", "--n_tokens_to_generate", 9]
    arguments = [str(a) for a in (*options, "--model_size", "tiny", "--models_dir", two_heads, *JAX, *devices)]
    distributed = ["--coordinator", f"127.0.0.1:{free_port()}", "--n_processes", "2", "--process_id"]
    commands = [command(*arguments, *distributed, str(i)) for i in range(2)]
    with started(commands[0], env=on_devices(1)) as first, started(commands[1], env=on_devices(1)) as second:
        found = [process.communicate(timeout=SECONDS) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), found
    assert found[1][0] == b""
    encoder, _, params = load_encoder_hparams_and_params("tiny", two_heads)
    texts = [encoder.decode(gpt2.generate(encoder.encode(p), params, 2, 9)) for p in ("ROMEO:", "O", "JULIET:")]
    if devices:
        assert [json.loads(line)["text"] for line in found[0][0].splitlines()] == texts
    else:
        assert found[0][0].decode() == texts[0] + "\n"


# The command line


def test_the_command_line_prints_numpys_text(inside, tiny_flags):
    for options in ([], ["--stream"]):
        expected = inside(PROMPTS[0], *tiny_flags, *options)
        assert expected[0] == 0
        assert inside(PROMPTS[0], *tiny_flags, *options, *JAX, "--devices", 1) == expected


def test_a_file_of_prompts_and_an_interactive_session(inside, tiny_flags, tmp_path):
    (tmp_path / "p").write_text("\n".join(PROMPTS[:1] + PROMPTS[2:4]), encoding="utf-8")
    flags = ["--prompts_file", tmp_path / "p", *tiny_flags, "--stop_at_end_of_text"]
    assert inside(*flags, *JAX) == inside(*flags)
    typed = f"{PROMPTS[2]}\n{PROMPTS[3]}\n".encode()
    assert inside("--interactive", *tiny_flags, *JAX, typed=typed) == inside("--interactive", *tiny_flags, typed=typed)


def test_samples_of_a_batch_are_those_of_runs_alone(inside, tiny_flags):
    flags = ["Hello", *tiny_flags, *JAX, "--temperature", 1, "--n_tokens_to_generate", 12]
    alone = [inside(*flags, "--seed", 7 + i)[1].decode() for i in range(3)]
    together = "".join(f"=== sample {i} ===\n{text}" for i, text in enumerate(alone, 1))
    assert inside(*flags, "--seed", 7, "--n_samples", 3, "--batch_size", 2)[1].decode() == together
    assert len(set(alone)) == 3


def test_evaluation_finds_numpys_loss(tiny_flags, tmp_path, capsys):
    (tmp_path / "text").write_text("".join(PROMPTS) * 3, encoding="utf-8")
    outputs = []
    for options in ([], JAX, [*JAX, "--dtype", "bfloat16"]):
        assert evaluate_cli.run([str(tmp_path / "text"), *tiny_flags, *options]) == 0
        outputs.append(capsys.readouterr())
    losses = [float(re.search(r"loss +(\S+)", out)[1]) for out, _ in outputs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and losses[0] == pytest.approx(losses[2], rel=0.02)
    assert "weights bfloat16 (lossy)" in outputs[2].out and "bfloat16 is lossy" in outputs[2].err and not outputs[1].err


def test_the_first_compilation_is_announced_and_kept(inside, tiny_flags, tmp_path):
    """In the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    arguments = [PROMPTS[0], *tiny_flags, "--n_tokens_to_generate", "3"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    first, second = (run(*arguments, *JAX, env=env | {"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(2))
    assert first[:2] == second[:2] == inside(*arguments)[:2] and first[0] == 0
    assert re.fullmatch(r"note: JAX compiles .*\n", first[2].decode()) and second[2] == b""
    assert [path.name for path in tmp_path.iterdir()] == ["jax"]
    code, out, err = run(*arguments, *JAX, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": "/proc/nowhere"})
    assert (code, out) == first[:2]
    assert re.fullmatch(r"note: no folder .* JAX_COMPILATION_CACHE_DIR .*\nnote: JAX compiles .*\n", err.decode())


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dtype bfloat16", ["--dtype bfloat16 needs JAX", "--engine jax"]),
        ("--engine numpy --dtype bfloat16", ["--dtype bfloat16 needs JAX", "--engine jax"]),
        ("--devices 2", ["--devices needs JAX", "--engine jax"]),
        ("--coordinator a:1", ["--coordinator needs JAX", "--engine jax"]),
        ("--engine jax --dtype int8", ["--dtype int8", "--engine jax", "leave one"]),
        ("--engine jax --speculate lookup", ["--speculate lookup", "--engine jax", "leave one"]),
        ("--engine jax --speculate self", ["--speculate self", "--engine jax", "leave one"]),
        ("--engine jax --draft_model tiny", ["--draft_model", "--engine jax", "leave one"]),
        ("--engine jax --devices 0", ["'0' is not a number of devices", "2x4"]),
        ("--engine jax --devices 2x", ["'2x' is not a number of devices"]),
        ("--engine jax --devices 64", ["64 devices", "JAX finds 1 (cpu)", "set --devices to 1"]),
        ("--engine jax --process_id 0", ["--coordinator HOST:PORT"]),
        ("--engine jax --n_processes 2", ["--coordinator HOST:PORT"]),
        ("--engine jax --coordinator localhost", ["localhost is not HOST:PORT"]),
        ("--engine jax --coordinator a:1", ["--process_id", "--n_processes"]),
        ("--engine jax --coordinator a:1 --process_id 2 --n_processes 2", ["--process_id 2", "at most 1"]),
        ("--engine jax --coordinator auto --interactive", ["standard input"]),
        ("--engine jax --coordinator auto --prompts_file -", ["standard input"]),
        ("--engine jax --coordinator auto --prompts_file x --output y", ["--output", "> FILE"]),
    ],
)
def test_mistakes(inside, tiny_flags, arguments, words):
    assert_mistake(inside(*arguments.split(), *tiny_flags), *words)


def test_heads_that_do_not_divide_by_the_devices(tiny_flags):
    result = run("a", *JAX, *tiny_flags, "--devices", "2", env=on_devices(2))
    assert_mistake(result, "3 heads and 192 hidden units do not divide by 2 devices", "one of 1x1, 1x3, or", "2x1")


def test_a_cluster_that_jax_does_not_detect(tiny_flags):
    assert_mistake(run("a", *JAX, *tiny_flags, "--coordinator", "auto"), "cannot join at --coordinator auto")


def test_processes_that_wait_in_vain(tiny_flags):
    """Process 0 for process 1, and process 1 of others for process 0."""
    program = "import sys; from cli import devices, generate; devices.SECONDS_TO_JOIN = 1; sys.exit(generate.run())"
    arguments = [sys.executable, "-c", program, "a", *JAX, *tiny_flags, "--n_processes", "2", "--process_id"]
    commands = [[*arguments, str(i), "--coordinator", f"127.0.0.1:{free_port()}"] for i in range(2)]
    with started(commands[0]) as first, started(commands[1]) as second:
        for process in (first, second):
            out, err = process.communicate(timeout=SECONDS)
            line, _, rest = err.partition(b"\n")
            assert_mistake((process.returncode, out, line + b"\n"), "cannot join", "connected within 1 s", "HOST:PORT")
            assert process is first or not rest  # process 0 ends the service, which reports that


def test_a_device_that_jax_does_not_have(tiny_flags):
    result = run("a", *JAX, *tiny_flags, env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert_mistake(result, "JAX cannot start on JAX_PLATFORMS=cuda", "JAX_PLATFORMS=cpu", "jax[cuda")


def test_without_jax_the_error_says_what_to_install(tiny_flags):
    program = "import sys; sys.modules['jax'] = None; from cli.generate import run; sys.exit(run())"
    arguments = [sys.executable, "-c", program, "a", *JAX, *tiny_flags]
    done = subprocess.run(arguments, check=False, cwd=ROOT, capture_output=True)
    assert_mistake((done.returncode, done.stdout, done.stderr), "pip install -r requirements-jax.txt")


def test_too_little_memory(inside, tiny_flags, monkeypatch):
    """Of the device, as JAX reports it, and of the machine, if that is the device."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.\nat x"
        )

    with monkeypatch.context() as m:
        m.setattr(jax_engine.Batch, "advance", fail)
        assert_mistake(inside("a", *tiny_flags, *JAX), "too little memory", "--batch_size", "--dtype bfloat16")
    monkeypatch.setattr("weights.resources.available_memory", lambda: 2**10)
    assert_mistake(inside("a", *tiny_flags, *JAX), "a copy of the weights in float32", "leave out --engine jax")
    monkeypatch.setattr("engines.jax_model.check_memory", lambda *_: None)
    assert_mistake(inside("a", *tiny_flags, *JAX), "a batch of 1 continuations", "--batch_size")
