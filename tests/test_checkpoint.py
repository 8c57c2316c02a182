"""Weights as files: OpenAI's checkpoint is imported bit for bit, both layouts load, damage is reported in one line."""

import contextlib
import errno
import functools
import json
import mmap
import os
import re
import shutil
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest

from gpt2 import gpt2
from tests.conftest import DATA, ROOT, TINY, need
from tests.random_model import SIZE_124M, random_tensors, write_safetensors
from utils import load_encoder_hparams_and_params
from weights import safetensors_file
from weights.errors import CorruptFile, UserError
from weights.names import flatten, hugging_face_name, n_params, nest, tensor_shapes
from weights.releases import DATA_FILE, N_PARAMS
from weights.safetensors_file import save_params
from weights.tf_checkpoint import load_gpt2_params_from_tf_ckpt, read_index

LINES_UP = {"n_vocab": 400, "n_ctx": 24, "n_embd": 32, "n_head": 2, "n_layer": 1}  # every tensor fills cache lines
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """Without a mirror, a folder whose name is not one of OpenAI's four is the user's own."""
    monkeypatch.delenv("GPT2_BASE_URL", raising=False)


@pytest.fixture
def own(tiny_models_dir, tmp_path):
    """A user's own folder in the imported layout."""
    return shutil.copytree(tiny_models_dir / "tiny", tmp_path / "models" / "own")


@pytest.fixture
def release(tiny_release, tmp_path):
    """A folder in OpenAI's layout that has not been imported yet."""
    return shutil.copytree(tiny_release, tmp_path / "models" / "release")


@pytest.fixture
def hugging_face(own):
    """The user's own folder under Hugging Face's four names."""
    (own / "encoder.json").rename(own / "vocab.json")
    (own / "vocab.bpe").rename(own / "merges.txt")
    (own / "hparams.json").unlink()
    return own


def load(folder):
    return load_encoder_hparams_and_params(folder.name, str(folder.parent))


