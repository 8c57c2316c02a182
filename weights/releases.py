"""OpenAI's releases of GPT-2: their names, their files, and the address they are downloaded from."""

import os

from weights.download import download_file
from weights.names import count_params

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA_FILE = "model.ckpt.data-00000-of-00001"
CHECKPOINT_FILES = ("checkpoint", "model.ckpt.index", "model.ckpt.meta", DATA_FILE)
HPARAMS = {
    name: {"n_vocab": 50_257, "n_ctx": 1_024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    for name, n_embd, n_head, n_layer in (
        ("124M", 768, 12, 12),
        ("355M", 1_024, 16, 24),
        ("774M", 1_280, 20, 36),
        ("1558M", 1_600, 25, 48),
    )
}
N_PARAMS = {name: count_params(**hparams) for name, hparams in HPARAMS.items()}
# Size in bytes and SHA-256 of the files that OpenAI serves, None where they are unknown. 124M: computed from copies
# (two published values for the data file agree). 355M: the sizes in the tests of "Build a Large Language Model
# (From Scratch)". The vocabulary is the same in all four models; a data file has 4 bytes per parameter.
VOCABULARY = {
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
RELEASED = {name: VOCABULARY | {DATA_FILE: (4 * n, None)} for name, n in N_PARAMS.items()}
RELEASED["124M"] |= {
    "checkpoint": (77, "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb"),
    "hparams.json": (90, "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318"),
    "model.ckpt.index": (5_215, "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"),
    "model.ckpt.meta": (471_155, "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b"),
    DATA_FILE: (497_759_232, "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"),
}
RELEASED["355M"] |= {
    "checkpoint": (77, None),
    "hparams.json": (91, None),
    "model.ckpt.index": (10_399, None),
    "model.ckpt.meta": (926_519, None),
}


def base_url():
    """Return the address of the models: the environment variable GPT2_BASE_URL (a mirror), or OpenAI's."""
    return (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")


def is_downloadable(model_size):
    """Return whether a server may have the model: OpenAI's has those in N_PARAMS, a mirror may have any."""
    return model_size in N_PARAMS or bool(os.environ.get("GPT2_BASE_URL"))


def fetch_released(model_size, model_dir, name, check=None):
    """Download one file of a model into model_dir; raise UserError if it is not the file that OpenAI published.

    check: a function that raises CorruptFile for the path of a file that cannot be this one.
    """
    from urllib.parse import quote

    url, path = f"{base_url()}/{quote(model_size)}/{name}", os.path.join(model_dir, name)
    size, sha256 = RELEASED.get(model_size, {}).get(name, (None, None))
    has_mirror = os.environ.get("GPT2_BASE_URL")
    remedy = "check GPT2_BASE_URL and the model's name" if has_mirror else "set GPT2_BASE_URL to a mirror"
    download_file(url, path, size, sha256, check, remedy=remedy)
