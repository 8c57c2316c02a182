"""Weights as files: OpenAI's checkpoint is imported bit for bit, both layouts load, damage is named in one line."""

import builtins
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys

import checkpoint
import numpy as np
import pytest

from encoder import get_encoder
from gpt2 import gpt2
from tests.conftest import ROOT, TINY
from tests.random_model import random_tensors, write_hparams, write_safetensors, write_tf_checkpoint
from utils import import_checkpoint, load_encoder_hparams_and_params
from weights.errors import CorruptFile, UserError
from weights.safetensors_file import save_params
from weights.tf_checkpoint import load_gpt2_params_from_tf_ckpt

DATA_FILE = "model.ckpt.data-00000-of-00001"
LINES_UP = {"n_vocab": 400, "n_ctx": 24, "n_embd": 32, "n_head": 2, "n_layer": 1}  # every tensor fills cache lines
HUGGING_FACE_LEAF = {"g": "weight", "b": "bias", "w": "weight", "wte": "wte.weight", "wpe": "wpe.weight"}


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """Without a mirror, a folder that is not one of OpenAI's four names is the user's own."""
    monkeypatch.delenv("GPT2_BASE_URL", raising=False)


@pytest.fixture
def own(tiny_models_dir, tmp_path):
    """A user's own folder in the imported layout."""
    return shutil.copytree(tiny_models_dir / "tiny", tmp_path / "models" / "own")


@pytest.fixture
def release(tiny_release, tmp_path):
    """A folder in OpenAI's layout that has not been imported yet."""
    return shutil.copytree(tiny_release, tmp_path / "models" / "release")


def load(folder):
    return load_encoder_hparams_and_params(folder.name, str(folder.parent))


def error_of(call, *arguments):
    """The UserError that the call must raise; what it says is one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def assert_says(error, *words):
    for word in words:
        assert word in str(error)


def by_name(params, name):
    """The array of the nested params that the checkpoint calls h1/attn/c_attn/w, ln_f/g, wte and so on."""
    block = re.fullmatch(r"h(\d+)/(.+)", name)
    inner, keys = (params["blocks"][int(block[1])], block[2]) if block else (params, name)
    for key in keys.split("/"):
        inner = inner[key]
    return inner


def hugging_face_name(name):
    scopes, leaf = name.split("/")[:-1], name.split("/")[-1]
    if scopes and scopes[0][:1] == "h":
        scopes[:1] = ["h", scopes[0][1:]]
    return ".".join([*scopes, HUGGING_FACE_LEAF[leaf]])


def assert_same_params(params, tensors):
    for name, tensor in tensors.items():
        loaded = by_name(params, name)
        assert (loaded.dtype, loaded.shape) == (np.float32, tensor.shape), name
        assert loaded.tobytes() == tensor.tobytes(), name
    assert n_arrays(params) == len(tensors)


def n_arrays(params):
    if isinstance(params, dict | list):
        return sum(n_arrays(inner) for inner in (params.values() if isinstance(params, dict) else params))
    return 1


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def edit_json(path, **changes):
    """Rewrites a JSON object; a change to ... removes the key."""
    found = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}), encoding="utf-8")


def read_header(path):
    """The header as it stands (with the padding), the parsed header and where the data start."""
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + n_header], json.loads(raw[8 : 8 + n_header]), 8 + n_header


def change_header(path, change):
    """Rewrites model.safetensors with its header changed in place by change(header); the data stay."""
    _, header, begin = read_header(path)
    data = path.read_bytes()[begin:]
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def hand_made(path, arrays):
    """A model.safetensors of {name: (dtype, array)}, written down without the project's code."""
    header, data = {}, b""
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data)]}
        data += array.tobytes()
        header[name]["data_offsets"].append(len(data))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def as_arrays(tensors, prefix=""):
    return {prefix + hugging_face_name(name): ("F32", tensor) for name, tensor in tensors.items()}


# Import of OpenAI's layout


def test_import_is_bit_for_bit(release, tiny_tensors, capsys):
    encoder, hparams, params = load(release)
    assert hparams == TINY
    assert encoder.encoder["<|endoftext|>"] == 399
    assert_same_params(params, tiny_tensors)
    config = json.loads((release / "config.json").read_text(encoding="utf-8"))
    assert (config["bos_token_id"], config["eos_token_id"]) == (399, 399)
    assert capsys.readouterr().err == f"importing {release} through TensorFlow, once\n"


def test_checkpoint_loads_directly(tiny_release, tiny_tensors):
    assert_same_params(load_gpt2_params_from_tf_ckpt(str(tiny_release / "model.ckpt"), TINY), tiny_tensors)


