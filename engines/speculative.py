"""Speculative decoding: draft several tokens cheaply, then check all of them in one forward pass of the model.

(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".) The draft tokens come from the
model itself with quantized weights, from a smaller model, or are the tokens that followed the same words earlier in the
text (Saxena 2023, "Prompt Lookup Decoding").

Draft tokens change the number of tokens per pass, never the tokens. The sampler chooses every token from the model's
logits, as it does without drafting; a draft token is accepted if it is the token that the sampler chose, and only then
are the logits after it used. For sampling this is the paper's rejection sampling (algorithm 1), since a draft token x
is certain here (q = 1): accepting x with probability p(x), and sampling from p without x otherwise, is the same as
sampling from p and comparing with x. A seed therefore gives the same tokens with and without drafting.

The compiled engine computes the same bits in a pass over several tokens as in single-token passes. gpt2's logits differ
by rounding, about 1e-5: if the two largest logits are closer than that, the other token may be chosen.
"""

import copy
import functools

import numpy as np

import gpt2
from engines.compiled import check_copy

MAX_DRAFT = 17  # with the token before them 18 rows of the products, three tiles
MAX_MATCH = 4  # tokens of the end of the text that Lookup searches for
DECAY = 0.9  # factor by which the counts of the acceptance rate shrink per pass
IDLE_DECAY = 0.985  # and without draft tokens if these take time: a drafter that failed is rarely tried again


class Lookup:
    """Drafts the tokens that followed the latest earlier occurrence of the last tokens, the longest match first."""

    cost = 0  # of a draft token, in single-token passes of the model

    def __init__(self, min_match=1):
        self.min_match = min_match  # tokens of the end of the text that must have occurred before
        self.places, self.n_read = {}, 0  # for each n-gram the position after its latest occurrence

    def draft(self, text, n):
        """Return up to n draft tokens to follow text, token ids that extend those of the previous call."""
        for place in range(self.n_read, len(text)):
            for length in range(self.min_match, min(MAX_MATCH, place) + 1):
                self.places[tuple(text[place - length : place])] = place
        self.n_read = len(text)
        lengths = range(min(MAX_MATCH, len(text)), self.min_match - 1, -1)
        place = next(filter(None, (self.places.get(tuple(text[-length:])) for length in lengths)), None)
        if place is None:
            return []
        drafted = text[place : place + n]
        while len(drafted) < n:  # the match overlaps the end of the text: continue periodically
            drafted.append(drafted[place - len(text)])
        return drafted


