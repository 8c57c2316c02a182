"""The command line of train.py.

Standard output carries one line at the end, the result; everything else goes to standard error.
"""

import argparse
import contextlib
import os
import re
import sys

from cli import devices
from cli.options import (
    EXIT_INTERRUPTED,
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
from train import train
from training.checkpoint import STATE, load_options
from training.options import DTYPES, ENGINES, MAX_THREADS, PRESETS, Options
from training.plan import new_options, plan_new, plan_resumed, prepare_folder
from training.report import NoReport, Report
from training.trainer import NumpyTrainer
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


# Flags of XLA, so that a resumed run continues bit for bit on GPUs. With the first alone, the gradient of an embedding
# is added up in a loop over the tokens of a batch; with the second, they are sorted first.
DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_enable_scatter_determinism_expander"
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
    add("--train_bin", metavar="FILES", help="instead of --dataset: GPT-2's tokens in the files of nanoGPT or llm.c")
    add("--val_bin", metavar="FILES", help="tokens for validation; a pattern such as 'val_*.bin' is several files")
    add("--init_from", metavar="MODEL", help="fine-tune this model (124M, ...); default: scratch, a new model")
    add(
        "--preset",
        choices=PRESETS,
        help="3min (default) or 1h, the time on two cores; gpu, 11 M parameters; 124M, GPT-2 from scratch, for GPUs; "
        "finetune (default with --init_from)",
    )
    add("--resume", action="store_true", help="continue from the last save of --name")
    add("--overwrite", action="store_true", help="replace the model --name if it exists")
    parser.add_models_dir()
    parser.add_data_dir()
    add("--threads", type=parse_up_to(MAX_THREADS), metavar="N", help="threads (default: number of cores)")
    add(
        "--engine",
        choices=ENGINES,
        help="numpy, compiled kernels, which need numba, or jax, for GPUs, which needs JAX; auto takes the compiled "
        "kernels if numba is installed, and else numpy (default)",
    )
    add_jax_options(parser.add_argument_group("JAX, with --engine jax"))
    for title, options in TUNABLE.items():
        group = parser.add_argument_group(title)
        for name, (kind, meaning) in options.items():
            values = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
            group.add_argument(f"--{name}", **values, help=meaning + describe_defaults(name))
    return parser


def add_jax_options(group):
    add, on_or_off = group.add_argument, {"action": argparse.BooleanOptionalAction}
    add("--dtype", choices=DTYPES, help="type of products; the parameters are float32 (default: float32)")
    add("--remat", **on_or_off, help="compute each block again in the backward pass, which saves memory")
    add("--shard_optimizer", **on_or_off, help="shard AdamW's moments over the groups of devices, too")
    devices.add_device_options(add, "a batch")


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
    """Train a model; return EXIT_INTERRUPTED if Ctrl-C stopped it, else 0. given: dict of the options."""
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    on = argparse.Namespace(**{name: given.pop(name, None) for name in devices.OPTIONS})
    devices.check_process_options(on)
    model_dir = os.path.join(given["models_dir"], given["name"])
    check_folder(model_dir, given["name"], resume, overwrite)
    options = load_options(model_dir) if resume else new_options({"threads": available_cores()} | given)
    is_first = start_engine(given.get("engine", options.engine), given, on)
    with new_folder(given["models_dir"] or "."):
        if not resume:
            plan = plan_new(model_dir, options, given)
            say(plan.describe(), is_first)
            trainer = new_trainer(plan, on, is_first)
            with trainer.running():
                trainer.dry_run()  # errors appear before any file is written
        with lock(model_dir) if is_first else contextlib.nullcontext():
            if is_first:
                check_folder(model_dir, given["name"], resume, overwrite)  # again: another run may have trained it
            if resume:
                plan = plan_resumed(model_dir, given)
                trainer = new_trainer(plan, on, is_first)
                say(f"resuming from step {plan.state.step} of {plan.options.max_iters}", is_first)
            if is_first:
                prepare_folder(plan)
            finished = train(trainer, Report(trainer) if is_first else NoReport())
    if not finished:
        say(interruption(plan), is_first)
        return EXIT_INTERRUPTED
    if is_first:
        print_result(plan)
    return 0


def say(line, is_first):
    """Print a line on standard error, in one of the processes."""
    if is_first:
        print(line, file=sys.stderr)


def start_engine(engine, given, on):
    """Start JAX if that is the engine; return whether this process is the first one, which writes the files.

    on: the options of the devices. Raises UserError for options that need JAX with another engine.
    """
    jax_only = {"dtype": "float32", "remat": False, "shard_optimizer": False} | given
    devices.check_jax_options(argparse.Namespace(**vars(on) | jax_only | {"engine": engine}))
    if engine != "jax":
        return True
    for name in DETERMINISTIC:
        if name not in (flags := os.environ.get("XLA_FLAGS", "")):
            os.environ["XLA_FLAGS"] = f"{flags} {name}=true"
    devices.start_jax(on)
    import jax

    return jax.process_index() == 0


def new_trainer(plan, on, is_first):
    """Return the Trainer of the plan's engine. on: the options of the devices."""
    if plan.options.engine != "jax":
        return NumpyTrainer(plan)
    say("JAX compiles the step, which takes seconds, or minutes for a large model", is_first)
    try:
        from training.jax_trainer import JaxTrainer
    except ImportError as error:
        raise UserError(f"training with JAX needs optax ({error}); pip install -r requirements-jax.txt") from None
    return JaxTrainer(plan, devices.mesh_shape(on.devices, "data"))


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


def interruption(plan):
    return (
        f"stopped at step {plan.state.step} of {plan.options.max_iters} and saved; resume with: "
        f"python train.py {plan.options.model_arguments('--name')} --resume"
    )


def lock(model_dir):
    """Return a context manager that keeps other processes from training this model, whose folder need not exist."""

    def refuse():
        raise UserError(f"another process is training {model_dir}; wait for it, or choose another --name")

    models_dir, name = os.path.split(model_dir)
    return hold_lock(os.path.join(models_dir, f".{name}.lock"), refuse, "choose another --name or --models_dir")
