"""Sampling by hand on a few tokens, and against Hugging Face's logits warpers on many."""

import itertools
import math

import numpy as np
import pytest

from sampling import distribution, make_sampler, top_k_keep, top_p_keep

HALVES = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]  # sums of these are exact in binary
JUST_ABOVE = np.nextafter(0.75, 1)
HUGE = np.finfo(np.float32).max
no_warnings = pytest.mark.filterwarnings("error")


def logits_of(probabilities):
    return np.log(np.array(probabilities))


def kept(probs):
    return [i for i, p in enumerate(probs) if p > 0]


def draws(sample, logits, n):
    return [int(sample(logits)) for _ in range(n)]


def random_logits(seed):
    """float32 as the model gives them, spread as GPT-2's are, all different."""
    logits = (3 * np.random.default_rng(seed).standard_normal(1000)).astype(np.float32)
    assert len(set(logits.tolist())) == 1000
    return logits


# Temperature


def test_temperature_0_takes_the_largest():
    assert make_sampler()(np.array([1.0, 3.0, 2.0], np.float32)) == 1
    assert make_sampler(temperature=0, top_k=2, top_p=0.1, seed=3)(np.array([-5.0, -7.0], np.float32)) == 0


def test_temperature_0_takes_the_first_of_ties():
    assert draws(make_sampler(temperature=0), np.array([1, 4, 4, 0, 4], np.float32), 20) == [1] * 20


def test_temperature_1_is_the_softmax():
    assert distribution(logits_of(HALVES)) == pytest.approx(HALVES, abs=1e-15)
    assert distribution(logits_of(HALVES) + 100) == pytest.approx(HALVES, abs=1e-12)


@pytest.mark.parametrize(("temperature", "ratio"), [(1, 2), (0.5, 4), (2, math.sqrt(2)), (0.1, 1024)])
def test_temperature_divides_the_logits(temperature, ratio):
    first, second = distribution(np.array([math.log(2), 0]), temperature=temperature)
    assert first / second == pytest.approx(ratio, rel=1e-12)


# Top-k


@pytest.mark.parametrize(("k", "expected"), [(1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_top_k(k, expected):
    assert kept(top_k_keep(np.array([3.0, 1.0, 4.0, 2.0]), k)) == expected
    assert kept(distribution(np.array([3.0, 1.0, 4.0, 2.0]), top_k=k)) == expected


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [0, 1, 3, 4]), (3, [0, 1, 3, 4]), (4, [0, 1, 3, 4])])
def test_top_k_keeps_all_that_tie_at_the_border(k, expected):
    assert kept(distribution(np.array([2.0, 3.0, 1.0, 2.0, 2.0]), top_k=k)) == expected


@pytest.mark.parametrize("k", [0, 5, 6, 50257])
def test_top_k_0_and_from_the_vocabulary_on_keep_all(k):
    assert distribution(logits_of(HALVES), top_k=k) == pytest.approx(HALVES)


def test_top_k_shares_the_probability_among_those_kept():
    assert distribution(logits_of(HALVES), top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])


# Top-p


def kept_by_openai(probs, p):
    """OpenAI's top_p_logits in sample.py, line by line: the token that crosses p falls out."""
    descending = np.sort(probs)[::-1]
    index = max(np.sum(np.cumsum(descending) <= p) - 1, 0)
    return kept(probs >= descending[index])


@pytest.mark.parametrize(
    ("p", "n_kept", "n_kept_by_openai"),
    [(1e-9, 1, 1), (0.49, 1, 1), (0.5, 1, 1), (0.51, 2, 1), (0.75, 2, 2), (JUST_ABOVE, 3, 2), (0.875, 3, 3), (1, 5, 5)],
)
def test_top_p_keeps_the_token_that_crosses_p_where_openai_drops_it(p, n_kept, n_kept_by_openai):
    """Those that reach p exactly are enough; OpenAI's last one is the last whose sum is at most p."""
    probs = np.array(HALVES)
    assert kept(top_p_keep(probs, p)) == list(range(n_kept))
    assert kept_by_openai(probs, p) == list(range(n_kept_by_openai))


