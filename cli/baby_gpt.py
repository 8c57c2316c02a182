"""The command line of baby_gpt.py: which rungs are trained with which numbers, the table and the picture of them.

Standard output carries the table, and what a single rung writes; the evaluations go to standard error. Exit codes as in
cli.py.
"""

import argparse
import sys

import numpy as np

from baby_gpt import CPU, GPU, RUNGS, SCALED_UP, train
from cli.options import Parser, exit_code, parse_count, parse_fraction, parse_positive, parse_positive_rate
from training.dataset import read_dataset, split_text
from training.figure import check_picture, new_figure, save_figure
from weights.errors import UserError
from weights.files import same_file

MOST = 10_000  # of anything that memory is taken for
PRESETS = {"cpu": (CPU, SCALED_UP), "gpu": (GPU, GPU)}  # of all rungs but the last, of the last


def parse_size(text):
    if (number := parse_positive(text)) > MOST:
        raise argparse.ArgumentTypeError(f"{number} is too many, at most {MOST}")
    return number


NUMBERS = {  # type, and what it is
    "batch_size": (parse_size, "pieces of text at a time"),
    "block_size": (parse_size, "characters in a piece, the context"),
    "d_model": (parse_size, "numbers that stand for a character"),
    "d_k": (parse_size, "width of a query, a key and a value"),
    "Nx": (parse_size, "blocks"),
    "h": (parse_size, "heads"),
    "dropout_rate": (parse_fraction, "the share that is dropped"),
    "lr_rate": (parse_positive_rate, "AdamW's learning rate"),
    "num_iter": (parse_positive, "steps"),
    "eval_interval": (parse_positive, "steps between evaluations"),
    "eval_iters": (parse_size, "batches in an evaluation"),
}
SAMPLE = 40  # characters of a text in the table
WIDTHS = {"rung": 12, "parameters": 10, "seconds": 7, "train loss": 10, "validation loss": 15, "change": 17}
WIDTHS |= {"sample": SAMPLE}


def make_parser():
    parser = Parser(
        prog="baby_gpt.py",
        description="Climb from a table of letter pairs to GPT-2, training a model on each rung.",
        argument_default=argparse.SUPPRESS,
        hint=" (the name of a rung goes after --rung)",
    )
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("--rung", choices=RUNGS, metavar="NAME", help=f"train one: {', '.join(RUNGS)}")
    one_of("--all", action="store_true", help="train all, one after the other")
    one_of("--markov", action="store_true", help="train a GPT of 0s and 1s, and show it as a Markov chain (markov.py)")
    add("--draw", metavar="FILE", help="the picture (default: baby_gpt.png for --all, markov.png for --markov)")
    add("--seed", type=parse_count, default=1337, metavar="N", help="1337 if not given; another one, another model")
    add("--dataset", metavar="FILE", help="a UTF-8 text file (default tinyshakespeare, which is downloaded)")
    add("--data_dir", metavar="DIR", help="where tinyshakespeare is downloaded to (default data)")
    add("--preset", choices=PRESETS, help="the numbers that are not given: cpu (default), or gpu, for days on a CPU")
    for name, (kind, meaning) in NUMBERS.items():
        values = f"[cpu {CPU[name]}, its scaled_up {SCALED_UP[name]}, gpu {GPU[name]}]"
        flag = "--steps" if name == "num_iter" else f"--{name}"
        add(flag, dest=name, type=kind, metavar="N", help=f"{meaning} {values}")
    return parser


def run(argv=None):
    """Runs the command line argv (default sys.argv[1:]) and returns its exit code."""
    return exit_code("baby_gpt.py", lambda: climb(vars(make_parser().parse_args(argv))))


def climb(given):
    """given: the options on the command line."""
    if "markov" in given:
        from explain.markov import show

        return show(given)
    path = given.get("draw", "baby_gpt.png" if "all" in given else None)
    if path:
        check_picture(path)
        if same_file(path, given.get("dataset", "")):
            raise UserError(f"--draw {path} is the text itself; choose another name for the picture")
    data, chars = read_characters(given)
    rungs = RUNGS if "all" in given else [given["rung"]]
    options = {rung: PRESETS[given.get("preset", "cpu")][rung == "scaled_up"] | given for rung in rungs}
    check_length(max(numbers["block_size"] for numbers in options.values()), data)
    print_row(WIDTHS)
    print_row("-" * width for width in WIDTHS.values())
    results = []
    for rung in rungs:
        results.append(train(rung, options[rung], data, chars))
        print_row(cells(*results[-2:][::-1]))
    if "rung" in given:
        print("\n" + printable(results[0].text))
    if path:
        draw_curves(results, path)
        print(f"drawn: {path}", file=sys.stderr)


def read_characters(given):
    """Arrays of ids by split, and the character of each id."""
    text = read_dataset(given.get("dataset", "tinyshakespeare"), given.get("data_dir", "data"))
    chars, ids = np.unique(list(text), return_inverse=True)
    return dict(zip(("train", "val"), split_text(ids), strict=True)), "".join(chars)


def check_length(block_size, data):
    n_train, n_val = len(data["train"]), len(data["val"])
    if min(n_train, n_val) <= block_size:
        raise UserError(
            f"the text gives {n_train} characters to train on and {n_val} to validate on; each must be more than "
            f"--block_size {block_size}: take a longer text"
        )


def print_row(texts):
    texts = (text.ljust(width) for text, width in zip(texts, WIDTHS.values(), strict=True))
    print("| " + " | ".join(texts) + " |", flush=True)


def cells(result, before=None):
    """What the table says of a rung; before: the result of the rung below it, None where that was not trained."""
    _, train_loss, val_loss = result.curve[-1]
    change = ""
    if before:
        difference = round(val_loss - before.curve[-1][2], 4)
        change = f"{difference:+.4f}" + ("" if difference < 0 else " no better")
    text = printable(result.text[:SAMPLE]).replace("\n", "⏎")
    losses = f"{train_loss:.4f}", f"{val_loss:.4f}"
    return result.rung, str(result.n_params), f"{result.seconds:.1f}", *losses, change, text


def printable(text):
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def draw_curves(results, path):
    """The validation losses over the steps; the first, of untrained models, lie above the picture."""
    from matplotlib import colormaps

    figure = new_figure(10, 6)
    axes = figure.add_subplot(xlabel="step", ylabel="validation loss (nats a character)")
    for result, color in zip(results, colormaps["turbo"](np.linspace(0, 1, len(results))), strict=True):
        steps, _, losses = zip(*result.curve, strict=True)
        axes.plot(steps, losses, marker=".", color=color, label=f"{losses[-1]:.3f}  {result.rung}")
    axes.set_ylim(top=1.02 * max(result.curve[1][2] for result in results))
    figure.legend(loc="outside right upper")
    save_figure(figure, path)
