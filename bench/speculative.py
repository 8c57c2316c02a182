"""Speculative decoding against token-by-token decoding, at 124M and 1558M shape: python bench/speculative.py [ROUNDS]

The weights are random, so nothing in what they generate could be predicted. Known texts are replayed instead: the
sampler returns the text's tokens whatever the logits, a draft token is accepted where the text has it, and every pass
is made in full. The texts: greedy continuations of four prompts by models/shakespeare (each time its context is full,
the older half is dropped); a passage repeated eight times; the beginning of tinyshakespeare, if it is available; and
tokens without any repetition.

For 1558M a model of 124M shape drafts. Each draft token is replaced by the text's next token with the given acceptance
rate, and by another one otherwise.
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
    next(tokens)
    start = time.perf_counter()
    for _ in tokens:
        pass
    return time.perf_counter() - start


def lookup_times(text, params, small, n_head, rounds):
    """Return (passes, [seconds plain, seconds with lookup] of each round)."""
    times, n, (model, small_params) = [], len(text) - N_PROMPT, small
    for _ in range(rounds):
        speculation = Speculation(small_params, n_head, model=model)
        plain = seconds_for(gpt2.generate_tokens(text[:N_PROMPT], params, n_head, n, replay(text)))
        times.append([plain, seconds_for(speculation.generate_tokens(text[:N_PROMPT], n, replay(text)))])
    return speculation.n_passes, times


def lookup_row(name, passes, times, n):
    plain, lookup = zip(*times, strict=True)
    speeds = [f"{(n - 1) / median(spent):.0f}" for spent in (plain, lookup)]
    return [name, f"{n / passes:.2f}", *speeds, f"{median(a / b for a, b in times):.2f}"]


def lookup_rows(params, n_head, rounds):
    small = small_batch_model(params, n_head)
    found = {name: lookup_times(text, params, small, n_head, rounds) for name, text in texts().items()}
    rows = [lookup_row(name, *result, N_TOKENS) for name, result in found.items()]
    ours = list(found.values())[: len(PROMPTS)]  # those of the bundled model, as one long text
    times = np.sum([times for _, times in ours], axis=0).tolist()
    rows.insert(len(PROMPTS), lookup_row("these together", sum(p for p, _ in ours), times, N_TOKENS * len(PROMPTS)))
    return rows


class ReplayedDraft:
    """A Draft whose tokens are replaced so that the given share of them is accepted."""

    def __init__(self, draft, text, rate):
        self.drafter, self.text, self.rate, self.cost = draft, text, rate, draft.cost
        self.rng = np.random.default_rng(0)

    def draft(self, text, n):
        places = range(len(text), len(text) + len(self.drafter.draft(text, n)))
        return [self.text[i] if self.rng.random() < self.rate else self.text[i] ^ 1 for i in places]


def some_params(hparams):
    """Return parameters that repeat a few random numbers: the time of a product does not depend on them."""
    numbers = 0.02 * np.random.default_rng(0).standard_normal(10**6, dtype=np.float32)
    tensors = {name: np.resize(numbers, shape) for name, shape in tensor_shapes(**hparams).items()}
    return nest(tensors, hparams["n_layer"])


def draft_rows(rounds):
    _, small, small_params = model_124m()
    draft_model, small_params = small_batch_model(small_params, small["n_head"])
    params, n_head = some_params(SIZE_1558M), SIZE_1558M["n_head"]
    text = np.random.default_rng(0).permutation(SIZE_124M["n_vocab"])[: N_PROMPT + N_DRAFTED].tolist()
    cost = n_params(tensor_shapes(**small)) / n_params(tensor_shapes(**SIZE_1558M))
    model, laid_out = small_batch_model(params, n_head)
    speculation, rates = Speculation(laid_out, n_head, model=model), (0.5, 0.7, 0.9)
    plain, spent, passes = [], {rate: [] for rate in rates}, {}
    for _ in range(rounds):
        plain.append(seconds_for(gpt2.generate_tokens(text[:N_PROMPT], params, n_head, N_DRAFTED, replay(text))))
        for rate in rates:
            speculation.make_drafter = lambda rate=rate: ReplayedDraft(
                Draft(small_params, small["n_head"], cost, draft_model), text, rate
            )
            speculation.reset_counts()
            spent[rate].append(seconds_for(speculation.generate_tokens(text[:N_PROMPT], N_DRAFTED, replay(text))))
            passes[rate] = speculation.n_passes
    n = N_DRAFTED - 1
    return [
        [
            f"1558M, draft 124M, acceptance rate {rate}",
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
    head = ["text, 124M shape", "tokens per pass", "tokens/s: plain", "lookup", "speedup"]
    table(head, lookup_rows(params, hparams["n_head"], rounds))
    table(["model", "tokens per pass", "tokens/s: plain", "draft", "speedup"], draft_rows(rounds))


if __name__ == "__main__":
    main()
