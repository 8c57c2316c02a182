"""The smallest GPT, seen whole: with two tokens and a context of three it is a Markov chain of 2**3 = 8 states.

    python baby_gpt.py --markov     trains it; prints and draws how likely each state leads to which, before and after

A state is what the model sees, the last three tokens. The model says how likely 0 and 1 are to follow; the oldest token
leaves, the drawn one comes in, and that is the next state. GPT-2 is such a chain too, of 50257**1024 states (and those
of shorter contexts): too many to draw, but no other kind of thing.

After Karpathy's notebook "GPT as a finite-state Markov chain" (2023): its model of 12,656 parameters, its text, its
training. Its matrices have no offsets; here they have some, which stay 0. Its gelu is the exact one, with erf, that of
gpt2.py the tanh form: from the same start, the losses of both agree to 1e-5. Its losses at steps 0, 10 and 49, from
another random start: 0.663539, 0.596775, 0.469983. None goes below 1/2 ln 2 = 0.3466: 6 of the 12 examples show what
follows 111, which is 0 as often as 1.
"""

import itertools
import math
import sys

import numpy as np
from tqdm import tqdm

import gpt2
from sampling import make_sampler
from training import fused
from training.adamw import AdamW
from training.autograd import value_and_gradients
from training.figure import check_picture, new_figure, save_figure
from training.trainer import initial_tensors
from weights.errors import UserError
from weights.names import nest

TEXT, STEPS = "111101111011110", 50
HPARAMS = {"n_vocab": 2, "n_ctx": 3, "n_embd": 16, "n_head": 4, "n_layer": 4}
STATES = ["".join(tokens) for tokens in itertools.product("01", repeat=HPARAMS["n_ctx"])]
# In the picture: the middle of each state's circle, the circles' radius, the color of the arrows for a 0 and for a 1.
PLACES = dict(zip(STATES, [(0, 1), (1.2, 2), (2.2, 1), (5, 2), (1.2, 0), (4, 1), (5, 0), (6.2, 1)], strict=True))
RADIUS, COLORS = 0.3, ("tab:blue", "tab:orange")


def examples():
    """Each three tokens of the text, [12, 3], and the one that follows them, [12]."""
    ids = np.array([int(token) for token in TEXT])
    windows = np.lib.stride_tricks.sliding_window_view(ids, HPARAMS["n_ctx"] + 1)  # -> [12, 4]
    return windows[:, :-1], windows[:, -1]


def new_tensors(seed):
    """The tensors that are trained, and those that stay 0: the offsets of the matrices."""
    tensors = initial_tensors(HPARAMS, seed)
    tensors["wpe"] *= 2  # to deviation 0.02, as there
    zeros = {name: tensors.pop(name) for name in list(tensors) if name.endswith("/b") and "ln_" not in name}
    return tensors, zeros


def next_logits(tensors, inputs):  # [batch, 3] -> [batch, 2]
    """tensors: by checkpoint name, those that stay 0 too."""
    params = nest(tensors, HPARAMS["n_layer"])
    return gpt2.gpt2(inputs, **params, n_head=HPARAMS["n_head"], last_only=True)[:, 0]


def train(tensors, zeros, steps=STEPS):
    """Updates the tensors, all examples in each step; returns the loss before each."""
    optimizer = AdamW(tensors, weight_decay=0.1, decays=lambda _: True)
    inputs, targets = examples()

    def loss(leaves):
        return fused.cross_entropy(next_logits(leaves | zeros, inputs), targets)

    losses = []
    for _ in tqdm(range(steps), unit="step", disable=None, leave=False):
        value, gradients = value_and_gradients(loss, tensors)
        optimizer.update(gradients, 1e-3)
        losses.append(value)
    return losses


def transitions(tensors):  # -> [8, 2]
    """How likely 0 and 1 follow each state."""
    return gpt2.softmax(next_logits(tensors, np.array([[int(token) for token in state] for state in STATES])))


def in_the_text():  # -> [8, 2]
    """The same as counted in the text; nan for states that do not occur there."""
    counts = np.zeros((len(STATES), 2))
    for state, token in zip(*examples(), strict=True):
        counts[int("".join(map(str, state)), 2), token] += 1
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def walk(tensors, seed, n=20):
    """n tokens from the state 111 on, each drawn as likely as the model says."""
    ids, choose = [1, 1, 1], make_sampler(temperature=1.0, seed=seed)
    for _ in range(n):
        ids.append(int(choose(next_logits(tensors, np.array([ids[-3:]]))[0])))
    return "".join(map(str, ids))


