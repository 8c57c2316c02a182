"""Weights as files: OpenAI's checkpoint is imported bit for bit, both layouts load, damage is reported in one line."""

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest

from tests.conftest import DATA, ROOT, TINY, assert_same_params, flipped, need, one_line_error, set_free_space
from tests.random_model import SIZE_124M, random_tensors, write_safetensors
from utils import load_encoder_hparams_and_params
from weights.errors import CorruptFile, UserError, quote
from weights.names import flatten, tensor_shapes
from weights.releases import DATA_FILE
from weights.tf_checkpoint import read_index

WEIGHTS, INDEX = "model.safetensors", "model.ckpt.index"


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


def times_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# Changes of a folder: functions of its path


def updated(found, changes):
    return {key: value for key, value in (found | changes).items() if value is not ...}


def edit_json(name, **changes):
    """Change a JSON object; a value of ... removes the key."""
    return damage(name, lambda data: json.dumps(updated(json.loads(data), changes)).encode())


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def damage(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write_header(header, data=b""):
    """Write a safetensors file of this header and data."""
    text = json.dumps(header).encode()
    return write(WEIGHTS, len(text).to_bytes(8, "little") + text + data)


def split(path):
    """Return the header of a safetensors file, as bytes, and the data."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def edit_entry(**changes):
    """Change the header's entry of a tensor of 192 bytes; a value of ... removes the key."""

    def edit(folder):
        text, data = split(folder / WEIGHTS)
        header = json.loads(text)
        header["h.0.ln_1.bias"] = updated(header["h.0.ln_1.bias"], changes)
        write_header(header, data)(folder)

    return edit


def edit_tensors(change):
    """Replace the tensors, a dict by name, by change(tensors), with the safetensors package."""

    def edit(folder):
        from safetensors.numpy import load_file, save_file

        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

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

    write(DATA_FILE, b"")(release)  # reading it again would fail
    before = times_of(release)
    assert_same_params(load(release)[2], tiny_tensors)
    assert capsys.readouterr().err == ""
    assert times_of(release) == before


def test_index_of_openais_release():
    """148 tensors in alphabetical order; offsets, sizes and CRCs as other readers have found them."""
    entries = read_index(str(need(DATA / "gpt2" / INDEX)))
    assert list(entries) == sorted(f"model/{name}" for name in tensor_shapes(**SIZE_124M))
    expected = {
        "h0/attn/c_attn/b": ("float32", (2304,), 0, 9_216, 0x8C273D74),
        "h0/attn/c_attn/w": ("float32", (1, 768, 2304), 9_216, 7_077_888, 0x863D710D),
        "wte": ("float32", (50257, 768), 343_369_728, 154_389_504, 0x0E298522),
    }
    assert {name: entries[f"model/{name}"] for name in expected} == expected


def test_checkpoint_under_another_path(release, tiny_tensors):
    """TensorFlow names a training run's checkpoints after the step; the .meta file is not read."""
    (release / "model.ckpt.meta").unlink()
    for name in (INDEX, DATA_FILE):
        (release / name).rename(release / name.replace("model.ckpt", "model-500"))
    write("checkpoint", b'model_checkpoint_path: "/home/somebody/gpt-2/models/124M/model-500"\n')(release)
    assert_same_params(load(release)[2], tiny_tensors)


EMPTY_BLOCK = b"\0\0\0\0\1\0\0\0"  # no record, one restart position


def with_crc(contents, compression=0):
    """Return a block of a LevelDB table: the contents, the compression and the masked CRC-32C of both."""
    block = contents + bytes([compression])
    crc = google_crc32c.value(block)
    return block + (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def compressed(index):
    return index.replace(with_crc(EMPTY_BLOCK), with_crc(EMPTY_BLOCK, compression=1))


def with_records(old, new):
    """Replace bytes in the records of the index, whose CRC becomes right again."""

    def edit(index):
        end = index.index(with_crc(EMPTY_BLOCK)) - 5
        return with_crc(index[:end].replace(old, new, 1)) + index[end + 5 :]

    return damage(INDEX, edit)


def test_any_damage_of_the_index_is_an_error_in_one_line(tiny_release, tmp_path):
    """Each byte is covered by a CRC, but for those of the footer; malformed records may have a right CRC."""
    path, data = tmp_path / "index", (tiny_release / INDEX).read_bytes()
    n_records, footer = data.index(with_crc(EMPTY_BLOCK)) - 5, len(data) - 48
    damaged = [flipped(data, i) for i in range(0, footer, 5)] + [data[:i] for i in range(0, len(data), 30)]
    damaged += [byte * n + data[-8:] for n in range(0, 60, 3) for byte in (b"\0", b"\xff")]
    for changed in damaged:
        path.write_bytes(changed)
        with one_line_error(path, "corrupt", kind=CorruptFile):
            read_index(str(path))

    rng = np.random.default_rng(0)
    damaged = [flipped(data, i) for i in range(footer, len(data))]
    for _ in range(200):
        changed = bytearray(data[:n_records])
        for i in rng.integers(n_records, size=3):
            changed[i] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        damaged.append(with_crc(bytes(changed)) + data[n_records + 5 :])
    for changed in damaged:
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            read_index(str(path))


def test_a_full_disk_or_a_missing_package_is_noticed_before_the_import(release, monkeypatch):
    before = times_of(release)
    set_free_space(monkeypatch, 100_000)
    with one_line_error(WEIGHTS, "100 kB free", "make room"):
        load(release)
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with one_line_error("google-crc32c", "pip install -r requirements.txt"):
        load(release)
    assert times_of(release) == before


def test_transformers_load_the_folder_and_save_one_that_loads(hugging_face, tmp_path, tiny_tensors):
    """The saved vocabulary is a tokenizer.json; test_gpt2.py compares the logits."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    assert b'{"__metadata__": {"format": "pt"}, ' in split(hugging_face / WEIGHTS)[0]  # which some versions need
    model, report = GPT2LMHeadModel.from_pretrained(hugging_face, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer, folder = GPT2Tokenizer.from_pretrained(hugging_face), tmp_path / "saved"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    assert b'"transformer.wte.weight"' in split(folder / WEIGHTS)[0]
    encoder, hparams, params = load(folder)
    assert hparams == TINY
    assert_same_params(params, tiny_tensors)
    assert encoder.encoder["<|endoftext|>"] == 399
    text = "def softmax(x):  # Müller 🤗"
    assert encoder.encode(text) == tokenizer(text)["input_ids"]


# Loading


def test_arrays_are_aligned_read_only_views_of_the_mapped_file(own):
    hparams = TINY | {"n_embd": 36}  # some tensors do not fill cache lines
    write_safetensors(own, hparams, random_tensors(hparams))
    for array in flatten(load(own)[2], hparams).values():
        assert not array.flags.writeable
        assert array.nbytes % 64 or array.ctypes.data % 64 == 0  # a tensor that fills cache lines begins with one
        owner = array
        while isinstance(owner, np.ndarray | memoryview):
            owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
        assert isinstance(owner, mmap.mmap)


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
    assert list(times_of(own.parent)) == [own.name]


def test_folder_within_a_symlinked_folder(own, tmp_path, tiny_tensors):
    (tmp_path / "link").symlink_to(own.parent, target_is_directory=True)
    assert_same_params(load_encoder_hparams_and_params("link/own", str(tmp_path))[2], tiny_tensors)


# Variations of Hugging Face's layout


def prefixed(tensors):
    return {f"transformer.{name}": value for name, value in tensors.items()}


def output_layer(tensors, change=0):
    wte = tensors["wte.weight"].copy()
    wte[399, 35] += change
    return {"lm_head.weight": wte}


def masks(dtype):
    mask, low = np.tri(128, dtype=dtype).reshape(1, 1, 128, 128), np.array(-1e4, np.float32)
    return {f"h.{i}.attn.{name}": value for i in (0, 1) for name, value in (("bias", mask), ("masked_bias", low))}


ACCEPTED = {
    "names without a prefix, no metadata": edit_tensors(lambda t: t),
    "prefix, tied output layer": edit_tensors(lambda t: prefixed(t) | output_layer(t)),
    "masks of numbers": edit_tensors(lambda t: t | masks(np.float32)),
    "prefix, masks of truth values": edit_tensors(lambda t: prefixed(t | masks(np.bool_))),
    "tanh form of gelu": edit_json("config.json", activation_function="gelu_pytorch_tanh"),
    "n_inner": edit_json("config.json", n_inner=192),
}


@pytest.mark.parametrize("how", ACCEPTED)
def test_variations_of_hugging_faces_layout_load(hugging_face, tiny_tensors, how):
    ACCEPTED[how](hugging_face)
    assert_same_params(load(hugging_face)[2], tiny_tensors)


# Folders that are refused


def tensor(name, array):
    return edit_tensors(lambda tensors: tensors | {name: array})


def mislabeled(folder):
    tensor("h.1.ln_2.bias", np.ones(48))(folder)
    damage(WEIGHTS, lambda raw: raw.replace(b'"F64"', b'"F32"'))(folder)


def large_header(folder):
    write(WEIGHTS, (10**9).to_bytes(8, "little"))(folder)
    os.truncate(folder / WEIGHTS, 10**9 + 8)


def word_piece(folder):
    (folder / "encoder.json").unlink()
    write("tokenizer.json", b'{"model": {"type": "WordPiece"}}')(folder)


GARBLED = [  # changes of model.safetensors
    lambda raw: b"",
    lambda raw: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    lambda raw: raw[:100],  # cut in the header
    lambda raw: raw[:-4],
    lambda raw: raw + b"\0\0\0\0",
    lambda raw: raw[:8] + b"\xff" * 100 + raw[108:],
    lambda raw: bytes(8) + raw[8:],
    lambda raw: (len(raw) - 7).to_bytes(8, "little") + raw[8:],  # a header longer than the file
    lambda raw: raw[:8] + b"[" * 10_000 + raw[10_008:],
]
HEADERS = [None, 3, {"wte.weight": 1}, {"__metadata__": {"a": 1}}, {"__metadata__": [1]}]
NO_TENSORS = [{}, {"wte.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}]
OFFSETS = [[10**9, 10**9 + 192], [-384, -192], [192, 0], [0, 188], [0, 384], [0.5, 192.5], [192], 192]
MALFORMED = [{"dtype": ...}, {"dtype": 32}, {"shape": ...}, {"shape": ["48"]}, {"data_offsets": [1, True]}]
NO_INTEGERS = [..., 0, -1, "48", True, 48.0, [48], 2**31, 10**4000, float("nan"), "\n" * 999]
OTHER_MODELS = [  # a change of Hugging Face's config, the value that GPT-2 has
    ("model_type", "gpt_neo", "gpt2"),
    ("activation_function", "gelu", "gelu_new"),  # the exact form, not the tanh form
    ("layer_norm_epsilon", 1e-6, "1e-05"),
    ("n_inner", 96, "4 * 48"),
    ("n_inner", 10**4299, "4 * 48"),
    ("tie_word_embeddings", False, "True"),
    ("scale_attn_weights", False, "True"),
    ("scale_attn_by_inverse_layer_idx", True, "False"),
    ("add_cross_attention", True, "False"),
]
OTHER_SIZES = [  # a change of the hparams, words of the message
    ("n_embd", 33, "has shape [400, 48]", "[400, 33]"),
    ("n_vocab", 401, "has shape [400, 48]", "[401, 48]"),
    ("n_ctx", 64, "has shape [128, 48]", "[64, 48]"),
    ("n_layer", 3, "lacks the tensor"),
    ("n_layer", 1, "has the tensor"),
    *(("n_layer", n, "28 tensors of 328 kB", f"n_layer = {n}", size) for n, size in ((29, "MB"), (2**31 - 1, "TB"))),
]
TENSORS = [  # a change of the tensors, words of the message
    (edit_tensors(lambda t: {name: t[name] for name in t if name != "wte.weight"}), "lacks the tensor 'wte.weight'"),
    (tensor("h.0.crossattention.bias", np.ones(48)), "has the tensor 'h.0.crossattention.bias'"),
    (tensor("a\n\x1b[2J\u202e" + "x" * 9999, np.ones(48)), r"has the tensor 'a\n\x1b[2J\u202exxx", "xx...xx"),
    (tensor("transformer.h.1.ln_2.bias", np.ones(48, np.float32)), "corrupt", "with and without the prefix"),
    (tensor("h.1.ln_2.bias", np.ones(48, np.float16)), "h.1.ln_2.bias is 'F16'", "only 'F32'"),
    (tensor("h.0.mlp.c_fc.weight", np.ones((192, 48), np.float32)), "[192, 48]", "[48, 192]"),
    (edit_tensors(lambda t: t | output_layer(t, 1)), "lm_head.weight", "wte.weight", "tie"),
    (mislabeled, "corrupt", "384 bytes for h.1.ln_2.bias, 192 needed"),
]
CUT_OR_FLIPPED = [lambda data: b"", lambda data: data[:-20], lambda data: flipped(data, 0), flipped]
CHECKPOINTS = [b"", b"garbage", b'model_checkpoint_path: "model-1000"\n']
NOT_JSON = [b"", b"{", b"[400]", b'{"who": "\xe9"}', b"[" * 100_000, b'{"n_vocab": 4' + b"0" * 5000 + b"}"]
REFUSED = [  # the folder before, the file or folder that the message names, the change, words of the message
    *[("own", WEIGHTS, damage(WEIGHTS, change), "corrupt") for change in GARBLED],
    ("own", WEIGHTS, large_header, "corrupt", "header would have 1 GB", "100 MB are allowed"),
    *[("own", WEIGHTS, write_header(header), "corrupt") for header in HEADERS],
    *[("own", WEIGHTS, write_header(header), "corrupt", "no tensors") for header in NO_TENSORS],
    *[("own", WEIGHTS, edit_entry(data_offsets=offsets), "corrupt") for offsets in OFFSETS],
    *[("own", WEIGHTS, edit_entry(**change), "corrupt", "no valid entry for 'h.0.ln_1.bias'") for change in MALFORMED],
    *[("own", WEIGHTS, *case) for case in TENSORS],
    *[("own", WEIGHTS, edit_json("hparams.json", **{name: n}), *words) for name, n, *words in OTHER_SIZES],
    *[("release", "model.ckpt", edit_json("hparams.json", **{name: n}), *words) for name, n, *words in OTHER_SIZES],
    *[("own", "hparams.json", write("hparams.json", text), "corrupt") for text in NOT_JSON],
    *[("own", "hparams.json", edit_json("hparams.json", **{name: 0}), "corrupt", f"({name} is 0") for name in TINY],
    *[("own", "hparams.json", edit_json("hparams.json", n_embd=n), "corrupt", "not a whole n") for n in NO_INTEGERS],
    ("own", "hparams.json", edit_json("hparams.json", n_head=5), "corrupt", "n_embd 48", "n_head 5", "not a multiple"),
    ("hugging_face", "config.json", write("config.json", b"{"), "corrupt"),
    ("hugging_face", "config.json", edit_json("config.json", vocab_size=...), "corrupt", "n_vocab is None"),
    ("hugging_face", "config.json", edit_json("config.json", n_head="3"), "corrupt", "n_head is '3'"),
    *[
        ("hugging_face", "config.json", edit_json("config.json", **{name: value}), f"{name} is {quote(value)}", gpt2s)
        for name, value, gpt2s in OTHER_MODELS
    ],
    ("own", "", edit_json("encoder.json", **{"<extra>": 400}), "ids up to 400", "n_vocab = 400", "put the right voc"),
    ("own", "tokenizer.json", word_piece, "is not a byte-level BPE"),
    ("own", "", lambda folder: without(*times_of(folder))(folder), "lacks hparams.json, encoder.json, vocab.bpe, c"),
    ("own", "", without("vocab.bpe"), "lacks vocab.bpe; put"),
    ("own", "", without(WEIGHTS), f"lacks checkpoint, model.ckpt.index, model.ckpt.meta, {DATA_FILE}; put", WEIGHTS),
    ("hugging_face", "", without("merges.txt"), "lacks encoder.json, vocab.bpe; put"),
    ("release", "", without(DATA_FILE), f"lacks {DATA_FILE}; put"),
    *[("release", "checkpoint", write("checkpoint", text), "corrupt") for text in CHECKPOINTS],
    ("release", INDEX, damage(INDEX, flipped), "corrupt"),
    ("release", INDEX, damage(INDEX, compressed), "is compressed", "tf.train.Saver"),
    # fields of the header: number of data files, version, endianness; of the first entry: dtype
    ("release", INDEX, with_records(b"\x08\x01\x1a", b"\x08\x02\x1a"), "2 data files", "sharded=False"),
    ("release", INDEX, with_records(b"\x1a\x02\x08\x01", b"\x10\x01\x10\x01"), "is big-endian", "little-endian m"),
    ("release", "model.ckpt", with_records(b"attn/b\x08\x01", b"attn/b\x08\x13"), "is 'float16'; only 'float32' is"),
    *[("release", DATA_FILE, damage(DATA_FILE, change), "corrupt") for change in CUT_OR_FLIPPED],
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: "-".join((case[0], case[1], case[3])))
def test_refused_folder_stays_as_it_is(request, case):
    fixture, file, change, *words = case
    folder = request.getfixturevalue(fixture)
    change(folder)
    before = times_of(folder)
    if "corrupt" in words:
        words += ["put a good copy in its place"]
    with one_line_error(folder / file, *words, kind=CorruptFile if "corrupt" in words else UserError):
        load(folder)
    assert times_of(folder) == before


@pytest.mark.parametrize("layout", ["release", "hugging_face"])
def test_fifo_or_folder_in_place_of_a_file_is_an_error(request, layout, tmp_path):
    """A FIFO would wait for a writer for ever. model.ckpt.meta is not read."""
    folder = request.getfixturevalue(layout)
    for path in sorted(set(folder.iterdir()) - {folder / "model.ckpt.meta"}):
        os.replace(path, tmp_path / "kept")
        os.mkfifo(path)
        with one_line_error(path, "not a regular file") if path.name != "checkpoint" else one_line_error(path):
            load(folder)
        path.unlink()
        path.mkdir()
        with pytest.raises((UserError, IsADirectoryError)):
            load(folder)
        path.rmdir()
        os.replace(tmp_path / "kept", path)


def test_corrupt_import_is_set_aside_and_made_again(release, tiny_tensors, capsys):
    load(release)
    whole = (release / WEIGHTS).read_bytes()
    damage(WEIGHTS, lambda raw: raw[:5000])(release)
    assert_same_params(load(release)[2], tiny_tensors)
    assert f"{release / WEIGHTS} is corrupt" in capsys.readouterr().err
    assert (release / f"{WEIGHTS}.corrupt").read_bytes() == whole[:5000]
    assert (release / WEIGHTS).read_bytes() == whole


def test_unknown_model_size_lists_the_known_ones(own, tmp_path):
    (own.parent / "another").mkdir()
    (own.parent / "a-file").write_text("not a folder")
    with one_line_error("unknown model size '125M'; choose from 124M, 355M, 774M, 1558M, another, own"):
        load_encoder_hparams_and_params("125M", str(own.parent))
    for models_dir in (tmp_path / "nowhere", own.parent / "a-file"):
        with one_line_error("125M", f"in {models_dir}, which is not a folder", "--models_dir"):
            load_encoder_hparams_and_params("125M", str(models_dir))
    assert not (tmp_path / "nowhere").exists()


NO_NAMES = ["..", ".", "", "../own", "own/../own", "/etc", "own/", "own//x", "..\\own", "C:own", "own\0x"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_lead_out_of_models_dir(own, name, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9/never-asked")  # a mirror, which may have any model
    before = sorted(own.parent.parent.rglob("*"))
    with one_line_error(repr(name), "model_size", "does not name a folder", own.parent, "try 124M"):
        load_encoder_hparams_and_params(name, str(own.parent))
    assert sorted(own.parent.parent.rglob("*")) == before
