"""The command line of train.py: options and presets, what a new model starts from, what a resumed one goes on from.

Standard output carries one line at the end, what was made; the rest goes to standard error. Exit codes as in cli.py.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys

import numpy as np
from filelock import FileLock, Timeout

from cli.options import (
    EXIT_INTERRUPTED,
    Parser,
    exit_code,
    n_cores,
    parse_count,
    parse_fraction,
    parse_positive,
    parse_positive_rate,
    parse_rate,
)
from encoder import END_OF_TEXT, get_encoder, save_encoder
from training.dataset import (
    N_BYTES,
    N_IDS,
    encode_splits,
    open_tokens,
    read_dataset,
    save_tokens,
    split_text,
    train_encoder,
)
from training.trainer import LOG, PICTURE, STATE, Trainer, initial_tensors, read_log
from utils import N_PARAMS, load_encoder_hparams_and_params, load_gpt2_encoder
from weights.download import check_space
from weights.errors import CorruptFile, UserError
from weights.files import atomic_write
from weights.names import flatten, load_hparams, tensor_shapes
from weights.safetensors_file import load_safetensors

COMMON = {
    "layout": "plain",
    "gradient_accumulation_steps": 1,
    "eval_interval": 250,
    "eval_iters": 20,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "grad_clip": 1.0,
    "min_lr": None,  # a twentieth of learning_rate
    "lr_decay_iters": None,  # max_iters
    "seed": 1337,
}
SCRATCH = COMMON | {
    "tokenizer": "bpe",
    "vocab_size": 512,
    "block_size": 128,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_iters": 100,
}
PRESETS = {
    "3min": SCRATCH
    | {"n_layer": 4, "n_head": 4, "n_embd": 128, "learning_rate": 4e-3, "dropout": 0.0, "max_iters": 1000},
    "1h": SCRATCH | {"n_layer": 6, "n_head": 6, "n_embd": 192, "dropout": 0.2, "max_iters": 7000},
    "finetune": COMMON
    | {"block_size": 256, "batch_size": 4, "learning_rate": 5e-5, "warmup_iters": 10, "dropout": 0.1, "max_iters": 200}
    | {"eval_interval": 50},
}
SHAPE = ("n_layer", "n_head", "n_embd", "tokenizer", "vocab_size")  # of a new model; one that is fine-tuned has its own
FIXED = (*SHAPE, "init_from", "dataset", "layout", "block_size", "seed")  # what --resume cannot change


def new_name(text):
    if text in N_PARAMS:
        raise argparse.ArgumentTypeError(f"{text!r} is OpenAI's model; choose another name for yours")
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a folder; take letters, digits, -, . and _")
    return text


TUNABLE = {  # what a preset has a value for: by name its type or choices, and what it is
    "the new model": {
        "n_layer": (parse_positive, "blocks"),
        "n_head": (parse_positive, "attention heads a block"),
        "n_embd": (parse_positive, "width, a multiple of n_head"),
        "tokenizer": (
            ("bpe", "bytes", "gpt2"),
            "bpe learns merges from the text, bytes has none, gpt2 is GPT-2's own",
        ),
        "vocab_size": (parse_positive, "tokens of a bpe, at least 256"),
    },
    "the data": {
        "layout": (("plain", "sections"), f"sections puts {END_OF_TEXT} before each part that follows a blank line"),
        "block_size": (parse_positive, "tokens of context"),
        "batch_size": (parse_positive, "blocks at a time"),
        "gradient_accumulation_steps": (parse_positive, "batches a step"),
    },
    "the training": {
        "max_iters": (parse_count, "steps in all; the learning rate falls until then"),
        "learning_rate": (parse_positive_rate, "AdamW's, after the warm-up"),
        "warmup_iters": (parse_count, "steps from 0 up to learning_rate"),
        "lr_decay_iters": (parse_positive, "steps down to min_lr, along a cosine; by default max_iters"),
        "min_lr": (parse_rate, "by default a twentieth of learning_rate"),
        "weight_decay": (parse_rate, "of matrices"),
        "beta1": (parse_fraction, "AdamW's running mean of gradients"),
        "beta2": (parse_fraction, "AdamW's running mean of their squares"),
        "grad_clip": (parse_rate, "the largest norm of all gradients, 0 for any"),
        "dropout": (parse_fraction, "the share that is dropped while training"),
        "seed": (parse_count, "the same seed trains the same model"),
        "eval_interval": (parse_positive, "steps between evaluations, each of which saves"),
        "eval_iters": (parse_positive, "batches in an evaluation, of each split"),
    },
}


def make_parser():
    parser = Parser(
        prog="train.py",
        description="Train a GPT-2 on a text, from scratch or from a model that is there.",
        epilog="What is left out is as the preset has it, shown in brackets; with --resume, as it was.",
        argument_default=argparse.SUPPRESS,
        hint=" (a text goes after --dataset, the new model's name after --name)",
    )
    add = parser.add_argument
    add("--name", required=True, type=new_name, help="the model made: a folder under models_dir")
    add("--dataset", metavar="FILE", help="a UTF-8 text file, or tinyshakespeare, which is downloaded")
    add("--init_from", metavar="MODEL", help="fine-tune this model (124M, ...); scratch makes a new one (default)")
    add("--preset", choices=PRESETS, help="3min (default), 1h, or finetune (default with --init_from)")
    add("--resume", action="store_true", help="go on from where --name was saved")
    add("--overwrite", action="store_true", help="replace the model --name, if it is there")
    parser.add_models_dir()
    add("--data_dir", metavar="DIR", default="data", help="where tinyshakespeare is downloaded to (default data)")
    add("--device", choices=["cpu"], help="cpu is what NumPy runs on")
    add("--threads", type=parse_positive, metavar="N", help="shards of a batch, one thread each (default: the cores)")
    for title, options in TUNABLE.items():
        group = parser.add_argument_group(title)
        for name, (kind, meaning) in options.items():
            takes = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
            group.add_argument(f"--{name}", **takes, help=meaning + preset_values(name))
    return parser


def preset_values(name):
    """[0.1] where all presets agree, [3min 4, 1h 6] where they do not."""
    values = {preset: options[name] for preset, options in PRESETS.items() if options.get(name) is not None}
    if not values:
        return ""
    if len(set(values.values())) == 1:
        return f" [{values['3min']}]"
    return f" [{', '.join(f'{preset} {value}' for preset, value in values.items())}]"


def run(argv=None):
    """Runs the command line argv (default sys.argv[1:]) and returns its exit code."""
    return exit_code("train.py", lambda: train(vars(make_parser().parse_args(argv))))


def train(given):
    """given: the options on the command line. Returns the exit code."""
    model_dir = os.path.join(given["models_dir"], given["name"])
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    if resume and overwrite:
        raise UserError("give --resume or --overwrite, not both: one goes on with the model, one begins anew")
    can_resume = os.path.exists(os.path.join(model_dir, STATE))
    if resume and not can_resume:
        raise UserError(explain_nothing_to_resume(model_dir, given["name"]))
    if not (resume or overwrite) and os.path.exists(model_dir):
        way_on = "--resume goes on with it, " if can_resume else ""
        raise UserError(f"{model_dir} exists; {way_on}--overwrite replaces it, or choose another --name")
    prepare = resumed_trainer if resume else new_trainer
    with locked(model_dir):
        trainer = prepare(model_dir, given)
        finished = trainer.run()
    return report(trainer, finished)


def explain_nothing_to_resume(model_dir, name):
    if not os.path.exists(os.path.join(model_dir, "model.safetensors")):
        return f"there is no training to resume in {model_dir}; check --name, or leave out --resume to start one"
    return (
        f"{model_dir} has no {STATE} to resume from; --init_from {name} with another --name trains its weights further"
    )


def report(trainer, finished):
    state, options = trainer.state, trainer.options
    if not finished:
        print(
            f"stopped at step {state['step']} of {options['max_iters']}, saved; go on with: "
            f"python train.py {trainer.model_options('--name')} --resume",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    nats = state["best_loss"] / state["val_chars_per_token"]
    print(
        f"{trainer.model_dir}: validation loss {state['best_loss']:.4f} nats a token, {nats:.4f} a character, "
        f"at step {state['best_step']} of {options['max_iters']}; {state['seconds']:.0f} s"
    )
    print(f'try it: python gpt2.py "A prompt" {trainer.model_options()} --temperature 0.8 --top_k 40', file=sys.stderr)
    return 0


@contextlib.contextmanager
def locked(model_dir):
    """While no other process trains in the folder, which need not be there yet."""
    models_dir, name = os.path.split(model_dir)
    try:
        os.makedirs(models_dir, exist_ok=True)
        lock = FileLock(os.path.join(models_dir, f".{name}.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training {model_dir}; wait for it, or choose another --name") from None
    except OSError as error:
        raise UserError(f"cannot write {model_dir} ({error.strerror}); choose another --name or --models_dir") from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            os.remove(lock.lock_file)


# A new model


def new_trainer(model_dir, given):
    """Reads, checks and makes everything, and goes once through the model and back, before anything is replaced."""
    options = resolve(given)
    text = read_dataset(options["dataset"], options["data_dir"])
    if options["init_from"] == "scratch":
        encoder = new_encoder(options, text)
        shape = {name: options[name] for name in ("n_embd", "n_head", "n_layer")}
        hparams = {"n_vocab": len(encoder.encoder), "n_ctx": options["block_size"]} | shape
    else:
        encoder, hparams, params = load_encoder_hparams_and_params(options["init_from"], options["models_dir"])
        if "block_size" not in given:
            options["block_size"] = min(options["block_size"], hparams["n_ctx"])
        check_fine_tuning(options, encoder, hparams)
    train_ids, val_ids, val_chars = encode_splits(text, encoder, options["layout"])
    check_length(options, train_ids, val_ids)
    if options["init_from"] == "scratch":
        tensors = initial_tensors(hparams, options["seed"])
    else:
        tensors = {name: np.array(tensor) for name, tensor in flatten(params, hparams).items()}  # to be written to
    data = {"train": np.array(train_ids, np.uint16), "val": np.array(val_ids, np.uint16)}
    state = {"val_chars_per_token": val_chars / len(val_ids), "tokens": {"train": len(train_ids), "val": len(val_ids)}}
    trainer = Trainer(model_dir, options, encoder, hparams, tensors, data, state)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    check_space(model_dir, 8 * n_bytes)  # weights, moments and the best weights, old and new
    announce(options, hparams, n_bytes // 4, len(train_ids), len(val_ids))
    trainer.try_a_step()
    begin_folder(trainer)
    return trainer


def begin_folder(trainer):
    """Takes away what was trained there before, and puts down all that does not change any more."""
    model_dir = trainer.model_dir
    os.makedirs(model_dir, exist_ok=True)
    for name in (STATE, LOG, PICTURE, "model.safetensors", "config.json", "tokenizer.json"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(model_dir, name))
    with atomic_write(os.path.join(model_dir, "hparams.json")) as f:
        f.write(json.dumps(trainer.hparams).encode("utf-8"))
    save_encoder(trainer.encoder, model_dir)
    for split, ids in trainer.data.items():
        save_tokens(os.path.join(model_dir, f"{split}.bin"), ids)
    trainer.data = open_data(model_dir, trainer.hparams, trainer.state)


def open_data(model_dir, hparams, state):
    paths = {split: os.path.join(model_dir, f"{split}.bin") for split in ("train", "val")}
    return {split: open_tokens(path, hparams["n_vocab"], state["tokens"][split]) for split, path in paths.items()}


def resolve(given):
    """All options: those given, the preset's for the others. Raises UserError where they do not go together."""
    if "dataset" not in given:
        raise UserError("--dataset is needed: a text file to learn from, or tinyshakespeare")
    fine_tunes = given.get("init_from", "scratch") != "scratch"
    preset = given.get("preset", "finetune" if fine_tunes else "3min")
    if fine_tunes != (preset == "finetune"):
        raise UserError(
            f"--preset {preset} is for {'new models' if fine_tunes else '--init_from a model'}; leave it out"
        )
    if fine_tunes and (own := [name for name in SHAPE if name in given]):
        raise UserError(f"--{own[0]} comes from {given['init_from']} and cannot be chosen; leave it out")
    options = {"init_from": "scratch", "threads": n_cores(), "device": "cpu"} | PRESETS[preset] | given
    if "vocab_size" in given and options["tokenizer"] != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer bpe; {options['tokenizer']} has its own, so leave it out")
    if not fine_tunes and options["n_embd"] % options["n_head"]:
        n_embd, n_head = options["n_embd"], options["n_head"]
        nearest = n_head * max(1, round(n_embd / n_head))
        raise UserError(f"--n_embd {n_embd} is not a multiple of --n_head {n_head}; --n_embd {nearest} is")
    return options


