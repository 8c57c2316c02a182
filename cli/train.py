"""The command line of train.py.

Standard output carries one line at the end, the result; everything else goes to standard error.
"""

import argparse
import os
import re
import sys

from cli.options import (
    Parser,
    exit_code,
    parse_count,
    parse_fraction,
    parse_positive,
    parse_positive_rate,
    parse_rate,
    parse_up_to,
)
from encoder import END_OF_TEXT
from train import compute_gradients, train
from training.checkpoint import STATE
from training.options import ENGINES, MAX_THREADS, PRESETS, Options
from training.plan import plan_new, plan_resumed, prepare_folder
from training.report import Report
from training.trainer import Trainer, functions_of
from weights.errors import UserError
from weights.lock import hold_lock, new_folder
from weights.releases import N_PARAMS
from weights.resources import available_cores
from weights.safetensors_file import WEIGHTS


def parse_name(text):
    if text in N_PARAMS:
        raise argparse.ArgumentTypeError(f"{text!r} is OpenAI's model; choose another name for yours")
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder's name; use letters, digits, -, . and _")
    return text


TUNABLE = {  # options with a default: (type or choices, help text) by name
    "model": {
        "n_layer": (parse_positive, "transformer blocks"),
        "n_head": (parse_positive, "attention heads per block"),
        "n_embd": (parse_positive, "embedding size, a multiple of n_head"),
        "tokenizer": (
            ("bpe", "bytes", "gpt2"),
            "bpe: byte pair encoding learned from the text; bytes: single bytes; gpt2: GPT-2's own",
        ),
        "vocab_size": (parse_positive, "vocabulary size of the bpe tokenizer, at least 256"),
    },
    "data": {
        "layout": (
            ("plain", "sections"),
            f"plain: the text as it is; sections: {END_OF_TEXT} before each part that follows a blank line",
        ),
        "block_size": (parse_positive, "context length in tokens"),
        "batch_size": (parse_positive, "windows of block_size tokens per batch"),
        "gradient_accumulation_steps": (parse_positive, "batches whose gradients are averaged for an update"),
    },
    "optimization": {
        "max_iters": (parse_count, "total number of steps"),
        "learning_rate": (parse_positive_rate, "AdamW's largest learning rate, after the warm-up"),
        "warmup_iters": (parse_count, "steps of linear warm-up"),
        "lr_decay_iters": (parse_positive, "step at which the cosine decay reaches min_lr (default: max_iters)"),
        "min_lr": (parse_rate, "final learning rate (default: learning_rate / 20)"),
        "weight_decay": (parse_rate, "AdamW's weight decay, applied to matrices only"),
        "beta1": (parse_fraction, "AdamW's decay rate of the first moment"),
        "beta2": (parse_fraction, "AdamW's decay rate of the second moment"),
        "grad_clip": (parse_rate, "largest global norm of the gradients, 0 for no clipping"),
        "dropout": (parse_fraction, "dropout probability"),
        "seed": (parse_count, "random seed"),
    },
    "evaluation": {
        "eval_interval": (parse_positive, "steps between evaluations; each evaluation saves the model"),
        "eval_iters": (parse_positive, "batches per evaluation and split"),
    },
}


def make_parser():
    parser = Parser(
        prog="train.py",
        description="Train a GPT-2 on a text, from scratch or from a pretrained model.",
        epilog="Defaults are in brackets: one for all presets, or one per preset. With --resume, options that are not "
        "given keep their values.",
        argument_default=argparse.SUPPRESS,
        hint=" (a text goes after --dataset, the new model's name after --name)",
    )
    add = parser.add_argument
    add("--name", required=True, type=parse_name, help="name of the new model, a folder under models_dir")
    add(
        "--dataset",
        metavar="FILE",
        help="a UTF-8 text file, or tinyshakespeare, which is downloaded",
    )
    add("--init_from", metavar="MODEL", help="fine-tune this model (124M, ...); default: scratch, a new model")
    add(
        "--preset",
        choices=PRESETS,
        help="3min (default) or 1h, the time on two cores; finetune (default with --init_from)",
    )
    add("--resume", action="store_true", help="continue from the last save of --name")
    add("--overwrite", action="store_true", help="replace the model --name if it exists")
    parser.add_models_dir()
    parser.add_data_dir()
    add("--threads", type=parse_up_to(MAX_THREADS), metavar="N", help="threads (default: number of cores)")
    add(
        "--engine",
        choices=ENGINES,
        help="numpy, or compiled kernels, which need numba; auto takes these if numba is installed (default)",
    )
    for title, options in TUNABLE.items():
        group = parser.add_argument_group(title)
        for name, (kind, meaning) in options.items():
            values = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
            group.add_argument(f"--{name}", **values, help=meaning + describe_defaults(name))
    return parser


