"""Speculative decoding: draft several tokens cheaply, then check all of them in one forward pass of the model.

(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".) The draft tokens come from a
smaller model, or are the tokens that followed the same words earlier in the text (Saxena 2023, "Prompt Lookup
Decoding").

Draft tokens change the number of tokens per pass, never the tokens. The sampler chooses every token from the model's
logits, as it does without drafting; a draft token is accepted if it is the token that the sampler chose, and only then
are the logits after it used. For sampling this is the paper's rejection sampling (algorithm 1), since a draft token x
is certain here (q = 1): accepting x with probability p(x), and sampling from p without x otherwise, is the same as
sampling from p and comparing with x. A seed therefore gives the same tokens with and without drafting.

The logits of a pass over several tokens differ from those of single-token passes by rounding, about 1e-5. If the two
largest logits are closer than that, the other token may be chosen.
"""

import numpy as np

import gpt2
from engines.columns import LEAST_ROWS

MAX_DRAFT = 15  # with the token before them 16 rows, which columns.py multiplies at once
MAX_MATCH = 4  # tokens of the end of the text that Lookup searches for
DECAY = 0.9  # factor by which the counts of the acceptance rate shrink per pass


class Lookup:
    """Drafts the tokens that followed the latest earlier occurrence of the last tokens, the longest match first."""

    cost = 0  # of a draft token, in single-token passes of the model

    def __init__(self):
        self.places, self.n_read = {}, 0  # for each n-gram the position after its latest occurrence

    def draft(self, text, n):
        """Return up to n draft tokens to follow text, token ids that extend those of the previous call."""
        for place in range(self.n_read, len(text)):
            for length in range(1, min(MAX_MATCH, place) + 1):
                self.places[tuple(text[place - length : place])] = place
        self.n_read = len(text)
        lengths = range(min(MAX_MATCH, len(text)), 0, -1)
        place = next(filter(None, (self.places.get(tuple(text[-length:])) for length in lengths)), None)
        if place is None:
            return []
        drafted = text[place : place + n]
        while len(drafted) < n:  # the match overlaps the end of the text: continue periodically
            drafted.append(drafted[place - len(text)])
        return drafted


class Draft:
    """Drafts the tokens that a smaller model chooses greedily; has a cache of its own.

    model: gpt2, or small_batch_model's with its params. Beside a small_batch_model the latter is faster: the threads
    of BLAS keep spinning for a tenth of a second after a product and would slow the worker processes down.
    """

    def __init__(self, params, n_head, cost, model=gpt2):
        self.params, self.n_head, self.cost, self.model = params, n_head, cost, model
        self.n_ctx = params["wpe"].shape[0]
        self.text, self.cache = [], [model.KVCache(self.n_ctx) for _ in params["blocks"]]

    def draft(self, text, n):
        """Return up to n draft tokens to follow text, fewer at the end of the draft model's context."""
        drafted = []
        while len(drafted) < min(n, self.n_ctx - len(text)):
            drafted.append(gpt2.choose(self.next_logits(text + drafted), np.argmax))
        return drafted

    def next_logits(self, text):  # [n_seq] -> [n_vocab]
        """Return the logits after text; the beginning it shares with the previous text stays in the cache."""
        pairs = enumerate(zip(self.text, text[:-1], strict=False))
        n_past = next((i for i, (a, b) in pairs if a != b), min(len(self.text), len(text) - 1))
        for layer in self.cache:
            layer.n_past = n_past
        self.text = text
        return self.model.prefill(text[n_past:], self.params, self.n_head, self.cache)


def small_batch_cost(n_tokens):
    """Time of a pass of small_batch_model over n tokens, in single-token passes of gpt2 (bench/batching.py)."""
    return 1 + 0.03 * max(n_tokens, LEAST_ROWS)


def plain_cost(n_tokens):
    """Time of a pass of gpt2 over n tokens, in single-token passes."""
    return 2.4 + 0.06 * n_tokens if n_tokens > 1 else 1