def new_encoder(options, text):
    """The tokenizer of a new model."""
    if options["tokenizer"] == "gpt2":
        return load_gpt2_encoder(options["models_dir"])
    end_of_text = options["layout"] == "sections"
    vocab_size = N_BYTES + end_of_text if options["tokenizer"] == "bytes" else options["vocab_size"]
    return train_encoder(split_text(text)[0], vocab_size, end_of_text)


def check_fine_tuning(options, encoder, hparams):
    model, n_ctx = options["init_from"], hparams["n_ctx"]
    if options["block_size"] > n_ctx:
        raise UserError(
            f"--block_size {options['block_size']} is beyond {model}'s context of {n_ctx}; set {n_ctx} or less"
        )
    if hparams["n_vocab"] > N_IDS:
        raise UserError(f"{model} has {hparams['n_vocab']} tokens; ids are kept in 16 bits, which hold {N_IDS}")
    if options["layout"] == "sections" and END_OF_TEXT not in encoder.encoder:
        raise UserError(f"{model} has no {END_OF_TEXT} to begin sections with; leave out --layout sections")


def check_length(options, train_ids, val_ids):
    shorter = min(len(train_ids), len(val_ids))
    if shorter <= options["block_size"]:
        raise UserError(
            f"{options['dataset']} gives {len(train_ids)} tokens to train on and {len(val_ids)} to validate on; each "
            f"must be more than --block_size {options['block_size']}: take a longer text"
            + (f", or --block_size {shorter - 1}" if shorter > 1 else "")
        )