def assert_refused(call, *words, kind=UserError):
    """The call raises UserError, in one line that contains these words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if str(word) not in message] == [], message


def assert_same_params(params, tensors, hparams=TINY):
    found = flatten(params, hparams)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def times_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# Changes of a folder: functions of its path


def edit_json(name, **changes):
    """Change a JSON object; a value of ... removes the key."""

    def edit(folder):
        found = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        text = json.dumps({key: value for key, value in found.items() if value is not ...})
        (folder / name).write_text(text, encoding="utf-8")

    return edit


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def damage(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def without(*names):
    return lambda folder: [(folder / name).rename(folder / f"{name}.bin") for name in names]


def flip_bit(data, position):
    position %= len(data)
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def with_header(header, data=b""):
    """A safetensors file; the header is a dict or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read_header(path):
    """The text of the header, the parsed header and the bytes after it."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], json.loads(raw[8:end]), raw[end:]


def edit_header(change):
    def edit(folder):
        _, header, data = read_header(folder / WEIGHTS)
        change(header)
        (folder / WEIGHTS).write_bytes(with_header(header, data))

    return edit


def edit_tensors(change):
    """Replace the tensors of model.safetensors, {name: (dtype, array)}, by change(tensors)."""

    def edit(folder):
        _, header, data = read_header(folder / WEIGHTS)
        del header["__metadata__"]
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = ("F32", np.frombuffer(data[begin:end], np.float32).reshape(entry["shape"]))
        header, data = {}, b""
        for name, (dtype, array) in change(tensors).items():
            end = len(data) + array.nbytes
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), end]}
            data += array.tobytes()
        (folder / WEIGHTS).write_bytes(with_header(header, data))

    return edit


# Import of OpenAI's layout


def test_import_is_bit_for_bit_and_needs_no_tensorflow(release, tiny_tensors, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    encoder, hparams, params = load(release)
    assert hparams == TINY
    assert encoder.encoder["<|endoftext|>"] == 399
    assert_same_params(params, tiny_tensors)
    config = json.loads((release / "config.json").read_text(encoding="utf-8"))
    assert (config["bos_token_id"], config["eos_token_id"]) == (399, 399)
    assert capsys.readouterr().err == f"importing the checkpoint in {release}, once\n"


def test_reader_returns_what_tensorflows_reader_returns(tiny_release):
    import tensorflow as tf

    theirs = tf.train.load_checkpoint(str(tiny_release / "model.ckpt"))
    shapes = theirs.get_variable_to_shape_map()
    entries = read_index(str(tiny_release / "model.ckpt.index"))
    assert {name: list(entry.shape) for name, entry in entries.items()} == shapes
    params = flatten(load_gpt2_params_from_tf_ckpt(str(tiny_release / "model.ckpt"), TINY), TINY)
    for name in shapes:
        assert params[name.removeprefix("model/")].tobytes() == theirs.get_tensor(name).tobytes(), name


def save_v2(prefix, tensors, dtype="float32"):
    """Write an index and a data file with TensorFlow."""
    import tensorflow as tf

    values = [tf.cast(tensor, dtype) for tensor in tensors.values()]
    slices = [""] * len(values)
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=list(tensors), shape_and_slices=slices, tensors=values)


def test_index_of_several_blocks(tmp_path):
    """TensorFlow starts a new block after 256 KiB."""
    arrays = {f"{i:04}" + 1000 * "x": np.full(i % 5, i, np.float32) for i in range(700)}
    save_v2(tmp_path / "many", arrays)
    data = (tmp_path / "many.data-00000-of-00001").read_bytes()
    entries = read_index(str(tmp_path / "many.index"))
    assert list(entries) == sorted(arrays)
    for name, entry in entries.items():
        assert entry.shape == arrays[name].shape
        assert data[entry.offset : entry.offset + entry.size] == arrays[name].tobytes()


def test_index_of_openais_release():
    """148 tensors in alphabetical order, without gaps; offsets, sizes and CRCs as other readers have found them."""
    entries = read_index(str(need(DATA / "gpt2" / "model.ckpt.index")))
    assert list(entries) == sorted(f"model/{name}" for name in tensor_shapes(**SIZE_124M))
    ends = [0, *(entry.offset + entry.size for entry in entries.values())]
    assert [entry.offset for entry in entries.values()] == ends[:-1]
    assert ends[-1] == 497_759_232
    expected = {
        "h0/attn/c_attn/b": ((2304,), 0, 9_216, 0x8C273D74),
        "h0/attn/c_attn/w": ((1, 768, 2304), 9_216, 7_077_888, 0x863D710D),
        "h1/attn/c_attn/b": ((2304,), 28_351_488, 9_216, 0x9DE00452),
        "ln_f/b": ((768,), 340_217_856, 3_072, 0x0C8F5269),
        "wpe": ((1024, 768), 340_224_000, 3_145_728, 0x2ACFB8F1),
        "wte": ((50257, 768), 343_369_728, 154_389_504, 0x0E298522),
    }
    assert {name: entries[f"model/{name}"] for name in expected} == {
        name: ("float32", *values) for name, values in expected.items()
    }


def test_second_load_reads_only_the_imported_file(release, tiny_tensors, capsys):
    load(release)
    capsys.readouterr()
    write(DATA_FILE, b"")(release)  # reading it again would fail
    before = times_of(release)
    assert_same_params(load(release)[2], tiny_tensors)
    assert capsys.readouterr().err == ""
    assert times_of(release) == before


@pytest.mark.parametrize("named", ["model-500", "/home/somebody/gpt-2/models/124M/model.ckpt"])
def test_checkpoint_under_another_path(release, tiny_tensors, named):
    """TensorFlow names a training run's checkpoints after the step; the .meta file is not read."""
    (release / "model.ckpt.meta").unlink()
    for name in ("model.ckpt.index", DATA_FILE):
        (release / name).rename(release / name.replace("model.ckpt", named.rpartition("/")[2]))
    write("checkpoint", f'model_checkpoint_path: "{named}"\n'.encode())(release)
    assert_same_params(load(release)[2], tiny_tensors)


DAMAGES = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at the end": lambda data: data[:-20],
    "zeros": lambda data: bytes(len(data)),
    "first byte": lambda data: flip_bit(data, 0),
    "middle": lambda data: flip_bit(data, len(data) // 3),
    "last byte": lambda data: flip_bit(data, -1),
}


