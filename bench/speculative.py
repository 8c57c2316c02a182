"""Speculative decoding against token-by-token decoding, at 124M and 1558M shape: python bench/speculative.py [ROUNDS]

The weights are random, so nothing in what they generate could be predicted. Known texts are replayed instead: the
sampler returns the text's tokens whatever the logits, a draft token is accepted where the text has it, and every pass
is made in full. The texts: greedy continuations of four prompts by models/shakespeare (each time its context is full,
the older half is dropped); a passage repeated eight times; the beginning of tinyshakespeare, if it is available; and
tokens without any repetition.

For 1558M a model of 124M shape drafts. Each draft token is replaced by the text's next token with the given acceptance
rate, and by another one otherwise.

A speedup is the time of decoding token by token divided by that of speculative decoding. Times are those of the tokens
after the first, since the first is the prompt's. A process that speculates copies the weights into another layout
before it generates; `speedup` counts the copy once, `after the copy` leaves it out, and `break-even` is the number of
tokens from which on speculation has made up for it.
"""

import functools
import sys
import time

import numpy as np
from common import DATA, SIZE_124M, in_turn, machine, median, model_124m, some_tensors, table

import gpt2
from engines.parallel import small_batch_model
from engines.speculative import Draft, Speculation
from utils import load_encoder_hparams_and_params
from weights.names import n_params, nest, tensor_shapes

SIZE_1558M = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48}
N_PROMPT, N_TOKENS, N_DRAFTED = 16, 600, 48
IDLE = 0.3  # seconds to wait before each measurement: BLAS's threads spin for a while
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


def seconds_for(tokens):
    """Return the time of all tokens after the first."""
    time.sleep(IDLE)
    next(tokens)
    start = time.perf_counter()
    for _ in tokens:
        pass
    return time.perf_counter() - start


def copied(params, n_head, rounds):
    """Return (median seconds, (model, params)) of small_batch_model, made once per round."""
    spent, small = [], None
    for _ in range(rounds):
        del small  # frees its memory
        start = time.perf_counter()
        small = small_batch_model(params, n_head)
        spent.append(time.perf_counter() - start)
    return median(spent), small


def times(variants, rounds):
    """Return {name: seconds of each round} of variants {name: a function that returns the tokens}, in turns."""
    spent = {name: [] for name in variants}
    for turn in range(rounds):
        for name in in_turn(list(variants), turn):
            spent[name].append(seconds_for(variants[name]()))
    return spent


def cells(n, passes, plain, fast, copying):
    """Return a row's numbers from the seconds of each round for n tokens, and those of copying the weights."""
    saved = (median(plain) - median(fast)) / (n - 1)  # per token
    rates = [f"{(n - 1) / median(spent):.1f}" for spent in (plain, fast)]
    speedups = [f"{median(a / (b + c) for a, b in zip(plain, fast, strict=True)):.2f}" for c in (copying, 0)]
    return [f"{n / passes:.2f}", *rates, *speedups, f"{copying / saved:.0f}" if saved > 0 else "never"]


def lookup_times(text, params, small, n_head, rounds):
    """Return (passes, seconds of each round plain, with lookup)."""
    n, speculation = len(text) - N_PROMPT, Speculation(small[1], n_head, model=small[0])

    def plain():
        return gpt2.generate_tokens(text[:N_PROMPT], params, n_head, n, replay(text))

    def lookup():
        speculation.reset_counts()
        return speculation.generate_tokens(text[:N_PROMPT], n, replay(text))

    spent = times({"plain": plain, "lookup": lookup}, rounds)
    return speculation.n_passes, *spent.values()


def lookup_rows(params, n_head, rounds):
    copying, small = copied(params, n_head, rounds)
    print(f"124M: the weights are copied in {copying:.2f} s")
    found = {name: lookup_times(text, params, small, n_head, rounds) for name, text in texts().items()}
    rows = [[name, *cells(N_TOKENS, *result, copying)] for name, result in found.items()]
    passes, *spent = zip(*list(found.values())[: len(PROMPTS)], strict=True)  # those of the bundled model, as one text
    together = [np.sum(rounds, axis=0).tolist() for rounds in spent]
    rows.insert(len(PROMPTS), ["these together", *cells(N_TOKENS * len(PROMPTS), sum(passes), *together, copying)])
    return rows


class ReplayedDraft:
    """A Draft whose tokens are replaced so that the given share of them is accepted."""

    def __init__(self, draft, text, rate):
        self.drafter, self.text, self.rate, self.cost = draft, text, rate, draft.cost
        self.rng = np.random.default_rng(0)

    def draft(self, text, n):
        places = range(len(text), len(text) + len(self.drafter.draft(text, n)))
        return [self.text[i] if self.rng.random() < self.rate else self.text[i] ^ 1 for i in places]


def draft_rows(rounds):
    _, hparams, small_params = model_124m()
    params, n_head = nest(some_tensors(SIZE_1558M), SIZE_1558M["n_layer"]), SIZE_1558M["n_head"]
    text = np.random.default_rng(0).permutation(SIZE_124M["n_vocab"])[: N_PROMPT + N_DRAFTED].tolist()
    cost = n_params(tensor_shapes(**hparams)) / n_params(tensor_shapes(**SIZE_1558M))
    copying, (model, copy) = copied(params, n_head, rounds)
    copying_draft, (draft_model, draft_params) = copied(small_params, hparams["n_head"], rounds)
    print(f"1558M: the weights are copied in {copying:.2f} s, those of the draft model in {copying_draft:.2f} s")
    speculation, passes = Speculation(copy, n_head, model=model), {}

    def plain():
        return gpt2.generate_tokens(text[:N_PROMPT], params, n_head, N_DRAFTED, replay(text))

    def drafted(rate):
        draft = Draft(draft_params, hparams["n_head"], cost, draft_model)
        speculation.make_drafter = lambda: ReplayedDraft(draft, text, rate)
        speculation.reset_counts()
        yield from speculation.generate_tokens(text[:N_PROMPT], N_DRAFTED, replay(text))
        passes[rate] = speculation.n_passes

    rates = (0.5, 0.7, 0.9)
    spent = times({"plain": plain} | {rate: functools.partial(drafted, rate) for rate in rates}, rounds)
    name, copying = "1558M, draft 124M, acceptance rate", copying + copying_draft
    return [[f"{name} {rate}", *cells(N_DRAFTED, passes[rate], spent["plain"], spent[rate], copying)] for rate in rates]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{machine()}; {N_TOKENS} tokens of each text, {N_DRAFTED} with a draft model")
    print(f"medians of {rounds} rounds in turns" if rounds > 2 else f"means of {rounds} rounds in turns")
    _, hparams, params = model_124m()
    speeds = ["tokens per pass", "tokens/s: plain", "speculative", "speedup", "after the copy", "break-even"]
    table(["text, 124M shape", *speeds], lookup_rows(params, hparams["n_head"], rounds))
    table(["model", *speeds], draft_rows(rounds))


if __name__ == "__main__":
    main()
