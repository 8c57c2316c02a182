"""training.safetensors: everything that --resume needs, in one file.

The tensors are the parameters ("w/" before the checkpoint name) and AdamW's moments ("m/", "v/"); the metadata are the
state and the options as JSON. No state of a random generator is saved: the random numbers of a step depend only on the
seed, the number of the step and, for dropout, the number of threads.
"""

import json
import math
import os
from dataclasses import asdict, dataclass

from training.options import Options, known_fields
from weights.errors import CorruptFile
from weights.names import tensor_shapes
from weights.safetensors_file import load_safetensors, save_safetensors

STATE = "training.safetensors"


@dataclass(kw_only=True)
class State:
    """The progress of a training run, and the sizes of its data."""

    tokens: dict[str, int]  # number of tokens by split, "train" and "val"
    val_chars_per_token: float  # characters per token of the validation text
    step: int = 0  # updates made so far
    evaluated_step: int = -1  # step of the last evaluation, -1: none
    saved_step: int = -1  # step of the last save, -1: none
    seconds: float = 0.0  # time spent in all runs together until the last save, evaluations included
    best_loss: float = math.inf  # lowest validation loss, in nats per token
    best_step: int = -1  # its step


def save_checkpoint(model_dir, options, state, optimizer):
    """Write training.safetensors. Raises UserError if that fails; the previous file is then kept."""
    parts = {"w": optimizer.tensors, "m": optimizer.m, "v": optimizer.v}
    tensors = {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
    metadata = {"state": json.dumps(asdict(state)), "options": json.dumps(asdict(options))}
    save_safetensors(os.path.join(model_dir, STATE), tensors, metadata)


def load_checkpoint(model_dir, hparams):
    """Return the Options, the State, and the tensors by part ("w", "m", "v") and checkpoint name.

    Raises CorruptFile for a damaged file, and if its tensors do not have the shapes that hparams require.
    """
    path, shapes = os.path.join(model_dir, STATE), tensor_shapes(**hparams)
    tensors, metadata = load_safetensors(path)
    try:
        options = Options(**known_fields(Options, json.loads(metadata["options"])))
        state = State(**known_fields(State, json.loads(metadata["state"])))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise CorruptFile(path, "no state of a training run in it") from None
    expected = {f"{part}/{name}": shape for part in "wmv" for name, shape in shapes.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise CorruptFile(path, "its tensors do not match hparams.json")
    return options, state, {part: {name: tensors[f"{part}/{name}"] for name in shapes} for part in "wmv"}
