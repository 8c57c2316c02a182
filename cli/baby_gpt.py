"""The command line of baby_gpt.py: its options, the table and the figure of the stages, and the Markov chain.

Standard output has the table, and the sample of a single stage; standard error has the evaluations during training. The
exit codes are those of options.py.
"""

import argparse
import sys

import numpy as np

from baby_gpt import CPU, GPU, SCALED_UP, STAGES, train, training_memory
from cli.options import Parser, exit_code, parse_count, parse_fraction, parse_positive, parse_positive_rate, parse_up_to
from explain import markov
from training.dataset import check_length, read_dataset, split_text
from training.figure import check_figure_path, new_figure, save_figure
from weights.errors import UserError, printable
from weights.files import same_file
from weights.names import n_params
from weights.resources import check_memory

MAX_SIZE = 10_000  # largest value of a hyperparameter that memory and time depend on
PRESETS = {"cpu": (CPU, SCALED_UP), "gpu": (GPU, GPU)}  # for all stages but scaled_up, and for scaled_up

HYPERPARAMETERS = {  # type and help text
    "batch_size": (parse_up_to(MAX_SIZE), "sequences per batch"),
    "block_size": (parse_up_to(MAX_SIZE), "characters per sequence: the context length"),
    "d_model": (parse_up_to(MAX_SIZE), "embedding size"),
    "d_k": (parse_up_to(MAX_SIZE), "width of a query, a key and a value"),
    "Nx": (parse_up_to(MAX_SIZE), "number of blocks"),
    "h": (parse_up_to(MAX_SIZE), "number of heads"),
    "dropout_rate": (parse_fraction, "dropout probability"),
    "lr_rate": (parse_positive_rate, "AdamW's learning rate"),
    "num_iter": (parse_positive, "number of training steps; 50 for --markov"),
    "eval_interval": (parse_positive, "number of steps between evaluations"),
    "eval_iters": (parse_up_to(MAX_SIZE), "batches per evaluation"),
}
SAMPLE_LENGTH = 40  # characters in the table
WIDTHS = {"stage": 12, "parameters": 10, "seconds": 7, "train loss": 10, "validation loss": 15, "change": 17}
WIDTHS |= {"sample": SAMPLE_LENGTH}


def make_parser():
    parser = Parser(
        prog="baby_gpt.py",
        description="Train models of eleven stages, from a table of letter pairs to GPT-2.",
        argument_default=argparse.SUPPRESS,
        hint=" (the name of a stage goes after --stage)",
    )
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("--stage", choices=STAGES, metavar="NAME", help=f"train one stage: {', '.join(STAGES)}")
    one_of("--all", action="store_true", help="train all stages, one after the other")
    one_of("--markov", action="store_true", help="train a GPT with two tokens and show it as a Markov chain")
    add("--draw", metavar="FILE", help="path of the figure (default: baby_gpt.png for --all, markov.png for --markov)")
    add("--seed", type=parse_count, default=1337, metavar="N", help="random seed (default: 1337)")
    add("--dataset", metavar="FILE", help="a UTF-8 text file (default: tinyshakespeare, which is downloaded)")
    add("--data_dir", metavar="DIR", help="where tinyshakespeare is downloaded to (default: data)")
    add(
        "--preset",
        choices=PRESETS,
        help="defaults of the options below: cpu (default), or gpu, which takes days on a CPU",
    )
    for name, (kind, meaning) in HYPERPARAMETERS.items():
        defaults = f"[cpu {CPU[name]}, stage scaled_up {SCALED_UP[name]}; gpu {GPU[name]}]"
        flag = "--steps" if name == "num_iter" else f"--{name}"
        add(flag, dest=name, type=kind, metavar="N", help=f"{meaning} {defaults}")
    return parser


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("baby_gpt.py", lambda: run_options(vars(make_parser().parse_args(argv))), argv)


def run_options(given):
    """Show the Markov chain or train stages. given: dict of the options on the command line."""
    if "markov" in given:
        show_markov(given)
    else:
        train_stages(given)


