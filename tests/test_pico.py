"""gpt2_pico.py prints what gpt2.py prints."""

import pytest

from tests.programs import assert_mistake, assert_prints, run
from tests.test_cli import TWELVE


@pytest.mark.parametrize(
    "prompt", ["Alan Turing theorized that", "42", "[1,2]", "None", "1e5", "Ondřej 你好 🤗", "a\n\nb"]
)
def test_pico_prints_what_gpt2_prints(inside, tiny_flags, truth, prompt):
    result = run(prompt, "--n_tokens_to_generate", "8", *tiny_flags, script="gpt2_pico.py")
    assert_prints(result, truth(prompt))
    assert result == inside(prompt, "--n_tokens_to_generate", 8, *tiny_flags)


def test_pico_generates_forty_tokens_from_another_directory(tiny_models_dir, truth, tmp_path):
    flags = ["--model_size=tiny", f"--models_dir={tiny_models_dir}"]
    assert_prints(run("Hello", *flags, script="gpt2_pico.py", cwd=tmp_path), truth("Hello", 40))


def test_pico_fills_the_whole_context(tiny_flags, truth):
    flags = ["--n_tokens_to_generate", "116", *tiny_flags]
    assert_prints(run(TWELVE, *flags, script="gpt2_pico.py"), truth(TWELVE, 116))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([TWELVE, "--n_tokens_to_generate", "117"], ["12 prompt tokens", "117"]),
        (["", "--n_tokens_to_generate", "8"], ["prompt tokens"]),
        (["Hello", "--n_tokens_to_generate", "eight"], []),
        (["Hello", "--n_tokens_to_generate", "1.5"], []),
        (["Hello", "--n_tokens_to_generate", "-1"], []),
        (["Hello", "--model_size", "125M"], ["125M", "124M"]),
        (["Hello", "--model_size", "../tiny"], ["../tiny"]),
        (["Hello", "--models_dir", "/dev/null/models", "--model_size", "124M"], ["/dev/null/models"]),
        ([b"abc\xff"], ["U+DCFF"]),
    ],
)
def test_a_mistake_ends_in_one_line(tiny_flags, arguments, words, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    assert_mistake(run(*tiny_flags, *arguments, script="gpt2_pico.py"), *words, script="gpt2_pico.py")


@pytest.mark.parametrize("arguments", [[], ["Hello", "--no_such_flag", "3"]])
def test_missing_and_unknown_arguments_are_errors(tiny_flags, arguments):
    code, out, err = run(*arguments, *tiny_flags, script="gpt2_pico.py")
    assert (code, out) == (2, b"")
    assert b"Traceback" not in err
