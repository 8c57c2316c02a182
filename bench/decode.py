"""How close decoding one sequence comes to the machine's memory: python bench/decode.py [ROUNDS]

Each new token has to read every weight but wpe once. The floor is the time that takes at the read bandwidth measured
just before and after; the ratio says which part of the time is that floor (1.00 is all of it).
"""

import itertools
import sys
import time

from common import BYTES_A_TOKEN, bandwidth, machine, median, model_124m, random_ids, table

from gpt2 import generate_tokens

N_TOKENS = 16


def times(ids, params, n_head, n_tokens):
    """Seconds until each of n_tokens new tokens, the first one after the prompt."""
    start, marks = time.perf_counter(), []
    for _ in generate_tokens(ids, params, n_head, n_tokens):
        marks.append(time.perf_counter() - start)
    return marks


def decode_row(context, params, n_head, rounds):
    """One row of the table: medians over rounds, the ratio taken within each round."""
    first, each, speeds, ratios = [], [], [], []
    for _ in range(rounds):
        before = bandwidth()
        marks = times(random_ids(context), params, n_head, 1 + N_TOKENS)
        speed = (before + bandwidth()) / 2
        per_token = (marks[-1] - marks[0]) / N_TOKENS
        first.append(marks[0])
        each.append(per_token)
        speeds.append(speed)
        ratios.append(BYTES_A_TOKEN / speed / per_token)
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    return [
        context,
        f"{1000 * median(first):.0f}",
        f"{1000 * median(each):.1f}",
        f"{1 / median(each):.1f}",
        f"{median(speeds) / 1e9:.1f}",
        f"{1000 * BYTES_A_TOKEN / median(speeds):.1f}",
        f"{median(ratios):.2f} [{spread}]",
    ]


def growth(params, n_head, rounds):
    """Cost per token of the last 20 of 200 tokens over that of the first 20 (the prompt's own left out)."""
    ratios = []
    for _ in range(rounds):
        marks = times(random_ids(32), params, n_head, 200)
        gaps = [b - a for a, b in itertools.pairwise(marks)]
        ratios.append(median(gaps[-20:]) / median(gaps[:20]))
    return ratios


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    _, hparams, params = model_124m()
    print(f"{machine()}; {BYTES_A_TOKEN / 1e6:.1f} MB a token, medians of {rounds} rounds")
    times(random_ids(32), params, hparams["n_head"], 4)  # touch the pages
    head = ["context", "first token ms", "ms a token", "tokens/s", "read GB/s", "floor ms", "floor / measured"]
    table(head, [decode_row(context, params, hparams["n_head"], rounds) for context in (32, 512, 900)])
    ratios = growth(params, hparams["n_head"], max(3, rounds // 2))
    print(f"200 tokens: the last 20 cost {median(ratios):.2f} times the first 20 [{min(ratios):.2f}-{max(ratios):.2f}]")


if __name__ == "__main__":
    main()
