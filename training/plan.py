"""Plan a training run, new or resumed: read and check all input, and make the model, before any file is written.

plan_new() and plan_resumed() return a Plan; prepare_folder() writes the files that training starts from.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys

import numpy as np

from encoder import END_OF_TEXT, Encoder, get_encoder, save_encoder
from training.adamw import AdamW
from training.checkpoint import STATE, State, load_checkpoint
from training.dataset import (
    N_BYTES,
    N_IDS,
    TokenFiles,
    check_length,
    encode_splits,
    open_tokens,
    read_dataset,
    save_tokens,
    train_encoder,
    training_text,
)
from training.fields import known_fields
from training.initialization import gpt2_deviation, initial_tensors
from training.memory import check_training_memory
from training.options import FIXED_OPTIONS, MODEL_OPTIONS, PRESETS, Options
from training.report import LOG, PICTURE, truncate_log
from utils import check_vocabulary, load_encoder_hparams_and_params, load_gpt2_encoder
from weights.download import size_of
from weights.errors import CorruptFile, UserError
from weights.files import atomic_write, remove_leftovers
from weights.names import count_params, flatten, load_hparams, read_hparams, tensor_shapes
from weights.resources import check_space
from weights.safetensors_file import WEIGHTS, load_params, save_params

SOME_TOKENS = 100_000  # of token files, decoded to find the characters per token
# Files of a model that is replaced; encoder.json, for example, would be read in place of the new vocab.json.
STALE = (STATE, LOG, PICTURE, WEIGHTS, "config.json", "encoder.json", "vocab.bpe", "tokenizer.json")


@dataclasses.dataclass
class Plan:
    """Everything that a training run needs."""

    model_dir: str
    options: Options
    state: State
    encoder: Encoder
    hparams: dict[str, int]
    optimizer: AdamW  # its tensors are the model's parameters
    data: dict[str, np.ndarray]  # token ids by split, "train" and "val"

    def describe(self):
        """Return one line with the sizes of the model, the data and the run."""
        options, hparams, tokens = self.options, self.hparams, self.state.tokens
        shape = ", ".join(f"{name} {value}" for name, value in hparams.items())
        epochs = options.max_iters * options.tokens_per_step / tokens["train"]
        return (
            f"{count_params(**hparams) / 1e6:.2f} M parameters ({shape}); {tokens['train']} tokens for "
            f"training, {tokens['val']} for validation; {options.max_iters} steps of {options.tokens_per_step} tokens: "
            f"{epochs:.1f} epochs"
        )


def new_optimizer(tensors, options):
    return AdamW(tensors, beta1=options.beta1, beta2=options.beta2, weight_decay=options.weight_decay)


# A new run


def plan_new(model_dir, options, given):
    """Return the Plan of a new model, from scratch or fine-tuned.

    options: those of new_options(given). given: dict of the options on the command line.
    Raises UserError for a mistake in the options, the data set or the pretrained model.
    """
    text = read_dataset(options.dataset, options.data_dir) if options.train_bin is None else None
    if options.init_from == "scratch":
        encoder = new_encoder(options, text)
        hparams = {"n_vocab": len(encoder.encoder), "n_ctx": options.block_size}
        hparams |= {"n_embd": options.n_embd, "n_head": options.n_head, "n_layer": options.n_layer}
    else:
        encoder, hparams, params = load_encoder_hparams_and_params(options.init_from, options.models_dir)
        if "block_size" not in given:
            options = dataclasses.replace(options, block_size=min(options.block_size, hparams["n_ctx"]))
        check_fine_tuning(options, encoder, hparams)
    data, val_chars_per_token = new_data(text, encoder, hparams, options)
    freed = sum(size_of(os.path.join(model_dir, name)) for name in STALE)
    # training.safetensors (3 arrays per parameter), its successor until it replaces it (3), model.safetensors (1)
    check_space(model_dir, 7 * 4 * count_params(**hparams) - freed)
    check_training_memory(options, hparams)
    if options.init_from == "scratch":
        tensors = initial_tensors(tensor_shapes(**hparams), options.seed, gpt2_deviation(options.n_layer))
    else:
        tensors = {name: np.array(tensor) for name, tensor in flatten(params, hparams).items()}  # writable copies
    n_tokens = {split: len(ids) for split, ids in data.items()}
    state = State(tokens=n_tokens, val_chars_per_token=val_chars_per_token)
    return Plan(model_dir, options, state, encoder, hparams, new_optimizer(tensors, options), data)


def new_options(given):
    """Return the Options: those given, the preset's for the others. Raises UserError if they contradict each other."""
    if "train_bin" in given or "val_bin" in given:
        check_token_files(given)
    elif "dataset" not in given:
        raise UserError("--dataset is missing: give the path of a text file, or tinyshakespeare")
    fine_tunes = given.get("init_from", "scratch") != "scratch"
    preset = given.get("preset", "finetune" if fine_tunes else "3min")
    if fine_tunes != (preset == "finetune"):
        raise UserError(
            f"--preset {preset} is for new models; leave it out"
            if fine_tunes
            else f"--preset {preset} needs --init_from MODEL; add it, or leave --preset out"
        )
    if fine_tunes and (extra := [name for name in MODEL_OPTIONS if name in given]):
        raise UserError(f"--{extra[0]} is determined by {given['init_from']}; leave it out")
    tokens = {"tokenizer": "gpt2", "vocab_size": None} if "train_bin" in given and not fine_tunes else {}
    options = Options(**known_fields(Options, PRESETS[preset] | tokens | given))
    if "vocab_size" in given and options.tokenizer != "bpe":
        raise UserError(
            f"--vocab_size is for --tokenizer bpe; the vocabulary of {options.tokenizer} is fixed, so leave it out"
        )
    if not fine_tunes and options.n_embd % options.n_head:
        nearest = options.n_head * max(1, round(options.n_embd / options.n_head))
        raise UserError(
            f"--n_embd {options.n_embd} is not a multiple of --n_head {options.n_head}; --n_embd {nearest} is"
        )
    return options


