"""This program and other engines in turns, with the same weights, ids and 2 threads: python bench/peers.py [ROUNDS]

The others are those of transformers (eager, and with torch.compile), ONNX Runtime, CTranslate2 and llama.cpp that are
installed (bench/requirements.txt). The first table is for float32, the second for quantized weights, whose ids differ.
A speedup is the time of the other engine divided by that of the first of the table; above 1, the first is faster.
"""

import sys
import time

from common import bandwidth, in_turn, machine, median, random_ids, read_seconds, table
from inference_engines import FLOAT32, QUANTIZED, engines

N_TOKENS = 16
IDLE = 0.3  # seconds to wait before each turn: the threads of an engine spin for a while


def measure(engine, context, n_tokens):
    """Return (ids, seconds to the first token, seconds per token after it)."""
    time.sleep(IDLE)
    start, marks, ids = time.perf_counter(), [], []
    for token in engine.run(random_ids(context), n_tokens):
        ids.append(token)
        marks.append(time.perf_counter() - start)
    return ids, marks[0], (marks[-1] - marks[0]) / max(n_tokens - 1, 1)


def rows(context, found, rounds):
    """The table's rows for a context, one per engine."""
    results, speeds = {engine: [] for engine in found}, []
    for engine in found:
        engine.call(measure, context, N_TOKENS)  # untimed: an engine may compile code for this shape
    for turn in range(rounds):
        speeds.append(bandwidth([read_seconds() for _ in range(3)]))
        for engine in in_turn(found, turn):
            results[engine].append(engine.call(measure, context, N_TOKENS))
    speed = f"{median(speeds) / 1e9:.1f}"
    return [[context, engine.name, *columns(results[found[0]], results[engine], speed)] for engine in found]


def columns(ours, theirs, speed):
    """One row from the results of each round; a speedup is the median of the rounds' ratios."""
    cells = []
    for i in (1, 2):
        speedup = median(b[i] / a[i] for a, b in zip(ours, theirs, strict=True))
        cells += [f"{1000 * median(result[i] for result in theirs):.1f}", f"{speedup:.2f}"]
    same = all(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    return [*cells, speed, "yes" if same else "NO"]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(f"{machine()}; 2 threads, medians of {rounds} rounds in turns")
    times = ["ms to first token", "speedup", "ms per token", "speedup"]
    head = ["context", "engine", *times, "read GB/s", "same ids"]
    for group in (FLOAT32, QUANTIZED):
        found = engines(group)
        print(", ".join(f"{engine.name} {engine.version}" for engine in found))
        table(head, [row for context in (32, 512, 900, 1000) for row in rows(context, found, rounds)])


if __name__ == "__main__":
    main()
