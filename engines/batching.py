"""Continuous batching: generate for many prompts at once, one token of each per forward pass.

A pass reads every weight once, so a pass over several rows costs little more than one over a single row. A row that is
complete leaves the batch and the next prompt takes its place in the next pass (Yu et al. 2022, "Orca", section 3.2).
Prompts that start together are packed into one sequence. Each row has its own cache,
position and sampler, and attention runs row by row over that row's positions: there is no padding, and a row's result
does not depend on the other rows: up to rounding with gpt2.py's functions, bit for bit with the compiled ones
(compiled.py).
"""

import copy
from itertools import chain, islice, pairwise

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


class PackedCaches:
    """The caches of several prompts for one block, used as the cache of one sequence that they are packed into.

    lengths: the number of new tokens of each prompt.
    """

    def __init__(self, caches, lengths):
        self.caches, self.starts = caches, np.cumsum([0, *lengths])

    @property
    def n_past(self):
        """The position of each token in its prompt, minus its index in the sequence."""
        pasts = [cache.n_past - start for cache, start in zip(self.caches, self.starts, strict=False)]
        return np.repeat(pasts, np.diff(self.starts))  # -> [n_seq]

    def attend(self, q, k, v):  # [h, n_seq, d], [h, n_seq, d], [h, n_seq, d] -> [h, n_seq, d]
        """Attend within each prompt, using its own cache."""
        prompts = zip(self.caches, *(np.split(a, self.starts[1:-1], axis=-2) for a in (q, k, v)), strict=True)
        return np.concatenate([cache.attend(*prompt) for cache, *prompt in prompts], axis=-2)


class Prompt:
    """A prompt whose rows share its prefill: its tokens but the last are computed once, in its cache."""

    def __init__(self, ids, cache):
        self.ids, self.cache, self.is_computed = list(ids), cache, len(ids) <= 1


class Row:
    """A continuation that is being generated.

    new_id: the token that is not in the cache yet. stop_reason: None until the row is complete, then "length" or
    "end_of_text".
    """

    def __init__(self, key, prompt, sample, n_tokens_to_generate, stop_id, is_last):
        self.key, self.prompt, self.sample, self.stop_id = key, prompt, sample, stop_id
        self.n_tokens_to_generate, self.is_last = n_tokens_to_generate, is_last  # of the prompt's rows
        self.ids, self.new_id, self.stop_reason = [], None, None if n_tokens_to_generate else "length"

    def start(self):
        """Continue the prompt, which is computed; all rows but its last one in a copy of its cache."""
        self.cache = self.prompt.cache if self.is_last else copy.deepcopy(self.prompt.cache)
        self.new_id, self.prompt = self.prompt.ids[-1], None

    def append_token(self, logits):  # [n_vocab]
        """Choose the next token, and set stop_reason if the row is complete."""
        self.append_id(gpt2.choose(logits, self.sample))

    def append_id(self, new_id):
        """Append the token that has been chosen."""
        self.new_id = new_id
        if self.new_id == self.stop_id:
            self.stop_reason = "end_of_text"
            return
        self.ids.append(self.new_id)
        if len(self.ids) == self.n_tokens_to_generate:
            self.stop_reason = "length"


def new_rows(requests, params, n_tokens_to_generate, stop_id, model):
    """Yield the rows of each request."""
    for key, inputs, samplers in requests:
        gpt2.check_context(len(inputs), n_tokens_to_generate, params["wpe"].shape[0])
        if len(inputs) == 0 and n_tokens_to_generate:
            raise ValueError("the prompt is empty; generation starts from at least one token")
        prompt = Prompt(inputs, [model.KVCache(len(inputs) + n_tokens_to_generate) for _ in params["blocks"]])
        for i, (sample, following) in enumerate(pairwise(chain(samplers, [None])), 1):
            yield Row((key, i), prompt, sample, n_tokens_to_generate, stop_id, is_last=following is None)