def check_token_files(given):
    """Raise UserError unless the options for token files are complete and suit the others."""
    missing = [name for name in ("train_bin", "val_bin") if name not in given]
    if missing:
        raise UserError(f"--{missing[0]} is missing: --train_bin and --val_bin give the tokens of both splits")
    excluded = [name for name in ("dataset", "layout", "vocab_size") if name in given]
    excluded += ["tokenizer"] * (given.get("tokenizer", "gpt2") != "gpt2")
    if excluded:
        raise UserError(f"--{excluded[0]} does not work with --train_bin, which has tokens of GPT-2; leave it out")


def new_encoder(options, text):
    """Return the tokenizer of a new model."""
    if options.tokenizer == "gpt2":
        return load_gpt2_encoder(options.models_dir)
    end_of_text = options.layout == "sections"
    vocab_size = N_BYTES + end_of_text if options.tokenizer == "bytes" else options.vocab_size
    return train_encoder(training_text(text, options.layout), vocab_size, end_of_text)


def check_fine_tuning(options, encoder, hparams):
    model, block_size, n_ctx = options.init_from, options.block_size, hparams["n_ctx"]
    if block_size > n_ctx:
        raise UserError(f"--block_size {block_size} exceeds the context of {n_ctx} of {model}; set at most {n_ctx}")
    if hparams["n_vocab"] > N_IDS:
        raise UserError(f"{model} has {hparams['n_vocab']} tokens; token ids are saved as uint16, at most {N_IDS}")
    if options.layout == "sections" and END_OF_TEXT not in encoder.encoder:
        raise UserError(f"the vocabulary of {model} has no {END_OF_TEXT} to put before sections; use --layout plain")


def new_data(text, encoder, hparams, options):
    """Return the token ids by split, as uint16 arrays, and the number of characters per token for validation.

    text: that of the dataset; None with token files.
    """
    if options.train_bin is not None:
        data = open_token_files(options, hparams["n_vocab"])
        check_length(len(data["train"]), len(data["val"]), options.block_size)
        some = data["val"][:SOME_TOKENS]
        return data, len(encoder.decode(some.tolist())) / len(some)
    train_ids, val_ids, val_chars = encode_splits(text, encoder, options.layout)
    check_length(len(train_ids), len(val_ids), options.block_size)
    data = {"train": np.array(train_ids, np.uint16), "val": np.array(val_ids, np.uint16)}
    return data, val_chars / len(val_ids)


def open_token_files(options, n_vocab):
    return {"train": TokenFiles(options.train_bin, n_vocab), "val": TokenFiles(options.val_bin, n_vocab)}


# A resumed run