def show(given):
    """given: the options on the command line. Prints losses, transitions and a sample, and draws."""
    if extra := set(given) - {"markov", "draw", "seed", "num_iter"}:
        raise UserError(f"--{min(extra)} is for the rungs; --markov takes --steps, --seed and --draw")
    path = given.get("draw", "markov.png")
    check_picture(path)
    tensors, zeros = new_tensors(given["seed"])
    before = transitions(tensors | zeros)
    losses = train(tensors, zeros, given.get("num_iter", STEPS))
    after = transitions(tensors | zeros)
    print(f"{sum(t.size for t in tensors.values())} parameters; the text is {TEXT}")
    for i in sorted({0, min(10, len(losses) - 1), len(losses) - 1}):
        print(f"step {i:2}: loss {losses[i]:.6f}")
    print_table(before, after)
    print(f"from 111: {walk(tensors | zeros, given['seed'])}")
    draw({"before": before, f"after {len(losses)} steps": after}, path)
    print(f"drawn: {path}", file=sys.stderr)


def print_table(before, after):
    """Where each state leads by 0 and by 1, how likely before and after, and how often in the text."""
    print("| state | 0 leads to | before | after | text | 1 leads to | before | after | text |")
    print("| ----- | ---------- | ------ | ----- | ---- | ---------- | ------ | ----- | ---- |")
    for state, *shares in zip(STATES, before, after, in_the_text(), strict=True):
        cells = [f"| {state:5} "]
        for token in range(2):
            percents = ["-" if np.isnan(share[token]) else f"{share[token]:.0%}" for share in shares]
            cells.append("| {:10} | {:>6} | {:>5} | {:>4} ".format(state[1:] + str(token), *percents))
        print("".join(cells) + "|")


def draw(chains, path):
    """A panel for each chain, dict of [8, 2] by title: the states, and arrows as wide as they are likely."""
    figure = new_figure(7.5, 3.1 * len(chains))
    figure.suptitle("blue: a 0 follows, orange: a 1; grey states occur in the text", fontsize=10)
    seen = {state for state, shares in zip(STATES, in_the_text(), strict=True) if not np.isnan(shares[0])}
    for axes, (title, chain) in zip(figure.subplots(len(chains), 1), chains.items(), strict=True):
        axes.set(title=title, xlim=(-1, 7.2), ylim=(-0.4, 2.4), aspect="equal")
        axes.axis("off")
        for state, shares in zip(STATES, chain, strict=True):
            for token, share in enumerate(shares):
                draw_arrow(axes, state, state[1:] + str(token), share, COLORS[token])
        for state, place in PLACES.items():
            face = "lightgrey" if state in seen else "white"
            circle = {"boxstyle": "circle,pad=0.6", "facecolor": face, "edgecolor": "black"}
            axes.text(*place, state, ha="center", va="center", fontsize=11, bbox=circle)
    save_figure(figure, path)


def draw_arrow(axes, state, to, share, color):
    """From rim to rim; 000 and 111 lead to themselves outside, 010 and 101 to each other on two ways."""
    start, end, bend = np.array(PLACES[state], float), np.array(PLACES[to], float), 0.0
    if state == to:
        side = -1 if state == "000" else 1
        corner = RADIUS * math.sqrt(0.5) * np.array((side, 1))
        start, end, bend = start + corner, end + corner * (1, -1), -2.4 * side
    else:
        rim = (end - start) / np.linalg.norm(end - start) * RADIUS
        start, end, bend = start + rim, end - rim, 0.5 if {state, to} == {"010", "101"} else 0.0
    along = end - start
    middle = (start + end) / 2 + bend / 2 * along[::-1] * (1, -1)  # of the curve that matplotlib calls arc3
    style = {"arrowstyle": "-|>", "mutation_scale": 8 + 12 * share, "linewidth": 0.5 + 5 * share, "color": color}
    style |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 1, "shrinkB": 1}
    axes.annotate("", end, start, arrowprops=style)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.text(*middle, f"{share:.0%}", ha="center", va="center", fontsize=9, bbox=box)
