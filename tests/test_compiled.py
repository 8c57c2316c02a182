"""engines/compiled.py: gpt2.py's logits up to rounding, and the same bits on every path to them."""

import copy
import functools
import subprocess
import sys

import numpy as np
import pytest

import gpt2
from engines import batching, compiled
from tests.conftest import ROOT, TINY, their_logits
from tests.gradients import torch_model
from tests.random_model import random_tensors
from utils import load_encoder_hparams_and_params
from weights.names import flatten, nest

pytest.importorskip("numba")

from tests.test_panels import unpacked

SIZES = {
    "heads of 16": TINY,  # no weight has whole panels only
    "heads of 64": {"n_vocab": 301, "n_ctx": 300, "n_embd": 192, "n_head": 3, "n_layer": 2},  # all but wte have
    "heads of 80": {"n_vocab": 50, "n_ctx": 128, "n_embd": 160, "n_head": 2, "n_layer": 3},
    "5 tokens": {"n_vocab": 5, "n_ctx": 128, "n_embd": 16, "n_head": 1, "n_layer": 1},  # less than a panel
    "heads of 12": {"n_vocab": 97, "n_ctx": 128, "n_embd": 48, "n_head": 4, "n_layer": 2},
    "n_embd of 36": {"n_vocab": 97, "n_ctx": 128, "n_embd": 36, "n_head": 3, "n_layer": 2},
    "n_embd of 6": {"n_vocab": 97, "n_ctx": 128, "n_embd": 6, "n_head": 2, "n_layer": 2},
}
# gpt2.py's own functions that run: those of arrays whose last axis is no multiple of LANES
OWN = {
    "heads of 12": {"attention", "softmax"},
    "n_embd of 36": {"attention", "softmax", "layer_norm"},
    "n_embd of 6": {"attention", "softmax", "layer_norm", "gelu"},
}
WITH_KERNELS = [name for name in SIZES if name not in OWN]
N = 90  # tokens: more than one block of keys, and not a multiple of a tile


class Case:
    """A random model of some sizes in both engines."""

    def __init__(self, sizes):
        self.name, self.hparams, self.tensors = sizes, SIZES[sizes], random_tensors(SIZES[sizes])
        self.plain, self.n_head = nest(self.tensors, self.hparams["n_layer"]), self.hparams["n_head"]
        self.model, self.params = compiled.compiled_model(self.plain)
        self.gpt2 = functools.partial(self.model.gpt2, **self.params, n_head=self.n_head)

    def ids(self, *shape):
        return np.random.default_rng(3).integers(0, self.hparams["n_vocab"], shape)

    def cache(self, n_max=N):
        return [self.model.KVCache(n_max) for _ in self.params["blocks"]]

    def exact(self, ids):
        """gpt2.py's logits in float64."""
        tensors = {name: tensor.astype(np.float64) for name, tensor in self.tensors.items()}
        return gpt2.gpt2(ids, **nest(tensors, self.hparams["n_layer"]), n_head=self.n_head)


make_case = functools.cache(Case)


@pytest.fixture(params=SIZES)
def case(request):
    return make_case(request.param)


@pytest.fixture(params=WITH_KERNELS)
def kernel_case(request):
    return make_case(request.param)


# The logits


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_logits_are_those_of_gpt2_in_float64(case, batch):
    """As close as gpt2.py's own in float32."""
    ids = case.ids(*batch, N)
    found, expected = case.gpt2(ids), case.exact(ids)
    assert found.dtype == np.float32 and expected.dtype == np.float64
    error = np.abs(gpt2.gpt2(ids, **case.plain, n_head=case.n_head) - expected).max()
    assert np.abs(found - expected).max() < 2 * error < 1e-4
    np.testing.assert_allclose(case.gpt2(ids, last_only=True), found[..., -1:, :], rtol=1e-4, atol=1e-5)


def test_logits_are_those_of_transformers(case):
    ids = case.ids(2, N)
    theirs = their_logits(torch_model(case.hparams, case.tensors)[0].eval(), ids)
    np.testing.assert_allclose(case.gpt2(ids), theirs, rtol=1e-4, atol=3e-5)


