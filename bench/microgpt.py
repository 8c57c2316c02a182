"""Measure how much faster microgpt.py is with one Value per dot product: python bench/microgpt.py [ROUNDS]

Alternates rounds of training on random letters with dot() as it is and with dot() composed of Value's * and +, from the
same initial parameters. Times are processor times; `largest difference` is that between the losses of the two. Both are
this repository's code; Karpathy's microGPT is not run.
"""

import random
import sys
import time

from common import machine, median, spread, table

import microgpt

N_VOCAB, STEPS = 27, 20


def plain_dot(a, b):
    """Return the same sum in the same order, with one Value per product and per sum."""
    return sum((x * y for x, y in zip(a, b, strict=True)), microgpt.Value(0.0))


def measure(dot, docs):
    """Return milliseconds per step, Values per step, and the losses."""
    random.seed(42)
    microgpt.dot, model = dot, microgpt.new_model(N_VOCAB)
    params = [p for matrix in model.values() for row in matrix for p in row]
    n_values = 0
    for doc in docs:
        microgpt.mean_loss(doc, model)
        n_values += len(microgpt.tape)
    start = time.process_time()
    losses = list(microgpt.train(docs, model, params, STEPS))
    return 1000 * (time.process_time() - start) / STEPS, n_values // STEPS, losses


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    random.seed(1)
    docs = [[random.randrange(N_VOCAB) for _ in range(random.randint(5, 11))] for _ in range(STEPS)]
    forms = {"one Value": microgpt.dot, "+ and *": plain_dot}
    found = {name: [] for name in forms}
    for _ in range(rounds):
        for name, dot in forms.items():
            found[name].append(measure(dot, docs))
    fused, plain = found.values()
    print(f"{machine()}; {STEPS} steps, medians of {rounds} alternating rounds")
    rows = [
        [name, median(n for _, n, _ in rows), f"{median(ms for ms, _, _ in rows):.1f}"] for name, rows in found.items()
    ]
    table(["dot()", "Values per step", "ms per step"], rows)
    print(f"+ and * take {spread([b / a for (a, *_), (b, *_) in zip(fused, plain, strict=True)])} times as long")
    differences = [abs(a - b) for a, b in zip(fused[0][2], plain[0][2], strict=True)]
    print(f"largest difference of the losses: {max(differences):.1e}")


if __name__ == "__main__":
    main()
