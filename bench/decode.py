"""How close decoding one sequence comes to the machine's memory bandwidth: python bench/decode.py [ROUNDS]

Each new token must read every weight except wpe once. The floor is the time this takes at the machine's read bandwidth,
which is measured after every few tokens because it changes within seconds. Bandwidth utilization is the floor divided
by the measured time per token, at most 1.
"""

import sys

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
from engines.compiled import compiled_model

GROUPS, TOKENS = 5, 5  # the first token of a group, after the bandwidth measurement, is not counted


def times(tokens, n):
    """Return the seconds that each of the next n tokens takes."""
    return [seconds(lambda: next(tokens)) for _ in range(n)]


def decode_row(name, model, params, n_head, context, rounds):
    """One row of the table: medians over rounds; the utilization is computed within each round."""
    first, each, speeds, ratios = [], [], [], []
    for _ in range(rounds):
        tokens = model.generate_tokens(random_ids(context), params, n_head, 1 + GROUPS * TOKENS)
        first += times(tokens, 1)
        spent, passes = [], [read_seconds()]
        for _ in range(GROUPS):
            spent += times(tokens, TOKENS)[1:]
            passes.append(read_seconds())
        each.append(median(spent))
        speeds.append(bandwidth(passes))
        ratios.append(BYTES_A_TOKEN / speeds[-1] / each[-1])
    return [
        name,
        context,
        f"{1000 * median(first):.0f}",
        f"{1000 * median(each):.1f}",
        f"{1 / median(each):.1f}",
        f"{median(speeds) / 1e9:.1f}",
        f"{1000 * BYTES_A_TOKEN / median(speeds):.1f}",
        spread(ratios),
    ]


def growth(model, params, n_head, rounds):
    """Time per token after a prompt of 1000 tokens over that after a prompt of one, in each round."""

    def each(context):
        return median(times(model.generate_tokens(random_ids(context), params, n_head, 24), 24)[4:])

    return [each(1000) / each(1) for _ in range(rounds)]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    _, hparams, params = model_124m()
    n_head = hparams["n_head"]
    print(f"{machine()}; {BYTES_A_TOKEN / 1e6:.1f} MB per token, medians of {rounds} rounds")
    models = {"compiled": compiled_model(params), "gpt2.py": (gpt2, params)}
    for model in models.values():
        times(model[0].generate_tokens(random_ids(32), model[1], n_head, 4), 4)  # touch the pages
    head = ["engine", "context", "ms to first token", "ms per token", "tokens/s", "read GB/s", "floor ms"]
    rows = [decode_row(name, *models[name], n_head, n, rounds) for name in models for n in (32, 512, 900)]
    table([*head, "bandwidth utilization"], rows)
    for name, model in models.items():
        print(f"{name}, a token after 1000 over one after 1: {spread(growth(*model, n_head, rounds))}")


if __name__ == "__main__":
    main()
