"""Load a GPT-2 by name: download and import OpenAI's release the first time, memory-map the result every time.

A model is a folder under models_dir, in either of two layouts:
    OpenAI's        hparams.json  encoder.json  vocab.bpe   checkpoint  model.ckpt.{index,meta,data-00000-of-00001}
    Hugging Face's  config.json   vocab.json    merges.txt (or tokenizer.json)   model.safetensors
Importing OpenAI's checkpoint writes model.safetensors and config.json next to it; transformers load such a folder too.
"""

import contextlib
import functools
import os
import re
import sys

from encoder import END_OF_TEXT, LAYOUTS, get_encoder, read_merges, read_vocabulary
from engines.allocator import keep_freed_memory
from weights.download import size_of
from weights.errors import CorruptFile, Mismatch, UserError, printable
from weights.files import remove_leftovers, set_aside
from weights.lock import hold_lock, new_folder
from weights.names import count_params, load_hparams, read_hparams
from weights.releases import CHECKPOINT_FILES, DATA_FILE, HPARAMS, N_PARAMS, base_url, fetch_released, is_downloadable
from weights.resources import check_space
from weights.safetensors_file import WEIGHTS, load_params, save_params
from weights.tf_checkpoint import checkpoint_prefix, load_gpt2_params_from_tf_ckpt, read_index, read_prefix


def load_encoder_hparams_and_params(model_size, models_dir):
    """Return the tokenizer, the hyperparameters and the parameters of the model in models_dir/model_size.

    hparams is a dict of n_vocab, n_ctx, n_embd, n_head and n_layer. params is the nested dict that gpt2() takes; its
    arrays are read-only float32 views of the memory-mapped model.safetensors. Files that the folder lacks are
    downloaded or imported first. Raises UserError for a file that is missing, corrupt or of another model.
    """
    model_dir = find_model_dir(model_size, models_dir)

    def load():
        prepare_model(model_size, model_dir, models_dir)
        encoder, hparams = get_encoder(model_size, models_dir), load_hparams(model_dir)
        check_vocabulary(encoder, hparams, model_dir)
        return encoder, hparams, load_params(os.path.join(model_dir, WEIGHTS), hparams)

    loaded = load_and_repair(load, model_size, models_dir, model_dir)
    keep_freed_memory()
    return loaded


def load_gpt2_encoder(models_dir):
    """Return GPT-2's own tokenizer, that of models_dir/124M; its files are downloaded if they are missing."""
    model_dir = find_model_dir("124M", models_dir)

    def missing():
        return [name for name in missing_files(model_dir) if name in LAYOUTS[0]]

    def load():
        if missing():
            with locked_folder(model_dir, models_dir):
                download_files("124M", model_dir, missing())
        return get_encoder("124M", models_dir)

    return load_and_repair(load, "124M", models_dir, model_dir)


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
        if not os.path.isdir(models_dir):
            raise UserError(f"no model {model_size!r} in {models_dir}, which is not a folder; correct --models_dir")
        local = sorted(set(os.listdir(models_dir)) - set(N_PARAMS))
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
    if not has(WEIGHTS):
        needed += missing_checkpoint(model_dir)
    return [name for name in needed if not has(name)]


def missing_checkpoint(model_dir):
    """Return the files of OpenAI's checkpoint that are missing, unless there is a checkpoint of another name."""
    if checkpoint_prefix(model_dir):
        return []
    return [name for name in CHECKPOINT_FILES if not os.path.exists(os.path.join(model_dir, name))]


def check_vocabulary(encoder, hparams, model_dir):
    """Raise Mismatch if the vocabulary has ids that the model does not have."""
    largest = max(encoder.decoder, default=0)
    if largest >= hparams["n_vocab"]:
        raise Mismatch(
            os.path.join(model_dir, "hparams.json"),
            f"{model_dir}: the vocabulary has ids up to {largest}, but the model has n_vocab = {hparams['n_vocab']}",
            "they belong to different models: put the right vocabulary there",
        )


# Corrupt files


def check_file(model_size, name, path):
    """Raise CorruptFile if the file in path cannot be the file `name` of the model."""
    if name == "encoder.json":
        read_vocabulary(path)
    elif name == "vocab.bpe":
        read_merges(path, with_version=True)
    elif name == "model.ckpt.index":
        read_index(path)
    elif name == "hparams.json":
        found = read_hparams(path)
        if HPARAMS.get(model_size, found) != found:
            raise CorruptFile(path, f"not the hyperparameters of {model_size}")
    elif name == "checkpoint" and read_prefix(path) != "model.ckpt":
        raise CorruptFile(path, "it does not name model.ckpt")