def test_second_load_reads_only_the_imported_file(release, tiny_tensors, capsys):
    load(release)
    before = {path.name: path.stat().st_mtime_ns for path in release.iterdir()}
    capsys.readouterr()
    (release / DATA_FILE).write_bytes(b"")  # who reads this again fails
    before[DATA_FILE] = (release / DATA_FILE).stat().st_mtime_ns
    assert_same_params(load(release)[2], tiny_tensors)
    assert capsys.readouterr().err == ""
    assert {path.name: path.stat().st_mtime_ns for path in release.iterdir()} == before


def test_checkpoint_under_another_prefix(tiny_release, tiny_tensors, tmp_path):
    folder = shutil.copytree(tiny_release, tmp_path / "m", ignore=shutil.ignore_patterns("model.ckpt*", "checkpoint"))
    write_tf_checkpoint(folder, tiny_tensors, prefix="model-1000")
    assert_same_params(load(folder)[2], tiny_tensors)


def test_checkpoint_with_an_absolute_path_from_elsewhere(release, tiny_tensors):
    (release / "checkpoint").write_text('model_checkpoint_path: "/home/somebody/gpt-2/models/124M/model.ckpt"\n')
    assert_same_params(load(release)[2], tiny_tensors)


@pytest.mark.parametrize("text", ["", "garbage", 'model_checkpoint_path: "model-1000"\n'])
def test_checkpoint_file_that_names_nothing_here(release, text):
    (release / "checkpoint").write_text(text)
    error = error_of(load, release)
    assert_says(error, "checkpoint")
    assert "model.safetensors" not in names_of(release)


def test_checkpoint_file_is_missing(release):
    (release / "checkpoint").unlink()
    assert_says(error_of(load, release), str(release), "lacks checkpoint", "put")


def test_data_file_is_missing(release):
    (release / DATA_FILE).unlink()
    assert_says(error_of(load, release), str(release), f"lacks {DATA_FILE}", "put")


def test_truncated_data_file(release):
    data = (release / DATA_FILE).read_bytes()
    (release / DATA_FILE).write_bytes(data[: len(data) // 2])
    error = error_of(load, release)
    assert isinstance(error, CorruptFile)
    assert_says(error, str(release / DATA_FILE), "corrupt", "put a good copy")
    assert not {"model.safetensors", "config.json"} & set(names_of(release))


@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
def test_flipped_byte_in_the_data_file(release, place):
    data = bytearray((release / DATA_FILE).read_bytes())
    data[int(place * len(data))] ^= 0x10
    (release / DATA_FILE).write_bytes(data)
    error = error_of(load, release)
    assert isinstance(error, CorruptFile)
    assert_says(error, str(release / DATA_FILE), "corrupt")
    assert "model.safetensors" not in names_of(release)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-20], lambda data: b"\0" * len(data)])
def test_damaged_index_file(release, damage):
    index = release / "model.ckpt.index"
    index.write_bytes(damage(index.read_bytes()))
    assert_says(error_of(load, release), str(index), "corrupt", "put a good copy")


def test_damaged_download_is_set_aside(release, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9/never-asked")
    (release / DATA_FILE).write_bytes((release / DATA_FILE).read_bytes()[:1000])
    assert_says(error_of(load, release), DATA_FILE, "set aside", "run the same command again")
    assert DATA_FILE not in names_of(release)
    assert (release / f"{DATA_FILE}.corrupt").stat().st_size == 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embd": 33}, ["wte has shape [400, 36]", "[400, 33]"]),
        ({"n_vocab": 401}, ["wte has shape [400, 36]", "[401, 36]"]),
        ({"n_ctx": 64}, ["wpe has shape [128, 36]", "[64, 36]"]),
        ({"n_layer": 3}, ["lacks the tensor", "h2/"]),
        ({"n_layer": 1}, ["has the tensor", "h1/"]),
    ],
)
def test_checkpoint_unlike_its_hparams(release, change, words):
    edit_json(release / "hparams.json", **change)
    assert_says(error_of(load, release), "model.ckpt", "correct the hparams", *words)
    assert "model.safetensors" not in names_of(release)


def test_checkpoint_of_half_precision(tiny_release, tiny_tensors, tmp_path):
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        for name, tensor in tiny_tensors.items():
            shape = (1, *tensor.shape) if name.endswith("/w") else tensor.shape
            tf.get_variable(f"model/{name}", shape, tf.float16, initializer=tf.zeros_initializer())
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    error = error_of(load_gpt2_params_from_tf_ckpt, str(tmp_path / "model.ckpt"), TINY)
    assert_says(error, "model.ckpt", "float16", "only float32", "convert")