def test_the_kernels_run_where_the_sizes_allow_it(case, monkeypatch):
    """Which of gpt2.py's own functions are called."""
    called = set()
    for name in ("linear", "layer_norm", "gelu", "attention", "softmax"):
        own = getattr(gpt2, name)
        monkeypatch.setattr(gpt2, name, lambda *args, name=name, own=own: called.add(name) or own(*args))
    for ids, cache in ((case.ids(9), None), (case.ids(9), case.cache()), (case.ids(2, 9), None)):
        case.gpt2(ids, cache=cache)
    assert called == OWN.get(case.name, set())


# Bits


@pytest.mark.parametrize("pieces", [[1] * N, [N - 1, 1], [4, 1, 60, 3, 22], [64, 26], [7] * 12 + [6]])
def test_chunks_and_single_tokens_give_the_bits_of_one_pass(kernel_case, pieces):
    ids, cache = kernel_case.ids(N), kernel_case.cache()
    parts = [kernel_case.gpt2(part, cache=cache) for part in np.split(ids, np.cumsum(pieces)[:-1])]
    np.testing.assert_array_equal(np.concatenate(parts), whole := kernel_case.gpt2(ids))
    np.testing.assert_array_equal(kernel_case.gpt2(ids, last_only=True), whole[-1:])


def test_a_discarded_token_leaves_no_trace(kernel_case):
    """As after rejected draft tokens: n_past is lowered and other tokens follow."""
    ids, cache = kernel_case.ids(N), kernel_case.cache()
    whole, others = kernel_case.gpt2(ids), (ids + 1) % kernel_case.hparams["n_vocab"]
    for n_past, n_right, n_wrong in ((0, 5, 3), (5, 1, 8), (6, 58, 20), (64, 1, 1), (65, 25, 0)):
        n = n_past + n_right
        found = kernel_case.gpt2([*ids[n_past:n], *others[n : n + n_wrong]], cache=cache)
        np.testing.assert_array_equal(found[:n_right], whole[n_past:n])
        for layer in cache:
            assert layer.n_past == n + n_wrong
            layer.n_past = n


def test_rows_of_a_batch_have_the_bits_of_a_row_alone(kernel_case):
    """Of one array, and with caches of different lengths side by side."""
    ids = kernel_case.ids(5, N)
    whole = np.stack([kernel_case.gpt2(row) for row in ids])
    np.testing.assert_array_equal(kernel_case.gpt2(ids), whole)
    lengths = [1, 63, 64, 80, 7]
    caches = [kernel_case.cache(n_max=N + i) for i in range(5)]
    for row, cache, n in zip(ids, caches, lengths, strict=True):
        kernel_case.gpt2(row[:n], cache=cache)
    for step in range(5):
        row_caches = getattr(kernel_case.model, "RowCaches", batching.RowCaches)
        rows = [row_caches(layer) for layer in zip(*caches, strict=True)]
        places = [n + step for n in lengths]
        found = kernel_case.gpt2(ids[range(5), places][:, None], cache=rows)
        np.testing.assert_array_equal(found[:, 0], whole[range(5), places])


def test_a_copy_of_a_cache_is_independent(kernel_case):
    """The samples of a prompt continue from copies."""
    ids, cache = kernel_case.ids(N), kernel_case.cache()
    whole = kernel_case.gpt2(ids)
    kernel_case.gpt2(ids[:70], cache=cache)
    twin = copy.deepcopy(cache)
    kernel_case.gpt2(ids[:5], cache=twin)
    for one in (cache, copy.deepcopy(cache)):
        np.testing.assert_array_equal(kernel_case.gpt2(ids[70:], cache=one), whole[70:])
    assert (cache[0].n_past, twin[0].n_past) == (N, 75)


THREADS = """
import numba
from tests.test_compiled import WITH_KERNELS, make_case
for case in map(make_case, WITH_KERNELS):
    logits = []
    for n_threads in (1, 2, 3):
        numba.set_num_threads(n_threads)
        logits.append(case.gpt2(case.ids(2, 60)).tobytes() + case.gpt2(case.ids(1), cache=case.cache()).tobytes())
    assert logits[0] == logits[1] == logits[2]
"""


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    done = subprocess.run([sys.executable, "-c", THREADS], check=False, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


# The bundled model


def test_greedy_ids_of_the_bundled_model_are_those_of_gpt2():
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))
    model, laid_out = compiled.compiled_model(params)
    for prompt in ("ROMEO:", "To be, or not to be", "\n"):
        ids = encoder.encode(prompt)
        n = hparams["n_ctx"] - len(ids)
        expected = gpt2.generate(ids, params, hparams["n_head"], n)
        assert len(set(expected)) > 8
        assert model.generate(ids, laid_out, hparams["n_head"], n) == expected