@pytest.mark.parametrize(("p", "expected"), [(0.3, [3]), (0.8, [0, 3]), (0.9, [0, 2, 3]), (0.99, [0, 1, 2, 3])])
def test_top_p_needs_no_order(p, expected):
    probs = [0.25, 0.0625, 0.125, 0.5625]
    assert kept(distribution(logits_of(probs), top_p=p)) == expected


def test_top_p_keeps_all_that_tie_at_the_border():
    assert kept(distribution(logits_of(HALVES), top_p=0.9)) == [0, 1, 2, 3, 4]
    assert kept(distribution(np.zeros(10), top_p=0.25)) == list(range(10))


def test_top_p_shares_the_probability_among_those_kept():
    assert distribution(logits_of(HALVES), top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])


def test_top_p_1_keeps_the_least_likely():
    probs = distribution(np.array([0.0, -700.0]), top_p=1.0)
    assert 0 < probs[1] < 1e-300


# All three


def test_temperature_comes_before_top_p():
    """At temperature 1/2 the probabilities 4/7, 2/7, 1/7 become 16/21, 4/21, 1/21, and 0.7 needs one token, not two."""
    logits = logits_of([4 / 7, 2 / 7, 1 / 7])
    assert kept(distribution(logits, top_p=0.7)) == [0, 1]
    assert kept(distribution(logits, temperature=0.5, top_p=0.7)) == [0]


def test_top_k_comes_before_top_p():
    """Of 0.4, 0.3, 0.2, 0.1 the first two are 4/7 and 3/7 among themselves: 0.5 needs one, not two."""
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    assert kept(distribution(logits, top_p=0.5)) == [0, 1]
    assert kept(distribution(logits, top_k=2, top_p=0.5)) == [0]


