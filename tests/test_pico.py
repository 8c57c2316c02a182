"""gpt2_pico.py prints what gpt2.py prints."""

import ast
import runpy
import shutil
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, TINY
from tests.programs import assert_mistake, assert_prints, run
from tests.random_model import write_safetensors
from tests.test_cli import TWELVE


@pytest.fixture
def pico(capsysbinary, monkeypatch, tiny_flags):
    """Run gpt2_pico.py in this process; returns what tests.programs.run returns."""

    def run_pico(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpt2_pico.py", *tiny_flags, *arguments])
        capsysbinary.readouterr()
        try:
            runpy.run_path(str(ROOT / "gpt2_pico.py"), run_name="__main__")
        except SystemExit as error:
            return error.code, *capsysbinary.readouterr()
        return 0, *capsysbinary.readouterr()

    return run_pico


@pytest.mark.parametrize("prompt", ["Alan Turing", "42", "[1,2]", "None", "1e5", "Ondřej 你好 🤗", "a\n\nb"])
def test_pico_prints_what_transformers_and_gpt2_print(pico, inside, tiny_flags, truth, prompt):
    result = pico(prompt, "--n_tokens_to_generate", "8")
    assert_prints(result, truth(prompt))
    assert result == inside(prompt, "--n_tokens_to_generate", 8, *tiny_flags)


def test_pico_generates_forty_tokens_from_another_directory(tiny_models_dir, truth, tmp_path):
    flags = ["--model_size=tiny", f"--models_dir={tiny_models_dir}"]
    assert_prints(run("Hello", *flags, script="gpt2_pico.py", cwd=tmp_path), truth("Hello", 40))


def test_pico_fills_the_whole_context(pico, truth):
    assert_prints(pico(TWELVE * 10, "--n_tokens_to_generate", "8"), truth(TWELVE * 10, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([TWELVE * 10, "--n_tokens_to_generate", "9"], ["120 prompt tokens", "9"]),
        (["", "--n_tokens_to_generate", "8"], ["prompt tokens"]),
        (["Hello", "--n_tokens_to_generate", "1.5"], []),
        (["Hello", "--n_tokens_to_generate", "-1"], []),
        (["Hello", "--model_size", "125M"], ["125M", "124M"]),
        (["Hello", "--models_dir", "/dev/null/models", "--model_size", "124M"], ["/dev/null/models"]),
        (["abc\udcff"], ["U+DCFF"]),
        (["Hello", "--no_such_flag", "3"], ["unexpected", "no_such_flag"]),
        (["Hello", "8", "tiny", "models", "upper"], ["arguments"]),
    ],
)
def test_a_mistake_ends_in_one_line(pico, arguments, words, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    assert_mistake(pico(*arguments), *words, script="gpt2_pico.py")


def test_a_missing_prompt_is_an_error(pico):
    code, out, err = pico()
    assert (code, out) == (2, b"")
    assert b"required argument: prompt" in err and b"Traceback" not in err


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_damaged_weights_are_an_error(pico, tmp_path, vocabulary_dir, tiny_tensors, damage):
    folder = shutil.copytree(vocabulary_dir, tmp_path / "damaged")
    tensors = tiny_tensors | {"h1/attn/c_proj/b": tiny_tensors["h1/attn/c_proj/b"] * np.float32(damage)}
    write_safetensors(str(folder), TINY, tensors)
    result = pico("Hello", "--model_size", "damaged", "--models_dir", str(tmp_path))
    assert_mistake(result, "the weights are damaged", script="gpt2_pico.py")


def test_the_file_is_as_short_as_the_documents_say():
    source = (ROOT / "gpt2_pico.py").read_text(encoding="utf-8")
    assert source.count("\n") == 60 and "Jay Mody" in ast.get_docstring(ast.parse(source))
    readme, cli = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cli.md"))
    assert (readme.count("in 60 lines"), cli.count("of 60 lines")) == (2, 1)
