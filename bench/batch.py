"""Many prompts at once, and what a pass over several tokens costs: python bench/batch.py [ROUNDS]

The first table is the time of one pass over k tokens of one text, over that of the plain pass of one token, in the same
round. The second is tokens a second of whole batches, prompts of 32 tokens included, beside the engines of peers.py.
"""

import sys
import time

import numpy as np
from common import bandwidth, machine, median, model_124m, random_ids, read_seconds, seconds, table
from engines import engines

import gpt2
from parallel import few_token_model

PASSES, N_TOKENS, IDLE = 7, 33, 0.3


def pass_seconds(model, params, n_head, context, k):
    """The median time of some passes over k tokens behind a context."""
    cache = [model.KVCache(context + k) for _ in params["blocks"]]
    model.feed(random_ids(context), params, n_head, cache)
    spent = []
    for _ in range(PASSES):
        for layer in cache:
            layer.n_past = context
        spent.append(seconds(lambda: model.gpt2(random_ids(k), **params, n_head=n_head, cache=cache)))
    return median(spent)


def pass_table(rounds):
    _, hparams, params = model_124m()
    n_head = hparams["n_head"]
    start = time.perf_counter()
    laid_out = few_token_model(params, n_head)
    print(f"laid out in {time.perf_counter() - start:.2f} s")
    rows = []
    for context in (32, 512):
        for k in (1, 2, 4, 8, 16, 32):
            plain, packed, few, speeds = [], [], [], []
            for _ in range(rounds):
                speeds.append(bandwidth([read_seconds()]))
                plain.append(pass_seconds(gpt2, params, n_head, context, 1))
                packed.append(pass_seconds(gpt2, params, n_head, context, k))
                few.append(pass_seconds(*laid_out, n_head, context, k))
            cells = [f"{1000 * median(plain):.1f}", f"{1000 * median(packed):.1f}", f"{1000 * median(few):.1f}"]
            rows.append([context, k, *cells, ratio(packed, plain), ratio(few, plain), f"{median(speeds) / 1e9:.1f}"])
    head = ["context", "k", "plain pass of 1 ms", "plain of k", "few_token_model", "plain / 1", "few / 1", "read GB/s"]
    table(head, rows)


def ratio(ours, theirs):
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"


def measure(engine, n_rows, n_tokens):
    """(ids of each row, seconds a pass after the first, seconds in all) for prompts of 32 ids."""
    rows = [np.random.default_rng(i).integers(0, 50257, 32).tolist() for i in range(n_rows)]
    time.sleep(IDLE)
    first = seconds(lambda: engine.run_batch(rows, 1))
    start = time.perf_counter()
    ids = engine.run_batch(rows, n_tokens)
    spent = time.perf_counter() - start
    return ids, (spent - first) / (n_tokens - 1), spent


def batch_table(found, rounds):
    rows = []
    for n_rows in (1, 8, 32):
        results, speeds = {engine: [] for engine in found}, []
        for turn in range(rounds):
            speeds.append(bandwidth([read_seconds()]))
            first = turn % len(found)
            for engine in found[first:] + found[:first]:
                results[engine].append(engine.call(measure, n_rows, N_TOKENS))
        for engine in found:
            rows.append(
                [
                    n_rows,
                    engine.name,
                    *columns(n_rows, results[found[0]], results[engine]),
                    f"{median(speeds) / 1e9:.1f}",
                ]
            )
    head = ["batch", "engine", "ms a pass", "tokens/s", "ours / theirs", "tokens/s with prompts", "ours / theirs"]
    table([*head, "same ids", "read GB/s"], rows)


def columns(n_rows, ours, theirs):
    """Tokens a second from the results of each round, and medians of the ratios within a round."""
    step, whole = (ratio([b[i] for b in theirs], [a[i] for a in ours]) for i in (1, 2))
    step_speed, speed = n_rows / median(b[1] for b in theirs), n_rows * N_TOKENS / median(b[2] for b in theirs)
    same = all(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    return [
        f"{1000 * n_rows / step_speed:.1f}",
        f"{step_speed:.0f}",
        step,
        f"{speed:.0f}",
        whole,
        "yes" if same else "NO",
    ]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{machine()}; 2 threads, medians of {rounds} rounds in turns")
    pass_table(rounds)
    found = engines()
    print(", ".join(f"{engine.name} {engine.version}" for engine in found[1:]))
    for engine in found:
        engine.call(measure, 2, 4)
    batch_table(found, rounds)


if __name__ == "__main__":
    main()