# The parameters


def test_the_params_given_stay_as_they_are_and_only_the_weights_are_copied(case):
    """The arrays of a model are read-only views of its file. wte is copied for the output layer, not for the lookup."""
    before = {name: tensor.copy() for name, tensor in case.tensors.items()}
    for tensor in case.tensors.values():
        tensor.flags.writeable = False
    model, params = compiled.compiled_model(case.plain)
    model.gpt2(case.ids(2, 5), **params, n_head=case.n_head)
    model.generate([1, 2, 3], params, case.n_head, 3)
    wte = params["wte"]
    for name, tensor in flatten(params | {"wte": wte.wte}, case.hparams).items():
        np.testing.assert_array_equal(case.tensors[name], before[name])
        is_copy = name.startswith("h") and name.endswith("/w")
        np.testing.assert_array_equal(unpacked(tensor) if is_copy else tensor, before[name])
        assert np.shares_memory(tensor.codes if is_copy else tensor, case.tensors[name]) != is_copy, name
    np.testing.assert_array_equal(unpacked(wte.T), before["wte"].T)
    assert not np.shares_memory(wte.T.codes, case.tensors["wte"])
    assert model is not gpt2 and gpt2.linear.__module__ == "gpt2"


def test_damaged_weights_give_logits_that_are_not_finite(kernel_case):
    """So that generation ends with an error instead of a wrong text."""
    for name in kernel_case.tensors:
        tensors = kernel_case.tensors | {name: kernel_case.tensors[name].copy()}
        tensors[name][..., 0] = np.nan
        model, params = compiled.compiled_model(nest(tensors, kernel_case.hparams["n_layer"]))
        with pytest.raises(FloatingPointError, match="not finite"):
            model.generate([1, 2, 3], params, kernel_case.n_head, 1)


# What it refuses


def test_what_gpt2_refuses_is_refused_and_the_next_call_works(case):
    n_ctx, n_vocab = case.hparams["n_ctx"], case.hparams["n_vocab"]
    cache = case.cache(4)
    expected = case.gpt2([1, 2])
    for ids, options, error in (
        ([0] * (n_ctx + 1), {}, ValueError),
        ([0] * 5, {"cache": cache}, ValueError),
        ([1, n_vocab], {}, IndexError),
        ([None], {}, TypeError),
        ([], {}, ValueError),
    ):
        with pytest.raises(error):
            case.gpt2(ids, **options)
    found = case.gpt2([1, 2], cache=cache)
    if case.name in WITH_KERNELS:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_of_another_batch_is_refused(case):
    """The shapes of the keys and values are those of its first call."""
    cache = case.cache()
    case.gpt2(case.ids(2, 5), cache=cache)
    for batch in ((3,), (2, 2)):
        with pytest.raises(ValueError):
            case.gpt2(case.ids(*batch, 5), cache=cache)
    assert cache[0].n_past == 5


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from tests.conftest import TINY
from tests.random_model import random_tensors
from weights.names import nest
from engines.compiled import compiled_model
compiled_model(nest(random_tensors(TINY), TINY["n_layer"]))
"""


def test_without_numba_the_error_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], check=False, cwd=ROOT, capture_output=True)
    *_, last = done.stderr.decode().splitlines()
    assert last.startswith("weights.errors.UserError") and "pip install numba" in last and "--engine numpy" in last


def test_without_memory_for_the_copy_it_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "check_memory", lambda what, n, remedy: pytest.fail(f"{what} {n} {remedy}"))
    with pytest.raises(pytest.fail.Exception, match=f"{(2 * 12 * 48 * 48 + 400 * 48) * 4} .*--engine numpy"):
        compiled.compiled_model(make_case("heads of 16").plain)
