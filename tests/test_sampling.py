"""sampling.py against distributions computed by hand, and against Hugging Face's logits warpers."""

import itertools
import types

import numpy as np
import pytest
from scipy import stats

from sampling import distribution, make_sampler, top_k_keep, top_p_keep

HALVES = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]  # sums of these are exact in binary
JUST_ABOVE = np.nextafter(0.75, 1)
HUGE = np.finfo(np.float32).max
no_warnings = pytest.mark.filterwarnings("error")


def kept(probs):
    return [i for i, p in enumerate(probs) if p > 0]


def samples(sample, logits, n):
    return [int(sample(logits)) for _ in range(n)]


def random_logits(seed, n=1000, dtype=np.float32):
    """float32 as the model gives them, spread as GPT-2's are, all different, and read-only."""
    logits = (3 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32).astype(dtype)
    assert len(set(logits.tolist())) == n
    logits.flags.writeable = False
    return logits


# Temperature


def test_temperature_0_takes_the_first_of_the_most_likely_tokens():
    assert make_sampler(temperature=0, top_k=2, top_p=0.1, seed=3)(np.array([-5.0, -7.0], np.float32)) == 0
    assert samples(make_sampler(), np.array([1, 4, 4, 0, 4], np.float32), 20) == [1] * 20


# Top-k


def test_top_k_keeps_the_k_largest_logits_and_0_keeps_all():
    logits = np.array([3.0, 1.0, 4.0, 2.0])
    for k, expected in ((1, [2]), (2, [0, 2]), (3, [0, 2, 3]), *((k, [0, 1, 2, 3]) for k in (0, 4, 5, 50257))):
        assert kept(top_k_keep(logits, k)) == kept(distribution(logits, top_k=k)) == expected


def test_tokens_that_tie_with_the_last_one_kept_are_kept():
    for k, expected in ((1, [1]), (2, [0, 1, 3, 4]), (4, [0, 1, 3, 4])):
        assert kept(distribution(np.array([2.0, 3.0, 1.0, 2.0, 2.0]), top_k=k)) == expected
    assert kept(distribution(np.log(HALVES), top_p=0.9)) == [0, 1, 2, 3, 4]
    assert kept(distribution(np.zeros(10), top_p=0.25)) == list(range(10))


# Top-p


def kept_by_openai(probs, p):
    """OpenAI's top_p_logits in sample.py, line by line: the token that crosses p is excluded."""
    descending = np.sort(probs)[::-1]
    index = max(np.sum(np.cumsum(descending) <= p) - 1, 0)
    return kept(probs >= descending[index])


@pytest.mark.parametrize(
    ("p", "n_kept", "n_kept_by_openai"),
    [(1e-9, 1, 1), (0.49, 1, 1), (0.5, 1, 1), (0.51, 2, 1), (0.75, 2, 2), (JUST_ABOVE, 3, 2), (0.875, 3, 3), (1, 5, 5)],
)
def test_top_p_keeps_the_token_that_crosses_p_where_openai_drops_it(p, n_kept, n_kept_by_openai):
    """Tokens whose sum is exactly p are enough; OpenAI's last token is the last one whose sum is at most p."""
    probs = np.array(HALVES)
    assert kept(top_p_keep(probs, p)) == list(range(n_kept))
    assert kept_by_openai(probs, p) == list(range(n_kept_by_openai))


def test_top_p_of_1_keeps_the_least_likely():
    probs = distribution(np.array([0.0, -700.0]), top_p=1.0)
    assert 0 < probs[1] < 1e-300


# All options


def hugging_face(logits, temperature, top_k, top_p):
    """Return the distribution by the classes that transformers' generate() uses for these options, in float64."""
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
@pytest.mark.parametrize("top_k", [0, 1, 40, 5000])
def test_the_distribution_is_hugging_faces(temperature, top_k):
    for seed, top_p in itertools.product(range(2), [1e-6, 0.1, 0.5, 0.95, 0.9999, 1.0]):
        logits = random_logits(seed)
        probs = distribution(logits, temperature, top_k, top_p)
        expected = hugging_face(logits, temperature, top_k, top_p)
        assert kept(probs) == kept(expected), (seed, top_p)
        np.testing.assert_allclose(probs, expected, rtol=1e-10)


# Samples


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}])
def test_a_sample_inverts_the_cumulative_distribution_at_one_random_number_of_its_own_generator(options, dtype):
    logits, options, before = random_logits(0, 10, dtype), {"temperature": 1.0} | options, np.random.get_state()[1]
    cumulative = list(itertools.accumulate(distribution(logits, **options)))
    numbers = np.random.default_rng(5).random(100)
    expected = [next(i for i, c in enumerate(cumulative) if u < c) for u in numbers]
    assert samples(make_sampler(seed=5, **options), logits, 100) == expected
    assert samples(make_sampler(**options), logits, 100) != samples(make_sampler(**options), logits, 100)
    np.testing.assert_array_equal(np.random.get_state()[1], before, "NumPy's global generator was used")


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}])
def test_samples_pass_a_chi_square_test(options):
    logits, options = np.linspace(0, 3, 10, dtype=np.float32), {"temperature": 1.0} | options
    probs = distribution(logits, **options)
    counts = np.bincount(samples(make_sampler(seed=1, **options), logits, 3000), minlength=10)
    assert list(np.flatnonzero(counts)) == kept(probs)
    counts, expected = counts[probs > 0], 3000 * probs[probs > 0]
    assert stats.chisquare(counts, expected).pvalue > 1e-3 > stats.chisquare(counts, np.roll(expected, 1)).pvalue


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, np.nextafter(0.5, 0), np.nextafter(1, 0)])
def test_a_token_of_probability_0_is_never_sampled(monkeypatch, number):
    """For any random number, including the borders between tokens and the ends."""
    monkeypatch.setattr(np.random, "default_rng", lambda seed: types.SimpleNamespace(random=lambda: number))
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf])
    assert make_sampler(temperature=1)(logits) == (1 if number < 0.5 else 3)


# Extremes


@no_warnings
@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-10, 1e-3, 1e10, 1e300])
def test_extreme_temperatures(temperature):
    probs = distribution(np.array([1.0, 2.0, -300.0, 2.0], np.float32), temperature=temperature)
    assert probs == pytest.approx([0, 0.5, 0, 0.5] if temperature < 1 else [0.25] * 4, abs=1e-7)
    assert make_sampler(temperature, seed=0)(random_logits(0)) in range(1000)


@no_warnings
@pytest.mark.parametrize("options", [{}, {"temperature": 1e-10}, {"top_k": 2}, {"top_k": 3, "top_p": 0.9}])
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-np.inf, 0, 0, -np.inf], [0, 0.5, 0.5, 0]),
        ([HUGE, -HUGE, 0, HUGE], [0.5, 0, 0, 0.5]),
        ([-HUGE, -HUGE, -np.inf, -np.inf], [0.5, 0.5, 0, 0]),
        ([0, -np.inf, -np.inf, -np.inf], [1, 0, 0, 0]),
        ([-7.5], [1]),  # a vocabulary of one token
    ],
)
def test_extreme_logits(logits, expected, options):
    logits = np.array(logits, np.float32)
    assert distribution(logits, **options) == pytest.approx(expected, abs=1e-12)
    assert expected[make_sampler(**{"temperature": 1, **options})(logits)] > 0
