"""Ours and other engines in turns, same weights, ids and 2 threads: python bench/peers.py [ROUNDS]

The others are transformers, ONNX Runtime and CTranslate2, as many of them as are installed (bench/requirements.txt).
"""

import sys
import time

from common import bandwidth, machine, median, random_ids, read_seconds, table
from engines import engines, in_turn

N_TOKENS = 16
IDLE = 0.3  # seconds before each turn, for an engine's threads go on looking for work when there is none


def measure(engine, context, n_tokens):
    """(ids, seconds to the first token, seconds a token after it)"""
    time.sleep(IDLE)
    start, marks, ids = time.perf_counter(), [], []
    for token in engine.run(random_ids(context), n_tokens):
        ids.append(token)
        marks.append(time.perf_counter() - start)
    return ids, marks[0], (marks[-1] - marks[0]) / max(n_tokens - 1, 1)


def rows(context, found, rounds):
    """The table's rows for a context, one an engine, ours first."""
    results, speeds = {engine: [] for engine in found}, []
    for turn in range(rounds):
        speeds.append(bandwidth([read_seconds() for _ in range(3)]))
        for engine in in_turn(found, turn):
            results[engine].append(engine.call(measure, context, N_TOKENS))
    speed = f"{median(speeds) / 1e9:.1f}"
    return [[context, engine.name, *columns(results[found[0]], results[engine], speed)] for engine in found]


def columns(ours, theirs, speed):
    """A row from the results of each round; the ratios are medians of those within a round."""
    cells = []
    for i in (1, 2):
        ratio = median(a[i] / b[i] for a, b in zip(ours, theirs, strict=True))
        cells += [f"{1000 * median(result[i] for result in theirs):.1f}", f"{ratio:.2f}"]
    same = all(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    return [*cells, speed, "yes" if same else "NO"]


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    found = engines()
    versions = ", ".join(f"{engine.name} {engine.version}" for engine in found[1:])
    print(f"{machine()}; {versions}; 2 threads, medians of {rounds} rounds in turns")
    for engine in found:
        engine.call(measure, 64, 4)
    times = ["first token ms", "ours / theirs", "ms a token", "ours / theirs"]
    head = ["context", "engine", *times, "read GB/s", "same ids"]
    table(head, [row for context in (32, 512, 900, 1000) for row in rows(context, found, rounds)])


if __name__ == "__main__":
    main()