def describe_defaults(name):
    """Return [0.1] if all presets agree, [3min 4, 1h 6] if they do not."""
    default = getattr(Options, name, None)
    values = {preset: options.get(name, default) for preset, options in PRESETS.items()}
    values = {preset: value for preset, value in values.items() if value is not None}
    if len(set(values.values())) < 2:
        return "".join(f" [{value}]" for value in set(values.values()))
    return f" [{', '.join(f'{preset} {value}' for preset, value in values.items())}]"


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("train.py", lambda: run_training(vars(make_parser().parse_args(argv))), argv)


def run_training(given):
    """Train a model. given: dict of the options on the command line. Raises KeyboardInterrupt if Ctrl-C stopped it."""
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    model_dir = os.path.join(given["models_dir"], given["name"])
    check_folder(model_dir, given["name"], resume, overwrite)
    with new_folder(given["models_dir"] or "."):
        if not resume:
            plan = plan_new(model_dir, {"threads": available_cores()} | given)
            print(plan.describe(), file=sys.stderr)
            with Trainer(plan).threads() as trainer:
                compute_gradients(trainer)  # a dry run: errors appear before any file is written
        with lock(model_dir):
            check_folder(model_dir, given["name"], resume, overwrite)  # again: another process may have trained it
            if resume:
                plan = plan_resumed(model_dir, given)
                functions_of(plan.options.engine)  # an error appears before any file is written
                print(f"resuming from step {plan.state.step} of {plan.options.max_iters}", file=sys.stderr)
            prepare_folder(plan)
            trainer = Trainer(plan)
            finished = train(trainer, Report(trainer))
    if not finished:
        print_interruption(plan)
        raise KeyboardInterrupt
    print_result(plan)


def check_folder(model_dir, name, resume, overwrite):
    """Raise UserError unless the model can be resumed, with --resume, or else created."""
    if resume and overwrite:
        raise UserError("give --resume or --overwrite, not both: one continues the model, the other replaces it")
    if os.path.exists(model_dir) and not os.path.isdir(model_dir):
        raise UserError(f"{model_dir} is not a folder; choose another --name")
    can_resume = os.path.exists(os.path.join(model_dir, STATE))
    if resume and not can_resume:
        if os.path.exists(os.path.join(model_dir, WEIGHTS)):
            raise UserError(
                f"{model_dir} has no {STATE} to resume from; --init_from {name} with another --name fine-tunes it"
            )
        raise UserError(f"no training to resume in {model_dir}; check --name, or leave out --resume to start one")
    if not (resume or overwrite) and os.path.exists(model_dir):
        choices = "--resume continues it, " if can_resume else ""
        raise UserError(f"{model_dir} exists; {choices}--overwrite replaces it, or choose another --name")


def print_result(plan):
    state, options = plan.state, plan.options
    nats = state.best_loss / state.val_chars_per_token
    print(
        f"{plan.model_dir}: validation loss {state.best_loss:.4f} nats per token, {nats:.4f} per character, "
        f"in windows of {options.block_size} tokens without overlap, "
        f"at step {state.best_step} of {options.max_iters}; {state.seconds:.0f} s"
    )
    arguments = options.model_arguments()
    print(f'try it: python gpt2.py "A prompt" {arguments} --temperature 0.8 --top_k 40', file=sys.stderr)


def print_interruption(plan):
    print(
        f"stopped at step {plan.state.step} of {plan.options.max_iters} and saved; resume with: "
        f"python train.py {plan.options.model_arguments('--name')} --resume",
        file=sys.stderr,
    )


def lock(model_dir):
    """Return a context manager that keeps other processes from training this model, whose folder need not exist."""

    def refuse():
        raise UserError(f"another process is training {model_dir}; wait for it, or choose another --name")

    models_dir, name = os.path.split(model_dir)
    return hold_lock(os.path.join(models_dir, f".{name}.lock"), refuse, "choose another --name or --models_dir")