@pytest.mark.parametrize("scope", ["", "other/"])
def test_checkpoint_with_another_scope(tiny_tensors, tmp_path, scope):
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        for name, tensor in tiny_tensors.items():
            tf.get_variable(scope + name, tensor.shape, tf.float32, initializer=tf.zeros_initializer())
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    assert_says(error_of(load_gpt2_params_from_tf_ckpt, str(tmp_path / "model.ckpt"), TINY), "model.ckpt", "tensor")


def test_without_tensorflow_the_import_says_what_to_install(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert_says(error_of(load, release), "TensorFlow", "pip install tensorflow")
    assert "model.safetensors" not in names_of(release)


def test_first_run_of_the_command_line_imports_quietly(release):
    command = [sys.executable, str(ROOT / "gpt2.py"), "Hello", "--model_size", release.name]
    command += ["--models_dir", str(release.parent), "--n_tokens_to_generate", "3"]
    first = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert first.stderr.decode() == f"importing {release} through TensorFlow, once\n"
    second = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert (second.stdout, second.stderr) == (first.stdout, b"")


# A write that fails half-way


class FullDisk(io.FileIO):
    """A file that takes this many bytes before it raises."""

    room, error = 3000, OSError(errno.ENOSPC, "No space left on device")

    def write(self, data):
        if self.tell() + memoryview(data).nbytes > self.room:
            raise self.error
        return super().write(data)


class InterruptedDisk(FullDisk):
    error = KeyboardInterrupt()


def open_on(disk):
    real_open = open
    return lambda path, mode="r", **options: (disk if "w" in mode else real_open)(path, mode, **options)


def write_tiny(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_params(str(folder), checkpoint.nest(tensors, TINY["n_layer"]), TINY)


def test_full_disk_leaves_nothing_half_written(tmp_path, tiny_tensors, monkeypatch):
    monkeypatch.setattr(builtins, "open", open_on(FullDisk))
    error = error_of(write_tiny, tmp_path, tiny_tensors)
    assert_says(error, "model.safetensors", "No space left on device", "make room", "--models_dir")
    assert names_of(tmp_path) == ["config.json"]


def test_interrupt_leaves_nothing_half_written(tmp_path, tiny_tensors, monkeypatch):
    monkeypatch.setattr(builtins, "open", open_on(InterruptedDisk))
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path, tiny_tensors)
    assert names_of(tmp_path) == ["config.json"]


def test_failed_write_keeps_what_was_there(own, tiny_tensors, monkeypatch):
    before = (own / "model.safetensors").read_bytes()
    monkeypatch.setattr(builtins, "open", open_on(FullDisk))
    error_of(write_tiny, own, random_tensors(TINY, seed=1))
    assert (own / "model.safetensors").read_bytes() == before


def test_failed_rename_leaves_nothing_and_the_next_call_imports(release, tiny_tensors, monkeypatch):
    before = names_of(release)
    real_replace = os.replace

    def failing_replace(source, target):
        if str(target).endswith("model.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing_replace)
        assert_says(error_of(load, release), "model.safetensors", "No space left on device", "make room")
    assert set(names_of(release)) - set(before) <= {"config.json"}
    assert_same_params(load(release)[2], tiny_tensors)


def test_full_disk_is_noticed_before_the_import(release, monkeypatch):
    usage = shutil.disk_usage(release)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_says(error_of(load, release), "model.safetensors", "0.00 GB free", "make room")
    assert "model.safetensors" not in names_of(release)


# The file written by the import, in other programs' eyes


def test_transformers_load_the_folder(own, tiny_tensors):
    from transformers import GPT2LMHeadModel

    model, report = GPT2LMHeadModel.from_pretrained(own, output_loading_info=True)
    found = {key: len(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert found == {"missing_keys": 0, "unexpected_keys": 0, "mismatched_keys": 0}
    state = model.state_dict()
    for name, tensor in tiny_tensors.items():
        assert np.array_equal(state[f"transformer.{hugging_face_name(name)}"].numpy(), tensor), name
    assert np.array_equal(state["lm_head.weight"].numpy(), tiny_tensors["wte"])


def test_config_describes_the_model(own):
    from transformers import AutoConfig, GPT2Config

    config = AutoConfig.from_pretrained(own)
    assert isinstance(config, GPT2Config)
    sizes = (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    assert sizes == (400, 128, 36, 3, 2)
    assert (config.bos_token_id, config.eos_token_id) == (399, 399)
    wanted = GPT2Config()
    for name in ("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights", "n_inner"):
        assert getattr(config, name) == getattr(wanted, name), name


def test_safetensors_package_reads_the_file(own, tiny_tensors):
    from safetensors.numpy import load_file

    found = load_file(own / "model.safetensors")
    assert {name: array.shape for name, array in found.items()} == {
        hugging_face_name(name): tensor.shape for name, tensor in tiny_tensors.items()
    }
    for name, tensor in tiny_tensors.items():
        assert found[hugging_face_name(name)].tobytes() == tensor.tobytes(), name


def test_header_is_legal(own):
    text, header, begin = read_header(own / "model.safetensors")
    assert text.startswith(b"{") and re.fullmatch(rb"\{.*\} *", text, re.DOTALL)
    assert begin % 64 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    ends = [0, *(end for _, end in spans)]
    assert [span[0] for span in spans] == ends[:-1]  # no holes, no overlaps
    assert begin + ends[-1] == (own / "model.safetensors").stat().st_size


def test_tensors_whose_size_allows_it_are_aligned(own):
    _, header, begin = read_header(own / "model.safetensors")
    sizes = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name[0] != "_"}
    filling = [name for name, size in sizes.items() if size % 64 == 0]
    assert filling and len(filling) < len(sizes)
    assert [name for name in filling if (begin + header[name]["data_offsets"][0]) % 64] == []


def test_every_tensor_is_aligned_in_memory_when_the_width_is_a_multiple_of_16(tmp_path, vocabulary_dir):
    folder = shutil.copytree(vocabulary_dir, tmp_path / "wide")
    tensors = random_tensors(LINES_UP)
    write_safetensors(folder, LINES_UP, tensors)
    params = load(folder)[2]
    assert_same_params(params, tensors)
    assert [name for name in tensors if by_name(params, name).ctypes.data % 64] == []


# Loading


def test_arrays_are_read_only_views_of_the_mapped_file(own, tiny_tensors):
    params = load(own)[2]
    for name in tiny_tensors:
        array = by_name(params, name)
        assert type(array) is np.ndarray
        assert not array.flags.writeable and not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        params["wte"][0, 0] = 1.0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_file_is_mapped_not_read(own):
    params = load(own)[2]
    with open("/proc/self/maps", encoding="utf-8") as f:
        mapped = [line.split(maxsplit=5) for line in f if str(own / "model.safetensors") in line]
    spans = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    address = params["wte"].ctypes.data
    assert any(begin <= address < end for begin, end in spans)


def test_ready_model_needs_no_heavy_package(own):
    code = (
        "import sys; from utils import load_encoder_hparams_and_params as load; load(*sys.argv[1:]); "
        "heavy = 'tensorflow torch transformers jax requests urllib3 safetensors tqdm filelock fire'.split(); "
        "print([name for name in heavy if name in sys.modules], 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, own.name, str(own.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("[] True\n", "")


def test_loading_a_ready_model_writes_nothing(own):
    before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    load(own)
    assert {path.name: path.stat().st_mtime_ns for path in own.iterdir()} == before
    assert names_of(own.parent) == [own.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_ready_model_loads_from_a_read_only_folder(own, tiny_tensors):
    own.chmod(0o555)
    try:
        assert_same_params(load(own)[2], tiny_tensors)
    finally:
        own.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_import_into_a_read_only_folder(release):
    release.chmod(0o555)
    try:
        assert_says(error_of(load, release), "cannot write", "Permission denied", "--models_dir")
    finally:
        release.chmod(0o755)


def test_symlinked_folder(own, tmp_path, tiny_tensors):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model").symlink_to(own, target_is_directory=True)
    assert_same_params(load(tmp_path / "links" / "model")[2], tiny_tensors)


def test_folder_within_a_folder(own, tiny_tensors):
    assert_same_params(load_encoder_hparams_and_params("models/own", str(own.parent.parent))[2], tiny_tensors)


# Hugging Face's layout


@pytest.fixture
def hugging_face(own, tiny_tensors):
    """The user's own folder with nothing but Hugging Face's four names."""
    (own / "encoder.json").rename(own / "vocab.json")
    (own / "vocab.bpe").rename(own / "merges.txt")
    (own / "hparams.json").unlink()
    return own


def transformers_model(tensors):
    """A GPT2LMHeadModel with these tensors, put in one by one."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=400, n_positions=128, n_embd=36, n_head=3, n_layer=2)
    model = GPT2LMHeadModel(config).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[f"transformer.{hugging_face_name(name)}"].copy_(torch.from_numpy(tensor))
    return model


def test_folder_saved_by_transformers(hugging_face, tiny_tensors):
    import torch

    for name in ("config.json", "model.safetensors"):
        (hugging_face / name).unlink()
    model = transformers_model(tiny_tensors)
    model.save_pretrained(hugging_face)
    assert "transformer.wte.weight" in read_header(hugging_face / "model.safetensors")[1]
    _, hparams, params = load(hugging_face)
    assert hparams == TINY
    assert_same_params(params, tiny_tensors)
    ids = [5, 399, 17, 280, 3, 3, 101]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(gpt2(ids, **params, n_head=3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_prefix(hugging_face, tiny_tensors, prefix):
    hand_made(hugging_face / "model.safetensors", as_arrays(tiny_tensors, prefix))
    assert_same_params(load(hugging_face)[2], tiny_tensors)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("BOOL", np.bool_), ("U8", np.uint8)])
def test_mask_buffers_are_skipped(hugging_face, tiny_tensors, prefix, dtype, kind):
    mask, low = np.tri(128, dtype=kind).reshape(1, 1, 128, 128), np.array(-1e4, np.float32)
    arrays = {f"{prefix}h.0.attn.bias": (dtype, mask), f"{prefix}h.0.attn.masked_bias": ("F32", low)}
    arrays |= {f"{prefix}h.1.attn.masked_bias": ("F32", low), f"{prefix}h.1.attn.bias": (dtype, mask)}
    hand_made(hugging_face / "model.safetensors", arrays | as_arrays(tiny_tensors, prefix))
    assert_same_params(load(hugging_face)[2], tiny_tensors)


@pytest.mark.parametrize("kind", [np.bool_, np.float32])
def test_masks_behind_the_tensors_are_skipped(hugging_face, tiny_tensors, kind):
    arrays = as_arrays(tiny_tensors)
    dtype = {np.bool_: "BOOL", np.float32: "F32"}[kind]
    arrays["h.0.attn.bias"] = (dtype, np.tri(128, dtype=kind).reshape(1, 1, 128, 128))
    hand_made(hugging_face / "model.safetensors", arrays)
    assert_same_params(load(hugging_face)[2], tiny_tensors)


def test_scalar_mask_value_at_the_end_of_the_file(hugging_face, tiny_tensors):
    arrays = as_arrays(tiny_tensors) | {"h.1.attn.masked_bias": ("F32", np.array(-1e4, np.float32))}
    hand_made(hugging_face / "model.safetensors", arrays)
    assert_same_params(load(hugging_face)[2], tiny_tensors)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_output_layer_equal_to_the_embedding(hugging_face, tiny_tensors, prefix):
    arrays = as_arrays(tiny_tensors, prefix) | {"lm_head.weight": ("F32", tiny_tensors["wte"])}
    hand_made(hugging_face / "model.safetensors", arrays)
    assert_same_params(load(hugging_face)[2], tiny_tensors)


def test_output_layer_of_its_own_is_refused(hugging_face, tiny_tensors):
    other = tiny_tensors["wte"].copy()
    other[399, 35] += 1
    arrays = as_arrays(tiny_tensors) | {"lm_head.weight": ("F32", other)}
    hand_made(hugging_face / "model.safetensors", arrays)
    assert_says(error_of(load, hugging_face), "model.safetensors", "lm_head.weight", "wte.weight", "tie")


def test_metadata_is_optional(hugging_face, tiny_tensors):
    change_header(hugging_face / "model.safetensors", lambda header: header.pop("__metadata__"))
    assert_same_params(load(hugging_face)[2], tiny_tensors)


# Tensors that are not as the hparams say


@pytest.mark.parametrize("name", ["wte.weight", "h.1.attn.c_attn.bias", "ln_f.weight"])
def test_missing_tensor(own, tiny_tensors, name):
    arrays = as_arrays(tiny_tensors)
    del arrays[name]
    hand_made(own / "model.safetensors", arrays)
    assert_says(error_of(load, own), "model.safetensors", f"lacks the tensor {name}", "correct the hparams")


@pytest.mark.parametrize("name", ["h.2.ln_1.weight", "score.weight", "h.0.crossattention.bias"])
def test_extra_tensor(own, tiny_tensors, name):
    hand_made(own / "model.safetensors", as_arrays(tiny_tensors) | {name: ("F32", np.ones(36, np.float32))})
    assert_says(error_of(load, own), "model.safetensors", f"has the tensor {name}", "correct the hparams")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embd": 33}, ["wte.weight has shape [400, 36]", "[400, 33]"]),
        ({"n_vocab": 500}, ["wte.weight has shape [400, 36]", "[500, 36]"]),
        ({"n_ctx": 1024}, ["wpe.weight has shape [128, 36]", "[1024, 36]"]),
        ({"n_layer": 1}, ["has the tensor h.1."]),
        ({"n_layer": 3}, ["lacks the tensor h.2."]),
    ],
)
def test_tensors_unlike_the_hparams(own, change, words):
    edit_json(own / "hparams.json", **change)
    assert_says(error_of(load, own), "model.safetensors", "correct the hparams", *words)


def test_transposed_tensor(own, tiny_tensors):
    arrays = as_arrays(tiny_tensors)
    arrays["h.0.mlp.c_fc.weight"] = ("F32", np.ascontiguousarray(tiny_tensors["h0/mlp/c_fc/w"].T))
    hand_made(own / "model.safetensors", arrays)
    assert_says(error_of(load, own), "h.0.mlp.c_fc.weight", "[144, 36]", "[36, 144]")


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("BF16", np.uint16), ("F64", np.float64)])
def test_other_precision(own, tiny_tensors, dtype, kind):
    arrays = as_arrays(tiny_tensors)
    arrays["h.1.ln_2.bias"] = (dtype, tiny_tensors["h1/ln_2/b"].astype(kind))
    hand_made(own / "model.safetensors", arrays)
    assert_says(error_of(load, own), "model.safetensors", "h.1.ln_2.bias", dtype, "only F32", "convert")


# A damaged model.safetensors


def bytes_of(own):
    return (own / "model.safetensors").read_bytes()


GARBLED = {
    "empty": lambda raw: b"",
    "cut in the header length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-4],
    "cut to the header": lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")],
    "something behind the data": lambda raw: raw + b"\0\0\0\0",
    "garbage header": lambda raw: raw[:8] + b"\xff" * 100 + raw[108:],
    "garbage": lambda raw: bytes(range(256)) * 100,
    "a web page": lambda raw: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    "header longer than the file": lambda raw: (len(raw) + 1).to_bytes(8, "little") + raw[8:],
    "header of 2**63 bytes": lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
    "header of no bytes": lambda raw: bytes(8) + raw[8:],
    "header shorter than it is": lambda raw: (20).to_bytes(8, "little") + raw[8:],
    "zeros": lambda raw: bytes(len(raw)),
}


@pytest.mark.parametrize("how", GARBLED)
def test_garbled_file(own, how):
    (own / "model.safetensors").write_bytes(GARBLED[how](bytes_of(own)))
    error = error_of(load, own)
    assert isinstance(error, CorruptFile)
    assert_says(error, str(own / "model.safetensors"), "corrupt", "put a good copy in its place")


@pytest.mark.parametrize("text", [b"null", b"[]", b"3", b'"x"', b"{}", b'{"wte.weight": 1}', b'{"wte.weight": {}}'])
def test_header_that_is_json_but_no_header(own, text):
    (own / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert_says(error_of(load, own), str(own / "model.safetensors"), "corrupt")


def test_header_that_describes_no_bytes_at_all(own):
    text = b'{"wte.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    (own / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert_says(error_of(load, own), str(own / "model.safetensors"))


def offsets_to(begin, end, name="h.0.ln_1.bias"):
    def change(header):
        header[name]["data_offsets"] = [begin, end]

    return change


WRONG_OFFSETS = {
    "out of range": offsets_to(10**9, 10**9 + 144),
    "negative": offsets_to(-288, -144),
    "negative begin": offsets_to(-144, 0),
    "backwards": offsets_to(144, 0),
    "too few bytes": offsets_to(0, 140),
    "no multiple of four bytes": offsets_to(0, 143),
    "too many bytes": offsets_to(0, 288),
    "fractions": offsets_to(0.5, 144.5),
    "text": offsets_to("0", "144"),
    "nothing": offsets_to(None, None),
    "three": lambda header: header["h.0.ln_1.bias"].update(data_offsets=[0, 144, 288]),
    "one": lambda header: header["h.0.ln_1.bias"].update(data_offsets=[144]),
    "no list": lambda header: header["h.0.ln_1.bias"].update(data_offsets=144),
    "no dtype": lambda header: header["h.0.ln_1.bias"].pop("dtype"),
    "no shape": lambda header: header["h.0.ln_1.bias"].pop("shape"),
    "shape is a number": lambda header: header["h.0.ln_1.bias"].update(shape=36),
}


@pytest.mark.parametrize("how", WRONG_OFFSETS)
def test_wrong_entry_of_a_tensor(own, how):
    change_header(own / "model.safetensors", WRONG_OFFSETS[how])
    assert_says(error_of(load, own), str(own / "model.safetensors"))


def test_two_tensors_in_the_same_bytes(own):
    _, header, _ = read_header(own / "model.safetensors")
    elsewhere = header["h.1.ln_2.weight"]["data_offsets"]
    change_header(own / "model.safetensors", offsets_to(*elsewhere))
    assert_says(error_of(load, own), str(own / "model.safetensors"), "corrupt")


def test_corrupt_import_is_set_aside_and_made_again(release, tiny_tensors):
    load(release)
    with open(release / "model.safetensors", "r+b") as f:
        f.truncate(5000)
    error = error_of(load, release)
    assert_says(error, str(release / "model.safetensors"), "5000 bytes", "model.safetensors.corrupt", "again")
    assert (release / "model.safetensors.corrupt").stat().st_size == 5000
    assert "model.safetensors" not in names_of(release)
    assert_same_params(load(release)[2], tiny_tensors)


def test_users_own_corrupt_file_stays_where_it_is(own):
    (own / "model.safetensors").write_bytes(b"my only copy")
    before = names_of(own)
    error_of(load, own)
    assert names_of(own) == before
    assert bytes_of(own) == b"my only copy"


# hparams.json and config.json


@pytest.mark.parametrize("text", ["", "{", "not JSON", "\0\0\0\0", '{"n_vocab": 400', "[400]", "400", "null"])
def test_hparams_that_are_no_json_object(own, text):
    (own / "hparams.json").write_text(text)
    error = error_of(load, own)
    assert isinstance(error, CorruptFile)
    assert_says(error, str(own / "hparams.json"), "corrupt", "put a good copy")


def test_hparams_that_are_not_utf_8(own):
    (own / "hparams.json").write_bytes(b'{"n_vocab": 400, "who": "\xe9"}')
    assert_says(error_of(load, own), str(own / "hparams.json"), "corrupt")


@pytest.mark.parametrize("name", ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"])
@pytest.mark.parametrize("value", [..., 0, -1, "36", True, 36.0, None, [36]])
def test_hparams_that_are_no_positive_whole_number(own, name, value):
    edit_json(own / "hparams.json", **{name: value})
    shown = None if value is ... else value
    assert_says(error_of(load, own), f"{own / 'hparams.json'}: {name} is {shown!r}", "positive whole", "correct it")


def test_width_that_the_heads_do_not_divide(own):
    edit_json(own / "hparams.json", n_head=5)
    words = [str(own / "hparams.json"), "n_embd 36", "n_head 5", "not a multiple", "correct it"]
    assert_says(error_of(load, own), *words)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("model_type", "gpt_neo", "gpt2"),
        ("activation_function", "relu", "gelu_new"),
        ("activation_function", "gelu", "gelu_new"),  # the exact form, not the tanh form
        ("layer_norm_epsilon", 1e-6, "1e-05"),
        ("n_inner", 72, "144"),
        ("tie_word_embeddings", False, "True"),
        ("scale_attn_weights", False, "True"),
        ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("add_cross_attention", True, "False"),
    ],
)
def test_config_of_something_else(hugging_face, name, value, wanted):
    edit_json(hugging_face / "config.json", **{name: value})
    assert_says(error_of(load, hugging_face), str(hugging_face / "config.json"), f"{name} is {value!r}", wanted)


@pytest.mark.parametrize(
    ("name", "value"), [("activation_function", "gelu_pytorch_tanh"), ("n_inner", None), ("n_inner", 144)]
)
def test_config_of_the_same_in_other_words(hugging_face, tiny_tensors, name, value):
    edit_json(hugging_face / "config.json", **{name: value})
    assert_same_params(load(hugging_face)[2], tiny_tensors)


@pytest.mark.parametrize(("name", "ours"), [("vocab_size", "n_vocab"), ("n_embd", "n_embd"), ("n_head", "n_head")])
@pytest.mark.parametrize("value", [..., None, 0, "36", True])
def test_config_without_a_size(hugging_face, name, ours, value):
    edit_json(hugging_face / "config.json", **{name: value})
    assert_says(error_of(load, hugging_face), str(hugging_face / "config.json"), f"{ours} is", "correct it")


def test_config_that_is_no_json(hugging_face):
    (hugging_face / "config.json").write_text("{")
    assert_says(error_of(load, hugging_face), str(hugging_face / "config.json"), "corrupt")


def test_no_hparams_at_all(own):
    (own / "hparams.json").unlink()
    (own / "config.json").unlink()
    assert_says(error_of(load, own), str(own), "lacks hparams.json", "put")


# The vocabulary


def test_vocabulary_larger_than_the_model(own):
    edit_json(own / "encoder.json", extra=400)
    assert_says(error_of(load, own), str(own), "ids up to 400", "n_vocab = 400", "put the right vocabulary")


def test_vocabulary_with_a_negative_id(own):
    edit_json(own / "encoder.json", extra=-1)
    assert_says(error_of(load, own), str(own))


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_missing_vocabulary(own, name):
    (own / name).unlink()
    assert_says(error_of(load, own), str(own), f"lacks {name}", "put")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_hugging_faces_vocabulary(hugging_face, name):
    (hugging_face / name).unlink()
    assert_says(error_of(load, hugging_face), str(hugging_face), "lacks encoder.json, vocab.bpe", "put")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "b"}', '{"a": 1.5}'])
def test_vocabulary_that_is_no_vocabulary(own, text):
    (own / "encoder.json").write_text(text)
    assert_says(error_of(load, own), str(own / "encoder.json"), "corrupt", "put a good copy")


@pytest.mark.parametrize("line", [b"three symbols here\n", b"one\n", b"\xff \xfe\n"])
def test_merges_that_are_no_merges(own, line):
    (own / "vocab.bpe").write_bytes((own / "vocab.bpe").read_bytes() + line)
    assert_says(error_of(load, own), str(own / "vocab.bpe"), "corrupt", "put a good copy")


# Which folder


def test_unknown_model_size_lists_what_there_is(own):
    (own.parent / "another").mkdir()
    (own.parent / "a-file").write_text("no folder")
    error = error_of(load_encoder_hparams_and_params, "125M", str(own.parent))
    assert_says(error, "unknown model size '125M'", "choose from 124M, 355M, 774M, 1558M, another, own")
    assert "a-file" not in str(error)


def test_unknown_model_size_without_any_folder(tmp_path):
    error = error_of(load_encoder_hparams_and_params, "125M", str(tmp_path / "nowhere"))
    assert_says(error, "'125M'", "124M, 355M, 774M, 1558M")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["..", ".", "", "../own", "own/../own", "/etc", "own/", "..\\own", "C:own", "own\0x"])
@pytest.mark.parametrize("mirror", [False, True])
def test_names_that_climb_out_of_models_dir(own, name, mirror, monkeypatch):
    if mirror:  # where any name could be had, no name may write elsewhere
        monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9/never-asked")
    before = sorted(str(path) for path in own.parent.parent.rglob("*"))
    error = error_of(load_encoder_hparams_and_params, name, str(own.parent))
    assert_says(error, repr(name), "does not name a folder", str(own.parent), "try 124M")
    assert sorted(str(path) for path in own.parent.parent.rglob("*")) == before


def test_only_a_pickled_model(own):
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    error = error_of(load, own)
    assert_says(error, str(own), "lacks", "put")
    assert "model.safetensors" in str(error)


def test_empty_folder_stays(tmp_path):
    (tmp_path / "models" / "empty").mkdir(parents=True)
    error = error_of(load, tmp_path / "models" / "empty")
    assert_says(error, "lacks hparams.json, encoder.json, vocab.bpe, checkpoint, model.ckpt.index", "put")
    assert names_of(tmp_path / "models") == ["empty"]


def test_weights_that_are_a_folder(own):
    (own / "model.safetensors").unlink()
    (own / "model.safetensors").mkdir()
    with pytest.raises((UserError, IsADirectoryError), match=r"model\.safetensors"):  # the command line shows either
        load(own)


def test_import_of_a_folder_given_by_name(release, tiny_tensors, capsys):
    import_checkpoint(release.name, str(release.parent))
    assert {"model.safetensors", "config.json"} <= set(names_of(release))
    assert_same_params(load(release)[2], tiny_tensors)


def test_hparams_of_openais_release_load(tmp_path):
    write_hparams(tmp_path, {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12})
    names = checkpoint.tensor_shapes(**checkpoint.load_hparams(str(tmp_path)))
    assert sum(int(np.prod(shape)) for shape in names.values()) == 124_439_808


def test_folder_as_transformers_saves_it_today(tmp_path, tiny_models_dir, vocabulary_dir):
    """With tokenizer.json alone for a vocabulary: the same ids and logits as transformers from the same folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    shutil.copy(vocabulary_dir / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(vocabulary_dir / "vocab.bpe", tmp_path / "merges.txt")
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    sizes = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_head": 2, "n_layer": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=399, eos_token_id=399)).eval()
    folder = tmp_path / "models" / "today"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    encoder, hparams, params = load_encoder_hparams_and_params("today", str(tmp_path / "models"))
    ids = encoder.encode("def softmax(x):  # Müller 🤗")
    assert ids == tokenizer("def softmax(x):  # Müller 🤗")["input_ids"]
    assert encoder.encoder["<|endoftext|>"] == 399
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(gpt2(ids, **params, n_head=hparams["n_head"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        {"model": {"type": "WordPiece"}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}},
        {"model": {"type": "BPE", "vocab": {}, "merges": [3]}, "pre_tokenizer": {"type": "ByteLevel"}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}},
    ],
)
def test_tokenizer_json_of_something_else(tmp_path, tokenizer):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        get_encoder("own", str(tmp_path))
    assert "\n" not in str(caught.value)
