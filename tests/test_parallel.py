"""columns.py and parallel.py: the weights in another layout and shared out, the same model."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2
from engines import columns, parallel
from engines.columns import Columns, Table
from tests.conftest import ROOT, TINY
from tests.random_model import random_tensors
from tests.test_gpt2 import their_greedy_ids
from weights.names import hugging_face_name, nest

WIDE = {"n_vocab": 300, "n_ctx": 64, "n_embd": 160, "n_head": 5, "n_layer": 2}  # 5 heads in 2 or 3 shares: unequal ones


def matrix(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


# Columns


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(36, 108), (64, 64), (768, 130), (768, 1), (1600, 70), (3072, 200), (6400, 65)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 33, 127, 128, 150])
def test_the_product_is_the_matrix_product(n_in, n_out, rows):
    x, w = matrix(rows, n_in), matrix(n_in, n_out)
    y = x @ Columns(w)
    truth = x.astype(np.float64) @ w.astype(np.float64)
    assert y.shape == (rows, n_out)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, truth, atol=2e-6 * n_in)


ROWS_ALONE_AND_TOGETHER = """
import sys
import numpy as np
from engines import parallel
from engines.columns import MANY_ROWS, Columns
if not parallel.has_small_kernels():
    sys.exit("skip")
rng = np.random.default_rng(0)
with parallel.blas().limit(limits=1):
    for n_in, n_out in ((768, 192), (3072, 130), (1600, 64), (36, 50)):
        x = rng.standard_normal((MANY_ROWS - 1, n_in), dtype=np.float32)
        w = Columns(rng.standard_normal((n_in, n_out), dtype=np.float32))
        together = x @ w
        for n in range(1, len(x)):
            assert np.array_equal(x[:n] @ w, together[:n]), (n_in, n)
        for i in (0, 1, 50, len(x) - 1):
            assert np.array_equal(x[i : i + 1] @ w, together[i : i + 1]), (n_in, i)
        assert np.array_equal(x[::-1].copy() @ w, together[::-1]), n_in
"""


def own_kernels():
    """The environment without what it tells OpenBLAS, so that OpenBLAS takes the processor's best kernels."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    command = [sys.executable, "-c", ROWS_ALONE_AND_TOGETHER]
    done = subprocess.run(command, check=False, cwd=ROOT, env=own_kernels(), capture_output=True)
    if b"skip" in done.stderr:
        pytest.skip("this processor has no AVX-512, or NumPy another BLAS")
    assert done.returncode == 0, done.stderr


def test_the_matrix_and_its_columns_can_be_had_back():
    w = matrix(768, 130)
    np.testing.assert_array_equal(Columns(w).whole(), w)
    ids = np.array([[0, 63, 64], [127, 128, 129]])
    np.testing.assert_array_equal(Table(Columns(w))[ids], w.T[ids])


def test_nothing_is_shared_with_the_matrix():
    w = matrix(64, 70)
    x, laid_out = matrix(3, 64), Columns(w)
    before = x @ laid_out
    w[:] = np.nan
    np.testing.assert_array_equal(x @ laid_out, before)


def test_sums_that_cannot_be_cut_stay_plain():
    assert [columns.n_parts(n) for n in (1, 768, 1024, 1600, 3072, 6400)] == [1, 1, 2, 2, 4, 8]
    assert columns.n_parts(997) == 0  # a prime
    w = matrix(997, 5)
    np.testing.assert_array_equal(columns.in_columns(w), w)
    for n in (768, 1024, 1280, 1600, 3072, 4096, 5120, 6400):  # the four sizes
        assert columns.FEW_ROWS * n // columns.n_parts(n) * columns.WIDTH <= columns.SMALL_PRODUCT


# Shares


@pytest.mark.parametrize(("n", "n_processes"), [(1, 1), (2, 2), (5, 2), (12, 2), (25, 2), (12, 8), (12, 12), (100, 3)])
def test_everyone_gets_an_equal_share(n, n_processes):
    ends = parallel.shares(n, n_processes)
    sizes = np.diff([0, *ends])
    assert ends[-1] == n and len(ends) == n_processes
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


# The model