class AcceptanceRate:
    """A running estimate of the acceptance rate, and the number of draft tokens that is fastest at this rate.

    draft_cost: of a draft token, pass_cost: of a pass over n tokens, both in single-token passes of gpt2.
    """

    def __init__(self, draft_cost, pass_cost):
        self.draft_cost, self.pass_cost = draft_cost, pass_cost
        self.accepted, self.checked = 0.0, 0.0

    @property
    def rate(self):
        """The acceptance rate of the recent passes, with a prior of 3/4 that counts as one token."""
        return (self.accepted + 0.75) / (self.checked + 1)

    def update(self, n_accepted, n_draft):
        """Count a pass with n_draft tokens; those after the first rejected one were not checked."""
        self.accepted = DECAY * self.accepted + n_accepted
        self.checked = DECAY * self.checked + min(n_accepted + 1, n_draft)

    def speed(self, n):
        """Return the expected tokens per unit of time with n draft tokens per pass (Leviathan et al., theorem 3.8)."""
        return sum(self.rate**i for i in range(n + 1)) / (self.pass_cost(n + 1) + n * self.draft_cost)

    def best_n_draft(self):
        return max(range(MAX_DRAFT + 1), key=self.speed)


class Speculation:
    """Generates like gpt2.generate_tokens, with draft tokens.

    make_drafter: makes the object that drafts for one text: Lookup, or a function that returns a Draft.
    model: the module gpt2, or small_batch_model's (parallel.py) with the params that belong to it.

    Counts: n_passes, n_tokens (generated), n_draft (draft tokens), n_accepted.
    """

    def __init__(self, params, n_head, make_drafter=Lookup, model=gpt2):
        self.params, self.n_head, self.make_drafter, self.model = params, n_head, make_drafter, model
        self.pass_cost = plain_cost if model is gpt2 else small_batch_cost
        self.reset_counts()

    def reset_counts(self):
        self.n_passes = self.n_tokens = self.n_draft = self.n_accepted = 0

    def report(self, seconds):
        """Return a line about the counts; seconds: the time since reset_counts."""
        per_pass = self.n_tokens / max(self.n_passes, 1)
        return (
            f"tokens: {self.n_tokens}, passes: {self.n_passes} ({per_pass:.2f} tokens per pass), "
            f"draft tokens: {self.n_draft}, accepted: {self.n_accepted}, {self.n_tokens / seconds:.1f} tokens/s"
        )

    def generate_tokens(self, inputs, n_tokens_to_generate, sample=np.argmax, stop_id=None):
        """Yield the token ids that gpt2.generate_tokens yields; raise what it raises."""
        gpt2.check_context(len(inputs), n_tokens_to_generate, self.params["wpe"].shape[0])
        text, end = list(inputs), len(inputs) + n_tokens_to_generate
        cache = [self.model.KVCache(end) for _ in self.params["blocks"]]
        drafter = self.make_drafter()
        acceptance = AcceptanceRate(drafter.cost, self.pass_cost)
        new_ids, draft = text[:], []  # tokens that are not in the cache yet, and those that may follow them
        while len(text) < end:
            n_accepted = 0
            for logits in self.logits_after(new_ids, draft, cache):
                next_id = gpt2.choose(logits, sample)
                if next_id == stop_id:
                    return
                text.append(next_id)
                self.n_tokens += 1
                yield next_id
                if draft[n_accepted : n_accepted + 1] != [next_id]:
                    break
                n_accepted += 1
                self.n_accepted += 1
            for layer in cache:
                layer.n_past = len(text) - 1  # removes the rejected tokens
            acceptance.update(n_accepted, len(draft))
            new_ids = text[-1:]
            draft = drafter.draft(text, max(0, min(acceptance.best_n_draft(), end - len(text) - 1)))

    def logits_after(self, new_ids, draft, cache):  # [n_new], [n_draft] -> [n_draft+1, n_vocab]
        """Return the logits after new_ids and after each draft token, in one pass unless new_ids is a long prompt."""
        self.n_passes += 1
        self.n_draft += len(draft)
        if not draft:
            return self.model.prefill(new_ids, self.params, self.n_head, cache)[None]
        return self.model.gpt2([*new_ids, *draft], **self.params, n_head=self.n_head, cache=cache)
