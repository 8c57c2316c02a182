"""engines/scoring.py: log-probabilities as of whole sequences one by one, and nothing is computed twice."""

import numpy as np
import pytest

import gpt2
from engines import scoring
from tests.conftest import N_HEAD, TINY, one_line_error

N_CTX = TINY["n_ctx"]


def some_pairs():
    """Pairs of random ids that have beginnings of many lengths in common, some too long, two the same."""
    rng = np.random.default_rng(3)

    def some(n):
        return rng.integers(0, TINY["n_vocab"], n).tolist()

    stem = some(60)
    pairs = [(stem[:n] + some(m), some(k)) for n in (0, 1, 30, 60) for m in (0, 1, 40) for k in (1, 4) if n + m]
    pairs += [(stem, some(1)), (stem, stem[:1]), (stem[:1], stem[1:]), (some(3), []), (some(2), some(N_CTX))]
    return [*pairs, (some(200), some(9)), (some(N_CTX), some(1)), (some(N_CTX + 1), some(1)), pairs[0]]


PAIRS = some_pairs()


def one_by_one(pairs, params):
    """The results from whole sequences, in float64, without a cache."""
    found = []
    for context, continuation in pairs:
        ids = [*context, *continuation][-N_CTX - 1 :]
        logits = gpt2.gpt2(ids[:-1], **params, n_head=N_HEAD).astype(np.float64)[len(ids) - 1 - len(continuation) :]
        log_probs = np.log(gpt2.softmax(logits))[np.arange(len(continuation)), continuation]
        found.append((np.sum(log_probs), np.array_equal(np.argmax(logits, axis=-1), continuation)))
    return [np.array(column) for column in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def pairs(params):
    """PAIRS, and one whose continuation is greedy."""
    return [*PAIRS, (PAIRS[5][0], gpt2.generate(PAIRS[5][0], params, N_HEAD, 5))]


def assert_as_one_by_one(found, pairs, params):
    (log_probs, is_greedy), (expected, expected_greedy) = found, one_by_one(pairs, params)
    np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-4)
    assert is_greedy.tolist() == expected_greedy.tolist()
    assert is_greedy[-1] and not is_greedy[0]


@pytest.mark.parametrize("pass_tokens", [512, 17])
def test_results_are_those_of_whole_sequences(monkeypatch, model_and_params, params, pairs, pass_tokens):
    monkeypatch.setattr(scoring, "PASS_TOKENS", pass_tokens)
    model, converted = model_and_params
    assert_as_one_by_one(scoring.score(pairs, converted, N_HEAD, model), pairs, params)


def test_jax_scores_too(params, pairs):
    pytest.importorskip("jax")
    from engines.jax_engine import jax_engine

    engine, sharded = jax_engine(params, N_HEAD)
    assert_as_one_by_one(engine.score(pairs, sharded, N_HEAD), pairs, params)


def test_each_beginning_is_computed_once():
    plan = scoring.make_plan(PAIRS, N_CTX)
    sequences = [([*context, *continuation][-N_CTX - 1 :])[:-1] for context, continuation in PAIRS]
    beginnings = {tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))}
    assert len(plan.ids) == len(beginnings) < 0.6 * sum(map(len, sequences))


def test_progress_counts_the_passes(monkeypatch, params):
    monkeypatch.setattr(scoring, "PASS_TOKENS", 10)
    seen = []
    scoring.score([([1], [2] * 25)], params, N_HEAD, progress=lambda passes: seen.extend(passes) or passes)
    assert seen == [0, 10, 20]
    assert [a.tolist() for a in scoring.score([], params, N_HEAD)] == [[], []]


@pytest.mark.parametrize("pair", [([], [1]), ([1], [2] * (N_CTX + 1))])
def test_what_cannot_be_scored_is_an_error(params, pair):
    with one_line_error(len(pair[0]), len(pair[1]), N_CTX):
        scoring.score([pair], params, N_HEAD)
