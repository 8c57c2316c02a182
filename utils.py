"""OpenAI's GPT-2: download the release, import it once through TensorFlow, then memory-map it at every start.

A model is a folder under models_dir. Two layouts are read, and one is made from the other:
    OpenAI's        hparams.json  encoder.json  vocab.bpe   checkpoint  model.ckpt.{index,meta,data-00000-of-00001}
    Hugging Face's  config.json   vocab.json    merges.txt  model.safetensors
The import writes model.safetensors and config.json, so that transformers load the folder too.
"""

import contextlib
import math
import os
import re
import sys
import urllib.parse

from encoder import END_OF_TEXT, LAYOUTS, get_encoder
from weights.download import check_space, download_file, size_of
from weights.errors import CorruptFile, UserError
from weights.names import load_hparams, tensor_shapes
from weights.safetensors_file import load_params, save_params
from weights.tf_checkpoint import load_gpt2_params_from_tf_ckpt

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA_FILE = "model.ckpt.data-00000-of-00001"
SMALL_FILES = ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint", "model.ckpt.index", "model.ckpt.meta")
N_PARAMS = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
RELEASED = {  # bytes and sha256 of what OpenAI serves, where they have been published
    "124M": {
        "checkpoint": (77, "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb"),
        "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        "hparams.json": (90, "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318"),
        "model.ckpt.index": (5_215, "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"),
        "model.ckpt.meta": (471_155, "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b"),
        "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        DATA_FILE: (497_759_232, "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"),
    },
    "355M": {
        "checkpoint": (77, None),
        "encoder.json": (1_042_301, None),
        "hparams.json": (91, None),
        "model.ckpt.index": (10_399, None),
        "model.ckpt.meta": (926_519, None),
        "vocab.bpe": (456_318, None),
        DATA_FILE: (1_419_292_672, None),
    },
}


def load_encoder_hparams_and_params(model_size, models_dir):
    """The tokenizer, the hyperparameters and the weights of the model in models_dir/model_size.

    hparams: dict of n_vocab, n_ctx, n_embd, n_head, n_layer. params: the nested dict that gpt2() takes, read-only
    float32 views of the memory-mapped model.safetensors. What is missing is downloaded and imported first.
    Raises UserError with the remedy; a file found corrupt is set aside where the next run can fetch or make it again.
    """
    model_dir = find_model_dir(model_size, models_dir)
    try:
        if missing_files(model_dir) or not os.path.exists(os.path.join(model_dir, "model.safetensors")):
            prepare_model(model_size, models_dir)
        encoder, hparams = get_encoder(model_size, models_dir), load_hparams(model_dir)
        if max(encoder.decoder, default=0) >= hparams["n_vocab"]:
            raise UserError(
                f"{model_dir}: the vocabulary has ids up to {max(encoder.decoder)}, the model n_vocab = "
                f"{hparams['n_vocab']}; they are not of the same model, so put the right vocabulary there"
            )
        return encoder, hparams, load_params(os.path.join(model_dir, "model.safetensors"), hparams)
    except CorruptFile as error:
        made_here = error.path.endswith("model.safetensors") and checkpoint_prefix(model_dir)
        if not (made_here or is_downloadable(model_size)):
            raise
        try:
            os.replace(error.path, error.path + ".corrupt")
        except OSError:
            raise error from None
        raise UserError(
            f"{error.path} is corrupt ({error.reason}); it is set aside under {os.path.basename(error.path)}.corrupt: "
            "run the same command again to get it anew"
        ) from None


# Which folder, and what it lacks


def find_model_dir(model_size, models_dir):
    """The path of the model's folder; raises UserError when it would lie outside models_dir or cannot be had."""
    parts = re.split(r"[/\\]", model_size)
    if {"", ".", ".."} & set(parts) or re.search(r"[\x00-\x1f\x7f:]", model_size):
        raise UserError(f"model_size {model_size!r} does not name a folder under {models_dir}; try 124M")
    model_dir = os.path.join(models_dir, *parts)
    if not os.path.isdir(model_dir) and not is_downloadable(model_size):
        local = sorted(set(os.listdir(models_dir)) - set(N_PARAMS)) if os.path.isdir(models_dir) else []
        folders = [name for name in local if os.path.isdir(os.path.join(models_dir, name))]
        raise UserError(f"unknown model size {model_size!r}; choose from {', '.join([*N_PARAMS, *folders])}")
    return model_dir


