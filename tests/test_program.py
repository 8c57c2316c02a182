"""engines/program.py: a pass that is replayed has the bits of one that is not, and what cannot be replayed is not."""

import copy
import functools
import subprocess
import sys
import threading

import numpy as np
import pytest

import gpt2
from tests.conftest import ROOT
from tests.test_compiled import Case, make_case

pytest.importorskip("numba")

from engines import functions, panels, program
from engines.program import MAX_TOKENS, Program

N = 90  # tokens of a text


class Counted(Case):
    """A model of its own, which counts the passes that are not replayed."""

    def __init__(self, sizes="heads of 16"):
        super().__init__(sizes)
        self.replayed, self.n_passes = self.model.gpt2, 0
        self.function, self.replayed.function = self.replayed.function, self.counted
        self.text = self.ids(N).tolist()

    def counted(self, *args):
        self.n_passes += 1
        return self.function(*args)

    @property
    def programs(self):
        return list(self.replayed.programs.values())

    def filled_cache(self, n):
        """A cache that holds the beginning of the text; its passes are not counted."""
        cache = self.cache()
        if n:
            self.function(np.array(self.text[:n]), **self.params, n_head=self.n_head, cache=cache)
        return cache


@pytest.fixture
def case():
    return Counted()


@functools.cache
def whole(sizes="heads of 16", dtype="float32"):
    """The logits of the text in one pass without a cache."""
    case = make_case(sizes)
    params = case.params if dtype == "float32" else panels.quantize(case.params, dtype)
    return case.model.gpt2(case.ids(N), **params, n_head=case.n_head)


def rows_of(model, caches):
    return [model.RowCaches(layer) for layer in zip(*caches, strict=True)]


def set_past(cache, n):
    for layer in cache:
        layer.n_past = n


# Bits


@pytest.mark.parametrize("sizes", ["heads of 16", "heads of 64", "5 tokens"])
@pytest.mark.parametrize("n_new", [1, 5, MAX_TOKENS])
def test_a_replayed_pass_has_the_bits_of_one_that_is_not(sizes, n_new):
    """At several positions, the cache of each being another one; the first pass records."""
    case = Counted(sizes)
    for n_past in (7, 0, 26, 3):
        expected = whole(sizes)[n_past : n_past + n_new]
        for last_only in (False, True):
            cache, new = case.filled_cache(n_past), case.text[n_past : n_past + n_new]
            logits = case.gpt2(new, cache=cache, last_only=last_only)
            np.testing.assert_array_equal(logits, expected[-1:] if last_only else expected)
            assert (type(logits), logits.dtype) == (np.ndarray, np.float32)
            assert [layer.n_past for layer in cache] == [n_past + n_new] * len(cache)
    assert case.n_passes == 2 and case.programs[0].is_complete


@pytest.mark.parametrize("n_new", [1, 3])
def test_rows_of_different_lengths(case, n_new):
    for lengths in ([1, 63, 20], [5, 4, 3], [64, 0, 80]):
        rows = rows_of(case.model, map(case.filled_cache, lengths))
        logits = case.gpt2([case.text[n : n + n_new] for n in lengths], cache=rows)
        np.testing.assert_array_equal(logits, np.stack([whole()[n : n + n_new] for n in lengths]))
        np.testing.assert_array_equal(rows[1].n_past, np.array(lengths)[:, None] + n_new)
    assert case.n_passes == 1


def test_a_cache_of_a_batch(case):
    """Of one array with leading axes, which has a program of its own."""
    ids = np.broadcast_to(case.text[:6], (2, 2, 6))
    for _ in range(2):
        cache = case.cache()
        parts = [case.gpt2(ids[..., i : i + 2], cache=cache) for i in range(0, 6, 2)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=-2), np.broadcast_to(whole()[:6], (2, 2, 6, 400)))
    assert case.n_passes == 1


def test_the_programs_of_several_caches_lengths_and_parameters_do_not_mix(case):
    """As with draft tokens: two sets of parameters, a cache of each and a copy of it, tokens that are discarded."""
    draft_params = panels.quantize(case.params, "int8")
    owners = [(case.params, whole()), (draft_params, whole(dtype="int8"))]
    passes = [(params, expected, case.cache()) for params, expected in owners]
    for round_, n_new in enumerate((1, 4, 1, 1, 4, 7, 1, 4)):
        for params, expected, cache in passes:
            n_past = cache[0].n_past
            logits = case.model.gpt2(case.text[n_past : n_past + n_new], **params, n_head=case.n_head, cache=cache)
            np.testing.assert_array_equal(logits, expected[n_past : n_past + n_new])
            case.model.gpt2([9] * n_new, **params, n_head=case.n_head, cache=cache)
            set_past(cache, n_past + n_new)
        if round_ == 2:
            passes += [(params, expected, copy.deepcopy(cache)) for params, expected, cache in passes]
    assert case.n_passes == 6 == len(case.programs)


