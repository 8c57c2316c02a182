"""Many prompts at once: one pass of the model takes a token of every row, and so reads the weights once for all.

Rows come and go (continuous batching; Yu et al. 2022, "Orca", section 3.2): one that is done leaves, and the next
prompt takes its place in the next pass. A row has its own cache, position and sampler; attention goes row by row over
exactly the positions a row has. Nothing is padded, and what a row gets does not depend on its neighbours, but for the
rounding of products (columns.py).
"""

import copy

import numpy as np

import gpt2


class RowCaches:
    """The caches of one layer of several rows, [batch, n_head, n_seq, d], as one cache."""

    def __init__(self, caches):
        self.caches = caches

    @property
    def n_past(self):
        return np.array([[cache.n_past] for cache in self.caches])  # -> [batch, 1]

    def attend(self, q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
        """Each row to its own cache: b rows, h heads."""
        return np.stack([cache.attend(*row) for cache, *row in zip(self.caches, q, k, v, strict=True)])


class Row:
    """One continuation in the making."""

    def __init__(self, key, cache, sample, n_tokens_to_generate, stop_id):
        self.key, self.cache, self.sample = key, cache, sample
        self.n_tokens_to_generate, self.stop_id = n_tokens_to_generate, stop_id
        self.ids, self.stop_reason = [], None if n_tokens_to_generate else "length"

    def take(self, logits):  # [n_vocab]
        """Chooses the next token, and says in stop_reason whether it was the last."""
        next_id = int(self.sample(logits))
        if next_id == self.stop_id:
            self.stop_reason = "end_of_text"
            return
        self.ids.append(next_id)
        if len(self.ids) == self.n_tokens_to_generate:
            self.stop_reason = "length"


def start_rows(requests, params, n_head, n_tokens_to_generate, stop_id, model):
    """Yields the rows of each request with their first token; they share the passes over the prompt."""
    for key, inputs, samplers in requests:
        gpt2.check_request(inputs, n_tokens_to_generate, params["wpe"].shape[0])
        cache = [model.KVCache(len(inputs) + n_tokens_to_generate) for _ in params["blocks"]]
        logits = model.prefill(inputs, params, n_head, cache) if n_tokens_to_generate else None
        for i, sample in enumerate(samplers, 1):
            own_cache = copy.deepcopy(cache) if i < len(samplers) else cache
            row = Row((key, i), own_cache, sample, n_tokens_to_generate, stop_id)
            if logits is not None:
                row.take(logits)
            yield row


def generate_batch(requests, params, n_head, n_tokens_to_generate, batch_size=8, stop_id=None, model=gpt2):
    """Yields ((key, i), new ids, stop reason) of every row as it ends, the reason being "length" or "end_of_text".

    requests: triples of a key, a prompt's ids, and a list of samplers, one for each continuation of it, i from 1 up.
    The next is asked for when a row is free, so memory is that of batch_size rows.
    model: the module gpt2, or small_batch_model's (parallel.py) with the params that belong to it.
    Raises ValueError when a prompt is empty or does not fit into the model's context, or batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size} rows at a time are too few, at least 1")
    waiting = start_rows(requests, params, n_head, n_tokens_to_generate, stop_id, model)
    rows, caches = [], None
    while True:
        while len(rows) < batch_size and (row := next(waiting, None)):
            if row.stop_reason:
                yield row.key, row.ids, row.stop_reason
            else:
                rows, caches = [*rows, row], None
        if not rows:
            return
        caches = caches or [RowCaches(layer) for layer in zip(*(row.cache for row in rows), strict=True)]
        newest = [row.ids[-1:] for row in rows]  # -> [batch, 1]
        logits = model.gpt2(newest, **params, n_head=n_head, cache=caches)  # -> [batch, 1, n_vocab]
        for row, row_logits in zip(rows, logits[:, -1], strict=True):
            row.take(row_logits)
        if any(row.stop_reason for row in rows):
            yield from ((row.key, row.ids, row.stop_reason) for row in rows if row.stop_reason)
            rows, caches = [row for row in rows if not row.stop_reason], None


def in_order(results, keys):
    """The values of (key, value) pairs in the order of the keys, each as soon as all before it are there."""
    held, waiting = {}, iter(keys)
    key = next(waiting, None)
    for found, value in results:
        held[found] = value
        while key in held:
            yield held.pop(key)
            key = next(waiting, None)