def train_stages(given):
    """Train one stage or all, and print a table; draw the curves for --all or if --draw is given."""
    path = given.get("draw", "baby_gpt.png" if "all" in given else None)
    if path:
        check_figure_path(path)
        if same_file(path, given.get("dataset", "")):
            raise UserError(f"--draw {path} would overwrite the dataset; choose another path for the figure")
    data, chars = read_characters(given)
    stages = STAGES if "all" in given else [given["stage"]]
    options = {stage: PRESETS[given.get("preset", "cpu")][stage == "scaled_up"] | given for stage in stages}
    block_size = max(options[stage]["block_size"] for stage in stages)
    check_length(len(data["train"]), len(data["val"]), block_size, "characters")
    for stage in stages:
        remedy = "lower --batch_size, --block_size, --d_model, --d_k, --h or --Nx"
        check_memory(f"stage {stage}", training_memory(stage, len(chars), options[stage]), remedy)
    print_row(WIDTHS)
    print_row("-" * width for width in WIDTHS.values())
    results = []
    for stage in stages:
        results.append(train(stage, options[stage], data, chars))
        print_row(cells(results[-1], results[-2] if len(results) > 1 else None))
    if "stage" in given:
        print("\n" + printable(results[0].text))
    if path:
        draw_curves(results, path)
        print(f"wrote {path}", file=sys.stderr)


def read_characters(given):
    """Return arrays of token ids by split, and a string of the character of each id."""
    text = read_dataset(given.get("dataset", "tinyshakespeare"), given.get("data_dir", "data"))
    code_points, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    return split_text(ids), "".join(map(chr, code_points))


def print_row(texts):
    texts = (text.ljust(width) for text, width in zip(texts, WIDTHS.values(), strict=True))
    print("| " + " | ".join(texts) + " |", flush=True)


def cells(result, previous=None):
    """Return the texts of a row of the table. previous: the result of the previous stage, if that was trained."""
    _, train_loss, val_loss = result.curve[-1]
    change = ""
    if previous:
        difference = round(val_loss - previous.curve[-1][2], 4)
        change = f"{difference:+.4f}" + ("" if difference < 0 else " no better")
    text = printable(result.text[:SAMPLE_LENGTH]).replace("\n", "⏎").replace("\t", " ")
    losses = f"{train_loss:.4f}", f"{val_loss:.4f}"
    return result.stage, str(result.n_params), f"{result.seconds:.1f}", *losses, change, text


def draw_curves(results, path):
    """Save a figure of the validation losses; the evaluations of untrained models are cut off at the top."""
    from matplotlib import colormaps

    figure = new_figure(10, 6)
    axes = figure.add_subplot(xlabel="step", ylabel="validation loss (nats per character)")
    for result, color in zip(results, colormaps["turbo"](np.linspace(0, 1, len(results))), strict=True):
        steps, _, losses = zip(*result.curve, strict=True)
        axes.plot(steps, losses, marker=".", color=color, label=f"{losses[-1]:.3f}  {result.stage}")
    axes.set_ylim(top=1.02 * max(result.curve[1][2] for result in results))
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


def show_markov(given):
    """Train the model of explain/markov.py; print its losses, its transitions and a sample, and draw it."""
    if extra := set(given) - {"markov", "draw", "seed", "num_iter"}:
        raise UserError(f"--{min(extra)} is an option of the stages; --markov takes --steps, --seed and --draw")
    path = given.get("draw", "markov.png")
    check_figure_path(path)
    tensors, zeros = markov.new_tensors(given["seed"])
    before = markov.transitions(tensors | zeros)
    losses = markov.train(tensors, zeros, given.get("num_iter", markov.STEPS))
    after = markov.transitions(tensors | zeros)
    count = n_params({name: tensor.shape for name, tensor in tensors.items()})
    print(f"{count} parameters; the text is {markov.TEXT}")
    for i in sorted({0, min(10, len(losses) - 1), len(losses) - 1}):
        print(f"step {i:2}: loss {losses[i]:.6f}")
    print(*markov.table(before, after), sep="\n")
    print(f"from 111: {markov.sample(tensors | zeros, given['seed'])}")
    markov.draw({"before": before, f"after {len(losses)} steps": after}, path)
    print(f"wrote {path}", file=sys.stderr)