THREADS = """
import numba
from tests.test_program import Counted, panels
results = []
for n_threads in (1, 2, 3):
    case = Counted()
    case.params |= {"blocks": [case.params["blocks"][0], panels.quantize(case.params, "int8")["blocks"][1]]}
    caches = [case.cache(), case.cache()]
    logits = b""
    for i in range(12):
        numba.set_num_threads(n_threads if i < 6 else i % 3 + 1)
        logits += case.model.gpt2(case.text[i : i + 1], **case.params, n_head=case.n_head, cache=caches[0]).tobytes()
        ids = case.text[5 * i : 5 * i + 5]
        logits += case.model.gpt2(ids, **case.params, n_head=case.n_head, cache=caches[1]).tobytes()
    assert case.n_passes == 2
    results.append(logits)
assert results[0] == results[1] == results[2]
print(numba.get_num_threads())
"""


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    """Also if it is another one than while the program was recorded."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    done = subprocess.run([sys.executable, "-c", THREADS], check=False, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"3\n"), done.stderr


# What is not replayed


def test_a_pass_without_a_cache_or_over_many_tokens_is_not_recorded(case):
    for n, cache in ((5, None), (MAX_TOKENS + 1, case.cache())):
        for _ in range(2):
            np.testing.assert_array_equal(case.gpt2(case.text[:n], cache=cache), whole()[:n])
            set_past(cache or [], 0)
    assert case.n_passes == 4 and not case.programs


def copied(function):
    return lambda *args: function(*args).copy()


def doubled_in_place(function):
    def doubled(x):
        y = function(x)
        y += y
        return y

    return doubled


def with_zeros(function):
    def zeroed(x):
        y = function(x)
        y[..., ::3] = 0
        return y

    return zeroed


CHANGES = {
    "an operation of NumPy": ("gelu", lambda own: gpt2.gelu),
    "an addition in place": ("gelu", doubled_in_place),
    "an assignment": ("gelu", with_zeros),
    "a copy": ("gelu", copied),
    "copies of views": ("split_heads", copied),
    "a parameter that is computed": ("layer_norm", lambda own: lambda x, g, b: own(x, g * 2, b)),
    "a copy of the result": ("layer_norm", lambda own: lambda x, g, b: np.array(own(x, g, b))),
    "an embedding that is not recorded": ("embed", lambda own: gpt2.embed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_that_is_not_all_recorded_is_not_replayed(case, change):
    """An instance of the module whose functions are replaced, as those that record intermediate results are."""
    name, replacement = CHANGES[change]
    own = getattr(case.model, name)
    setattr(case.model, name, replacement(own))
    expected = case.gpt2(case.text[:20])
    for ends in ([1, 2, 3, 4, 5, 20], [5, 10, 15, 20]):
        cache = case.cache()
        for i, j in zip([0, *ends], ends, strict=False):
            logits = case.gpt2(case.text[i:j], cache=cache)
            np.testing.assert_allclose(logits, expected[i:j], rtol=1e-4, atol=1e-5)


def test_a_sum_of_different_shapes_is_that_of_numpy():
    a, b = np.ones((3, 48), np.float32), np.arange(48, dtype=np.float32)[None]
    with Program((), []).recording():
        x, y = functions.gelu(a), functions.gelu(b)
        for found in (x + y, y + x):
            np.testing.assert_array_equal(found, np.asarray(x) + np.asarray(y))


@pytest.mark.parametrize("sizes", ["heads of 16", "heads of 12", "n_embd of 6"])
@pytest.mark.parametrize("kind", ["a cache of gpt2.py", "parameters that are not in panels"])
def test_other_caches_and_parameters(sizes, kind):
    """Each with the compiled functions that fit; replayed or not."""
    case = Counted(sizes)
    params = case.plain if kind.startswith("p") else case.params
    expected = gpt2.gpt2(case.text[:21], **case.plain, n_head=case.n_head)
    for _ in range(2):
        cache = [gpt2.KVCache(N) for _ in params["blocks"]] if kind.startswith("a") else case.cache()
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 12), (12, 21)):
            logits = case.model.gpt2(case.text[i:j], **params, n_head=case.n_head, cache=cache)
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected[i:j], rtol=1e-4, atol=3e-5)


# Memory


def test_the_number_of_programs_is_bounded(case, monkeypatch):
    """The one that was not used for the longest time gives way, and is recorded again."""
    monkeypatch.setattr(program, "MAX_PROGRAMS", 3)

    def run(n):
        np.testing.assert_array_equal(case.gpt2(case.text[:n], cache=case.cache()), whole()[:n])
        assert len(case.programs) <= 3
        return case.n_passes

    assert [run(n) for n in (1, 2, 3, 1, 3, 2)] == [1, 2, 3, 3, 3, 3]
    assert [run(n) for n in (4, 3, 2, 1, 4, 2)] == [4, 4, 4, 5, 6, 6]


def test_arrays_are_used_again(case):
    """A program of more blocks needs no more memory, and other programs use the same."""
    case.gpt2(case.text[:5], cache=case.cache())
    n_arrays, sizes = len(case.replayed.memory), sum(a.size for a in case.replayed.memory)
    assert n_arrays < len(case.programs[0].operations) / 2
    for n in (1, 3, 5):
        case.gpt2(case.text[:n], cache=case.cache(), last_only=True)
    assert sum(a.size for a in case.replayed.memory) < 2 * sizes


# Errors and threads


@pytest.mark.parametrize("is_recorded", [False, True])
def test_an_error_ends_the_recording_and_the_next_call_works(case, is_recorded):
    """In the pass that would be recorded, and in one that would be replayed."""
    if is_recorded:
        case.gpt2(case.text[:5], cache=case.cache())
    n_vocab = case.hparams["n_vocab"]
    small, full = case.cache(n_max=7), case.cache(n_max=200)
    case.gpt2(case.text[:4], cache=small)
    for layer in full:
        layer.n_past = case.hparams["n_ctx"] - 3
    for ids, cache, error in (
        (case.text[:5], small, ValueError),
        (case.text[:5], full, ValueError),
        ([*case.text[:4], n_vocab], case.cache(), IndexError),
        ([*case.text[:4], None], case.cache(), TypeError),
        ([], case.cache(), ValueError),
    ):
        n_past = cache[0].n_past
        with pytest.raises(error):
            case.gpt2(ids, cache=cache)
        assert type(program.empty(1)) is np.ndarray  # nothing is being recorded
        assert [layer.n_past for layer in cache] == [n_past] * 2
        for _ in range(2):
            np.testing.assert_array_equal(case.gpt2(case.text[:5], cache=case.cache()), whole()[:5])
    np.testing.assert_array_equal(case.gpt2(case.text[4:7], cache=small), whole()[4:7])


def test_threads_of_python(case):
    """Each with caches of its own; passes that are recorded, replayed, too long, and without a cache."""
    errors = []

    def run(ends, n_rounds):
        try:
            for _ in range(n_rounds):
                cache = case.cache()
                parts = [case.gpt2(case.text[i:j], cache=cache) for i, j in zip([0, *ends], ends, strict=False)]
                np.testing.assert_array_equal(np.concatenate(parts), whole()[: ends[-1]])
                np.testing.assert_array_equal(case.gpt2(case.text[:9]), whole()[:9])
        except Exception as error:
            errors.append(error)

    plans = [1, 2, 3, 10, 90], [*range(1, 90)], [70, 71, 72, 90], [4, 8, 12, 20, 90]
    threads = [threading.Thread(target=run, args=(plan, 5)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


def test_another_thread_during_a_recording(case):
    """Its operations are not recorded: it runs while the gelu of a block is computed, or after the pass."""
    own, results = case.model.gelu, []
    other = make_case("heads of 64")
    tasks = [lambda: case.gpt2(case.text[:9]), lambda: other.gpt2(other.ids(N), cache=other.cache())]
    threads = [threading.Thread(target=lambda task=task: results.append(task())) for task in tasks]

    def gelu(x):
        case.model.gelu = own
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=1)
        return own(x)

    case.model.gelu = gelu
    for _ in range(2):
        np.testing.assert_array_equal(case.gpt2(case.text[:5], cache=case.cache()), whole()[:5])
    for thread in threads:
        thread.join()
    found = sorted(results, key=len)
    np.testing.assert_array_equal(found[0], whole()[:9])
    np.testing.assert_array_equal(found[1], whole("heads of 64"))