def announce(options, hparams, n_params, n_train, n_val):
    shape = ", ".join(f"{name} {value}" for name, value in hparams.items())
    step = options["batch_size"] * options["gradient_accumulation_steps"] * options["block_size"]
    print(
        f"{n_params / 1e6:.2f} M parameters ({shape}); {n_train} tokens to train on, {n_val} to validate on; "
        f"{options['max_iters']} steps of {step} tokens = {options['max_iters'] * step / n_train:.1f} times the text",
        file=sys.stderr,
    )


# A model to go on with


def resumed_trainer(model_dir, given):
    path = os.path.join(model_dir, STATE)
    saved, metadata = load_safetensors(path)
    try:
        state, before = json.loads(metadata["state"]), json.loads(metadata["options"])
    except (KeyError, ValueError):
        raise CorruptFile(path, "no state of a training in it") from None
    for name in FIXED:
        if name in given and given[name] != before.get(name):
            raise UserError(
                f"--{name} {given[name]} is not what {model_dir} is trained with ({before.get(name)}); leave it out, "
                "or start another --name"
            )
    if "preset" in given:
        raise UserError(f"--preset is for new models; leave it out, {model_dir} keeps its options")
    options, hparams = before | given, load_hparams(model_dir)
    if options["max_iters"] < state["step"]:
        raise UserError(
            f"{model_dir} is at step {state['step']}; --max_iters {options['max_iters']} lies behind it, set more"
        )
    if not os.path.exists(os.path.join(model_dir, "model.safetensors")):
        state |= {"best_loss": math.inf, "evaluated_step": -1}  # it is written again
    shapes = {f"{part}/{name}": shape for part in "wmv" for name, shape in tensor_shapes(**hparams).items()}
    if {name: tensor.shape for name, tensor in saved.items()} != shapes:
        raise CorruptFile(path, "its tensors are not those of hparams.json")
    tensors = {name: np.array(saved[f"w/{name}"]) for name in tensor_shapes(**hparams)}
    encoder, data = get_encoder(given["name"], given["models_dir"]), open_data(model_dir, hparams, state)
    trainer = Trainer(model_dir, options, encoder, hparams, tensors, data, state)
    trainer.load_moments(saved)
    lines = read_log(model_dir, state["step"])  # those of later steps are written again
    with atomic_write(os.path.join(model_dir, LOG)) as f:
        f.write("".join(json.dumps(line) + "\n" for line in lines).encode("utf-8"))
    print(f"going on from step {state['step']} of {options['max_iters']}", file=sys.stderr)
    return trainer
