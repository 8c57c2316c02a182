"""How close decoding one sequence comes to the machine's memory bandwidth: python bench/decode.py [ROUNDS]

Each new token must read every weight except wpe once. The floor is the time this takes at the machine's read bandwidth,
which is measured after every few tokens because it changes within seconds. Bandwidth utilization is the floor divided
by the measured time per token, at most 1. The same follows for small_batch_model (engines/parallel.py), which batches
and speculative decoding use.
"""

import sys
import time

from common import (
    BYTES_A_TOKEN,
    bandwidth,
    machine,
    median,
    model_124m,
    random_ids,
    read_seconds,
    seconds,
    spread,
    table,
)

import gpt2
from engines.parallel import small_batch_model
from gpt2 import generate_tokens

IDLE = 0.15  # seconds to wait after a bandwidth measurement: its threads spin for a while
GROUPS, TOKENS = 5, 5  # the first token of a group, after the bandwidth measurement, is not counted


def times(tokens, n):
    """Return the seconds that each of the next n tokens takes."""
    return [seconds(lambda: next(tokens)) for _ in range(n)]


def decode_row(model, params, n_head, context, rounds):
    """One row of the table: medians over rounds; the utilization is computed within each round."""
    first, each, speeds, ratios = [], [], [], []
    for _ in range(rounds):
        tokens = model.generate_tokens(random_ids(context), params, n_head, 1 + GROUPS * TOKENS)
        first += times(tokens, 1)
        spent, passes = [], [read_seconds()]
        for _ in range(GROUPS):
            time.sleep(IDLE)
            spent += times(tokens, TOKENS)[1:]
            passes.append(read_seconds())
        each.append(median(spent))
        speeds.append(bandwidth(passes))
        ratios.append(BYTES_A_TOKEN / speeds[-1] / each[-1])
    return [
        "gpt2" if model is gpt2 else "small_batch_model",
        context,
        f"{1000 * median(first):.0f}",
        f"{1000 * median(each):.1f}",
        f"{1 / median(each):.1f}",
        f"{median(speeds) / 1e9:.1f}",
        f"{1000 * BYTES_A_TOKEN / median(speeds):.1f}",
        spread(ratios),
    ]


def growth(params, n_head, rounds):
    """Time per token of the last 20 of 200 tokens over that of the first 20, without the pass over the prompt."""
    ratios = []
    for _ in range(rounds):
        spent = times(generate_tokens(random_ids(32), params, n_head, 201), 201)[1:]
        ratios.append(median(spent[-20:]) / median(spent[:20]))
    return ratios


def linear(params, n_head):
    """The time of 990 tokens after a prompt of 32 over 990 times that of one of the first 20."""
    spent = times(generate_tokens(random_ids(32), params, n_head, 991), 991)[1:]
    return sum(spent) / len(spent) / median(spent[:20])


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    _, hparams, params = model_124m()
    print(f"{machine()}; {BYTES_A_TOKEN / 1e6:.1f} MB per token, medians of {rounds} rounds")
    times(generate_tokens(random_ids(32), params, hparams["n_head"], 4), 4)  # touch the pages
    models = [(gpt2, params), small_batch_model(params, hparams["n_head"])]
    times_head = ["ms to first token", "ms per token", "tokens/s", "read GB/s", "floor ms"]
    head = ["model", "context", *times_head, "bandwidth utilization"]
    table(
        head, [decode_row(*model, hparams["n_head"], context, rounds) for model in models for context in (32, 512, 900)]
    )
    ratios = growth(params, hparams["n_head"], max(3, rounds // 2))
    print(f"200 tokens, the last 20 over the first 20: {spread(ratios)}")
    ratios = [linear(params, hparams["n_head"]) for _ in range(3)]
    print(f"990 tokens over 990 times one of the first 20: {median(ratios):.2f}")


if __name__ == "__main__":
    main()
