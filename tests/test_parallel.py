"""engines/columns.py and engines/parallel.py: blocked and sharded weights give the same model."""

import contextlib
import copy
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import gpt2
from engines import columns, parallel
from engines.columns import Columns, Table
from tests.conftest import ROOT, TINY, their_greedy_ids, their_logits
from tests.gradients import torch_model
from tests.random_model import random_tensors
from weights.names import nest

WIDE = {"n_vocab": 300, "n_ctx": 64, "n_embd": 160, "n_head": 5, "n_layer": 2}  # shards of 5 heads: unequal ones


def matrix(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def some_ids(*shape):
    return np.random.default_rng(7).integers(0, 300, shape)


def params_of(hparams):
    return nest(random_tensors(hparams), hparams["n_layer"])


# Blocked matrices


@pytest.mark.parametrize(("n_in", "n_out"), [(36, 108), (64, 64), (768, 1), (1600, 70), (6400, 65)])
def test_the_product_is_the_matrix_product(n_in, n_out):
    w = matrix(n_in, n_out)
    blocked = Columns(w)
    for rows in (1, 2, 5, 17, 127, 128, 150):
        x = matrix(rows, n_in)
        y = x @ blocked
        assert (y.shape, y.dtype) == ((rows, n_out), np.float32)
        np.testing.assert_allclose(y, x.astype(np.float64) @ w.astype(np.float64), atol=2e-6 * n_in)


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


def test_a_row_has_the_same_bits_in_any_batch():
    """With the kernels that OpenBLAS chooses for this processor, whatever its variables say in these tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    command = [sys.executable, "-c", ROWS_ALONE_AND_TOGETHER]
    done = subprocess.run(command, check=False, cwd=ROOT, env=own, capture_output=True)
    if b"skip" in done.stderr:
        pytest.skip("this processor has no AVX-512, or NumPy another BLAS")
    assert done.returncode == 0, done.stderr


def test_the_blocks_are_a_copy_that_can_be_read_back():
    w = matrix(768, 130)
    blocked, original = Columns(w), w.copy()
    w[:] = np.nan
    np.testing.assert_array_equal(blocked.whole(), original)
    ids = np.array([[0, 63, 64], [127, 128, 129]])
    np.testing.assert_array_equal(Table(blocked)[ids], original.T[ids])


def test_sums_that_cannot_be_split_stay_plain():
    assert [columns.n_parts(n) for n in (1, 768, 1024, 1600, 3072, 6400)] == [1, 1, 2, 2, 4, 8]
    assert columns.n_parts(997) == 0  # a prime
    w = matrix(997, 5)
    np.testing.assert_array_equal(columns.in_columns(w), w)
    for n in (768, 1024, 1280, 1600, 3072, 4096, 5120, 6400):  # the four sizes
        assert columns.FEW_ROWS * n // columns.n_parts(n) * columns.WIDTH <= columns.SMALL_PRODUCT


# The sharded model


@pytest.mark.parametrize(("n", "n_processes"), [(1, 1), (5, 2), (12, 8), (12, 12), (100, 3)])
def test_shards_are_of_equal_size(n, n_processes):
    ends = parallel.shares(n, n_processes)
    sizes = np.diff([0, *ends])
    assert ends[-1] == n and len(ends) == n_processes
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


@pytest.fixture(scope="module", params=[(WIDE, 1), (WIDE, 3), (TINY, 2)], ids=["wide-1", "wide-3", "tiny-2"])
def sharded(request):
    """(sharded model, its params, the plain params, n_head, transformers' model)"""
    hparams, n_processes = request.param
    tensors, n_head = random_tensors(hparams), hparams["n_head"]
    theirs = torch_model(hparams, tensors)[0].eval()
    model, params = parallel.shared(nest(tensors, hparams["n_layer"]), n_head, n_processes)
    for tensor in tensors.values():
        tensor.fill(np.nan)  # the sharded model has copies in all processes
    return model, params, params_of(hparams), n_head, theirs


def test_its_logits_and_ids_are_those_of_transformers(sharded):
    model, params, _, n_head, theirs = sharded
    ids = some_ids(2, 20)
    logits, expected = functools.partial(model.gpt2, **params, n_head=n_head), their_logits(theirs, ids)
    assert logits(ids).dtype == np.float32
    np.testing.assert_allclose(logits(ids), expected, atol=2e-4)
    np.testing.assert_allclose(logits(ids[0]), expected[0], atol=2e-4)
    np.testing.assert_allclose(logits(ids, last_only=True), expected[:, -1:], atol=2e-4)
    ids = some_ids(6).tolist()
    assert model.generate(ids, params, n_head, 16) == their_greedy_ids(theirs, ids, 16)


def test_its_cache_and_copies_of_it(sharded):
    """Chunks through a cache give the logits of the whole; so do a copy of the cache and a cache that was cut back."""
    model, params, plain, n_head, _ = sharded
    ids = some_ids(20)
    whole = gpt2.gpt2(ids, **plain, n_head=n_head)
    cache = [model.KVCache(20) for _ in params["blocks"]]

    def logits(start, stop, cache=cache):
        return model.gpt2(ids[start:stop], **params, n_head=n_head, cache=cache)

    np.testing.assert_allclose(np.concatenate([logits(0, 9), logits(9, 10)]), whole[:10], atol=1e-4)
    logits(0, 5, copy.deepcopy(cache))
    for same in (copy.deepcopy(cache), cache):
        np.testing.assert_allclose(logits(10, 20, same), whole[10:], atol=1e-4)
    assert cache[0].n_past == 20
    for layer in cache:
        layer.n_past = 9
    np.testing.assert_allclose(logits(9, 20), whole[9:], atol=1e-4)


def test_workers_drop_the_caches_that_rank_0_has_dropped():
    """The worker's side runs in this process."""
    team = parallel.Team(1)
    forget = parallel.helper_actions(gpt2, None, 1)["forget"]
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


def test_blas_has_its_threads_again_after_a_call_and_after_an_error():
    with parallel.blas().limit(limits=2):
        model, params = parallel.shared(params_of(TINY), TINY["n_head"], 1)
        for ids in ([1], [None]):
            with contextlib.suppress(TypeError):
                model.gpt2(ids, **params, n_head=TINY["n_head"])
            assert {library["num_threads"] for library in parallel.blas().info()} == {2}


def test_wrong_ids_are_refused_and_the_next_call_works(sharded):
    model, params, plain, n_head, _ = sharded
    n_ctx, n_vocab = len(plain["wpe"]), len(plain["wte"])
    with pytest.raises(ValueError, match=f"context of {n_ctx}"):
        model.gpt2(np.zeros(n_ctx + 1, dtype=int), **params, n_head=n_head)
    for wrong in (n_vocab, -1):
        with pytest.raises(IndexError, match=f"of {n_vocab}"):
            model.gpt2([1, wrong], **params, n_head=n_head)
    with pytest.raises(TypeError):
        model.gpt2([None], **params, n_head=n_head)
    ours = model.gpt2([1, 2], **params, n_head=n_head)
    np.testing.assert_allclose(ours, gpt2.gpt2([1, 2], **plain, n_head=n_head), atol=1e-4)


def in_a_daemon(pipe):
    params = params_of(WIDE | {"n_embd": 640})  # from 512 on there are workers
    parallel.has_small_kernels = lambda: True
    model, laid_out = parallel.small_batch_model(params, 5)
    difference = model.gpt2([1, 2], **laid_out, n_head=5) - gpt2.gpt2([1, 2], **params, n_head=5)
    pipe.send((laid_out["wte"].T.team.n, float(np.abs(difference).max())))


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_daemon_which_cannot_start_workers_runs_alone():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=in_a_daemon, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    n, difference = ours.recv()
    process.join()
    assert n == 1 and difference < 1e-3


@pytest.mark.parametrize("available", [False, True])
def test_without_small_kernels_it_is_gpt2_itself(monkeypatch, available):
    monkeypatch.setattr(parallel, "has_small_kernels", lambda: available)
    params = params_of(TINY)
    model, laid_out = parallel.small_batch_model(params, TINY["n_head"])
    assert available == (model is not gpt2) == (laid_out is not params)


def test_there_are_never_more_processes_than_shards():
    """Two blocks of hidden units for 8 processes; 3 heads; two blocks of tokens."""
    for hparams, n in ((WIDE | {"n_embd": 30}, 2), (TINY | {"n_embd": 60}, 3), (WIDE | {"n_vocab": 65}, 2)):
        params = params_of(hparams)
        model, laid_out = parallel.shared(params, hparams["n_head"], 8)
        assert laid_out["wte"].T.team.n == n
        expected = gpt2.gpt2([1, 2, 3], **params, n_head=hparams["n_head"])
        ours = model.gpt2([1, 2, 3], **laid_out, n_head=hparams["n_head"])
        np.testing.assert_allclose(ours, expected, atol=1e-4)
