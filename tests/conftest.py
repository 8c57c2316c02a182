import pathlib
import signal

import pytest

from tests.random_model import (
    DATA,  # noqa: F401
    copy_vocabulary,
    random_tensors,
    write_hparams,
    write_safetensors,
    write_tf_checkpoint,
    write_vocabulary,
)
from utils import load_encoder_hparams_and_params

ROOT = pathlib.Path(__file__).parent.parent
# n_embd is no multiple of 16: tensors that do not fill cache lines; every dimension differs from every other
TINY = {"n_vocab": 400, "n_ctx": 128, "n_embd": 36, "n_head": 3, "n_layer": 2}
PROMPTS = [
    "Alan Turing theorized that computers would one day become",
    "",
    "a",
    "The answer to life, the universe, and everything is",
    "def softmax(x):\n    return np.exp(x)",
    "Ondřej Čertík was born in",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,",
    "   spaces   and\ttabs\n\n",
    "你好，世界 🤗",
    "In 1942, the first reactor went critical under the stands of a football field in Chicago.",
    "<|endoftext|> as ordinary text",
    "Dear Sir or Madam,",
]


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    """No test downloads anything but from the server it starts itself."""
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9/nothing-listens-here")


@pytest.fixture(autouse=True)
def ctrl_c():
    """A program that was interrupted ignores the next Ctrl-C; tests go on."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def vocabulary_dir(tmp_path_factory):
    """encoder.json and vocab.bpe of 400 tokens, learned from this project's own license and source."""
    path = tmp_path_factory.mktemp("vocabulary")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "gpt2.py", "encoder.py"))
    write_vocabulary(path, text, TINY["n_vocab"])
    return path


@pytest.fixture(scope="session")
def tiny_tensors():
    return random_tensors(TINY)


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory, vocabulary_dir, tiny_tensors):
    """A folder with the seven files of a release in OpenAI's layout, of a tiny model with random weights."""
    path = tmp_path_factory.mktemp("release") / "tiny"
    path.mkdir()
    copy_vocabulary(path, vocabulary_dir)
    write_hparams(path, TINY)
    write_tf_checkpoint(path, tiny_tensors)
    return path


@pytest.fixture(scope="session")
def tiny_models_dir(tmp_path_factory, vocabulary_dir, tiny_tensors):
    """A models_dir whose folder "tiny" is as the import leaves it, less the checkpoint: nothing needs TensorFlow."""
    path = tmp_path_factory.mktemp("models")
    (path / "tiny").mkdir()
    copy_vocabulary(path / "tiny", vocabulary_dir)
    write_safetensors(path / "tiny", TINY, tiny_tensors)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_models_dir):
    """(encoder, hparams, params) of the tiny model."""
    return load_encoder_hparams_and_params("tiny", str(tiny_models_dir))


def need(path):
    """The path, or a skipped test that says what is not here."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path