def is_downloadable(model_size):
    return model_size in N_PARAMS or bool(os.environ.get("GPT2_BASE_URL"))


def checkpoint_prefix(model_dir):
    """The path TensorFlow knows the folder's checkpoint by, such as models/124M/model.ckpt; None if it is not whole."""
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(model_dir, "checkpoint"), encoding="utf-8") as f:
            named = re.search(r'^model_checkpoint_path: *"(.+)"', f.read(), re.MULTILINE)
        prefix = os.path.join(model_dir, os.path.basename(named[1])) if named else None
        if prefix and all(os.path.exists(prefix + end) for end in (".index", ".data-00000-of-00001")):
            return prefix
    return None


def missing_files(model_dir):
    """Names of the files of OpenAI's layout that the folder lacks and that no file of the other layout stands for."""

    def has(*names):
        return all(os.path.exists(os.path.join(model_dir, name)) for name in names)

    needed = []
    if not has("config.json"):
        needed += ["hparams.json"]
    if not any(has(*names) for names in LAYOUTS):
        needed += LAYOUTS[0]
    if not has("model.safetensors") and not checkpoint_prefix(model_dir):
        needed += ["checkpoint", "model.ckpt.index", "model.ckpt.meta", DATA_FILE]
    return [name for name in needed if not has(name)]


def prepare_model(model_size, models_dir):
    """Downloads what the folder lacks and imports the checkpoint, one process at a time."""
    from filelock import FileLock, Timeout

    model_dir = find_model_dir(model_size, models_dir)
    if (missing := missing_files(model_dir)) and not is_downloadable(model_size):
        raise UserError(
            f"{model_dir} lacks {', '.join(missing)}; put them there, or Hugging Face's files in their place "
            "(model.safetensors in one piece, config.json, vocab.json and merges.txt or tokenizer.json)"
        )
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
        if missing_files(model_dir):
            download_gpt2_files(model_size, model_dir)
        if not os.path.exists(os.path.join(model_dir, "model.safetensors")):
            import_checkpoint(model_size, models_dir)
    finally:
        with contextlib.suppress(OSError):
            os.removedirs(model_dir)  # only if nothing came
        lock.release()


def download_gpt2_files(model_size, model_dir):
    """Fetches what model_dir lacks of OpenAI's release (or of GPT2_BASE_URL's), each file whole or not at all.

    Raises UserError when a file cannot be had or is not the one OpenAI published.
    """
    say(f"downloading {model_size} from {base_url()} to {model_dir}")
    missing = missing_files(model_dir)
    if DATA_FILE in missing:
        path = os.path.join(model_dir, DATA_FILE)
        check_space(path, 2 * 4 * N_PARAMS.get(model_size, 0) - size_of(path + ".part"))  # twice: the imported copy
    for name in missing:
        fetch_released(model_size, model_dir, name)


def base_url():
    return (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")


def fetch_released(model_size, model_dir, name):
    size, sha256 = RELEASED.get(model_size, {}).get(name, (None, None))
    download_file(f"{base_url()}/{urllib.parse.quote(model_size)}/{name}", os.path.join(model_dir, name), size, sha256)


def load_gpt2_encoder(models_dir):
    """GPT-2's own tokenizer: that of models_dir/124M, into which its two files are downloaded if it is not there."""
    model_dir = find_model_dir("124M", models_dir)
    if missing := [name for name in missing_files(model_dir) if name in LAYOUTS[0]]:
        os.makedirs(model_dir, exist_ok=True)
        for name in missing:
            fetch_released("124M", model_dir, name)
    return get_encoder("124M", models_dir)


def import_checkpoint(model_size, models_dir):
    """Writes model.safetensors and config.json from the folder's TensorFlow checkpoint."""
    model_dir = find_model_dir(model_size, models_dir)
    say(f"importing {model_dir} through TensorFlow, once")
    prefix = checkpoint_prefix(model_dir)
    if not prefix:
        raise CorruptFile(os.path.join(model_dir, "checkpoint"), "it names no checkpoint that is there")
    hparams, end_of_text = load_hparams(model_dir), get_encoder(model_size, models_dir).encoder.get(END_OF_TEXT)
    n_bytes = sum(4 * math.prod(shape) for shape in tensor_shapes(**hparams).values())
    check_space(os.path.join(model_dir, "model.safetensors"), n_bytes)
    save_params(model_dir, load_gpt2_params_from_tf_ckpt(prefix, hparams), hparams, end_of_text)


def say(message):
    print(message, file=sys.stderr, flush=True)
