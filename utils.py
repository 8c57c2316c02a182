"""Load a GPT-2 by name: download and import OpenAI's release the first time, memory-map the result every time.

A model is a folder under models_dir, in either of two layouts:
    OpenAI's        hparams.json  encoder.json  vocab.bpe   checkpoint  model.ckpt.{index,meta,data-00000-of-00001}
    Hugging Face's  config.json   vocab.json    merges.txt (or tokenizer.json)   model.safetensors
Importing OpenAI's checkpoint writes model.safetensors and config.json next to it; transformers load such a folder too.
"""

import contextlib
import os
import re
import sys

from encoder import END_OF_TEXT, LAYOUTS, get_encoder
from engines.allocator import keep_freed_memory
from weights.download import size_of
from weights.errors import CorruptFile, UserError
from weights.names import load_hparams, n_params, tensor_shapes
from weights.releases import CHECKPOINT_FILES, DATA_FILE, N_PARAMS, base_url, fetch_released, is_downloadable
from weights.resources import check_space
from weights.safetensors_file import WEIGHTS, load_params, save_params
from weights.tf_checkpoint import checkpoint_prefix, load_gpt2_params_from_tf_ckpt


def load_encoder_hparams_and_params(model_size, models_dir):
    """Return the tokenizer, the hyperparameters and the parameters of the model in models_dir/model_size.

    hparams is a dict of n_vocab, n_ctx, n_embd, n_head and n_layer. params is the nested dict that gpt2() takes; its
    arrays are read-only float32 views of the memory-mapped model.safetensors. Files that the folder lacks are
    downloaded or imported first. Raises UserError for a file that is missing, corrupt or of another model.
    """
    model_dir = find_model_dir(model_size, models_dir)
    with quarantine(model_size, model_dir):
        prepare_model(model_size, model_dir, models_dir)
        encoder, hparams = get_encoder(model_size, models_dir), load_hparams(model_dir)
        check_vocabulary(encoder, hparams, model_dir)
        params = load_params(os.path.join(model_dir, WEIGHTS), hparams)
    keep_freed_memory()
    return encoder, hparams, params


def load_gpt2_encoder(models_dir):
    """Return GPT-2's own tokenizer, that of models_dir/124M; its files are downloaded if they are missing."""
    model_dir = find_model_dir("124M", models_dir)
    if missing := [name for name in missing_files(model_dir) if name in LAYOUTS[0]]:
        os.makedirs(model_dir, exist_ok=True)
        for name in missing:
            fetch_released("124M", model_dir, name)
    return get_encoder("124M", models_dir)


# Checks


def find_model_dir(model_size, models_dir):
    """Return the path of the model's folder.

    Raises UserError for a name that leads out of models_dir, and for one that is neither a folder nor downloadable.
    """
    parts = re.split(r"[/\\]", model_size)
    if {"", ".", ".."} & set(parts) or re.search(r"[\x00-\x1f\x7f:]", model_size):
        raise UserError(f"model_size {model_size!r} does not name a folder under {models_dir}; try 124M")
    model_dir = os.path.join(models_dir, *parts)
    if not os.path.isdir(model_dir) and not is_downloadable(model_size):
        local = sorted(set(os.listdir(models_dir)) - set(N_PARAMS)) if os.path.isdir(models_dir) else []
        folders = [name for name in local if os.path.isdir(os.path.join(models_dir, name))]
        raise UserError(f"unknown model size {model_size!r}; choose from {', '.join([*N_PARAMS, *folders])}")
    return model_dir


def missing_files(model_dir):
    """Return the files of OpenAI's layout that are missing, unless their counterpart in the other layout is there."""

    def has(*names):
        return all(os.path.exists(os.path.join(model_dir, name)) for name in names)

    needed = []
    if not has("config.json"):
        needed += ["hparams.json"]
    if not any(has(*names) for names in LAYOUTS):
        needed += LAYOUTS[0]
    if not has(WEIGHTS) and not checkpoint_prefix(model_dir):
        needed += CHECKPOINT_FILES
    return [name for name in needed if not has(name)]


