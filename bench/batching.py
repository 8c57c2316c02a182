"""Batches of prompts, and the cost of a pass over several tokens: python bench/batching.py [ROUNDS]

The first table has the time of one pass over k tokens of one text. A cost is this time divided by that of the same
engine's pass over one token, in the same round. The second table has the speed of whole batches of prompts of 32
tokens, for the engines of inference_engines.py. A speedup is the time of the other engine divided by ours; above 1,
ours is faster.
"""

import sys
import time

import numpy as np
from common import bandwidth, in_turn, machine, median, model_124m, random_ids, read_seconds, seconds, spread, table
from inference_engines import engines

import gpt2
from engines.compiled import compiled_model

PASSES, N_TOKENS, IDLE = 7, 33, 0.3
PASS_TOKENS, BATCHES = (1, 2, 4, 8, 16, 32), (1, 8, 32)


def pass_seconds(model, params, n_head, context, k):
    """Return the median time of PASSES passes over k tokens after a context."""
    cache = [model.KVCache(context + k) for _ in params["blocks"]]
    model.prefill(random_ids(context), params, n_head, cache)
    spent = []
    for _ in range(PASSES):
        for layer in cache:
            layer.n_past = context
        spent.append(seconds(lambda: model.gpt2(random_ids(k), **params, n_head=n_head, cache=cache)))
    return median(spent)


def pass_table(rounds):
    _, hparams, params = model_124m()
    n_head, rows = hparams["n_head"], []
    for name, model in {"compiled": compiled_model(params), "gpt2.py": (gpt2, params)}.items():
        for context in (32, 512):
            spent, speeds = {k: [] for k in PASS_TOKENS}, []
            for turn in range(rounds):
                speeds.append(bandwidth([read_seconds()]))
                for k in in_turn(list(PASS_TOKENS), turn):
                    spent[k].append(pass_seconds(*model, n_head, context, k))
            for k in PASS_TOKENS:
                cells = [f"{1000 * median(spent[k]):.1f}", ratio(spent[k], spent[1]), f"{median(speeds) / 1e9:.1f}"]
                rows.append([name, context, k, *cells])
    table(["engine", "context", "k", "ms", "cost", "read GB/s"], rows)


def ratio(times, others):
    return spread([a / b for a, b in zip(times, others, strict=True)])


def measure(engine, n_rows, n_tokens):
    """Return (ids of each row, seconds per pass after the first, seconds in all) for prompts of 32 ids."""
    rows = [np.random.default_rng(i).integers(0, 50257, 32).tolist() for i in range(n_rows)]
    time.sleep(IDLE)
    first = seconds(lambda: engine.run_batch(rows, 1))
    start = time.perf_counter()
    ids = engine.run_batch(rows, n_tokens)
    spent = time.perf_counter() - start
    return ids, (spent - first) / (n_tokens - 1), spent


def batch_table(found, rounds):
    results, speeds = {(n_rows, engine): [] for n_rows in BATCHES for engine in found}, {n: [] for n in BATCHES}
    for n_rows, engine in results:
        engine.call(measure, n_rows, N_TOKENS)  # untimed: an engine may compile code for this shape
    for turn in range(rounds):
        for n_rows in BATCHES:
            speeds[n_rows].append(bandwidth([read_seconds()]))
            for engine in in_turn(found, turn):
                results[n_rows, engine].append(engine.call(measure, n_rows, N_TOKENS))
    rows = []
    for n_rows in BATCHES:
        for engine in found:
            compared = [results[key] for key in ((n_rows, engine), (n_rows, found[0]), (1, engine))]
            speed = f"{median(speeds[n_rows]) / 1e9:.1f}"
            rows.append([n_rows, engine.name, *columns(n_rows, *compared), speed])
    head = ["batch", "engine", "ms per pass", "tokens/s", "times one row", "speedup"]
    table([*head, "tokens/s with prompts", "speedup", "same ids", "read GB/s"], rows)


def columns(n_rows, theirs, ours, alone):
    """Return an engine's cells from its results of each round, those of ours, and its own for one row."""
    ids, step, whole = zip(*theirs, strict=True)
    our_ids, our_step, our_whole = zip(*ours, strict=True)
    times = median(n_rows * a[1] / b for a, b in zip(alone, step, strict=True))
    speed, whole_speed = n_rows / median(step), n_rows * N_TOKENS / median(whole)
    cells = [f"{1000 * median(step):.1f}", f"{speed:.0f}", f"{times:.1f}", ratio(step, our_step)]
    return [*cells, f"{whole_speed:.0f}", ratio(whole, our_whole), "yes" if ids == our_ids else "NO"]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{machine()}; 2 threads, medians of {rounds} rounds in turns")
    pass_table(rounds)
    found = engines()
    print(", ".join(f"{engine.name} {engine.version}" for engine in found[1:]))
    batch_table(found, rounds)


if __name__ == "__main__":
    main()