def plan_resumed(model_dir, given):
    """Return the Plan of a run that continues from its last save. given: dict of the options on the command line.

    Raises UserError for options that cannot change, CorruptFile for a damaged file.
    """
    if "preset" in given:
        raise UserError(f"--preset is for new models; leave it out, {model_dir} keeps its options")
    hparams = load_hparams(model_dir)
    options, state, tensors = load_checkpoint(model_dir, hparams)
    for name in FIXED_OPTIONS:
        before = getattr(options, name)
        if given.get(name, before) != before:
            raise UserError(
                f"--{name} {given[name]} differs from the {before} that {model_dir} is trained with; leave it out, or "
                "start another --name"
            )
    options = dataclasses.replace(options, **known_fields(Options, given))
    if options.max_iters < state.step:
        raise UserError(f"{model_dir} is at step {state.step} already; --max_iters must be at least that")
    check_training_memory(options, hparams)
    check_length(state.tokens["train"], state.tokens["val"], options.block_size)
    if read_or_none(load_params, os.path.join(model_dir, WEIGHTS), hparams) is None:
        state.best_loss, state.best_step, state.evaluated_step = math.inf, -1, -1  # the next evaluation writes it
    optimizer = new_optimizer({name: np.array(tensor) for name, tensor in tensors["w"].items()}, options)
    optimizer.load_moments(tensors["m"], tensors["v"], state.step)
    encoder = get_encoder(given["name"], given["models_dir"])
    check_vocabulary(encoder, hparams, model_dir)
    if options.init_from == "scratch" and len(encoder.encoder) != hparams["n_vocab"]:
        raise UserError(
            f"{model_dir}: the vocabulary has {len(encoder.encoder)} tokens, but the model has {hparams['n_vocab']}; "
            "put the right vocabulary there"
        )
    return Plan(model_dir, options, state, encoder, hparams, optimizer, open_data(model_dir, options, hparams, state))


def open_data(model_dir, options, hparams, state):
    """Return the token ids by split, from the files that the model is trained on; CorruptFile if they have changed."""
    if options.train_bin is not None:
        data = open_token_files(options, hparams["n_vocab"])
        for split, tokens in data.items():
            if len(tokens) != state.tokens[split]:
                raise CorruptFile(tokens.pattern, f"{len(tokens)} tokens, {state.tokens[split]} when the run began")
        return data
    paths = {split: os.path.join(model_dir, f"{split}.bin") for split in ("train", "val")}
    return {split: open_tokens(path, hparams["n_vocab"], state.tokens[split]) for split, path in paths.items()}


# Writing


def prepare_folder(plan):
    """Write the files that stay the same during training, after removing those of a model that is replaced.

    plan.data is then read from these files. For a resumed run, drop the lines of the log after its last save. The
    caller holds the lock of the folder.
    """
    os.makedirs(plan.model_dir, exist_ok=True)
    remove_leftovers(plan.model_dir)
    if plan.state.saved_step >= 0:
        restore_config(plan)
        return truncate_log(plan.model_dir, plan.state.step)
    for name in STALE:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(plan.model_dir, name))
    with atomic_write(os.path.join(plan.model_dir, "hparams.json")) as f:
        f.write(json.dumps(plan.hparams).encode("utf-8"))
    save_encoder(plan.encoder, plan.model_dir)
    if plan.options.train_bin is None:
        for split, ids in plan.data.items():
            save_tokens(os.path.join(plan.model_dir, f"{split}.bin"), ids)
        plan.data = open_data(plan.model_dir, plan.options, plan.hparams, plan.state)


def restore_config(plan):
    """Write config.json again if it is damaged, unless the next evaluation writes it with model.safetensors."""
    config, weights = (os.path.join(plan.model_dir, name) for name in ("config.json", WEIGHTS))
    found = read_or_none(read_hparams, config)
    if found not in (None, plan.hparams):
        raise UserError(f"{config} and hparams.json differ; correct the wrong one")
    if found is None and plan.state.best_step >= 0:
        params = load_params(weights, plan.hparams)
        save_params(plan.model_dir, params, plan.hparams, plan.encoder.encoder.get(END_OF_TEXT))


def read_or_none(read, path, *arguments):
    """Return read(path, *arguments), or None, after a message, if the file is missing or damaged."""
    try:
        return read(path, *arguments)
    except FileNotFoundError:
        reason = f"{path} is missing"
    except UserError as error:
        reason = str(error).partition(";")[0]
    print(f"{reason}; it is written again", file=sys.stderr)