def load_and_repair(load, model_size, models_dir, model_dir):
    """Return load(). If it finds a corrupt file that can be downloaded or imported again, replace that and load again.

    The corrupt file is kept as *.corrupt when its replacement has arrived. Raises CorruptFile for a file of the user's
    own, and if the second call finds a corrupt file, too.
    """
    try:
        return load()
    except CorruptFile as error:
        names, path, fault = suspects(error, model_size, model_dir), error.path, error.fault
        if not names:
            raise
        identity = inode(path)
    with locked_folder(model_dir, models_dir):
        if inode(path) == identity:  # no other process has replaced it
            say(f"{fault}; replacing {', '.join(names)}")
            is_imported = names == [WEIGHTS]
            download_files(model_size, model_dir, missing_checkpoint(model_dir) if is_imported else names)
            if is_imported:
                set_aside(path)  # load() imports it again
    return load()


def inode(path):
    """Return the number that identifies a file on its disk, None if there is no such file."""
    return os.stat(path).st_ino if os.path.exists(path) else None


def suspects(error, model_size, model_dir):
    """Return the names of the files that may have caused a CorruptFile, if they can be downloaded or imported again.

    A folder with a vocabulary in Hugging Face's layout was not downloaded: the user put or trained it there.
    """
    name, vocabulary = os.path.basename(error.path), LAYOUTS[0]
    has_own = any(os.path.exists(os.path.join(model_dir, other)) for layout in LAYOUTS[1:] for other in layout)
    is_downloaded = is_downloadable(model_size) and not has_own
    if name == WEIGHTS:
        can_replace = (is_downloaded or checkpoint_prefix(model_dir)) and not isinstance(error, Mismatch)
        return [WEIGHTS] if can_replace else []
    if not is_downloaded:
        return []
    try:
        check_file(model_size, name, error.path)
    except UserError:
        return [name]
    # The file is valid, but does not match others; any of them may be wrong, the largest only if it is this one.
    if name in vocabulary:
        return [*vocabulary]
    if name == "hparams.json":
        return [name, *vocabulary]
    return ["hparams.json", *(other for other in CHECKPOINT_FILES if other != DATA_FILE or other == name)]


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
        download_files(model_size, model_dir, missing_files(model_dir))
        if not os.path.exists(weights):
            import_checkpoint(model_size, model_dir, models_dir)


@contextlib.contextmanager
def locked_folder(model_dir, models_dir):
    """Hold the inter-process lock of models_dir; create model_dir if necessary, and remove it if it stays empty."""
    path, another = os.path.join(models_dir, ".lock"), "choose another --models_dir"
    waiting = f"waiting for another process that is preparing a model in {models_dir}"
    with hold_lock(path, lambda: say(waiting), another), new_folder(model_dir):
        remove_leftovers(model_dir)
        yield


def download_files(model_size, model_dir, names):
    """Download these files of a model; raise UserError if one is not available or not the published one."""
    if names:
        say(f"downloading {model_size} from {base_url()} to {model_dir}")
    if DATA_FILE in names:
        path = os.path.join(model_dir, DATA_FILE)
        check_space(path, 2 * 4 * N_PARAMS.get(model_size, 0) - size_of(path + ".part"))  # also for its import
    for name in names:
        fetch_released(model_size, model_dir, name, functools.partial(check_file, model_size, name))


def import_checkpoint(model_size, model_dir, models_dir):
    """Write model.safetensors and config.json from the TensorFlow checkpoint in the model's folder."""
    say(f"importing the checkpoint in {model_dir}, once")
    prefix = checkpoint_prefix(model_dir)
    if not prefix:
        raise CorruptFile(os.path.join(model_dir, "checkpoint"), "it names no checkpoint in this folder")
    encoder, hparams = get_encoder(model_size, models_dir), load_hparams(model_dir)
    check_vocabulary(encoder, hparams, model_dir)
    params = load_gpt2_params_from_tf_ckpt(prefix, hparams)
    check_space(os.path.join(model_dir, WEIGHTS), 4 * count_params(**hparams))
    save_params(model_dir, params, hparams, encoder.encoder.get(END_OF_TEXT))


def say(message):
    print(printable(message).replace("\n", " "), file=sys.stderr, flush=True)
