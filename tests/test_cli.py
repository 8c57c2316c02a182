"""The command line: what it prints for which flags, what it says to bad input, how it ends when it is stopped."""

import codecs
import contextlib
import errno
import fcntl
import functools
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from cli import generate as cli
from gpt2 import generate
from tests.conftest import ROOT, TINY
from tests.random_model import random_tensors, write_byte_vocabulary, write_safetensors
from utils import load_encoder_hparams_and_params
from weights import download

PROMPTS = ["Alan Turing theorized that", "42", "a", "def softmax(x):\n    return", "Ondřej 你好 🤗", "  two\n\n"]
TWELVE = "你好你好"  # twelve tokens, one a byte: nothing like it is in the text the vocabulary was learned from
SECONDS = 60  # what a run may take before a test gives up on it
# generation that stops dead after three tokens, for as long as a test needs: argv as for gpt2.py
HANGS_AFTER_THREE = """
import sys, time
from cli import generate as cli
def generate_tokens(*arguments):
    for i, token in enumerate(real(*arguments)):
        if i == 3:
            print("three are out", file=sys.stderr, flush=True)
            while True:
                time.sleep(0.05)
        yield token
real, cli.generate_tokens = cli.generate_tokens, generate_tokens
sys.exit(cli.run())
"""
# the same for what chooses the tokens
HANGS_AT_THE_FOURTH = """
import sys, time
from cli import generate as cli
def make_sampler(*arguments):
    sample, drawn = real(*arguments), []
    def slowly(logits):
        if len(drawn) == 3:
            print("three are out", file=sys.stderr, flush=True)
            while True:
                time.sleep(0.05)
        drawn.append(sample(logits))
        return drawn[-1]
    return slowly
real, cli.make_sampler = cli.make_sampler, make_sampler
sys.exit(cli.run())
"""
LETTERS = {"a": 0.4, "b": 0.3, "c": 0.15, "d": 0.1, "é": 0.05}  # what the letters model draws, whatever the prompt


# Models


def make_letters_model(models_dir, name, chances, end_of_text=0.0):
    """A model whose next token does not depend on the prompt: it draws these letters (or <|endoftext|>) by chance."""
    hparams = TINY | {"n_vocab": 258}
    folder = models_dir / name
    folder.mkdir(parents=True)
    write_byte_vocabulary(folder, hparams["n_vocab"])
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    vocabulary["Ã©"] = vocabulary.pop("<|256|>")  # the two bytes of é as one token
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tensors = random_tensors(hparams)
    tensors["ln_f/g"][:] = 0
    tensors["ln_f/b"][:] = np.eye(1, hparams["n_embd"])[0]  # so the logits are the first column of wte
    tensors["wte"][:, 0] = -40
    for letter, chance in chances.items():
        tensors["wte"][vocabulary["Ã©" if letter == "é" else letter], 0] = np.log(chance)
    if end_of_text:
        tensors["wte"][vocabulary["<|endoftext|>"], 0] = np.log(end_of_text)
    write_safetensors(folder, hparams, tensors)


@pytest.fixture(scope="session")
def letters_dir(tmp_path_factory):
    models_dir = tmp_path_factory.mktemp("letters")
    make_letters_model(models_dir, "letters", LETTERS)
    make_letters_model(models_dir, "ending", {"a": 0.6, "b": 0.3}, end_of_text=0.1)
    make_letters_model(models_dir, "ended", {"a": 0.1}, end_of_text=0.9)
    make_letters_model(models_dir, "accents", {"é": 1.0})
    return models_dir


@pytest.fixture(scope="session")
def truth(tiny_models_dir, tmp_path_factory):
    """A function from a prompt and a number of tokens to the text that transformers continue it with, greedily."""
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path_factory.mktemp("truth") / "tiny")
    (folder / "encoder.json").rename(folder / "vocab.json")
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.set_num_threads(1)  # threads cost such a model more than they save it

    @functools.cache
    def continuation(prompt, n_tokens=8):
        n_prompt = len(ids := tokenizer(prompt)["input_ids"] or [TINY["n_vocab"] - 1])
        for _ in range(n_tokens):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        return tokenizer.decode(ids[n_prompt:], clean_up_tokenization_spaces=False)

    return continuation


# Running the program


