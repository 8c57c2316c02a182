"""A GPT as a finite-state Markov chain: with two tokens and a context of three, it has 2**3 = 8 states.

A state is the context: the last three tokens. From each state the model predicts the probability of 0 and of 1; the
next state drops the oldest token and appends the new one. GPT-2 is a Markov chain as well, with 50257**1024 states
(and those of shorter contexts).

After Karpathy's notebook "GPT as a finite-state Markov chain" (2023), with its model of 12,656 parameters, its text and
its training. Its linear layers have no biases: here the biases stay 0. Its gelu is the exact form with erf, gpt2.py's
is the tanh form: from the same initial weights, the losses agree to 1e-5. Its losses at steps 0, 10 and 49, from other
initial weights, are 0.663539, 0.596775 and 0.469983. The minimum is 1/2 ln 2 = 0.3466: in 6 of the 12 examples the
context is 111, which is followed by 0 as often as by 1.
"""

import itertools
import math

import numpy as np
from tqdm import tqdm

import gpt2
from sampling import make_sampler
from training import fused
from training.adamw import AdamW
from training.autograd import value_and_gradients
from training.figure import new_figure, save_figure
from training.initialization import gpt2_deviation, initial_tensors
from weights.names import nest, tensor_shapes

TEXT, STEPS = "111101111011110", 50
HPARAMS = {"n_vocab": 2, "n_ctx": 3, "n_embd": 16, "n_head": 4, "n_layer": 4}
STATES = ["".join(tokens) for tokens in itertools.product("01", repeat=HPARAMS["n_ctx"])]
# In the figure: the center of each state's circle, the radius of the circles, the color of the arrows per token
CENTERS = dict(zip(STATES, [(0, 1), (1.2, 2), (2.2, 1), (5, 2), (1.2, 0), (4, 1), (5, 0), (6.2, 1)], strict=True))
RADIUS, COLORS = 0.3, ("tab:blue", "tab:orange")


def examples():
    """Return all sequences of three tokens in the text, [12, 3], and the token that follows each, [12]."""
    ids = np.array([int(token) for token in TEXT])
    windows = np.lib.stride_tricks.sliding_window_view(ids, HPARAMS["n_ctx"] + 1)  # -> [12, 4]
    return windows[:, :-1], windows[:, -1]


def new_tensors(seed):
    """Return two dicts by checkpoint name: the tensors to train, and the biases of the linear layers, which stay 0."""
    tensors = initial_tensors(tensor_shapes(**HPARAMS), seed, gpt2_deviation(HPARAMS["n_layer"]))
    tensors["wpe"] *= 2  # standard deviation 0.02, as in the notebook
    zeros = {name: tensors.pop(name) for name in list(tensors) if name.endswith("/b") and "ln_" not in name}
    return tensors, zeros


def next_logits(tensors, inputs):  # [batch, 3] -> [batch, 2]
    """Return the logits of the next token. tensors: all tensors by checkpoint name, the zero biases included."""
    params = nest(tensors, HPARAMS["n_layer"])
    return gpt2.gpt2(inputs, **params, n_head=HPARAMS["n_head"], last_only=True)[:, 0]


def train(tensors, zeros, steps=STEPS):
    """Update the tensors in place, with all examples in each step; return the losses before each step."""
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
    """Return the probabilities of 0 and 1 after each state."""
    return gpt2.softmax(next_logits(tensors, np.array([[int(token) for token in state] for state in STATES])))


def frequencies():  # -> [8, 2]
    """Return the frequencies of 0 and 1 after each state in the text; nan for states that it does not contain."""
    counts = np.zeros((len(STATES), 2))
    for state, token in zip(*examples(), strict=True):
        counts[int("".join(map(str, state)), 2), token] += 1
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def sample(tensors, seed, n=20):
    """Return the state 111 and n tokens sampled after it, as a string."""
    ids, choose = [1, 1, 1], make_sampler(temperature=1.0, seed=seed)
    for _ in range(n):
        ids.append(int(choose(next_logits(tensors, np.array([ids[-3:]]))[0])))
    return "".join(map(str, ids))


def table(before, after):
    """Return the lines of a table: the transitions of each state before and after training, and in the text."""
    lines = [
        "| state | 0 leads to | before | after | text | 1 leads to | before | after | text |",
        "| ----- | ---------- | ------ | ----- | ---- | ---------- | ------ | ----- | ---- |",
    ]
    for state, *rows in zip(STATES, before, after, frequencies(), strict=True):
        line = f"| {state:5} |"
        for token in range(2):
            percents = ["-" if np.isnan(row[token]) else f"{row[token]:.0%}" for row in rows]
            line += " {:10} | {:>6} | {:>5} | {:>4} |".format(state[1:] + str(token), *percents)
        lines.append(line)
    return lines


def draw(chains, path):
    """Save a figure with one panel per chain: the states, and arrows whose widths show the probabilities.

    chains: dict of transitions, [8, 2], by title.
    """
    figure = new_figure(7.5, 3.1 * len(chains))
    figure.suptitle("blue: a 0 follows, orange: a 1; grey states occur in the text", fontsize=10)
    in_text = dict(zip(STATES, ~np.isnan(frequencies()[:, 0]), strict=True))
    for axes, (title, chain) in zip(figure.subplots(len(chains), 1), chains.items(), strict=True):
        axes.set(title=title, xlim=(-1, 7.2), ylim=(-0.4, 2.4), aspect="equal")
        axes.axis("off")
        for state, probs in zip(STATES, chain, strict=True):
            for token, prob in enumerate(probs):
                draw_arrow(axes, state, state[1:] + str(token), prob, COLORS[token])
        for state, center in CENTERS.items():
            face = "lightgrey" if in_text[state] else "white"
            circle = {"boxstyle": "circle,pad=0.6", "facecolor": face, "edgecolor": "black"}
            axes.text(*center, state, ha="center", va="center", fontsize=11, bbox=circle)
    save_figure(figure, path)


def draw_arrow(axes, state, next_state, prob, color):
    """Draw an arrow between the rims of two circles: a loop for 000 and 111, curved between 010 and 101."""
    start, end, bend = np.array(CENTERS[state], float), np.array(CENTERS[next_state], float), 0.0
    if state == next_state:
        side = -1 if state == "000" else 1
        corner = RADIUS * math.sqrt(0.5) * np.array((side, 1))
        start, end, bend = start + corner, end + corner * (1, -1), -2.4 * side
    else:
        rim = (end - start) / np.linalg.norm(end - start) * RADIUS
        start, end, bend = start + rim, end - rim, 0.5 if {state, next_state} == {"010", "101"} else 0.0
    along = end - start
    middle = (start + end) / 2 + bend / 2 * along[::-1] * (1, -1)  # the middle of matplotlib's curve arc3
    style = {"arrowstyle": "-|>", "mutation_scale": 8 + 12 * prob, "linewidth": 0.5 + 5 * prob, "color": color}
    style |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 1, "shrinkB": 1}
    axes.annotate("", end, start, arrowprops=style)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.text(*middle, f"{prob:.0%}", ha="center", va="center", fontsize=9, bbox=box)
