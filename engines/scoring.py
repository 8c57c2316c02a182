"""Log-probabilities of continuations, for evaluation: what several sequences have in common is computed once.

The sequences are sorted, so that no earlier one shares a longer beginning with a sequence than its predecessor does.
Only the tokens after that beginning are computed: the cache is set back to where the two part. The tokens of all
sequences are packed one after another, without padding, and go through the model PASS_TOKENS at a time; logits are
computed only where a token is scored. So a question with four answers is read once, and few-shot examples that all
questions begin with are read once for all of them.
"""

from typing import NamedTuple

import numpy as np

import gpt2
from engines.batching import PackedCaches
from engines.instance import new_instance
from weights.errors import UserError

PASS_TOKENS = 512  # per forward pass; fewer leave the time of a pass to reading the weights


class Plan(NamedTuple):
    """The tokens to compute, [n] each, and the tokens to score, [m] each, in the order of the rows."""

    ids: np.ndarray
    positions: np.ndarray  # of each token in its sequence
    rows: np.ndarray  # index in ids: the logits there score the target
    targets: np.ndarray
    owners: np.ndarray  # index of the pair that the target belongs to


def fitted(context, continuation, n_ctx):
    """Return the token ids of a pair, without the first ones if there are more than the model reads and one to predict.

    Raises UserError if the context is empty or the continuation alone is too long.
    """
    if not context or len(continuation) > n_ctx:
        raise UserError(
            f"a continuation of {len(continuation)} tokens after a context of {len(context)} cannot be scored: a "
            f"context has at least 1, a continuation at most {n_ctx}, the model's context; choose another task or model"
        )
    return [*context, *continuation][-n_ctx - 1 :]


def common_length(a, b):
    """Return the number of elements at the beginning that two lists have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def make_plan(pairs, n_ctx):
    """Return the Plan for pairs of (context, continuation), lists of token ids.

    Raises UserError as in fitted().
    """
    ids, positions, scored = [], [], []
    previous, rows = [], []  # the rows of the previous sequence's tokens
    for inputs, i in sorted((fitted(*pair, n_ctx)[:-1], i) for i, pair in enumerate(pairs)):
        n_shared = common_length(previous, inputs)
        rows[n_shared:] = range(len(ids), len(ids) + len(inputs) - n_shared)
        ids += inputs[n_shared:]
        positions += range(n_shared, len(inputs))
        targets = pairs[i][1]
        scored += zip(rows[len(inputs) - len(targets) :], targets, [i] * len(targets), strict=True)
        previous = inputs
    scored = np.array(scored, dtype=int).reshape(-1, 3)
    scored = scored[np.argsort(scored[:, 0], kind="stable")]
    return Plan(np.array(ids), np.array(positions), *scored.T)


class Branch:
    """A cache that is set back to n_past tokens before it is used."""

    def __init__(self, cache, n_past):
        self.cache, self.n_past = cache, n_past

    def attend(self, q, k, v):  # [h, n_seq, d], [h, n_seq, d], [h, n_seq, d] -> [h, n_seq, d]
        self.cache.n_past = self.n_past
        return self.cache.attend(q, k, v)


def with_rows(model):
    """Return an instance of gpt2 that runs the functions of this model and whose blocks take `rows`, those they return.

    With rows for the last block, gpt2() computes the logits of these positions only.
    """
    instance = new_instance()
    instance.embed, instance.layer_norm, instance.linear = model.embed, model.layer_norm, model.linear
    instance.transformer_block = lambda x, rows=slice(None), **options: model.transformer_block(x, **options)[rows]
    return instance


def score(pairs, params, n_head, model=gpt2, progress=iter):
    """Return the log-probability of each continuation, [n] float64, and whether all its tokens are the most likely.

    pairs: (context, continuation), lists of token ids; see make_plan. model: as in generate_batch (batching.py).
    progress: a function that wraps the iterable of the passes, to count them.
    """
    plan = make_plan(pairs, n_ctx=params["wpe"].shape[0])
    log_probs, is_greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    cache = [model.KVCache(int(max(plan.positions, default=0)) + 1) for _ in params["blocks"]]
    instance = with_rows(model)
    for start in progress(range(0, len(plan.ids), PASS_TOKENS)):
        first, last = np.searchsorted(plan.rows, [start, start + PASS_TOKENS])
        rows, targets, owners = plan.rows[first:last] - start, plan.targets[first:last], plan.owners[first:last]
        distinct, rows = np.unique(rows, return_inverse=True)
        one_pass = slice(start, start + PASS_TOKENS)
        logits = logits_of(distinct, plan.ids[one_pass], plan.positions[one_pass], cache, params, n_head, instance)
        log_sums, most_likely = np.array(list(map(summary, logits))).reshape(-1, 2).T  # one row fits into the cache
        np.add.at(log_probs, owners, logits[rows, targets] - log_sums[rows])
        np.logical_and.at(is_greedy, owners, most_likely[rows] == targets)
    return log_probs, is_greedy


def logits_of(rows, ids, positions, cache, params, n_head, instance):  # [n_rows], [n], [n] -> [n_rows, n_vocab]
    """Return the logits of some rows of a pass. A new branch begins where a position does not follow the one before."""
    starts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1)]
    lengths = np.diff([*starts, len(ids)])
    packed = [PackedCaches([Branch(layer, positions[i]) for i in starts], lengths) for layer in cache]
    *blocks, last = params["blocks"]
    return instance.gpt2(ids, **params | {"blocks": [*blocks, last | {"rows": rows}]}, n_head=n_head, cache=packed)


def summary(logits):  # [n_vocab] -> a number, an index
    """Return the logarithm of the sum of exp(logits), and the index of the largest."""
    largest = int(np.argmax(logits))
    exp_logits = np.exp(logits - logits[largest])
    return np.log(np.sum(exp_logits)) + logits[largest], largest
