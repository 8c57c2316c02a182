"""How the next token is chosen from the logits: greedily, or sampled with temperature, top-k and top-p.

Temperature is applied first, then top-k, then top-p, as in OpenAI's sample.py and Hugging Face's generate.
Ties: tokens exactly as likely as the last token kept are kept too, for top-k and top-p (as in OpenAI's code).
Top-p keeps the smallest set of most likely tokens whose probabilities sum to at least p (Holtzman et al. 2020,
section 3.1, and Hugging Face). OpenAI's code leaves out the token that crosses p, unless it is the only one.
"""

import functools

import numpy as np

from gpt2 import softmax


def top_k_keep(logits, k):  # [n_vocab] -> [n_vocab] of bool
    """Mask of the k largest logits and of any that equal the smallest of them; k = 0 keeps all."""
    if not 0 < k < len(logits):
        return np.ones(len(logits), dtype=bool)
    return logits >= np.partition(logits, -k)[-k]


def top_p_keep(probs, p):  # [n_vocab] -> [n_vocab] of bool
    """Mask of the smallest set of most likely tokens whose probabilities reach p, ties included; p = 1 keeps all."""
    if p >= 1:
        return np.ones(len(probs), dtype=bool)
    descending = np.sort(probs)[::-1]
    n_keep = min(np.searchsorted(np.cumsum(descending), p) + 1, len(probs))
    return probs >= descending[n_keep - 1]


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):  # [n_vocab] -> [n_vocab]
    """Probability of each token, for temperature > 0, in float64: float32 sums over a vocabulary are too inexact."""
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf for all but the largest, as intended
        logits = (logits - np.max(logits)) / temperature
    probs = softmax(np.where(top_k_keep(logits, top_k), logits, -np.inf))
    probs = np.where(top_p_keep(probs, top_p), probs, 0)
    return probs / np.sum(probs)


def sample(logits, rng, **options):
    """Return a token id sampled from distribution(logits, **options)."""
    cumulative = np.cumsum(distribution(logits, **options))
    return np.searchsorted(cumulative / cumulative[-1], rng.random(), side="right")


def make_sampler(temperature=0.0, top_k=0, top_p=1.0, seed=None):
    """Return a function from logits, [n_vocab], to a token id: argmax at temperature 0, else a seeded random sample.

    Each sample uses one random number of NumPy's Generator, so a seed gives the same tokens on every machine, up to
    rounding.
    """
    if temperature == 0:
        return np.argmax
    return functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, rng=np.random.default_rng(seed))
