"""Speculative decoding with the compiled engine, at 124M and 1558M shape: python bench/speculative.py [ROUNDS]

The weights are random, so nothing in what they generate could be predicted. Known texts are replayed instead: the
sampler returns the text's tokens whatever the logits, a draft token is accepted where the text has it, and every pass
is made in full. The texts: greedy continuations of four prompts by models/shakespeare (each time its context is full,
the older half is dropped); a passage repeated eight times; the beginning of tinyshakespeare, if it is available; and
tokens without any repetition.

`lookup` drafts what followed earlier in the text. `self` also drafts with quantized weights, and for 1558M a model of
124M shape drafts: each of their draft tokens is replaced by the text's next token with the given acceptance rate, and
by another one otherwise (bench/quantized.py has rates that were measured).

A speedup is the compiled engine's time token by token divided by that with draft tokens. Times are those of the tokens
after the first, since the first is the prompt's.
"""

import functools
import sys

import numpy as np
from common import DATA, SIZE_124M, in_turn, machine, median, model_124m, seconds_for, some_tensors, table

import gpt2
from engines.compiled import compiled_model
from engines.panels import quantize
from engines.speculative import MAX_MATCH, Draft, Lookup, SelfDraft, Speculation
from utils import load_encoder_hparams_and_params
from weights.names import n_params, nest, tensor_shapes

SIZE_1558M = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48}
N_PROMPT, N_TOKENS, N_DRAFTED = 16, 600, 48
RATE, RATES = 0.9, (0.5, 0.7, 0.9)  # acceptance rates of self, and of the draft model
PROMPTS = ["ROMEO:", "First Citizen:", "KING", "JULIET:\nO Romeo"]


def recorded(prompt, n_tokens):
    """Return the ids of a prompt and of its greedy continuation by models/shakespeare."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", "models")
    text, n_ctx = encoder.encode(prompt), hparams["n_ctx"]
    while len(text) < n_tokens:
        window = text[-n_ctx // 2 :]
        text += gpt2.generate(window, params, hparams["n_head"], min(n_ctx - len(window), n_tokens - len(text)))
    return text


def texts():
    """Return {name: ids}, N_PROMPT + N_TOKENS ids each."""
    n, rng = N_PROMPT + N_TOKENS, np.random.default_rng(0)
    found = {f"shakespeare, {prompt.split(chr(10))[0]}": recorded(prompt, n) for prompt in PROMPTS}
    found["a passage of 77, eight times"] = (rng.permutation(SIZE_124M["n_vocab"])[:77].tolist() * 8)[:n]
    if (DATA / "tinyshakespeare.txt").exists():
        encoder = model_124m()[0]
        found["tinyshakespeare itself"] = encoder.encode(
            (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")[:9000]
        )[:n]
    found["no token twice"] = rng.permutation(SIZE_124M["n_vocab"])[:n].tolist()
    return found


def replay(text):
    """Return a sampler that returns the tokens of a text; it reads the logits as greedy decoding does."""
    left = iter(text[N_PROMPT:])

    def sample(logits):
        np.argmax(logits)
        return next(left)

    return sample


def times(variants, rounds):
    """Return {name: seconds of each round} of variants {name: a function that returns the tokens}, in turns."""
    spent = {name: [] for name in variants}
    for turn in range(rounds):
        for name in in_turn(list(variants), turn):
            spent[name].append(seconds_for(variants[name]()))
    return spent


class ReplayedDraft:
    """A drafter whose tokens are replaced so that the given share of them is accepted."""

    def __init__(self, drafter, text, rate):
        self.drafter, self.text, self.rate, self.cost = drafter, text, rate, drafter.cost
        self.rng = np.random.default_rng(0)

    def draft(self, text, n):
        places = range(len(text), len(text) + len(self.drafter.draft(text, n)))
        return [self.text[i] if self.rng.random() < self.rate else self.text[i] ^ 1 for i in places]


def compare(text, model, params, n_head, make_drafters, rounds):
    """Return {name: (tokens, passes, seconds of each round plain, with draft tokens)} of {name: make_drafters}."""
    n, passes = len(text) - N_PROMPT, {}

    def plain():
        return model.generate_tokens(text[:N_PROMPT], params, n_head, n, replay(text))

    def drafted(name):
        speculation = Speculation(params, n_head, make_drafters[name], model)
        yield from speculation.generate_tokens(text[:N_PROMPT], n, replay(text))
        passes[name] = speculation.n_passes

    spent = times({"": plain} | {name: functools.partial(drafted, name) for name in make_drafters}, rounds)
    return {name: (n, passes[name], spent[""], spent[name]) for name in make_drafters}


def cells(n, passes, plain, fast):
    """Return a row's numbers from the seconds of each round for n tokens."""
    rates = [f"{(n - 1) / median(spent):.1f}" for spent in (plain, fast)]
    return [f"{n / passes:.2f}", *rates, f"{median(a / b for a, b in zip(plain, fast, strict=True)):.2f}"]


def total(results):
    """Return the sum of the results of several texts, as if they were one."""
    n, passes, *spent = zip(*results, strict=True)
    return sum(n), sum(passes), *(np.sum(rounds, axis=0).tolist() for rounds in spent)


def text_rows(rounds):
    _, hparams, params = model_124m()
    n_head, (model, params) = hparams["n_head"], compiled_model(params)
    draft_params = quantize(params, "int8")

    def self_drafters(text, cache, sample):
        return [Lookup(MAX_MATCH), ReplayedDraft(SelfDraft(draft_params, n_head, model, cache, sample), text, RATE)]

    found = {}
    for name, text in texts().items():
        make_drafters = {"lookup": lambda cache, sample: [Lookup()]}
        make_drafters[f"self, {RATE}"] = functools.partial(self_drafters, text)
        found[name] = compare(text, model, params, n_head, make_drafters, rounds)
    rows = []
    for draft in make_drafters:
        results = {name: found[name][draft] for name in found}
        results["the first four together"] = total(list(results.values())[: len(PROMPTS)])
        rows += [[name, draft, *cells(*result)] for name, result in results.items()]
    return rows


def draft_rows(rounds):
    _, hparams, small_params = model_124m()
    n_head, cost = SIZE_1558M["n_head"], n_params(tensor_shapes(**hparams)) / n_params(tensor_shapes(**SIZE_1558M))
    model, params = compiled_model(nest(some_tensors(SIZE_1558M), SIZE_1558M["n_layer"]))
    draft_model, draft_params = compiled_model(small_params)
    text = np.random.default_rng(0).permutation(SIZE_124M["n_vocab"])[: N_PROMPT + N_DRAFTED].tolist()

    def make_drafters(rate, _cache, _sample):
        draft = Draft(draft_params, hparams["n_head"], cost, draft_model)
        return [ReplayedDraft(draft, text, rate)]

    drafts = {f"124M, {rate}": functools.partial(make_drafters, rate) for rate in RATES}
    found = compare(text, model, params, n_head, drafts, rounds)
    return [["1558M: no token twice", name, *cells(*result)] for name, result in found.items()]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{machine()}; {N_TOKENS} tokens of each text, {N_DRAFTED} with a draft model")
    print(f"medians of {rounds} rounds in turns" if rounds > 2 else f"means of {rounds} rounds in turns")
    head = ["text", "draft, acceptance rate", "tokens per pass", "tokens/s: plain", "speculative", "speedup"]
    table(head, text_rows(rounds))
    table(head, draft_rows(rounds))


if __name__ == "__main__":
    main()