@pytest.mark.parametrize("name", ["model.ckpt.index", DATA_FILE])
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoint(release, name, how):
    damage(name, DAMAGES[how])(release)
    before = names_of(release)
    assert_refused(lambda: load(release), release / name, "corrupt", "put a good copy", kind=CorruptFile)
    assert names_of(release) == before


EMPTY_BLOCK = b"\0\0\0\0\1\0\0\0"  # no record, one restart position


def with_crc(contents, compression=0):
    """A block of a LevelDB table: the contents, the compression and the masked CRC-32C of both."""
    block = contents + bytes([compression])
    crc = google_crc32c.value(block)
    return block + (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def test_any_damage_of_the_index_is_an_error_in_one_line(tiny_release, tmp_path):
    """Each byte is covered by a CRC, but for those of the footer; malformed records may have a right CRC."""
    path, data = tmp_path / "index", (tiny_release / "model.ckpt.index").read_bytes()
    records, footer = data.index(with_crc(EMPTY_BLOCK)) - 5, len(data) - 48
    damaged = [flip_bit(data, i) for i in range(0, footer, 3)] + [data[:i] for i in range(0, len(data), 20)]
    damaged += [byte * n + data[-8:] for n in range(0, 60, 3) for byte in (b"\0", b"\xff")]
    for changed in damaged:
        path.write_bytes(changed)
        assert_refused(lambda: read_index(str(path)), path, "corrupt", kind=CorruptFile)

    rng = np.random.default_rng(0)
    damaged = [flip_bit(data, i) for i in range(footer, len(data))]
    for _ in range(300):
        changed = bytearray(data[:records])
        for i in rng.integers(records, size=3):
            changed[i] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        damaged.append(with_crc(bytes(changed)) + data[records + 5 :])
    for changed in damaged:
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            read_index(str(path))


def test_compressed_index_is_refused(release):
    compressed = with_crc(EMPTY_BLOCK, compression=1)
    damage("model.ckpt.index", lambda data: data.replace(with_crc(EMPTY_BLOCK), compressed))(release)
    assert_refused(lambda: load(release), "model.ckpt.index is compressed", "tf.train.Saver")


def test_big_endian_checkpoint_is_refused(release):
    def change(data):
        records = data[: data.index(with_crc(EMPTY_BLOCK)) - 5]
        version, endianness = b"\x1a\x02\x08\x01", b"\x10\x01\x10\x01"  # fields 3 and 2 of the header
        return with_crc(records.replace(version, endianness, 1)) + data[len(records) + 5 :]

    damage("model.ckpt.index", change)(release)
    assert_refused(lambda: load(release), "model.ckpt.index is big-endian", "little-endian machine")


def test_checkpoint_in_two_data_files_is_refused(tmp_path):
    import tensorflow as tf

    parts = [str(tmp_path / "a"), str(tmp_path / "b")]
    for part in parts:
        save_v2(part, {part: np.ones(3)})
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "model.ckpt"))
    call = functools.partial(load_gpt2_params_from_tf_ckpt, str(tmp_path / "model.ckpt"), TINY)
    assert_refused(call, "model.ckpt.index: 2 data files", "sharded=False")


@pytest.mark.parametrize(
    ("scope", "dtype", "words"),
    [
        ("model/", "float16", ["float16", "only float32", "convert"]),
        ("model/", "uint8", ["dtype 4", "only float32", "convert"]),
        ("", "float32", ["has the tensor h0/"]),
        ("other/", "float32", ["lacks the tensor model/"]),
    ],
)
def test_checkpoint_of_other_tensors_is_refused(tiny_tensors, tmp_path, scope, dtype, words):
    tensors = {scope + name: t[np.newaxis] if name.endswith("/w") else t for name, t in tiny_tensors.items()}
    save_v2(tmp_path / "model.ckpt", tensors, dtype)
    call = functools.partial(load_gpt2_params_from_tf_ckpt, str(tmp_path / "model.ckpt"), TINY)
    assert_refused(call, "model.ckpt", *words)


