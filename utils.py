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
from weights.errors import CorruptFile, Mismatch, UserError
from weights.files import read_text, remove_leftovers
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

    loaded = load_and_repair(load, model_size, model_dir)
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

    return load_and_repair(load, "124M", model_dir)


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
            raise UserError(f"{models_dir} is not a folder, {model_size!r} cannot be in it; correct --models_dir")
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
    if not has(WEIGHTS) and not checkpoint_prefix(model_dir):
        needed += CHECKPOINT_FILES
    return [name for name in needed if not has(name)]


def check_vocabulary(encoder, hparams, model_dir):
    """Raise Mismatch if the vocabulary has ids that the model does not have."""
    largest = max(encoder.decoder, default=0)
    if largest >= hparams["n_vocab"]:
        raise Mismatch(
            os.path.join(model_dir, LAYOUTS[0][0]),
            f"{model_dir}: the vocabulary has ids up to {largest}, but the model has n_vocab = {hparams['n_vocab']}; "
            "they belong to different models: put the right vocabulary there",
        )


# Corrupt files


def check_file(model_size, name, path):
    """Raise CorruptFile if the file in path cannot be the file `name` of the model."""
    readers = {"encoder.json": read_vocabulary, "vocab.bpe": read_merges, "model.ckpt.index": read_index}
    if name in readers:
        readers[name](path)
    if name == "vocab.bpe" and not read_text(path).startswith("#version"):
        raise CorruptFile(path, "it does not begin with #version")
    if name == "hparams.json" and read_hparams(path) != HPARAMS.get(model_size, read_hparams(path)):
        raise CorruptFile(path, f"not the hyperparameters of {model_size}")
    if name == "checkpoint" and read_prefix(path) != "model.ckpt":
        raise CorruptFile(path, "it does not name model.ckpt")


def load_and_repair(load, model_size, model_dir):
    """Return load(). If it finds a corrupt file that can be downloaded or imported again, replace that and load again.

    The corrupt file is kept as *.corrupt, or stays where it is if the download fails. Raises UserError if the second
    call finds a corrupt file, too, and CorruptFile for a file of the user's own.
    """
    renamed = []
    for is_last in (False, True):
        try:
            return load()
        except CorruptFile as error:
            renamed = set_aside(model_dir, suspects(error, model_size, model_dir))
            if not renamed:
                raise
            fault = str(error).rpartition("; ")[0]  # without the remedy
        except UserError:
            put_back(model_dir, renamed)
            raise
        if is_last:
            kept = ", ".join(f"{name}.corrupt" for name in renamed)
            raise UserError(f"{fault}; kept as {kept}: run the same command again to replace it")
        say(f"{fault}; replacing {', '.join(renamed)}")


def suspects(error, model_size, model_dir):
    """Return the names of the files that may have caused a CorruptFile, if they can be downloaded or imported again.

    A folder with a vocabulary in Hugging Face's layout was not downloaded: the user put or trained it there.
    """
    name, vocabulary = os.path.basename(error.path), LAYOUTS[0]
    others = [other for layout in LAYOUTS[1:] for other in layout if os.path.exists(os.path.join(model_dir, other))]
    is_downloaded = is_downloadable(model_size) and not others
    if name == WEIGHTS:
        can_replace = (is_downloaded or checkpoint_prefix(model_dir)) and not isinstance(error, Mismatch)
        return [WEIGHTS] if can_replace else []
    if not is_downloaded:
        return []
    try:
        check_file(model_size, name, error.path)
    except UserError:
        return [name]
    # the file is valid, but does not match the others; any of them may be the wrong one
    return ["hparams.json", *vocabulary] if name in vocabulary else ["hparams.json", *CHECKPOINT_FILES[:-1], name]


def set_aside(model_dir, names):
    """Rename files to *.corrupt; return the names of those that exist."""
    renamed = []
    for path in [os.path.join(model_dir, name) for name in names]:
        with contextlib.suppress(OSError):
            os.replace(path, path + ".corrupt")
            renamed.append(os.path.basename(path))
    return renamed


def put_back(model_dir, renamed):
    """Undo set_aside() for the files that have not been replaced."""
    for path in [os.path.join(model_dir, name) for name in renamed]:
        if not os.path.exists(path):
            with contextlib.suppress(OSError):
                os.replace(path + ".corrupt", path)


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
    with contextlib.ExitStack() as stack:
        try:
            waiting = f"waiting for another process that is preparing a model in {models_dir}"
            stack.enter_context(hold_lock(os.path.join(models_dir, ".lock"), lambda: say(waiting)))
            stack.enter_context(new_folder(model_dir))
        except OSError as error:
            raise UserError(f"cannot write to {models_dir} ({error.strerror}); choose another --models_dir") from None
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
    print(message, file=sys.stderr, flush=True)
