"""gpt2.py --list_models: layouts and missing files of complete, incomplete and damaged models beside other folders."""

import json
import os
import shutil

import pytest

from tests.conftest import ROOT, TINY
from tests.programs import assert_mistake, run
from tests.random_model import write_hparams


@pytest.fixture
def copy(tiny_models_dir, tmp_path):
    """Copy the tiny model, without some files, into a folder of tmp_path; rename files of it."""

    def make(name, without=(), **renamed):
        folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path / name)
        for file in without:
            (folder / file).unlink()
        for old, new in renamed.items():
            next(folder.glob(f"{old}.*")).rename(folder / new)
        return folder

    return make


@pytest.fixture
def listed(inside, tmp_path):
    """The rows of the table of tmp_path: from the name of each model to its other cells."""

    def rows():
        code, out, err = inside("--list_models", "--models_dir", tmp_path)
        assert (code, err) == (0, b"")
        lines = [line.split("  ") for line in out.decode().splitlines()]
        cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
        assert cells[0] == ["model", "parameters", "context", "vocabulary", "layout", "state"]
        return {name: rest for name, *rest in cells[1:]}

    return rows


HUGGING_FACE = {"encoder": "vocab.json", "vocab": "merges.txt"}
SIZES = ["0.08 M", "128", "400"]


def test_complete_models_of_each_layout(copy, listed, tmp_path):
    copy("imported")
    copy("hf", without=["hparams.json"], **HUGGING_FACE)
    copy("trained", **HUGGING_FACE)
    copy("openai-community/gpt2", **HUGGING_FACE)
    (tmp_path / "linked").symlink_to(tmp_path / "imported")
    released = copy("released", without=["model.safetensors", "config.json"])
    (released / "checkpoint").write_text('model_checkpoint_path: "other.ckpt"\n', encoding="utf-8")
    for end in ("index", "data-00000-of-00001"):
        (released / f"other.ckpt.{end}").touch()
    assert listed() == {
        "hf": [*SIZES, "Hugging Face's", "complete"],
        "imported": [*SIZES, "imported", "complete"],
        "linked": [*SIZES, "imported", "complete"],
        "openai-community/gpt2": [*SIZES, "Hugging Face's", "complete"],
        "released": [*SIZES, "OpenAI's checkpoint", "complete"],
        "trained": [*SIZES, "Hugging Face's", "complete"],
    }


def test_incomplete_models_name_what_is_missing(copy, listed, tmp_path):
    copy("no weights", without=["model.safetensors"], **HUGGING_FACE)
    copy("no merges", without=["vocab.bpe"], encoder="vocab.json")
    copy("no config", without=["hparams.json", "config.json"], **HUGGING_FACE)
    copy("no vocabulary", without=["encoder.json", "vocab.bpe"])
    copy("half", without=["model.safetensors", "config.json", "vocab.bpe"])
    (tmp_path / "124M").mkdir()
    write_hparams(tmp_path / "124M", TINY)
    checkpoint = "checkpoint, model.ckpt.index, model.ckpt.meta, model.ckpt.data-00000-of-00001"
    assert listed() == {
        "124M": [*SIZES, "OpenAI's checkpoint", f"lacks encoder.json, vocab.bpe, {checkpoint}; a run downloads them"],
        "half": [*SIZES, "OpenAI's checkpoint", f"lacks vocab.bpe, {checkpoint}"],
        "no config": ["Hugging Face's", "lacks config.json"],
        "no merges": [*SIZES, "Hugging Face's", "lacks merges.txt"],
        "no vocabulary": [*SIZES, "Hugging Face's", "lacks vocab.json, merges.txt"],
        "no weights": [*SIZES, "Hugging Face's", "lacks model.safetensors"],
    }


def test_damaged_models_have_the_fault_in_their_row(copy, listed, tmp_path):
    os.truncate(copy("short") / "model.safetensors", 1000)
    (copy("json", without=["hparams.json"]) / "config.json").write_text("{", encoding="utf-8")
    (copy("bert", without=["hparams.json"]) / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    write_hparams(copy("mismatch"), TINY | {"n_layer": 3})
    (copy("a\x1b[31m\nb") / "hparams.json").write_text(json.dumps(TINY | {"n_ctx": 0}), encoding="utf-8")
    rows = listed()
    words = {"short": "no safetensors header", "json": "is corrupt", "bert": "only GPT-2 is supported"}
    words |= {"mismatch": "h.2.", "a\ufffd[31m b": "n_ctx is 0"}
    assert rows.keys() == words.keys()
    for name, word in words.items():
        assert word in rows[name][-1] and (name == "json" or str(tmp_path) in rows[name][-1]), rows[name]


def test_other_folders_and_files_are_not_models(inside, copy, listed, tmp_path):
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/config.json").touch()
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "config.json").touch()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").mkdir()
    os.mkfifo(tmp_path / "junk" / "model.safetensors")
    code, out, err = inside("--list_models", "--models_dir", tmp_path)
    assert (code, out) == (0, b"") and err.startswith(b"note: no models in ") and err.count(b"\n") == 1
    copy("tiny")
    assert list(listed()) == ["tiny"]


def test_mistakes(inside, tmp_path):
    assert_mistake(inside("--list_models", "--models_dir", tmp_path / "none"), "none is not a folder", "--models_dir")
    mistake = inside("a", "--list_models", "--seed", 1)
    assert_mistake(mistake, "--list_models does not generate text; leave out the prompt, --seed")


def test_the_bundled_model_is_listed_by_default():
    code, out, err = run("--list_models", cwd=ROOT)
    assert (code, err) == (0, b"") and b"\nshakespeare  2.79 M " in out