def test_first_run_of_the_command_line_imports_quietly(release):
    command = [sys.executable, str(ROOT / "gpt2.py"), "Hello", "--model_size", release.name]
    command += ["--models_dir", str(release.parent), "--n_tokens_to_generate", "3"]
    first = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert first.stderr.decode() == f"importing the checkpoint in {release}, once\n"
    second = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert (second.stdout, second.stderr) == (first.stdout, b"")


def test_parameter_counts_of_openais_four_sizes():
    sizes = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
    assert {size: n_params(tensor_shapes(50257, 1024, *rest)) for size, rest in sizes.items()} == N_PARAMS


# A write that fails


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_no_other(own, error, monkeypatch):
    def write_half(f, pieces):
        f.write(pieces[0])
        raise error

    before, names = (own / WEIGHTS).read_bytes(), names_of(own)
    monkeypatch.setattr(safetensors_file, "write_blocks", write_half)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        save_params(str(own), nest(random_tensors(TINY, seed=1), TINY["n_layer"]), TINY)
    message = f"cannot write {own / WEIGHTS} (No space left on device); make room, or choose another --models_dir"
    assert str(caught.value) == (message if isinstance(error, OSError) else "")
    assert names_of(own) == names
    assert (own / WEIGHTS).read_bytes() == before


def test_full_disk_is_noticed_before_the_import(release, monkeypatch):
    before, usage = names_of(release), shutil.disk_usage(release)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(lambda: load(release), WEIGHTS, "0.00 GB free", "make room")
    assert names_of(release) == before


# The imported file as other programs read it


