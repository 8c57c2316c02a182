import contextlib
import functools
import io
import pathlib
import shutil
import signal
import sys
import types

import numpy as np
import pytest

import gpt2
from engines import compiled
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
from weights.errors import UserError
from weights.names import flatten

ROOT = pathlib.Path(__file__).parent.parent
# all dimensions differ; heads of 16, so that the compiled kernels run
TINY = {"n_vocab": 400, "n_ctx": 128, "n_embd": 48, "n_head": 3, "n_layer": 2}
N_HEAD = TINY["n_head"]
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
RNG = np.random.default_rng(5)
INPUTS = [RNG.integers(0, TINY["n_vocab"], n).tolist() for n in (7, 1, 30, 2, 100, 13, 1, 64, 5, 9)]
INPUTS.append([3, 1, 4, 1, 5, 9] * 6)
N_NEW = 24  # tokens that the fixture `expected` has for each of INPUTS


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The same for everyone: nothing is downloaded, no setting hides a missing flush or a wrong encoding.

    Ctrl-C interrupts, even if the tests run in the background.
    """
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9/nothing-listens-here")
    for name in ("PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compilation(tmp_path_factory):
    """The tests of JAX and the programs that they start compile fast, share a cache, and are quiet about it."""
    jax, path = pytest.importorskip("jax"), tmp_path_factory.mktemp("jax")
    (path / "jit_decode_chunk").touch()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("JAX_COMPILATION_CACHE_DIR", str(path))
        m.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        yield path


@pytest.fixture(scope="session")
def vocabulary_dir(tmp_path_factory):
    """encoder.json and vocab.bpe of 400 tokens, learned from texts that do not change with the source."""
    path = tmp_path_factory.mktemp("vocabulary")
    text = "\n".join([(ROOT / "LICENSE").read_text(encoding="utf-8"), *PROMPTS])
    write_vocabulary(path, text, TINY["n_vocab"])
    return path


@pytest.fixture(scope="session")
def tiny_tensors():
    return random_tensors(TINY)


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory, vocabulary_dir, tiny_tensors):
    """A folder with the seven files of OpenAI's layout, of a tiny model with random weights."""
    path = tmp_path_factory.mktemp("release") / "tiny"
    path.mkdir()
    copy_vocabulary(path, vocabulary_dir)
    write_hparams(path, TINY)
    write_tf_checkpoint(path, tiny_tensors)
    return path


@pytest.fixture(scope="session")
def tiny_models_dir(tmp_path_factory, vocabulary_dir, tiny_tensors):
    """A models_dir with the tiny model in the folder "tiny", in the imported layout; written without TensorFlow."""
    path = tmp_path_factory.mktemp("models")
    (path / "tiny").mkdir()
    copy_vocabulary(path / "tiny", vocabulary_dir)
    write_safetensors(path / "tiny", TINY, tiny_tensors)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_models_dir):
    """(encoder, hparams, params) of the tiny model."""
    return load_encoder_hparams_and_params("tiny", str(tiny_models_dir))


@pytest.fixture(scope="session")
def params(tiny):
    return tiny[2]


@pytest.fixture(scope="session", params=["numpy", "compiled"])
def engine(request):
    """A function from params to (model, params in its layout), for each engine."""
    if request.param == "numpy":
        return lambda params: (gpt2, params)
    pytest.importorskip("numba")
    return compiled.compiled_model


@pytest.fixture(scope="session")
def model_and_params(engine, params):
    """The tiny model in each engine."""
    return engine(params)


# transformers


@pytest.fixture(scope="session")
def theirs(tiny_models_dir):
    """transformers' GPT-2 with the tiny model's weights."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)  # threads cost more than they save with such a model
    return GPT2LMHeadModel.from_pretrained(tiny_models_dir / "tiny").eval()


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def their_greedy_ids(model, ids, n_tokens):
    import torch

    inputs = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(inputs), "pad_token_id": 0, "eos_token_id": None}  # id 0 is a token
    return model.generate(inputs, max_new_tokens=n_tokens, do_sample=False, **options)[0, len(ids) :].tolist()


@pytest.fixture(scope="session")
def expected(theirs):
    """The N_NEW ids with which transformers continue each of INPUTS."""
    return [their_greedy_ids(theirs, ids, N_NEW) for ids in INPUTS]


@pytest.fixture(scope="session")
def truth(tiny_models_dir, theirs, tmp_path_factory):
    """A function from a prompt and a number of tokens to the text that transformers continue it with, greedily."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path_factory.mktemp("truth") / "tiny")
    (folder / "encoder.json").rename(folder / "vocab.json")
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @functools.cache
    def continuation(prompt, n_tokens=8):
        ids = tokenizer(prompt)["input_ids"] or [TINY["n_vocab"] - 1]
        return tokenizer.decode(their_greedy_ids(theirs, ids, n_tokens), clean_up_tokenization_spaces=False)

    return continuation


def assert_transformers_agree(folder, text):
    """transformers load a trained model, and find the same ids and logits."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    encoder, hparams, params = load_encoder_hparams_and_params(folder.name, str(folder.parent))
    ids = encoder.encode(text)
    assert AutoTokenizer.from_pretrained(folder).encode(text) == ids
    logits = their_logits(GPT2LMHeadModel.from_pretrained(folder), [ids])[0]
    np.testing.assert_allclose(gpt2.gpt2(ids, **params, n_head=hparams["n_head"]), logits, rtol=1e-4, atol=1e-5)


def need(path):
    """Return the path; skip the test if it does not exist."""
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path


@contextlib.contextmanager
def one_line_error(*words, kind=UserError):
    """The block raises an error of this kind, in one line that contains the words."""
    with pytest.raises(kind) as error:
        yield error
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in map(str, words) if word not in message] == [], message


def assert_same_params(params, tensors):
    """The tiny model's nested params have exactly these tensors, bit for bit."""
    found = flatten(params, TINY)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flipped(data, position=-100, bit=1):
    """Return the bytes with one bit flipped."""
    position %= len(data)
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


def set_free_space(monkeypatch, n_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=n_bytes))


@pytest.fixture(scope="session")
def browser():
    """Chromium or Chrome, controlled by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright (requirements-dev.txt) is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


# gpt2.py's command line


@pytest.fixture
def tiny_flags(tiny_models_dir):
    return ["--model_size", "tiny", "--models_dir", str(tiny_models_dir)]


@pytest.fixture
def inside(capsysbinary, monkeypatch):
    """Run gpt2.py's command line in this process; returns what tests.programs.run returns."""
    from cli.generate import run

    def run_inside(*arguments, typed=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        capsysbinary.readouterr()
        return run([str(argument) for argument in arguments]), *capsysbinary.readouterr()

    return run_inside
