"""What one Value for a whole dot product gains microgpt.py: python bench/microgpt.py [ROUNDS]

Training steps on random letters, in turns with dot() as it is and with dot() as Value's own * and + would have it, from
the same weights. The time is that of the processor; `largest difference` is that between the losses of the two.
"""

import random
import sys
import time

from common import machine, median, spread, table

import microgpt

N_VOCAB, STEPS = 27, 20


def plain_dot(a, b):
    """The same sum in the same order, a Value for each product and each sum."""
    return sum((x * y for x, y in zip(a, b, strict=True)), microgpt.Value(0.0))


def measure(dot, docs):
    """(milliseconds, Values made) a step, and the losses."""
    random.seed(42)
    microgpt.dot, model = dot, microgpt.new_model(N_VOCAB)
    params = [p for matrix in model.values() for row in matrix for p in row]
    first, start = next(microgpt.numbers), time.process_time()
    losses = list(microgpt.train(docs, model, params, STEPS))
    spent = time.process_time() - start
    return 1000 * spent / STEPS, (next(microgpt.numbers) - first) // STEPS, losses


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
    print(f"{machine()}; {STEPS} steps, medians of {rounds} rounds in turns")
    rows = [
        [name, median(n for _, n, _ in rows), f"{median(ms for ms, _, _ in rows):.1f}"] for name, rows in found.items()
    ]
    table(["dot()", "Values a step", "ms a step"], rows)
    print(f"+ and * take {spread([b / a for (a, *_), (b, *_) in zip(fused, plain, strict=True)])} times as long")
    differences = [abs(a - b) for a, b in zip(fused[0][2], plain[0][2], strict=True)]
    print(f"largest difference of the losses: {max(differences):.1e}")


if __name__ == "__main__":
    main()