def test_transformers_load_the_folder(own, tiny_tensors):
    from transformers import GPT2Config, GPT2LMHeadModel

    model, report = GPT2LMHeadModel.from_pretrained(own, output_loading_info=True)
    assert [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]] == []
    state = model.state_dict()
    for name, tensor in tiny_tensors.items():
        assert np.array_equal(state[f"transformer.{hugging_face_name(name)}"].numpy(), tensor), name
    assert np.array_equal(state["lm_head.weight"].numpy(), tiny_tensors["wte"])
    config, default = model.config, GPT2Config()
    sizes = (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    assert sizes == (400, 128, 36, 3, 2)
    assert (config.bos_token_id, config.eos_token_id) == (399, 399)
    for name in ("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights", "n_inner"):
        assert getattr(config, name) == getattr(default, name), name


def test_safetensors_package_reads_the_file(own, tiny_tensors):
    from safetensors.numpy import load_file

    found = load_file(own / WEIGHTS)
    assert set(found) == {hugging_face_name(name) for name in tiny_tensors}
    for name, tensor in tiny_tensors.items():
        array = found[hugging_face_name(name)]
        assert (array.shape, array.tobytes()) == (tensor.shape, tensor.tobytes()), name


def test_header_is_legal_and_tensors_are_aligned_where_their_sizes_allow(own):
    text, header, data = read_header(own / WEIGHTS)
    assert re.fullmatch(rb"\{.*\} *", text, re.DOTALL)
    assert (8 + len(text)) % 64 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    ends = [0, *(end for _, end in spans)]
    assert [span[0] for span in spans] == ends[:-1]  # no gaps, no overlaps
    assert ends[-1] == len(data)
    filling = [begin for begin, end in spans if (end - begin) % 64 == 0]
    assert 0 < len(filling) < len(spans)
    assert [begin for begin in filling if begin % 64] == []


def test_every_tensor_is_aligned_in_memory_if_the_width_is_a_multiple_of_16(tmp_path, vocabulary_dir):
    folder = shutil.copytree(vocabulary_dir, tmp_path / "wide")
    tensors = random_tensors(LINES_UP)
    write_safetensors(folder, LINES_UP, tensors)
    params = load(folder)[2]
    assert_same_params(params, tensors, LINES_UP)
    assert [name for name, tensor in flatten(params, LINES_UP).items() if tensor.ctypes.data % 64] == []


# Loading


def test_arrays_are_read_only_views_of_the_mapped_file(own):
    params = load(own)[2]
    for array in flatten(params, TINY).values():
        assert type(array) is np.ndarray
        assert not array.flags.writeable
        owner = array
        while isinstance(owner, np.ndarray | memoryview):
            owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
        assert isinstance(owner, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        params["wte"][0, 0] = 1.0


def test_loading_a_ready_model_imports_no_heavy_package_and_writes_nothing(own):
    before = times_of(own)
    code = (
        "import sys; from utils import load_encoder_hparams_and_params as load; load(*sys.argv[1:]); "
        "heavy = 'tensorflow torch transformers jax requests urllib3 safetensors tqdm filelock fire google_crc32c'; "
        "print([name for name in heavy.split() if name in sys.modules], 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, own.name, str(own.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("[] True\n", "")
    assert times_of(own) == before
    assert names_of(own.parent) == [own.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(own, release, tiny_tensors):
    for folder in (own, release):
        folder.chmod(0o555)
    try:
        assert_same_params(load(own)[2], tiny_tensors)
        assert_refused(lambda: load(release), "cannot write", "Permission denied", "--models_dir")
    finally:
        for folder in (own, release):
            folder.chmod(0o755)


def test_symlinked_folder_and_folder_within_a_folder(own, tmp_path, tiny_tensors):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model").symlink_to(own, target_is_directory=True)
    assert_same_params(load(tmp_path / "links" / "model")[2], tiny_tensors)
    assert_same_params(load_encoder_hparams_and_params("models/own", str(tmp_path))[2], tiny_tensors)


# Hugging Face's layout


def test_folder_saved_by_transformers(tmp_path, tiny_tensors, vocabulary_dir):
    """The same parameters, ids and logits as transformers from the same folder; its vocabulary is a tokenizer.json."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    shutil.copy(vocabulary_dir / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(vocabulary_dir / "vocab.bpe", tmp_path / "merges.txt")
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    sizes = {"vocab_size": 400, "n_positions": 128, "n_embd": 36, "n_head": 3, "n_layer": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=399, eos_token_id=399)).eval()
    state, folder = model.state_dict(), tmp_path / "models" / "today"
    for name, tensor in tiny_tensors.items():
        state[f"transformer.{hugging_face_name(name)}"].copy_(torch.from_numpy(tensor))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    assert "transformer.wte.weight" in read_header(folder / WEIGHTS)[1]

    encoder, hparams, params = load(folder)
    assert hparams == TINY
    assert_same_params(params, tiny_tensors)
    ids = encoder.encode("def softmax(x):  # Müller 🤗")
    assert ids == tokenizer("def softmax(x):  # Müller 🤗")["input_ids"]
    assert encoder.encoder["<|endoftext|>"] == 399
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(gpt2(ids, **params, n_head=hparams["n_head"]), expected, rtol=1e-4, atol=1e-5)


def prefixed(tensors):
    return {f"transformer.{name}": value for name, value in tensors.items()}


def output_layer(tensors, change=0):
    dtype, wte = tensors["wte.weight"]
    lm_head = wte.copy()
    lm_head[399, 35] += change
    return {"lm_head.weight": (dtype, lm_head)}


def masks(dtype):
    kind = {"F32": np.float32, "BOOL": np.bool_, "U8": np.uint8}[dtype]
    mask, low = (dtype, np.tri(128, dtype=kind).reshape(1, 1, 128, 128)), ("F32", np.array(-1e4, np.float32))
    names = {"h.0.attn.bias": mask, "h.0.attn.masked_bias": low}
    return names | {"h.1.attn.masked_bias": low, "h.1.attn.bias": mask}


ACCEPTED = {
    "names with a prefix": edit_tensors(prefixed),
    "names without a prefix": edit_tensors(lambda t: t),
    "tied output layer": edit_tensors(lambda t: t | output_layer(t)),
    "tied output layer, prefix": edit_tensors(lambda t: prefixed(t) | output_layer(t)),
    "no metadata": edit_header(lambda header: header.pop("__metadata__")),
    "tanh form of gelu": edit_json("config.json", activation_function="gelu_pytorch_tanh"),
    "default n_inner": edit_json("config.json", n_inner=None),
    "n_inner": edit_json("config.json", n_inner=144),
}
for kind in ("F32", "BOOL", "U8"):
    ACCEPTED[f"{kind} masks first"] = edit_tensors(lambda t, kind=kind: masks(kind) | t)
    ACCEPTED[f"{kind} masks last"] = edit_tensors(lambda t, kind=kind: t | masks(kind))
    ACCEPTED[f"{kind} masks, prefix"] = edit_tensors(lambda t, kind=kind: prefixed(masks(kind) | t))


@pytest.mark.parametrize("how", ACCEPTED)
def test_variations_of_hugging_faces_layout_load(hugging_face, tiny_tensors, how):
    ACCEPTED[how](hugging_face)
    assert_same_params(load(hugging_face)[2], tiny_tensors)


# Folders that are refused


def entry(**changes):
    """Change the header's entry of a tensor of 144 bytes; a value of ... removes the key."""

    def change(header):
        found = header["h.0.ln_1.bias"] | changes
        header["h.0.ln_1.bias"] = {key: value for key, value in found.items() if value is not ...}

    return edit_header(change)


def same_bytes(header):
    header["h.0.ln_1.bias"]["data_offsets"] = header["h.1.ln_2.weight"]["data_offsets"]


def tensor(name, dtype, array):
    return edit_tensors(lambda tensors: tensors | {name: (dtype, array)})


def no_tensor(name):
    return edit_tensors(lambda tensors: {other: value for other, value in tensors.items() if other != name})


def tokenizer(content):
    def edit(folder):
        without("encoder.json")(folder)
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    return edit


GARBLED = {
    "empty": DAMAGES["empty"],
    "zeros": DAMAGES["zeros"],
    "cut in the header length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-4],
    "cut to the header": lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")],
    "bytes after the data": lambda raw: raw + b"\0\0\0\0",
    "garbage header": lambda raw: raw[:8] + b"\xff" * 100 + raw[108:],
    "garbage": lambda raw: bytes(range(256)) * 100,
    "web page": lambda raw: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    "header longer than the file": lambda raw: (len(raw) + 1).to_bytes(8, "little") + raw[8:],
    "header of 2**63 bytes": lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
    "header of no bytes": lambda raw: bytes(8) + raw[8:],
    "header length too small": lambda raw: (20).to_bytes(8, "little") + raw[8:],
}
HEADERS = [None, [], 3, "x", {}, {"wte.weight": 1}, {"wte.weight": {}}]
HEADERS += [{"wte.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}]
OFFSETS = [[10**9, 10**9 + 144], [-288, -144], [-144, 0], [144, 0], [0, 140], [0, 143], [0, 288], [0.5, 144.5]]
OFFSETS += [["0", "144"], [None, None], [0, 144, 288], [144], 144]
NOT_JSON = [b"", b"{", b"not JSON", b"\0\0\0\0", b'{"n_vocab": 400', b"[400]", b"400", b"null", b'{"who": "\xe9"}']
BYTE_LEVEL = {"pre_tokenizer": {"type": "ByteLevel"}}
NO_TOKENIZERS = [{}, {"model": {"type": "WordPiece"}}, {"model": {"type": "BPE"}} | BYTE_LEVEL]
NO_TOKENIZERS += [{"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}]
NO_TOKENIZERS += [{"model": {"type": "BPE", "vocab": {}, "merges": [3]}} | BYTE_LEVEL]
NO_TOKENIZERS += [{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}} | BYTE_LEVEL]
COPY = "put a good copy in its place"

REFUSED = [  # the folder before, the file or folder that the message names, the change, words of the message
    *[("own", WEIGHTS, damage(WEIGHTS, GARBLED[how]), "corrupt", COPY) for how in GARBLED],
    *[("own", WEIGHTS, write(WEIGHTS, with_header(json.dumps(h).encode())), "corrupt") for h in HEADERS],
    *[("own", WEIGHTS, entry(data_offsets=offsets), "is corrupt") for offsets in OFFSETS],
    ("own", WEIGHTS, entry(dtype=...), "is corrupt"),
    ("own", WEIGHTS, entry(shape=...), "is corrupt"),
    ("own", WEIGHTS, entry(shape=36), "is corrupt"),
    ("own", WEIGHTS, edit_header(same_bytes), "is corrupt"),
    *[
        ("own", WEIGHTS, no_tensor(name), f"lacks the tensor {name}", "correct the hparams")
        for name in ("wte.weight", "h.1.attn.c_attn.bias", "ln_f.weight")
    ],
    *[
        ("own", WEIGHTS, tensor(name, "F32", np.ones(36)), f"has the tensor {name}", "correct the hparams")
        for name in ("h.2.ln_1.weight", "score.weight", "h.0.crossattention.bias")
    ],
    *[
        ("own", WEIGHTS, tensor("h.1.ln_2.bias", dtype, np.ones(36, kind)), "h.1.ln_2.bias is " + dtype, "only F32")
        for dtype, kind in (("F16", np.float16), ("BF16", np.uint16), ("F64", np.float64))
    ],
    ("own", WEIGHTS, tensor("h.0.mlp.c_fc.weight", "F32", np.ones((144, 36))), "[144, 36]", "[36, 144]"),
    ("hugging_face", WEIGHTS, edit_tensors(lambda t: t | output_layer(t, 1)), "lm_head.weight", "wte.weight", "tie"),
    *[
        (folder, file, edit_json("hparams.json", **{name: value}), *words, "correct the hparams")
        for folder, file in (("own", WEIGHTS), ("release", "model.ckpt"))
        for name, value, *words in (
            ("n_embd", 33, "has shape [400, 36]", "[400, 33]"),
            ("n_vocab", 401, "has shape [400, 36]", "[401, 36]"),
            ("n_ctx", 64, "has shape [128, 36]", "[64, 36]"),
            ("n_layer", 3, "lacks the tensor"),
            ("n_layer", 1, "has the tensor"),
        )
    ],
    *[("own", "hparams.json", write("hparams.json", text), "corrupt", COPY) for text in NOT_JSON],
    *[
        ("own", "hparams.json", edit_json("hparams.json", **{name: value}), f": {name} is {shown!r}", "positive whole")
        for name in TINY
        for value, shown in [(..., None)] + [(value, value) for value in (0, -1, "36", True, 36.0, None, [36])]
    ],
    ("own", "hparams.json", edit_json("hparams.json", n_head=5), "n_embd 36", "n_head 5", "not a multiple"),
    ("hugging_face", "config.json", write("config.json", b"{"), "corrupt", COPY),
    *[
        ("hugging_face", "config.json", edit_json("config.json", **{name: value}), f"{ours} is", "correct it")
        for name, ours in (("vocab_size", "n_vocab"), ("n_embd", "n_embd"), ("n_head", "n_head"))
        for value in (..., None, 0, "36", True)
    ],
    *[
        ("hugging_face", "config.json", edit_json("config.json", **{name: value}), f"{name} is {value!r}", wanted)
        for name, value, wanted in (
            ("model_type", "gpt_neo", "gpt2"),
            ("activation_function", "relu", "gelu_new"),
            ("activation_function", "gelu", "gelu_new"),  # the exact form, not the tanh form
            ("layer_norm_epsilon", 1e-6, "1e-05"),
            ("n_inner", 72, "144"),
            ("tie_word_embeddings", False, "True"),
            ("scale_attn_weights", False, "True"),
            ("scale_attn_by_inverse_layer_idx", True, "False"),
            ("add_cross_attention", True, "False"),
        )
    ],
    ("own", "", edit_json("encoder.json", extra=400), "ids up to 400", "n_vocab = 400", "put the right vocabulary"),
    ("own", "encoder.json", edit_json("encoder.json", extra=-1), "corrupt"),
    *[
        ("own", "encoder.json", write("encoder.json", text), "corrupt", COPY)
        for text in (b"", b"{", b"[]", b'{"a": "b"}', b'{"a": 1.5}')
    ],
    *[
        ("own", "vocab.bpe", damage("vocab.bpe", lambda data, line=line: data + line), "corrupt", COPY)
        for line in (b"three symbols here\n", b"one\n", b"\xff \xfe\n")
    ],
    *[("own", "tokenizer.json", tokenizer(content), "tokenizer.json") for content in NO_TOKENIZERS],
    ("own", "", without("hparams.json", "config.json"), "lacks hparams.json; put"),
    ("own", "", without("encoder.json"), "lacks encoder.json; put"),
    ("own", "", without("vocab.bpe"), "lacks vocab.bpe; put"),
    ("own", "", without(WEIGHTS), f"lacks checkpoint, model.ckpt.index, model.ckpt.meta, {DATA_FILE}; put", WEIGHTS),
    ("hugging_face", "", without("vocab.json"), "lacks encoder.json, vocab.bpe; put"),
    ("hugging_face", "", without("merges.txt"), "lacks encoder.json, vocab.bpe; put"),
    ("release", "", without("checkpoint"), "lacks checkpoint; put"),
    ("release", "", without(DATA_FILE), f"lacks {DATA_FILE}; put"),
    *[
        ("release", "", write("checkpoint", text), "checkpoint")
        for text in (b"", b"garbage", b'model_checkpoint_path: "model-1000"\n')
    ],
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: "-".join((case[0], case[1], case[3])))
def test_refused_folder_stays_as_it_is(request, case):
    fixture, file, change, *words = case
    folder = request.getfixturevalue(fixture)
    change(folder)
    before = times_of(folder)
    assert_refused(lambda: load(folder), folder / file, *words, kind=CorruptFile if "corrupt" in words else UserError)
    assert times_of(folder) == before


def test_weights_that_are_a_folder(own):
    (own / WEIGHTS).unlink()
    (own / WEIGHTS).mkdir()
    with pytest.raises((UserError, IsADirectoryError), match=r"model\.safetensors"):  # the command line shows either
        load(own)


def test_corrupt_import_is_set_aside_and_made_again(release, tiny_tensors):
    load(release)
    whole = (release / WEIGHTS).read_bytes()
    damage(WEIGHTS, lambda raw: raw[:5000])(release)
    assert_refused(lambda: load(release), release / WEIGHTS, "5000 bytes", f"{WEIGHTS}.corrupt", "again")
    assert (release / f"{WEIGHTS}.corrupt").stat().st_size == 5000
    assert WEIGHTS not in names_of(release)
    assert_same_params(load(release)[2], tiny_tensors)
    assert (release / WEIGHTS).read_bytes() == whole


# Which folder


def test_unknown_model_size_lists_the_known_ones(own, tmp_path):
    (own.parent / "another").mkdir()
    (own.parent / "a-file").write_text("not a folder")
    for models_dir, folders in ((own.parent, ", another, own"), (tmp_path / "nowhere", "")):
        with pytest.raises(UserError) as caught:
            load_encoder_hparams_and_params("125M", str(models_dir))
        wanted = f"unknown model size '125M'; choose from 124M, 355M, 774M, 1558M{folders}"
        assert str(caught.value) == wanted
    assert not (tmp_path / "nowhere").exists()


NO_NAMES = ["..", ".", "", "../own", "own/../own", "/etc", "own/", "own//x", "..\\own", "a\\..\\own", "C:own", "own\0x"]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("mirror", [False, True])
def test_names_that_lead_out_of_models_dir(own, name, mirror, monkeypatch):
    if mirror:  # any name may be downloadable, and still no name may write elsewhere
        monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9/never-asked")
    before = sorted(str(path) for path in own.parent.parent.rglob("*"))
    words = repr(name), "model_size", "does not name a folder", own.parent, "try 124M"
    assert_refused(lambda: load_encoder_hparams_and_params(name, str(own.parent)), *words)
    assert sorted(str(path) for path in own.parent.parent.rglob("*")) == before


def test_empty_folder_stays(tmp_path):
    (tmp_path / "models" / "empty").mkdir(parents=True)
    words = "lacks hparams.json, encoder.json, vocab.bpe, checkpoint, model.ckpt.index", "put"
    assert_refused(lambda: load(tmp_path / "models" / "empty"), *words)
    assert names_of(tmp_path / "models") == ["empty"]