def hugging_face(logits, temperature, top_k, top_p):
    """The same by the classes that transformers' generate() makes of these options, in its order, in float64."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 40, 999, 5000])
def test_the_distribution_is_hugging_faces(temperature, top_k):
    for seed, top_p in itertools.product(range(3), [1e-6, 0.1, 0.5, 0.95, 0.9999, 1.0]):
        logits = random_logits(seed)
        probs = distribution(logits, temperature, top_k, top_p)
        expected = hugging_face(logits, temperature, top_k, top_p)
        assert kept(probs) == kept(expected), (seed, top_p)
        np.testing.assert_allclose(probs, expected, rtol=1e-10)


# Draws


def test_a_draw_inverts_the_cumulative_distribution_at_one_random_number():
    probs = [0.125, 0.5, 0, 0.375]
    cumulative = [0.125, 0.625, 0.625, 1.0]
    numbers = np.random.default_rng(5).random(100)
    expected = [next(i for i, c in enumerate(cumulative) if u < c) for u in numbers]
    with np.errstate(divide="ignore"):
        logits = logits_of(probs)
    assert draws(make_sampler(temperature=1, seed=5), logits, 100) == expected


def test_a_seed_gives_the_same_draws():
    logits = random_logits(0)
    first, again = ([draws(make_sampler(1.0, seed=seed), logits, 50) for seed in range(5)] for _ in range(2))
    assert first == again
    assert len({tuple(ids) for ids in first}) == 5


def test_samplers_share_no_state():
    logits = random_logits(0)
    alone = draws(make_sampler(1.0, seed=7), logits, 50)
    one, other = make_sampler(1.0, seed=7), make_sampler(1.0, seed=7)
    pairs = [(int(one(logits)), int(other(logits))) for _ in range(50)]
    assert pairs == [(i, i) for i in alone]


def test_without_a_seed_draws_differ():
    np.random.seed(0)
    first = draws(make_sampler(1.0), np.zeros(1000), 20)
    np.random.seed(0)
    assert first != draws(make_sampler(1.0), np.zeros(1000), 20)


def test_draws_leave_numpys_own_generator_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    draws(make_sampler(1.0), np.zeros(10), 5)
    draws(make_sampler(1.0, seed=1), np.zeros(10), 5)
    assert np.random.random() == expected


def chi_square(counts, probs):
    expected = np.array(probs) * sum(counts)
    return float(np.sum((counts - expected) ** 2 / expected))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}])
def test_draws_follow_the_distribution(options):
    """Ten tokens have at most nine degrees of freedom, for which chance exceeds 27.88 once in a thousand times."""
    logits, options = np.linspace(0, 3, 10, dtype=np.float32), {"temperature": 1.0} | options
    found = draws(make_sampler(seed=1, **options), logits, 20_000)
    counts, probs = np.bincount(found, minlength=10), distribution(logits, **options)
    possible = probs > 0
    assert set(found) == set(kept(probs))
    assert chi_square(counts[possible], probs[possible]) < 27.88
    others = np.roll(probs[possible], 1)
    assert chi_square(counts[possible], others) > 1000  # so many draws tell distributions apart


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, np.nextafter(0.5, 0), np.nextafter(1, 0)])
def test_a_token_of_probability_0_is_never_drawn(monkeypatch, number):
    """Whatever the random number, also at the borders between tokens and at the ends."""

    class Fixed:
        def random(self):
            return number

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Fixed())
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf])
    expected = 1 if number < 0.5 else 3
    assert make_sampler(temperature=1)(logits) == expected


# Extremes


@no_warnings
@pytest.mark.parametrize("temperature", [1e-300, 1e-10, 1e-3, 1e10, 1e300])
def test_extreme_temperatures(temperature):
    probs = distribution(np.array([1.0, 2.0, -1.0, 2.0], np.float32), temperature=temperature)
    expected = [0, 0.5, 0, 0.5] if temperature < 1 else [0.25] * 4
    assert probs == pytest.approx(expected, abs=1e-9)
    assert make_sampler(temperature, seed=0)(random_logits(0)) in range(1000)


@no_warnings
@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-306])
def test_the_smallest_temperatures_choose_the_largest(temperature):
    """The command line takes every number above 0."""
    assert list(distribution(np.array([-300.0, 1.0], np.float32), temperature=temperature)) == [0, 1]


@no_warnings
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1e-10}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}]
)
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-np.inf, 0, 0, -np.inf], [0, 0.5, 0.5, 0]),
        ([HUGE, -HUGE, 0, HUGE], [0.5, 0, 0, 0.5]),
        ([-HUGE, -HUGE, -np.inf, -np.inf], [0.5, 0.5, 0, 0]),
        ([0, -np.inf, -np.inf, -np.inf], [1, 0, 0, 0]),
    ],
)
def test_extreme_logits(logits, expected, options):
    assert distribution(np.array(logits, np.float32), **options) == pytest.approx(expected, abs=1e-12)


@no_warnings
def test_one_token_is_all_there_is():
    for options in ({}, {"top_k": 1}, {"top_p": 0.5}, {"temperature": 1e-10}):
        assert list(distribution(np.array([-7.5], np.float32), **options)) == [1]
        assert make_sampler(**{"temperature": 1, **options})(np.array([-7.5], np.float32)) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_are_not_changed(dtype):
    logits = random_logits(0).astype(dtype)
    logits.flags.writeable = False
    before = logits.tobytes()
    make_sampler(temperature=0.7, top_k=40, top_p=0.9, seed=0)(logits)
    make_sampler()(logits)
    assert logits.tobytes() == before


def test_float32_logits_give_float64_probabilities():
    """Summed in float32 the probabilities of 50257 tokens would drift."""
    logits = random_logits(0)
    probs = distribution(logits)
    assert probs.dtype == np.float64
    exact = [math.exp(x) for x in logits.tolist()]
    np.testing.assert_allclose(probs, np.array(exact) / math.fsum(exact), rtol=1e-12)
    assert distribution(np.zeros(50257, np.float32)).sum() == pytest.approx(1, abs=1e-12)
