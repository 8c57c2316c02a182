"""Guessing tokens against going token by token, at 124M and 1558M shape: python bench/speculate.py [ROUNDS]

The weights are random, and say nothing that one could guess. So known texts are replayed: a sampler hands out their
tokens whatever the logits, and a guess is right where the text has that token; every pass is made in full. The texts:
what models/shakespeare continues four prompts with, greedily (its window slides on by half when it is full); a passage
eight times over; the begin of tinyshakespeare, where it is; and tokens of which none comes twice.

A draft of 124M shape guesses for 1558M; what it says is replaced, with the chance given, by the text's next token, or
else by another one.
"""

import sys
import time

import numpy as np
from common import DATA, SIZE_124M, machine, median, model_124m, table

import gpt2
from engines.parallel import small_batch_model
from engines.speculative import Draft, Speculation
from utils import load_encoder_hparams_and_params
from weights.names import n_params, nest, tensor_shapes

SIZE_1558M = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48}
N_PROMPT, N_TOKENS, N_DRAFTED = 16, 600, 48
PROMPTS = ["ROMEO:", "First Citizen:", "KING", "JULIET:\nO Romeo"]


def recorded(prompt, n_tokens):
    """Ids of models/shakespeare: a prompt and what follows it."""
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", "models")
    text, n_ctx = encoder.encode(prompt), hparams["n_ctx"]
    while len(text) < n_tokens:
        window = text[-n_ctx // 2 :]
        text += gpt2.generate(window, params, hparams["n_head"], min(n_ctx - len(window), n_tokens - len(text)))
    return text


def texts():
    """{name: ids}, each of N_PROMPT + N_TOKENS"""
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
    """A sampler that says a text whatever the logits; it looks at them as argmax does."""
    left = iter(text[N_PROMPT:])

    def sample(logits):
        np.argmax(logits)
        return next(left)

    return sample


def seconds_for(tokens):
    """How long each token takes after the first, in all."""
    next(tokens)
    start = time.perf_counter()
    for _ in tokens:
        pass
    return time.perf_counter() - start


def lookup_times(text, params, n_head, rounds):
    """(passes, [seconds plain, with lookup, with auto] of each round)"""
    times, n = [], len(text) - N_PROMPT
    for _ in range(rounds):
        spent = [seconds_for(gpt2.generate_tokens(text[:N_PROMPT], params, n_head, n, replay(text)))]
        for eager in (False, True):
            speculation = Speculation(params, n_head, eager=eager)
            spent.insert(1, seconds_for(speculation.generate_tokens(text[:N_PROMPT], n, replay(text))))
        times.append(spent)
    return speculation.passes, times


def lookup_row(name, passes, times, n):
    plain, *others = zip(*times, strict=True)
    speeds = [f"{(n - 1) / median(spent):.0f}" for spent in (plain, *others)]
    ratios = [f"{median(a / b for a, b in zip(plain, spent, strict=True)):.2f}" for spent in others]
    return [name, f"{n / passes:.2f}", *speeds, *ratios]


def lookup_rows(params, n_head, rounds):
    found = {name: lookup_times(text, params, n_head, rounds) for name, text in texts().items()}
    rows = [lookup_row(name, *result, N_TOKENS) for name, result in found.items()]
    ours = list(found.values())[: len(PROMPTS)]  # the bundled model's, as one long text
    times = np.sum([times for _, times in ours], axis=0).tolist()
    rows.insert(len(PROMPTS), lookup_row("these together", sum(p for p, _ in ours), times, N_TOKENS * len(PROMPTS)))
    return rows


class PartlyRight:
    """A draft whose guesses are those of a text as often as wanted."""

    def __init__(self, draft, text, rate):
        self.draft, self.text, self.rate, self.cost = draft, text, rate, draft.cost
        self.rng = np.random.default_rng(0)

    def guess(self, text, n):
        guessed = self.draft.guess(text, n)
        places = range(len(text), len(text) + len(guessed))
        return [self.text[i] if self.rng.random() < self.rate else self.text[i] ^ 1 for i in places]


def some_params(hparams):
    """Weights of a shape, all from a few random numbers: how long a product takes does not depend on them."""
    numbers = 0.02 * np.random.default_rng(0).standard_normal(10**6, dtype=np.float32)
    tensors = {name: np.resize(numbers, shape) for name, shape in tensor_shapes(**hparams).items()}
    return nest(tensors, hparams["n_layer"])


def draft_rows(rounds):
    _, small, small_params = model_124m()
    draft_model, small_params = small_batch_model(small_params, small["n_head"])
    params, n_head = some_params(SIZE_1558M), SIZE_1558M["n_head"]
    text = np.random.default_rng(0).permutation(SIZE_124M["n_vocab"])[: N_PROMPT + N_DRAFTED].tolist()
    cost = n_params(tensor_shapes(**small)) / n_params(tensor_shapes(**SIZE_1558M))
    speculation, rates = Speculation(params, n_head), (0.5, 0.7, 0.9)
    plain, spent, passes = [], {rate: [] for rate in rates}, {}
    for _ in range(rounds):
        plain.append(seconds_for(gpt2.generate_tokens(text[:N_PROMPT], params, n_head, N_DRAFTED, replay(text))))
        for rate in rates:
            speculation.make_guesser = lambda rate=rate: PartlyRight(
                Draft(small_params, small["n_head"], cost, draft_model), text, rate
            )
            speculation.passes = 0
            spent[rate].append(seconds_for(speculation.generate_tokens(text[:N_PROMPT], N_DRAFTED, replay(text))))
            passes[rate] = speculation.passes
    n = N_DRAFTED - 1
    return [
        [
            f"1558M, draft 124M right {rate}",
            f"{N_DRAFTED / passes[rate]:.2f}",
            f"{n / median(plain):.2f}",
            f"{n / median(spent[rate]):.2f}",
            f"{median(a / b for a, b in zip(plain, spent[rate], strict=True)):.2f}",
        ]
        for rate in rates
    ]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{machine()}; {N_TOKENS} tokens of each text, medians of {rounds} rounds in turns")
    _, hparams, params = model_124m()
    seconds_for(gpt2.generate_tokens([1], params, hparams["n_head"], 4))
    head = ["text, 124M shape", "tokens a pass", "tokens/s: plain", "lookup", "auto", "lookup / plain", "auto / plain"]
    table(head, lookup_rows(params, hparams["n_head"], rounds))
    table(["model", "tokens a pass", "tokens/s: plain", "draft", "draft / plain"], draft_rows(rounds))


if __name__ == "__main__":
    main()