def check_vocabulary(encoder, hparams, model_dir):
    """Raise UserError if the vocabulary has ids that the model does not have."""
    largest = max(encoder.decoder, default=0)
    if largest >= hparams["n_vocab"]:
        raise UserError(
            f"{model_dir}: the vocabulary has ids up to {largest}, but the model has n_vocab = {hparams['n_vocab']}; "
            "they belong to different models: put the right vocabulary there"
        )


@contextlib.contextmanager
def quarantine(model_size, model_dir):
    """Rename a corrupt file to *.corrupt if the next run can download or import it again."""
    try:
        yield
    except CorruptFile as error:
        is_imported = error.path.endswith(WEIGHTS) and checkpoint_prefix(model_dir)
        if not (is_imported or is_downloadable(model_size)):
            raise
        try:
            os.replace(error.path, error.path + ".corrupt")
        except OSError:
            raise error from None
        raise UserError(
            f"{error.path} is corrupt ({error.reason}); it is set aside under {os.path.basename(error.path)}.corrupt: "
            "run the same command again to replace it"
        ) from None


# The first run


def prepare_model(model_size, model_dir, models_dir):
    """Download the files that the model's folder lacks and import its checkpoint, if this has not been done yet."""
    missing, weights = missing_files(model_dir), os.path.join(model_dir, WEIGHTS)
    if not missing and os.path.exists(weights):
        return
    if missing and not is_downloadable(model_size):
        raise UserError(
            f"{model_dir} lacks {', '.join(missing)}; put them there, or Hugging Face's files in their place "
            "(model.safetensors in one piece, config.json, vocab.json and merges.txt or tokenizer.json)"
        )
    with locked_folder(model_dir, models_dir):
        if missing_files(model_dir):
            download_gpt2_files(model_size, model_dir)
        if not os.path.exists(weights):
            import_checkpoint(model_size, model_dir, models_dir)


@contextlib.contextmanager
def locked_folder(model_dir, models_dir):
    """Create model_dir if necessary and hold the inter-process lock of models_dir."""
    from filelock import FileLock, Timeout

    try:
        os.makedirs(models_dir, exist_ok=True)
        lock = FileLock(os.path.join(models_dir, ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that is preparing a model in {models_dir}")
            lock.acquire()
        os.makedirs(model_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {models_dir} ({error.strerror}); choose another --models_dir") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.removedirs(model_dir)  # if it is still empty
        lock.release()


def download_gpt2_files(model_size, model_dir):
    """Download the files that model_dir lacks; raise UserError if one is not available or not the published one."""
    say(f"downloading {model_size} from {base_url()} to {model_dir}")
    missing = missing_files(model_dir)
    if DATA_FILE in missing:
        path = os.path.join(model_dir, DATA_FILE)
        check_space(path, 2 * 4 * N_PARAMS.get(model_size, 0) - size_of(path + ".part"))  # also for its import
    for name in missing:
        fetch_released(model_size, model_dir, name)


def import_checkpoint(model_size, model_dir, models_dir):
    """Write model.safetensors and config.json from the TensorFlow checkpoint in the model's folder."""
    say(f"importing the checkpoint in {model_dir}, once")
    prefix = checkpoint_prefix(model_dir)
    if not prefix:
        raise CorruptFile(os.path.join(model_dir, "checkpoint"), "it names no checkpoint in this folder")
    hparams, end_of_text = load_hparams(model_dir), get_encoder(model_size, models_dir).encoder.get(END_OF_TEXT)
    check_space(os.path.join(model_dir, WEIGHTS), 4 * n_params(tensor_shapes(**hparams)))
    save_params(model_dir, load_gpt2_params_from_tf_ckpt(prefix, hparams), hparams, end_of_text)


def say(message):
    print(message, file=sys.stderr, flush=True)
