"""Continuous batching: generate for many prompts at once, one token of each per forward pass.

A pass reads every weight once, so a pass over several rows costs little more than one over a single row. A row that is
complete leaves the batch and the next prompt takes its place in the next pass (Yu et al. 2022, "Orca", section 3.2).
Each row has its own cache, position and sampler, and attention runs row by row over that row's positions: there is no
padding, and a row's result does not depend on the other rows: up to rounding with gpt2.py's functions, bit for bit with
the compiled ones (compiled.py).
"""

import copy
from itertools import chain, pairwise

import numpy as np

import gpt2


class RowCaches:
    """The caches of several rows for one block, used as a single cache of shape [batch, n_head, n_seq, d]."""

    def __init__(self, caches):
        self.caches = caches

    @property
    def n_past(self):
        return np.array([[cache.n_past] for cache in self.caches])  # -> [batch, 1]

    def attend(self, q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
        """Attend within each row, using its own cache; b rows, h heads."""
        return np.stack([cache.attend(*row) for cache, *row in zip(self.caches, q, k, v, strict=True)])


class Row:
    """A continuation that is being generated.

    stop_reason: None until the row is complete, then "length" or "end_of_text".
    """

    def __init__(self, key, cache, sample, n_tokens_to_generate, stop_id):
        self.key, self.cache, self.sample = key, cache, sample
        self.n_tokens_to_generate, self.stop_id = n_tokens_to_generate, stop_id
        self.ids, self.stop_reason = [], None if n_tokens_to_generate else "length"

    def append_token(self, logits):  # [n_vocab]
        """Choose the next token, and set stop_reason if the row is complete."""
        next_id = gpt2.choose(logits, self.sample)
        if next_id == self.stop_id:
            self.stop_reason = "end_of_text"
            return
        self.ids.append(next_id)
        if len(self.ids) == self.n_tokens_to_generate:
            self.stop_reason = "length"


def start_rows(requests, params, n_head, n_tokens_to_generate, stop_id, model):
    """Yield the rows of each request with their first token; the rows of a request share its prefill."""
    for key, inputs, samplers in requests:
        gpt2.check_context(len(inputs), n_tokens_to_generate, params["wpe"].shape[0])
        cache = [model.KVCache(len(inputs) + n_tokens_to_generate) for _ in params["blocks"]]
        logits = model.prefill(inputs, params, n_head, cache) if n_tokens_to_generate else None
        for i, (sample, following) in enumerate(pairwise(chain(samplers, [None])), 1):
            own_cache = copy.deepcopy(cache) if following else cache
            row = Row((key, i), own_cache, sample, n_tokens_to_generate, stop_id)
            if logits is not None:
                row.append_token(logits)
            yield row


def advance_rows(rows, params, n_head, model):
    """Append a token to each row, in one forward pass."""
    row_caches = getattr(model, "RowCaches", RowCaches)  # a compiled model has its own
    caches = [row_caches(layer) for layer in zip(*(row.cache for row in rows), strict=True)]
    newest = [row.ids[-1:] for row in rows]  # -> [batch, 1]
    logits = model.gpt2(newest, **params, n_head=n_head, cache=caches)  # -> [batch, 1, n_vocab]
    for row, row_logits in zip(rows, logits[:, -1], strict=True):
        row.append_token(row_logits)


def generate_batch(requests, params, n_head, n_tokens_to_generate, batch_size=8, stop_id=None, model=gpt2):
    """Yield ((key, i), new ids, stop reason) of each continuation when it is complete.

    requests: an iterable of (key, token ids of a prompt, iterable of samplers), one continuation per sampler, numbered
    i from 1. Both iterables are read when a row is free, so memory is bounded by batch_size rows.
    model: the module gpt2, or the one that compiled_model (compiled.py) returns with its params.
    The stop reason is "length" or "end_of_text".
    Raises ValueError if a prompt is empty or does not fit into the model's context, or batch_size is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    waiting, rows = start_rows(requests, params, n_head, n_tokens_to_generate, stop_id, model), []
    while True:
        while len(rows) < batch_size and (row := next(waiting, None)):
            if row.stop_reason:
                yield row.key, row.ids, row.stop_reason
            else:
                rows.append(row)
        if not rows:
            return
        advance_rows(rows, params, n_head, model)
        yield from ((row.key, row.ids, row.stop_reason) for row in rows if row.stop_reason)
        rows = [row for row in rows if not row.stop_reason]


def in_order(results, keys):
    """Yield the values of (key, value) pairs in the order of keys, each as soon as its predecessors have arrived."""
    arrived, expected = {}, iter(keys)
    key = next(expected, None)
    for found, value in results:
        arrived[found] = value
        while key in arrived:
            yield arrived.pop(key)
            key = next(expected, None)