class Draft:
    """Drafts the tokens that a smaller model chooses greedily; has a cache of its own.

    model: gpt2, or a compiled_model with its params. Beside a compiled model the latter is faster: the threads of BLAS
    keep spinning for a tenth of a second after a product.
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


class SelfDraft:
    """Drafts the tokens that the model itself chooses with quantized weights and the same random numbers.

    cache, sample: the model's cache and sampler. A draft continues the cache; the model then computes the keys and
    values of the draft tokens again. Drafting samples with a copy of the sampler, so that the state of its random
    numbers stays as it is; it is greedy if make_sampler did not make the sampler, as a copy may then share its state.
    """

    cost = 0.4  # 0.3 while the memory is slow (bench/quantized.py)

    def __init__(self, params, n_head, model, cache, sample):
        self.params, self.n_head, self.model, self.cache, self.sample = params, n_head, model, cache, sample

    def draft(self, text, n):
        """Return n draft tokens to follow text, of which all but the last token are in the cache."""
        if n == 0:
            return []
        drafted, sample = [], copy.deepcopy(self.sample) if isinstance(self.sample, functools.partial) else np.argmax
        for _ in range(n):
            logits = self.model.prefill([*text[-1:], *drafted][-1:], self.params, self.n_head, self.cache)
            drafted.append(gpt2.choose(logits, sample))
        for layer in self.cache:
            layer.n_past -= n
        return drafted


def self_drafter(model, params, n_head):
    """Return the make_drafters of a compiled model that drafts for itself where the text does not repeat itself."""
    from engines.panels import quantize

    check_copy(params, "int8", "leave out --speculate self")
    draft_params = quantize(params, "int8")
    return lambda cache, sample: [Lookup(MAX_MATCH), SelfDraft(draft_params, n_head, model, cache, sample)]


def compiled_cost(n_tokens):
    """Time of a pass of a compiled model over n tokens, in single-token passes, while the memory is fast.

    A tile of the products has up to six tokens; a smaller last one counts as a whole one here.
    """
    return 0.75 + 0.35 * -(-n_tokens // 6) if n_tokens > 1 else 1


def plain_cost(n_tokens):
    """Time of a pass of gpt2 over n tokens, in single-token passes."""
    return 2.4 + 0.06 * n_tokens if n_tokens > 1 else 1


class AcceptanceRate:
    """A running estimate of the acceptance rate, and the number of draft tokens that is fastest at this rate.

    draft_cost: of a draft token, pass_cost: of a pass over n tokens, both in single-token passes of the model.
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
        decay = DECAY if n_draft or self.draft_cost == 0 else IDLE_DECAY
        self.accepted = decay * self.accepted + n_accepted
        self.checked = decay * self.checked + min(n_accepted + 1, n_draft)

    def speed(self, n):
        """Return the expected tokens per unit of time with n draft tokens per pass (Leviathan et al., theorem 3.8)."""
        n_tokens = (1 - self.rate ** (n + 1)) / (1 - self.rate)  # 1 + rate + rate**2 + ... + rate**n
        return n_tokens / (self.pass_cost(n + 1) + n * self.draft_cost)

    def best_n_draft(self):
        return max(range(MAX_DRAFT + 1), key=self.speed)


def next_draft(drafters, text, n_max):
    """Return (up to n_max draft tokens, the AcceptanceRate of their drafter), from the fastest that has any.

    drafters: list of (drafter, its AcceptanceRate).
    """
    plans = [(acceptance.best_n_draft(), drafter, acceptance) for drafter, acceptance in drafters]
    for n, drafter, acceptance in sorted(plans, key=lambda plan: -plan[2].speed(plan[0])):
        if draft := drafter.draft(text, max(0, min(n, n_max))):
            return draft, acceptance
    return [], None


class Speculation:
    """Generates like gpt2.generate_tokens, with draft tokens.

    make_drafters: function from the cache and the sampler of a text to the list of objects that may draft for it.
    model: the module gpt2, or a compiled_model with the params that belong to it.

    Counts: n_passes, n_tokens (generated), n_draft (draft tokens), n_accepted.
    """

    def __init__(self, params, n_head, make_drafters=lambda cache, sample: [Lookup()], model=gpt2):
        self.params, self.n_head, self.make_drafters, self.model = params, n_head, make_drafters, model
        self.pass_cost = plain_cost if model is gpt2 else compiled_cost
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
        drafters = [(a, AcceptanceRate(a.cost, self.pass_cost)) for a in self.make_drafters(cache, sample)]
        new_ids, draft, used = text[:], [], None  # tokens that are not in the cache yet, and those that may follow them
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
            for _, acceptance in drafters:
                acceptance.update(*((n_accepted, len(draft)) if acceptance is used else (0, 0)))
            new_ids = text[-1:]
            draft, used = next_draft(drafters, text, end - len(text) - 1)

    def logits_after(self, new_ids, draft, cache):  # [n_new], [n_draft] -> [n_draft+1, n_vocab]
        """Return the logits after new_ids and after each draft token, in one pass unless new_ids is a long prompt."""
        self.n_passes += 1
        self.n_draft += len(draft)
        if not draft:
            return self.model.prefill(new_ids, self.params, self.n_head, cache)[None]
        return self.model.gpt2([*new_ids, *draft], **self.params, n_head=self.n_head, cache=cache)