def start_rows(rows, params, n_head, model):
    """Compute the prompts of new rows, PREFILL_CHUNK tokens per pass."""
    pieces, room = [], gpt2.PREFILL_CHUNK
    for prompt in dict.fromkeys(row.prompt for row in rows if not row.prompt.is_computed):
        ids = prompt.ids[:-1]
        while ids:
            pieces.append((ids[:room], prompt.cache))
            ids, room = ids[room:], room - len(pieces[-1][0])
            if room == 0:
                prefill_packed(pieces, params, n_head, model)
                pieces, room = [], gpt2.PREFILL_CHUNK
        prompt.is_computed = True
    if pieces:
        prefill_packed(pieces, params, n_head, model)
    for row in rows:
        row.start()


def prefill_packed(pieces, params, n_head, model):
    """Append pieces of prompts to their caches, in one forward pass. pieces: a list of (ids, cache)."""
    all_ids, caches = zip(*pieces, strict=True)
    packed = [PackedCaches(layer, list(map(len, all_ids))) for layer in zip(*caches, strict=True)]
    model.gpt2(list(chain(*all_ids)), **params, n_head=n_head, cache=packed, last_only=True)


def score_prompt(prompt, params, n_head, model=gpt2):
    """Compute a prompt as start_rows does; yield the logits of each position but the last, [n_vocab]."""
    for i in range(0, len(prompt.ids) - 1, gpt2.PREFILL_CHUNK):
        ids = prompt.ids[:-1][i : i + gpt2.PREFILL_CHUNK]
        yield from model.gpt2(ids, **params, n_head=n_head, cache=prompt.cache)  # [n_seq] -> [n_seq, n_vocab]
    prompt.is_computed = True


def advance_rows(rows, params, n_head, model):
    """Append a token to each row, in one forward pass."""
    row_caches = getattr(model, "RowCaches", RowCaches)  # a compiled model has its own
    caches = [row_caches(layer) for layer in zip(*(row.cache for row in rows), strict=True)]
    newest = [[row.new_id] for row in rows]  # -> [batch, 1]
    logits = model.gpt2(newest, **params, n_head=n_head, cache=caches)  # -> [batch, 1, n_vocab]
    for row, row_logits in zip(rows, logits[:, -1], strict=True):
        row.append_token(row_logits)


class Batch:
    """Up to max_rows rows that are generated together. New rows join between two passes, and complete ones leave."""

    def __init__(self, params, n_head, max_rows, model=gpt2):
        if max_rows < 1:
            raise ValueError(f"batch_size is {max_rows}; it must be at least 1")
        self.params, self.n_head, self.max_rows, self.model, self.rows = params, n_head, max_rows, model, []

    def step(self, waiting):
        """Let rows of the iterator `waiting` join, and append a token to each row; return all of them.

        A row leaves in the next step if its stop_reason is set, here or by the caller.
        """
        self.rows = [row for row in self.rows if not row.stop_reason]
        started = list(islice(waiting, self.max_rows - len(self.rows)))
        self.rows += started
        start_rows([row for row in started if not row.stop_reason], self.params, self.n_head, self.model)
        if growing := [row for row in self.rows if not row.stop_reason]:
            advance_rows(growing, self.params, self.n_head, self.model)
        return self.rows


def generate_batch(requests, params, n_head, n_tokens_to_generate, batch_size=8, stop_id=None, model=gpt2):
    """Yield ((key, i), new ids, stop reason) of each continuation when it is complete.

    requests: an iterable of (key, token ids of a prompt, iterable of samplers), one continuation per sampler, numbered
    i from 1. Both iterables are read when a row is free, so memory is bounded by batch_size rows.
    model: the module gpt2, or the one that compiled_model (compiled.py) returns with its params.
    The stop reason is "length" or "end_of_text".
    Raises ValueError if a prompt is empty or does not fit into the model's context, or batch_size is less than 1.
    """
    batch = Batch(params, n_head, batch_size, model)
    waiting = new_rows(requests, params, n_tokens_to_generate, stop_id, model)
    while rows := batch.step(waiting):
        yield from ((row.key, row.ids, row.stop_reason) for row in rows if row.stop_reason)


def in_order(results, keys):
    """Yield the values of (key, value) pairs in the order of keys, each as soon as its predecessors have arrived."""
    arrived, expected = {}, iter(keys)
    key = next(expected, None)
    for found, value in results:
        arrived[found] = value
        while key in arrived:
            yield arrived.pop(key)
            key = next(expected, None)
