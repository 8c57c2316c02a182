"""How the engines share the processor: python bench/threads.py [ROUNDS]

The first table has the time per token alone, beside another busy process, and on one core. The second has the time of
work of one kind directly after work of the other kind, over that of the same work after a pause: threads that keep
spinning after their work slow the next one down. Linux only.
"""

import os
import subprocess
import sys
import time

import numpy as np
from common import IDLE, in_turn, machine, median, model_124m, random_ids, seconds, spread, table
from inference_engines import Compiled, Numpy

CONTEXT, N_TOKENS = 32, 32
ENGINES = {engine.name: engine for engine in (Compiled, Numpy)}


def token_seconds(engine):
    """Return the median time per token after the first few."""
    tokens = engine.run(random_ids(CONTEXT), N_TOKENS)
    return median([seconds(lambda: next(tokens)) for _ in range(N_TOKENS)][4:])


def process_seconds(name, command=()):
    """Return token_seconds of an engine in a process of its own, started by a command such as taskset."""
    arguments = [*command, sys.executable, __file__, "--worker", name]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def busy_seconds(name):
    """Return token_seconds of an engine beside a process that never waits."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return process_seconds(name)
    finally:
        busy.kill()
        busy.wait()


def share_rows(rounds):
    ways = {
        "alone": process_seconds,
        "beside a busy process": busy_seconds,
        "on one core": lambda name: process_seconds(name, ("taskset", "-c", "0")),
    }
    found = {(name, way): [] for name in ENGINES for way in ways}
    for turn in range(rounds):
        for name, way in in_turn(list(found), turn):
            found[name, way].append(ways[way](name))
    rows = []
    for (name, way), spent in found.items():
        over = spread([a / b for a, b in zip(spent, found[name, "alone"], strict=True)])
        rows.append([name, way, f"{1000 * median(spent):.1f}", over])
    return rows


def order_rows(rounds):
    """Rows for a token of the compiled engine after a product of BLAS, and the reverse."""
    engine, x = Compiled(), np.ones((256, 768), np.float32)
    w = model_124m()[2]["blocks"][0]["mlp"]["c_fc"]["w"]
    tokens = engine.run(random_ids(CONTEXT), 1 + 3 * rounds)
    next(tokens)
    work, rows = {"a token, compiled": lambda: next(tokens), "a product of BLAS": lambda: x @ w}, []
    for name, before in (list(work), list(work)[::-1]):
        over = []
        for _ in range(rounds):
            time.sleep(IDLE)
            alone = seconds(work[name])
            time.sleep(IDLE)
            work[before]()
            over.append(seconds(work[name]) / alone)
        rows.append([name, before, spread(over)])
    return rows


def main():
    if sys.argv[1:2] == ["--worker"]:
        return print(token_seconds(ENGINES[sys.argv[2]]()))
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{machine()}; {os.cpu_count()} threads, context {CONTEXT}, medians of {rounds} rounds in turns")
    table(["engine", "", "ms per token", "times alone"], share_rows(rounds))
    return table(["work", "directly after", "times after a pause"], order_rows(4 * rounds))


if __name__ == "__main__":
    main()