@pytest.fixture(autouse=True)
def usual_python(monkeypatch):
    """Settings of whoever runs the tests that would hide a missing flush or a wrong encoding."""
    for name in ("PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)


def command(*arguments, script="gpt2.py"):
    """A command as bytes: an argument may be bytes that are no text."""
    return [os.fsencode(a) for a in (sys.executable, ROOT / script, *arguments)]


def run(*arguments, script="gpt2.py", **options):
    """Runs the program as a person would; returns (exit code, standard output, standard error) as bytes."""
    options = {"input": b"", "capture_output": True, "timeout": SECONDS} | options
    done = subprocess.run(command(*arguments, script=script), check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tiny_flags(tiny_models_dir):
    return ["--model_size", "tiny", "--models_dir", str(tiny_models_dir)]


@pytest.fixture
def letters_flags(letters_dir):
    return ["--model_size", "letters", "--models_dir", str(letters_dir)]


@pytest.fixture
def inside(capsysbinary, monkeypatch):
    """The same as run() without a process of its own; standard input is what `typed` says."""

    def run_inside(*arguments, typed=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        capsysbinary.readouterr()
        code = cli.run([str(a) for a in arguments])
        return code, *capsysbinary.readouterr()

    return run_inside


def assert_mistake(result, *words, script="gpt2.py"):
    """Exit code 2, nothing on standard output, one line on standard error."""
    code, out, err = result
    text = err.decode("utf-8")
    assert (code, out) == (2, b""), text
    assert text.startswith(f"{script}: error: ") and text.endswith("\n") and text.count("\n") == 1, text
    for word in words:
        assert word in text


def assert_continues(result, text):
    """Exit code 0, the text and a newline on standard output, nothing on standard error."""
    assert result == (0, text.encode("utf-8") + b"\n", b"")


# The text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_continuation_is_that_of_transformers(tiny_flags, truth, prompt):
    assert_continues(run(prompt, "--n_tokens_to_generate", "8", *tiny_flags), truth(prompt))


def test_forty_tokens_are_the_default(inside, tiny_flags, truth):
    assert_continues(inside("Hello", *tiny_flags), truth("Hello", 40))


def test_from_another_directory(tiny_models_dir, truth, tmp_path):
    flags = ["--model_size", "tiny", "--models_dir", os.path.relpath(tiny_models_dir, tmp_path)]
    assert_continues(run("Hello", "--n_tokens_to_generate", "8", *flags, cwd=tmp_path), truth("Hello"))
    assert list(tmp_path.iterdir()) == []


def test_tilde_is_the_home_directory(inside, tiny_models_dir, truth, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_models_dir.parent))
    flags = ["--models_dir", f"~/{tiny_models_dir.name}", "--model_size", "tiny"]
    assert_continues(inside("Hello", "--n_tokens_to_generate", 8, *flags), truth("Hello"))


@pytest.mark.parametrize(
    "prompt", ["42", "1e5", "[1,2]", "None", "True", "{}", "-5", "-0.5", "- a list", "'a'", "~", "*"]
)
def test_prompts_are_text(inside, tiny_flags, truth, prompt):
    assert_continues(inside(prompt, "--n_tokens_to_generate", 8, *tiny_flags), truth(prompt))


@pytest.mark.parametrize("prompt", ["--dashes", "--help", "-x", "-1e5", "--", "-5"])
def test_prompts_behind_two_dashes_are_text(inside, tiny_flags, truth, prompt):
    assert_continues(inside("--n_tokens_to_generate", 8, *tiny_flags, "--", prompt), truth(prompt))


@pytest.mark.parametrize("prompt", ["two\n", "\n", "two\r\n", "\ufeffmark"])
def test_line_breaks_and_marks_of_an_argument_stay(inside, tiny_flags, truth, prompt):
    assert_continues(inside(prompt, "--n_tokens_to_generate", 8, *tiny_flags), truth(prompt))


def test_prompt_from_standard_input(tiny_flags, truth):
    result = run("-", "--n_tokens_to_generate", "8", *tiny_flags, input="Ondřej 🤗\n".encode())
    assert_continues(result, truth("Ondřej 🤗"))


TYPED = {  # what a file or standard input holds, and the prompt it is
    "no line break": (b"one", "one"),
    "line break": (b"one\n", "one"),
    "two line breaks": (b"one\n\n", "one\n"),
    "Windows line break": (b"one\r\n", "one"),
    "two Windows line breaks": (b"one\r\n\r\n", "one\r\n"),
    "several lines": (b"one\ntwo\n\nthree\n", "one\ntwo\n\nthree"),
    "several Windows lines": (b"one\r\ntwo\r\n", "one\r\ntwo"),
    "byte order mark": (b"\xef\xbb\xbfone\n", "one"),
    "a mark in the middle": (b"o\xef\xbb\xbfne\n", "o\ufeffne"),
    "other line breaks": ("one\u2028\n".encode(), "one\u2028"),
    "tab": (b"one\t\n", "one\t"),
    "nothing": (b"", ""),
    "a line break alone": (b"\n", ""),
    "null": (b"one\0two", "one\0two"),
}


@pytest.mark.parametrize("what", TYPED)
def test_last_line_break_is_dropped_and_no_more(inside, tiny_flags, truth, tmp_path, what):
    data, prompt = TYPED[what]
    (tmp_path / "prompt").write_bytes(data)
    flags = ["--n_tokens_to_generate", 8, *tiny_flags]
    assert_continues(inside("-", *flags, typed=data), truth(prompt))
    assert_continues(inside("--prompt_file", tmp_path / "prompt", *flags), truth(prompt))


@pytest.mark.parametrize("prompt", [[], [""]])
def test_no_prompt_starts_from_end_of_text(tiny_flags, truth, prompt):
    assert_continues(run(*prompt, "--n_tokens_to_generate", "8", *tiny_flags), truth(""))


def test_end_of_text_in_a_prompt_is_ordinary(inside, tiny_flags, truth):
    code, out, _ = inside("<|endoftext|>", "--n_tokens_to_generate", 8, *tiny_flags)
    assert code == 0
    assert out.decode() != truth("") + "\n"


def test_space_at_the_end_is_noted(inside, tiny_flags, truth):
    code, out, err = inside("Hello ", "--n_tokens_to_generate", 8, *tiny_flags)
    assert (code, out.decode()) == (0, truth("Hello ") + "\n")
    assert re.fullmatch(r"note: .*space.*\n", err.decode())


def test_no_tokens_are_an_empty_line(inside, tiny_flags):
    assert_continues(inside("Hello", "--n_tokens_to_generate", 0, *tiny_flags), "")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_whole_context_works_and_one_more_is_refused(inside, tiny_flags, truth, stream):
    flags = [*tiny_flags, stream, "--n_tokens_to_generate"]
    assert_continues(inside(TWELVE, *flags, 116), truth(TWELVE, 116))
    result = inside(TWELVE, *flags, 117)
    assert_mistake(result, "12 prompt tokens", "117 to generate", "129", "128", "--n_tokens_to_generate to 116")


def test_prompt_longer_than_the_context(inside, tiny_flags):
    assert_mistake(inside("0" * 1000, *tiny_flags), "tokens", "128", "shorten the prompt")


# Flags


def drawn(result):
    code, out, err = result
    assert (code, err) == (0, b"")
    return out.decode("utf-8").removesuffix("\n")


def test_greedy_is_the_default(inside, letters_flags):
    assert_continues(inside("x", "--n_tokens_to_generate", 60, *letters_flags), "a" * 60)


@pytest.mark.parametrize(
    ("flags", "letters"),
    [
        (["--temperature", 1], "abcdé"),
        (["--temperature", 1, "--top_k", 0, "--top_p", 1], "abcdé"),
        (["--temperature", 1, "--top_k", 3], "abc"),
        (["--temperature", 1, "--top_k", 1], "a"),
        (["--temperature", 1, "--top_p", 0.6], "ab"),  # 0.4 is too little, 0.4 + 0.3 reaches it
        (["--temperature", 1, "--top_p", 0.8], "abc"),
        (["--temperature", 1, "--top_p", 0.01], "a"),
        (["--temperature", 1, "--top_k", 4, "--top_p", 0.6], "ab"),  # 0.4 / 0.95 is still too little
        (["--temperature", 1, "--top_k", 2, "--top_p", 0.8], "ab"),
        (["--temperature", 0.02], "a"),  # b is 0.75 ** 50 times as likely as a
    ],
)
def test_flags_choose_what_is_drawn(inside, letters_flags, flags, letters):
    text = drawn(inside("x", "--n_tokens_to_generate", 120, "--seed", 1, *flags, *letters_flags))
    assert len(text) == 120
    assert set(text) == set(letters)


@pytest.mark.parametrize("flags", [["--top_k", 3], ["--top_p", 0.9], ["--seed", 1]])
def test_what_has_no_effect_at_temperature_0_is_said(inside, letters_flags, flags):
    code, out, err = inside("x", "--n_tokens_to_generate", 3, *flags, *letters_flags)
    assert (code, out) == (0, b"aaa\n")
    assert err.startswith(b"note: ") and b"set --temperature 1" in err and err.count(b"\n") == 1


def test_high_temperature_draws_everything(inside, letters_flags):
    code, out, err = inside("x", "--n_tokens_to_generate", 120, "--seed", 1, "--temperature", 1000, *letters_flags)
    assert (code, err) == (0, b"")
    assert len(set(out)) > 30  # of 257 tokens, all but equally likely; half of them are no whole character


def test_letters_come_as_often_as_the_model_says(inside, letters_flags):
    flags = ["--n_tokens_to_generate", 125, "--n_samples", 16, "--temperature", 1, "--seed", 0]
    text = drawn(inside("x", *flags, *letters_flags))
    text = re.sub(r"=== sample \d+ ===|\n", "", text)
    assert len(text) == 2000
    for letter, chance in LETTERS.items():
        assert abs(text.count(letter) / 2000 - chance) < 5 * (chance * (1 - chance) / 2000) ** 0.5, letter


def test_seed_repeats_the_text(tiny_flags):
    flags = ["Hello", "--n_tokens_to_generate", "20", "--temperature", "1", *tiny_flags]
    first, again, other = (drawn(run(*flags, "--seed", seed)) for seed in ("7", "7", "8"))
    assert first == again != other


def test_seed_is_that_of_numpys_generator(inside, letters_flags):
    numbers = np.random.default_rng(7).random(60)
    expected = "".join("abcdé"[i] for i in np.searchsorted(np.cumsum(list(LETTERS.values())), numbers))
    flags = ["x", "--n_tokens_to_generate", 60, "--temperature", 1, "--seed", 7]
    assert_continues(inside(*flags, *letters_flags), expected)


def test_without_a_seed_texts_differ(inside, tiny_flags):
    flags = ["Hello", "--n_tokens_to_generate", 30, "--temperature", 1, *tiny_flags]
    assert drawn(inside(*flags)) != drawn(inside(*flags))


def test_samples_are_those_of_the_seeds_that_follow(inside, tiny_flags):
    flags = ["Hello", "--n_tokens_to_generate", 12, "--temperature", 1, *tiny_flags]
    alone = [drawn(inside(*flags, "--seed", seed)) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    expected = "".join(f"=== sample {i} ===\n{text}\n" for i, text in enumerate(alone, 1))
    assert_continues(inside(*flags, "--seed", 5, "--n_samples", 3), expected.removesuffix("\n"))


def test_one_sample_has_no_header(inside, letters_flags):
    assert_continues(inside("x", "--n_samples", 1, "--n_tokens_to_generate", 5, *letters_flags), "aaaaa")


def test_stop_at_end_of_text(inside, letters_dir):
    flags = ["x", "--n_tokens_to_generate", 120, "--temperature", 1, "--models_dir", letters_dir]
    lengths = set()
    for seed in range(5):
        seeded = [*flags, "--seed", seed, "--model_size", "ending"]
        before, mark, _ = drawn(inside(*seeded)).partition("<|endoftext|>")
        assert mark and set(before) <= {"a", "b"}
        assert_continues(inside(*seeded, "--stop_at_end_of_text"), before)
        lengths.add(len(before))
    assert len(lengths) > 1


def test_end_of_text_at_once_is_an_empty_line(inside, letters_dir):
    flags = ["x", "--n_tokens_to_generate", 3, "--model_size", "ended", "--models_dir", letters_dir]
    assert_continues(inside(*flags), "<|endoftext|>" * 3)
    assert_continues(inside(*flags, "--stop_at_end_of_text"), "")


@pytest.mark.parametrize("prompt", ["Hello", "你好"])
def test_streamed_bytes_are_the_same(inside, tiny_flags, prompt):
    flags = [prompt, "--n_tokens_to_generate", 100, "--temperature", 2, "--seed", 3, "--n_samples", 2, *tiny_flags]
    streamed, whole, default = inside(*flags, "--stream"), inside(*flags, "--no-stream"), inside(*flags)
    assert streamed == whole == default
    assert len(whole[1]) > 200


def test_help_names_every_flag():
    code, out, err = run("--help")
    assert (code, err) == (0, b"")
    flags = "prompt_file n_tokens_to_generate model_size models_dir temperature top_k top_p seed n_samples"
    for flag in [*flags.split(), "stop_at_end_of_text", "stream", "no-stream", "interactive"]:
        assert re.search(rf"--{flag}\b", out.decode("utf-8")), flag


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n_tokens_to_generate", "-1"], ["--n_tokens_to_generate", "-1"]),
        (["--n_tokens_to_generate", "ten"], ["--n_tokens_to_generate", "ten"]),
        (["--n_tokens_to_generate", "1.5"], ["--n_tokens_to_generate", "1.5"]),
        (["--n_tokens_to_generate", "1e3"], ["--n_tokens_to_generate", "1e3"]),
        (["--n_tokens_to_generate", ""], ["--n_tokens_to_generate"]),
        (["--n_tokens_to_generate"], ["--n_tokens_to_generate"]),
        (["--n_tokens_to_generate", "9" * 30], ["9" * 30, "128"]),
        (["--n_samples", "0"], ["--n_samples", "0"]),
        (["--n_samples", "-2"], ["--n_samples", "-2"]),
        (["--n_samples", "2.0"], ["--n_samples", "2.0"]),
        (["--top_k", "-1"], ["--top_k", "-1"]),
        (["--top_k", "4.5"], ["--top_k", "4.5"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", "x"], ["--seed", "x"]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
        (["--temperature=-0.1"], ["--temperature", "-0.1"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--temperature", "inf"], ["--temperature", "inf"]),
        (["--temperature", "1e999"], ["--temperature", "1e999"]),
        (["--temperature", "abc"], ["--temperature", "abc"]),
        (["--top_p", "0"], ["--top_p", "0"]),
        (["--top_p", "1.5"], ["--top_p", "1.5"]),
        (["--top_p", "-1"], ["--top_p", "-1"]),
        (["--top_p", "nan"], ["--top_p", "nan"]),
        (["--n_token", "3"], ["--n_token"]),
        (["--temp", "1"], ["--temp"]),
        (["--no_such_flag"], ["--no_such_flag", "--help"]),
        (["-x"], ["-x"]),
        (["more", "words"], ["more words", "quotes"]),
        (["--prompt_file", "some.txt"], ["--prompt_file", "prompt"]),
        (["--interactive"], ["--interactive", "prompt"]),
    ],
)
def test_mistake_on_the_command_line(inside, tiny_flags, arguments, words):
    assert_mistake(inside("Hello", *tiny_flags, *arguments), *words)


def test_prompt_file_together_with_interactive(inside, tiny_flags):
    assert_mistake(inside("--prompt_file", "some.txt", "--interactive", *tiny_flags), "--prompt_file", "--interactive")


@pytest.mark.parametrize("arguments", [["--top_p", "0"], ["Hello", "more"], ["--model_size", "../tiny"]])
def test_mistake_in_a_process_of_its_own(tiny_flags, arguments):
    assert_mistake(run(*tiny_flags, *arguments))


def test_unknown_model_size(tiny_models_dir, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    result = run("Hello", "--model_size", "125M", "--models_dir", str(tiny_models_dir))
    assert_mistake(result, "'125M'", "124M, 355M, 774M, 1558M, tiny")


@pytest.mark.parametrize("name", ["../tiny", "..", "/etc", "", "a/../../b"])
def test_climbing_model_size(inside, tiny_models_dir, name):
    assert_mistake(inside("Hello", "--model_size", name, "--models_dir", tiny_models_dir), repr(name), "124M")


def test_no_network(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACK_OFF", 0.001)
    code, out, err = inside("Hello", "--model_size", "small", "--models_dir", tmp_path / "models")
    lines = err.decode("utf-8").splitlines()
    assert (code, out, len(lines)) == (2, b"", 2)
    assert lines[0].startswith("downloading small from http://127.0.0.1:9/")
    assert lines[1].startswith(
        "gpt2.py: error: cannot fetch http://127.0.0.1:9/nothing-listens-here/small/hparams.json"
    )
    assert "network" in lines[1] and "GPT2_BASE_URL" in lines[1]
    assert not (tmp_path / "models" / "small").exists()


@pytest.mark.parametrize("name", ["124M", "small"])
def test_models_dir_below_a_regular_file(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    result = run("Hello", "--model_size", name, "--models_dir", str(tmp_path / "file" / "models"))
    assert_mistake(result, "cannot write", str(tmp_path / "file" / "models"), "--models_dir")


def test_models_dir_is_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("no folder")
    result = run("Hello", "--model_size", "124M", "--models_dir", str(tmp_path / "file"))
    assert_mistake(result, "cannot write", str(tmp_path / "file"), "--models_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_models_dir_without_write_permission(tmp_path):
    tmp_path.chmod(0o555)
    try:
        result = run("Hello", "--model_size", "124M", "--models_dir", str(tmp_path))
    finally:
        tmp_path.chmod(0o755)
    assert_mistake(result, "cannot write", str(tmp_path), "Permission denied", "--models_dir")


def test_prompt_file_is_missing(tiny_flags, tmp_path):
    assert_mistake(run("--prompt_file", tmp_path / "none", *tiny_flags), str(tmp_path / "none"), "No such file")


def test_prompt_file_is_a_directory(inside, tiny_flags, tmp_path):
    assert_mistake(inside("--prompt_file", tmp_path, *tiny_flags), str(tmp_path), "Is a directory")


def test_prompt_file_is_not_utf_8(inside, tiny_flags, tmp_path):
    (tmp_path / "prompt").write_bytes("Žluťoučký kůň".encode("iso-8859-2"))
    result = inside("--prompt_file", tmp_path / "prompt", *tiny_flags)
    assert_mistake(result, str(tmp_path / "prompt"), "not UTF-8", "byte 0xae at position 0", "iconv")


def test_standard_input_is_not_utf_8(tiny_flags):
    result = run("-", *tiny_flags, input=b"abc\xff\n")
    assert_mistake(result, "standard input", "not UTF-8", "byte 0xff at position 3")


def test_prompt_argument_is_not_utf_8(tiny_flags):
    assert_mistake(run(b"abc\xff", *tiny_flags), "the prompt", "not UTF-8", "byte 0xff at position 3")


@pytest.mark.parametrize(
    "arguments",
    [[b"--prompt_file", b"/none/\xff"], [b"--models_dir", b"/dev/null/\xff"], [b"--model_size", b"\xff"], [b"--\xff"]],
)
def test_other_arguments_that_are_not_utf_8(tiny_flags, arguments, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    assert_mistake(run(*tiny_flags, "--model_size", "124M", *arguments))


def test_corrupt_model(tiny_models_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    os.truncate(tmp_path / "tiny" / "model.safetensors", 5000)
    result = run("Hello", "--model_size", "tiny", "--models_dir", str(tmp_path))
    assert_mistake(result, str(tmp_path / "tiny" / "model.safetensors"), "corrupt", "5000 bytes")


def test_without_end_of_text_a_text_from_nothing_begins_a_line(tiny_models_dir, tmp_path, inside):
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    del vocabulary["<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", str(tmp_path))
    expected = encoder.decode(generate(encoder.encode("\n"), params, hparams["n_head"], 5))
    flags = ["--model_size", "tiny", "--models_dir", tmp_path, "--n_tokens_to_generate", 5]
    assert_continues(inside(*flags), expected)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_standard_output_on_a_full_disk(letters_flags):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("x", *letters_flags), stdout=full, stderr=subprocess.PIPE, timeout=SECONDS, check=False
        )
    assert_mistake((done.returncode, b"", done.stderr), os.strerror(errno.ENOSPC))


def run_in_shell(line, *arguments):
    """Runs a shell command in which "$@" is the program and its arguments."""
    whole = ["sh", "-c", line, "sh", *command(*arguments)]
    return subprocess.run(whole, capture_output=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize("line", ['"$@" >&-', '"$@" - <&-', '"$@" --interactive <&-'])
def test_closed_standard_streams_give_no_traceback(letters_flags, line):
    done = run_in_shell(line, *letters_flags)
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize("temperature", ["1e-310", "1e-30", "1e30", "1e308"])
def test_extreme_temperatures_give_no_warnings(letters_flags, temperature):
    code, out, err = run(
        "x", "--temperature", temperature, "--n_tokens_to_generate", "5", "--seed", "1", *letters_flags
    )
    assert (code, err) == (0, b"")
    if float(temperature) < 1:
        assert out == b"aaaaa\n"


# Character encodings


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def c_locale(monkeypatch):
    for name, value in C_LOCALE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_output_is_utf_8_in_any_locale(c_locale, letters_dir, stream):
    flags = ["--model_size", "accents", "--models_dir", str(letters_dir), "--n_tokens_to_generate", "3", stream]
    assert_continues(run("x", *flags), "ééé")


def test_prompts_are_utf_8_in_any_locale(c_locale, tiny_flags, truth, tmp_path):
    (tmp_path / "prompt").write_text("Ondřej 你好", encoding="utf-8")
    flags = ["--n_tokens_to_generate", "8", *tiny_flags]
    assert_continues(run("Ondřej 你好".encode(), *flags), truth("Ondřej 你好"))
    assert_continues(run("-", *flags, input="Ondřej 你好".encode()), truth("Ondřej 你好"))
    assert_continues(run("--prompt_file", tmp_path / "prompt", *flags), truth("Ondřej 你好"))


def test_mistakes_are_utf_8_in_any_locale(c_locale, tiny_flags):
    assert_mistake(run("--prompt_file", "žádný".encode(), *tiny_flags))


def test_output_is_utf_8_under_another_io_encoding(letters_dir, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    flags = ["--model_size", "accents", "--models_dir", str(letters_dir), "--n_tokens_to_generate", "3"]
    assert_continues(run("x", *flags), "ééé")


# Ctrl-C and closed pipes


def start_process(arguments, **options):
    """A new process in which Ctrl-C does what it does in a shell, even where the tests run in the background."""
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a handler is not inherited, ignoring it would be
    try:
        return subprocess.Popen(arguments, cwd=ROOT, **options)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def started(arguments, **options):
    """A running process, which does not outlive the test."""
    with start_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def hanging(*arguments):
    return [sys.executable, "-c", HANGS_AFTER_THREE, *arguments]


@pytest.mark.parametrize(("stream", "n_samples"), [("--stream", 1), ("--no-stream", 1), ("--stream", 2)])
def test_interrupt_prints_what_there_is(letters_flags, stream, n_samples):
    with started(hanging("x", stream, "--n_samples", str(n_samples), *letters_flags)) as process:
        assert process.stderr.readline() == b"three are out\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    header = b"=== sample 1 ===\n" if n_samples > 1 else b""
    assert (process.returncode, out, err) == (130, header + b"aaa\n", b"")


def test_interrupt_prints_what_there_is_of_samples_made_at_once(letters_flags):
    with started([sys.executable, "-c", HANGS_AT_THE_FOURTH, "x", "--n_samples", "2", *letters_flags]) as process:
        assert process.stderr.readline() == b"three are out\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err) == (130, b"=== sample 1 ===\naaa\n=== sample 2 ===\naaa\n", b"")


@pytest.mark.parametrize(("flags", "visible"), [([], b""), (["--no-stream"], b""), (["--stream"], b"aaa")])
def test_tokens_come_as_they_are_made_only_when_streamed(letters_flags, flags, visible):
    with started(hanging("x", *flags, *letters_flags)) as process:
        assert process.stderr.readline() == b"three are out\n"
        os.set_blocking(process.stdout.fileno(), False)
        assert (process.stdout.read() or b"") == visible


def test_interrupt_of_a_working_model(tmp_path, vocabulary_dir):
    hparams = TINY | {"n_ctx": 1024, "n_embd": 192, "n_layer": 6}  # a second for the whole text
    folder = shutil.copytree(vocabulary_dir, tmp_path / "slow")
    write_safetensors(folder, hparams, random_tensors(hparams))
    arguments = command("Hello", "--model_size", "slow", "--models_dir", str(tmp_path), "--stream")
    with started([*arguments, b"--n_tokens_to_generate", b"1000"]) as process:
        first = os.read(process.stdout.fileno(), 1)  # unbuffered: communicate() would miss what a buffer took
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    text = (first + out).decode("utf-8")
    assert (process.returncode, err) == (130, b"")
    assert text.endswith("\n")
    whole = drawn(run("Hello", "--model_size", "slow", "--models_dir", tmp_path, "--n_tokens_to_generate", "1000"))
    assert len(text) < len(whole) and whole.startswith(text[:-1])


def test_interrupt_while_reading_the_prompt(letters_flags):
    with started(command("-", *letters_flags), stdin=subprocess.PIPE) as process:
        wait_until_reading(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err) == (130, b"", b"")


def wait_until_reading(process):
    """Waits until the process has taken in a first byte of its standard input."""
    process.stdin.write(b"H")
    process.stdin.flush()
    end = time.monotonic() + SECONDS
    while unread(process.stdin) and time.monotonic() < end:
        time.sleep(0.01)


def unread(pipe):
    """How many bytes are in a pipe."""
    count = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(count, sys.byteorder)


def test_head_closes_the_pipe(letters_flags):
    done = run_in_shell('"$@" | head -c 5', "x", "--n_tokens_to_generate", "120", "--stream", *letters_flags)
    assert (done.stdout, done.stderr) == (b"aaaaa", b"")


@pytest.mark.parametrize(
    "flags", [["--stream"], ["--no-stream"], ["--n_samples", "3"], ["--stream", "--n_samples", "3"]]
)
def test_nobody_reads_the_output(letters_flags, flags):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command("x", *flags, *letters_flags), stdout=writer, stderr=subprocess.PIPE, timeout=SECONDS, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# Interactive


def test_piped_prompts_are_answered_one_by_one(tiny_flags, truth):
    typed = "Hello\n\n\r\nOndřej 你好\n".encode()
    result = run("--interactive", "--n_tokens_to_generate", "8", *tiny_flags, input=typed)
    assert_continues(result, truth("Hello") + "\n" + truth("Ondřej 你好"))


def test_last_prompt_needs_no_line_break(inside, letters_flags):
    assert_continues(inside("--interactive", "--n_tokens_to_generate", 2, *letters_flags, typed=b"x\ny"), "aa\naa")


def test_no_prompts_at_all(inside, letters_flags):
    assert inside("--interactive", *letters_flags, typed=b"") == (0, b"", b"")


@pytest.mark.parametrize(
    ("line", "words"),
    [(TWELVE.encode() * 10, ["120 prompt tokens", "40 to generate", "160", "128"]), (b"a\xffb", ["not UTF-8", "0xff"])],
)
def test_bad_prompt_does_not_end_the_session(tiny_flags, truth, line, words):
    code, out, err = run("--interactive", *tiny_flags, input=b"Hello\n" + line + b"\nbye\n")
    assert (code, out.decode("utf-8")) == (0, f"{truth('Hello', 40)}\n{truth('bye', 40)}\n")
    assert re.fullmatch(r"error: .*\n", err.decode("utf-8"))
    for word in words:
        assert word in err.decode("utf-8")


def test_each_answer_has_its_samples(inside, letters_flags):
    flags = ["--interactive", "--n_samples", 2, "--n_tokens_to_generate", 2, *letters_flags]
    one = "=== sample 1 ===\naa\n=== sample 2 ===\naa"
    assert_continues(inside(*flags, typed=b"x\ny\n"), one + "\n" + one)


# At a terminal


AT_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A program at a pseudo-terminal: what it shows, what a person types."""

    def __init__(self, arguments):
        self.master, screen = pty.openpty()
        termios.tcsetwinsize(screen, (24, 80))
        arguments = [sys.executable, "-c", AT_A_TERMINAL, *arguments]
        streams = {"stdin": screen, "stdout": screen, "stderr": screen, "env": os.environ | {"TERM": "dumb"}}
        self.process = start_process(arguments, start_new_session=True, **streams)
        os.close(screen)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.shown = ""

    def type(self, text):
        os.write(self.master, text.encode("utf-8"))

    def read_until(self, text):
        """What is shown up to text, which must come; the next call goes on behind it."""
        while text not in self.shown:
            assert self.read_more(), f"{text!r} does not come after {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def read_to_the_end(self):
        while self.read_more():
            pass
        return self.shown, self.process.wait(SECONDS)

    def read_more(self):
        if not select.select([self.master], [], [], SECONDS)[0]:
            return False
        with contextlib.suppress(OSError):  # the program is gone
            data = os.read(self.master, 4096)
            self.shown += self.decoder.decode(data).replace("\r", "")
            return bool(data)
        return False


@pytest.fixture
def terminal():
    """Starts a program at a terminal of its own, and ends it with the test."""
    terminals = []

    def start(arguments):
        terminals.append(Terminal(arguments))
        return terminals[-1]

    yield start
    for each in terminals:
        each.process.kill()
        each.process.wait()
        os.close(each.master)


def test_terminal_answers_until_ctrl_d(terminal, letters_flags):
    screen = terminal(command("--interactive", "--n_tokens_to_generate", "4", *letters_flags))
    assert screen.read_until("prompt> ") == ""
    screen.type("Hello\n")
    assert screen.read_until("prompt> ") == "Hello\naaaa\n"
    screen.type("\n")
    assert screen.read_until("prompt> ") == "\n"
    screen.type("Ondřej\n")
    assert screen.read_until("prompt> ") == "Ondřej\naaaa\n"
    screen.type("\x04")
    assert screen.read_to_the_end() == ("\n", 0)


def test_ctrl_c_at_the_prompt_leaves(terminal, letters_flags):
    screen = terminal(command("--interactive", *letters_flags))
    screen.read_until("prompt> ")
    time.sleep(0.3)  # as long as a person takes at least: CPython misses a Ctrl-C in the instant it shows the prompt
    screen.type("\x03")
    shown, code = screen.read_to_the_end()
    assert code == 130
    assert "Traceback" not in shown


def test_terminal_shows_tokens_as_they_come_and_ctrl_c_ends_the_answer(terminal, letters_flags):
    screen = terminal(hanging("--interactive", *letters_flags))
    screen.read_until("prompt> ")
    screen.type("Hello\n")
    assert screen.read_until("three are out\n") == "Hello\naaa"
    screen.type("\x03")
    assert screen.read_until("prompt> ").replace("^C", "") == "\n"
    screen.type("\x04")
    assert screen.read_to_the_end()[1] == 0


def test_one_answer_at_a_terminal_is_streamed_without_a_bar(terminal, letters_flags):
    screen = terminal(command("x", "--n_tokens_to_generate", "5", *letters_flags))
    assert screen.read_to_the_end() == ("aaaaa\n", 0)


def test_terminal_without_streaming_shows_a_bar_that_goes(terminal, letters_flags):
    screen = terminal(command("x", "--no-stream", "--n_tokens_to_generate", "5", *letters_flags))
    shown, code = screen.read_to_the_end()
    assert code == 0
    assert "generating" in shown and shown.endswith("aaaaa\n")


# gpt2_pico.py


@pytest.mark.parametrize(
    "prompt", ["Alan Turing theorized that", "42", "[1,2]", "None", "1e5", "Ondřej 你好 🤗", "a\n\nb"]
)
def test_pico_says_the_same(inside, tiny_flags, truth, prompt):
    result = run(prompt, "--n_tokens_to_generate", "8", *tiny_flags, script="gpt2_pico.py")
    assert_continues(result, truth(prompt))
    assert result == inside(prompt, "--n_tokens_to_generate", 8, *tiny_flags)


def test_pico_generates_forty_tokens_from_another_directory(tiny_models_dir, truth, tmp_path):
    flags = ["--model_size=tiny", f"--models_dir={tiny_models_dir}"]
    assert_continues(run("Hello", *flags, script="gpt2_pico.py", cwd=tmp_path), truth("Hello", 40))


def test_pico_fills_the_whole_context(tiny_flags, truth):
    flags = ["--n_tokens_to_generate", "116", *tiny_flags]
    assert_continues(run(TWELVE, *flags, script="gpt2_pico.py"), truth(TWELVE, 116))


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
def test_pico_says_mistakes_in_one_line(tiny_flags, arguments, words, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    assert_mistake(run(*tiny_flags, *arguments, script="gpt2_pico.py"), *words, script="gpt2_pico.py")


@pytest.mark.parametrize("arguments", [[], ["Hello", "--no_such_flag", "3"]])
def test_pico_refuses_what_it_does_not_know(tiny_flags, arguments):
    code, out, err = run(*arguments, *tiny_flags, script="gpt2_pico.py")
    assert (code, out) == (2, b"")
    assert b"Traceback" not in err
