"""training.safetensors: everything that --resume needs, in one file.

The tensors are the parameters ("w/" before the checkpoint name) and AdamW's moments ("m/", "v/"); the metadata are the
state and the options as JSON. No state of a random generator is saved: the random numbers of a step depend only on the
seed, the number of the step and, for dropout, the number of threads.
"""

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass

import numpy as np

from training.fields import Count, Loss, PositiveRate, Rate, Step, from_json
from training.options import Options
from weights.errors import CorruptFile
from weights.names import count_params, tensor_shapes
from weights.safetensors_file import load_safetensors, save_safetensors

STATE = "training.safetensors"


@dataclass(kw_only=True)
class State:
    """The progress of a training run, and the sizes of its data."""

    tokens: dict[str, Count]  # number of tokens by split, "train" and "val"
    val_chars_per_token: PositiveRate  # characters per token of the validation text
    step: Count = 0  # updates made so far
    evaluated_step: Step = -1  # step of the last evaluation, -1: none
    saved_step: Step = -1  # step of the last save, -1: none
    seconds: Rate = 0.0  # time spent in all runs together until the last save, evaluations included
    best_loss: Loss = math.inf  # lowest validation loss, in nats per token
    best_step: Step = -1  # its step


def save_checkpoint(model_dir, options, state, optimizer):
    """Write training.safetensors. Raises UserError if that fails; the previous file is then kept."""
    parts = {"w": optimizer.tensors, "m": optimizer.m, "v": optimizer.v}
    tensors = {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
    metadata = {"state": json.dumps(asdict(state)), "options": json.dumps(asdict(options))}
    save_safetensors(os.path.join(model_dir, STATE), tensors, metadata)


def load_options(model_dir):
    """Return the Options alone; raise CorruptFile if they cannot be read. load_checkpoint checks the rest."""
    path = os.path.join(model_dir, STATE)
    with errors_of_metadata(path):
        return from_json(Options, json.loads(load_safetensors(path)[1]["options"]))


@contextlib.contextmanager
def errors_of_metadata(path):
    try:
        yield
    except (LookupError, ValueError, RecursionError) as error:
        raise CorruptFile(path, f"no state of this training run: {error}") from None


def load_checkpoint(model_dir, hparams):
    """Return the Options, the State, and the tensors by part ("w", "m", "v") and checkpoint name.

    Raises CorruptFile for a damaged file, and for one of a model with other hparams.
    """
    path, n_bytes = os.path.join(model_dir, STATE), 3 * 4 * count_params(**hparams)
    tensors, metadata = load_safetensors(path)
    with errors_of_metadata(path):
        options = from_json(Options, json.loads(metadata["options"]))
        state = from_json(State, json.loads(metadata["state"]), use_defaults=False)
        state.saved_step = state.step
        check_consistency(options, state, hparams)
    if sum(tensor.nbytes for tensor in tensors.values()) != n_bytes:  # before tensor_shapes of a huge n_layer
        raise CorruptFile(path, f"its tensors do not have the {n_bytes} bytes that match hparams.json")
    shapes = tensor_shapes(**hparams)
    expected = {f"{part}/{name}": shape for part in "wmv" for name, shape in shapes.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise CorruptFile(path, "its tensors do not match hparams.json")
    if infinite := [name for name, tensor in tensors.items() if not np.all(np.isfinite(tensor))]:
        raise CorruptFile(path, f"{infinite[0]} has elements that are infinite or NaN")
    return options, state, {part: {name: tensors[f"{part}/{name}"] for name in shapes} for part in "wmv"}


def check_consistency(options, state, hparams):
    """Raise ValueError if the options and the state contradict each other or hparams.json."""
    for name in ("n_layer", "n_head", "n_embd"):
        if getattr(options, name) not in (None, hparams[name]):
            raise ValueError(f"{name} is {getattr(options, name)}, in hparams.json {hparams[name]}")
    if options.block_size > hparams["n_ctx"]:
        raise ValueError(f"block_size is {options.block_size}, n_ctx in hparams.json {hparams['n_ctx']}")
    if set(state.tokens) != {"train", "val"} or max(state.evaluated_step, state.best_step) > state.step:
        raise ValueError("its numbers of tokens or of steps contradict each other")