def hugging_face_model(hparams, tensors):
    config = GPT2Config(
        vocab_size=hparams["n_vocab"],
        n_positions=hparams["n_ctx"],
        n_embd=hparams["n_embd"],
        n_layer=hparams["n_layer"],
        n_head=hparams["n_head"],
    )
    model = GPT2LMHeadModel(config).eval()
    state = {f"transformer.{hugging_face_name(name)}": torch.tensor(tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"]
    model.tie_weights()
    return model


@pytest.fixture(
    scope="module", params=[(WIDE, 1), (WIDE, 2), (WIDE, 3), (TINY, 2)], ids=lambda p: f"{p[0]['n_embd']}-{p[1]}"
)
def shared(request):
    """(model, its params, the plain params, n_head, transformers' model)"""
    hparams, n_processes = request.param
    tensors = random_tensors(hparams)
    params = nest(tensors, hparams["n_layer"])
    return (
        *parallel.shared(params, hparams["n_head"], n_processes),
        params,
        hparams["n_head"],
        hugging_face_model(hparams, tensors),
    )


def some_ids(*shape):
    return np.random.default_rng(7).integers(0, 300, shape)


def test_its_logits_are_those_of_transformers(shared):
    model, params, _, n_head, theirs = shared
    ids = some_ids(2, 20)
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = model.gpt2(ids, **params, n_head=n_head)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    np.testing.assert_allclose(model.gpt2(ids[0], **params, n_head=n_head), expected[0], atol=2e-4)
    last = model.gpt2(ids, **params, n_head=n_head, last_only=True)
    np.testing.assert_allclose(last, expected[:, -1:], atol=2e-4)


def test_pieces_through_its_cache_are_the_whole(shared):
    model, params, _, n_head, _ = shared
    ids = some_ids(20)
    whole = model.gpt2(ids, **params, n_head=n_head)
    cache = [model.KVCache(20) for _ in params["blocks"]]
    pieces = [model.gpt2(ids[i:j], **params, n_head=n_head, cache=cache) for i, j in ((0, 9), (9, 10), (10, 20))]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-4)
    assert cache[0].n_past == 20
    for layer in cache:
        layer.n_past = 9  # forget some and say them again
    np.testing.assert_allclose(model.gpt2(ids[9:], **params, n_head=n_head, cache=cache), whole[9:], atol=1e-4)


def test_it_generates_what_transformers_generate(shared):
    model, params, _, n_head, theirs = shared
    ids = some_ids(6).tolist()
    assert model.generate(ids, params, n_head, 30) == their_greedy_ids(theirs, ids, 30)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_the_given_params_may_go(shared, n_processes):
    model, params, plain, n_head, _ = shared
    ids = some_ids(10)
    expected = model.gpt2(ids, **params, n_head=n_head)
    plain = copy.deepcopy(plain)
    model, params = parallel.shared(plain, n_head, n_processes)

    def poison(branch):
        for value in branch.values() if isinstance(branch, dict) else branch:
            value.fill(np.nan) if isinstance(value, np.ndarray) else poison(value)

    poison(plain)
    np.testing.assert_allclose(model.gpt2(ids, **params, n_head=n_head), expected, atol=1e-4)


def cache_of(model, params, n_head, ids):
    """A cache with room for 20 positions that has taken in these ids."""
    cache = [model.KVCache(20) for _ in params["blocks"]]
    model.gpt2(ids, **params, n_head=n_head, cache=cache)
    return cache


def test_caches_can_be_shared_out_and_made_whole(shared):
    model, params, plain, n_head, _ = shared
    ids = some_ids(20)
    expected = gpt2.gpt2(ids, **plain, n_head=n_head)
    cache = parallel.share_caches(cache_of(gpt2, plain, n_head, ids[:7]), params)
    np.testing.assert_allclose(model.gpt2(ids[7:12], **params, n_head=n_head, cache=cache), expected[7:12], atol=1e-4)
    cache = parallel.whole_caches(cache, n_head)
    np.testing.assert_allclose(gpt2.gpt2(ids[12:], **plain, n_head=n_head, cache=cache), expected[12:], atol=1e-4)
    assert parallel.share_caches(cache, plain) is cache  # nothing to do where there are no shares


def test_a_copied_cache_goes_its_own_way(shared):
    model, params, plain, n_head, _ = shared
    ids = some_ids(20)
    expected = gpt2.gpt2(ids, **plain, n_head=n_head)
    cache = cache_of(model, params, n_head, ids[:7])
    twin = copy.deepcopy(cache)
    model.gpt2(ids[:5], **params, n_head=n_head, cache=twin)
    del twin
    ours = model.gpt2(ids[7:], **params, n_head=n_head, cache=cache)
    np.testing.assert_allclose(ours, expected[7:], atol=1e-4)


def test_helpers_drop_what_the_first_process_has_dropped():
    """A helper's side is played here."""
    team = parallel.Team(1)
    forget = parallel.helper_actions(gpt2, None, 1, team)["forget"]
    kept, gone = parallel.SharedCache(5, team), parallel.SharedCache(5, team)
    shares = [pickle.loads(pickle.dumps(cache)) for cache in (kept, gone)]
    assert [pickle.loads(pickle.dumps(cache)) for cache in (kept, gone)] == shares  # the same ones again
    assert [parallel.CACHES[cache.number] for cache in (kept, gone)] == shares
    number = gone.number
    del gone
    assert team.dropped == [number]
    forget(team.dropped)
    assert number not in parallel.CACHES
    assert parallel.CACHES.pop(kept.number) is shares[0]


def test_the_context_may_not_overflow(shared):
    model, params, _, n_head, _ = shared
    n_ctx = len(params["wpe"])
    with pytest.raises(ValueError, match=f"the context is {n_ctx}"):
        model.gpt2(np.zeros(n_ctx + 1, dtype=int), **params, n_head=n_head)


@pytest.mark.parametrize("wrong", [300, -1])
def test_ids_that_are_none_are_refused_and_it_goes_on(shared, wrong):
    model, params, plain, n_head, _ = shared
    if len(plain["wte"]) == 300:
        with pytest.raises(IndexError, match="of 300"):
            model.gpt2([1, wrong], **params, n_head=n_head)
    with pytest.raises(TypeError):
        model.gpt2([None], **params, n_head=n_head)
    ours = model.gpt2([1, 2], **params, n_head=n_head)
    np.testing.assert_allclose(ours, gpt2.gpt2([1, 2], **plain, n_head=n_head), atol=1e-4)


def in_a_daemon(pipe):
    hparams = WIDE | {"n_embd": 640}  # from 512 on there are helpers
    params = nest(random_tensors(hparams), hparams["n_layer"])
    parallel.has_small_kernels = lambda: True
    model, laid_out = parallel.small_batch_model(params, hparams["n_head"])
    difference = model.gpt2([1, 2], **laid_out, n_head=5) - gpt2.gpt2([1, 2], **params, n_head=5)
    pipe.send((laid_out["wte"].T.team.n, float(np.abs(difference).max())))


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_daemon_which_may_have_no_helpers_does_without():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=in_a_daemon, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    n, difference = ours.recv()
    process.join()
    assert n == 1 and difference < 1e-3


@pytest.mark.parametrize("there", [False, True])
def test_without_small_kernels_it_is_gpt2_itself(monkeypatch, there):
    monkeypatch.setattr(parallel, "has_small_kernels", lambda: there)
    params = nest(random_tensors(TINY), TINY["n_layer"])
    model, laid_out = parallel.small_batch_model(params, TINY["n_head"])
    assert there == (model is not gpt2) == (laid_out is not params)


def test_there_are_never_more_processes_than_shares():
    """30 wide, 5 heads, 120 hidden units in two blocks; 3 heads for 8 processes; two blocks of tokens."""
    for hparams in (WIDE | {"n_embd": 30}, TINY, WIDE | {"n_vocab": 65}):
        params = nest(random_tensors(hparams), hparams["n_layer"])
        model, laid_out = parallel.shared(params, hparams["n_head"], 8)
        expected = gpt2.gpt2([1, 2, 3], **params, n_head=hparams["n_head"])
        ours = model.gpt2([1, 2, 3], **laid_out, n_head=hparams["n_head"])
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_blas_has_its_threads_again_after_a_pass(shared):
    model, params, _, n_head, _ = shared
    before = [library["num_threads"] for library in parallel.blas().info()]
    model.gpt2(some_ids(3), **params, n_head=n_head)
    assert [library["num_threads"] for library in parallel.blas().info()] == before
