"""The command line of gpt2.py: the output for each option, the error lines, the end of an interrupted run."""

import codecs
import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from cli.session import with_bar
from gpt2 import generate
from tests.conftest import TINY
from tests.programs import SECONDS, assert_mistake, assert_prints, command, run, start_process, started
from tests.random_model import random_tensors, write_byte_vocabulary, write_safetensors
from utils import load_encoder_hparams_and_params

PROMPTS = ["Alan Turing theorized that", "42", "a", "def softmax(x):\n    return", "Ondřej 你好 🤗", "  two\n\n"]
TWELVE = "щфюэъы"  # twelve tokens, one per byte: the text that the vocabulary was learned from has no Cyrillic letters
N_8 = ["--n_tokens_to_generate", "8"]
# the program, in which sampling the fourth token of a continuation takes forever: argv as for gpt2.py
HANGS_AT_THE_FOURTH = """
import sys, time
from cli import generate, session
def make_sampler(*arguments):
    sample, sampled = real(*arguments), []
    def slow(logits):
        if len(sampled) == 3:
            print("three are out", file=sys.stderr, flush=True)
            while True:
                time.sleep(0.05)
        sampled.append(sample(logits))
        return sampled[-1]
    return slow
real, session.make_sampler = session.make_sampler, make_sampler
sys.exit(generate.run())
"""
LETTERS = {"a": 0.4, "b": 0.3, "c": 0.15, "d": 0.1, "é": 0.05}  # probabilities of the letters model, for any prompt


# Models


def make_letters_model(models_dir, name, probabilities, end_of_text=0.0):
    """Make a model whose next token does not depend on the prompt: a letter, or <|endoftext|>."""
    hparams = TINY | {"n_vocab": 258}
    folder = models_dir / name
    folder.mkdir(parents=True)
    write_byte_vocabulary(folder, hparams["n_vocab"])
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    vocabulary["Ã©"] = vocabulary.pop("<|256|>")  # the two bytes of é as one token
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tensors = random_tensors(hparams)
    tensors["ln_f/g"][:] = 0
    tensors["ln_f/b"][:] = np.eye(1, hparams["n_embd"])[0]  # the logits are the first column of wte
    tensors["wte"][:, 0] = -40
    for letter, probability in probabilities.items():
        tensors["wte"][vocabulary["Ã©" if letter == "é" else letter], 0] = np.log(probability)
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


@pytest.fixture
def letters_flags(letters_dir):
    return ["--model_size", "letters", "--models_dir", str(letters_dir)]


# The prompt and the text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_continuation_is_that_of_transformers(tiny_flags, truth, prompt):
    assert_prints(run(prompt, *N_8, *tiny_flags), truth(prompt))


def test_forty_tokens_are_the_default(inside, tiny_flags, truth):
    assert_prints(inside("Hello", *tiny_flags), truth("Hello", 40))


def test_from_another_directory(tiny_models_dir, truth, tmp_path):
    flags = ["--model_size", "tiny", "--models_dir", os.path.relpath(tiny_models_dir, tmp_path)]
    assert_prints(run("Hello", *N_8, *flags, cwd=tmp_path), truth("Hello"))
    assert list(tmp_path.iterdir()) == []


def test_tilde_is_the_home_directory(inside, tiny_models_dir, truth, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_models_dir.parent))
    flags = ["--models_dir", f"~/{tiny_models_dir.name}", "--model_size", "tiny"]
    assert_prints(inside("Hello", *N_8, *flags), truth("Hello"))


@pytest.mark.parametrize(
    "prompt", ["42", "1e5", "[1,2]", "None", "{}", "-0.5", "- a list", "'a'", "~", "two\n", "\n", "a\r\n", "\ufeffmark"]
)
def test_prompts_are_text(inside, tiny_flags, truth, prompt):
    assert_prints(inside(prompt, *N_8, *tiny_flags), truth(prompt))


@pytest.mark.parametrize("prompt", ["--dashes", "--help", "-x", "--", "-5"])
def test_prompts_after_two_dashes_are_text(inside, tiny_flags, truth, prompt):
    assert_prints(inside(*N_8, *tiny_flags, "--", prompt), truth(prompt))


@pytest.mark.parametrize(
    ("typed", "prompt"),
    [
        ("one", "one"),
        ("one\n", "one"),
        ("one\n\n", "one\n"),
        ("one\r\n", "one"),
        ("one\r\n\r\n", "one\r\n"),
        ("one\ntwo\n\nthree\n", "one\ntwo\n\nthree"),
        ("\ufeffone\n", "one"),
        ("o\ufeffne\n", "o\ufeffne"),
        ("one\u2028\n", "one\u2028"),
        ("one\t\n", "one\t"),
        ("", ""),
        ("\n", ""),
        ("one\0two", "one\0two"),
    ],
)
def test_prompt_from_standard_input_lacks_only_its_last_line_break(inside, tiny_flags, truth, typed, prompt):
    assert_prints(inside("-", *N_8, *tiny_flags, typed=typed.encode()), truth(prompt))


@pytest.mark.parametrize("prompt", [[], [""]])
def test_unconditional_generation_starts_from_end_of_text(inside, tiny_flags, truth, prompt):
    assert_prints(inside(*prompt, *N_8, *tiny_flags), truth(""))


def test_unconditional_generation_without_end_of_text_starts_a_line(tiny_models_dir, tmp_path, inside):
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    del vocabulary["<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", str(tmp_path))
    expected = encoder.decode(generate(encoder.encode("\n"), params, hparams["n_head"], 8))
    assert_prints(inside("--model_size", "tiny", "--models_dir", tmp_path, *N_8), expected)


def test_end_of_text_in_a_prompt_is_ordinary_text(inside, tiny_flags, truth):
    code, out, _ = inside("<|endoftext|>", *N_8, *tiny_flags)
    assert code == 0
    assert out.decode() != truth("") + "\n"


def test_space_at_the_end_is_noted(inside, tiny_flags, truth):
    code, out, err = inside("Hello ", *N_8, *tiny_flags)
    assert (code, out.decode()) == (0, truth("Hello ") + "\n")
    assert re.fullmatch(r"note: .*space.*\n", err.decode())


def test_no_tokens_are_an_empty_line(inside, tiny_flags):
    assert_prints(inside("Hello", "--n_tokens_to_generate", 0, *tiny_flags), "")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_full_context_works_and_one_more_token_is_refused(inside, tiny_flags, truth, stream):
    flags = [*tiny_flags, stream, "--n_tokens_to_generate"]
    assert_prints(inside(TWELVE, *flags, 116), truth(TWELVE, 116))
    result = inside(TWELVE, *flags, 117)
    assert_mistake(result, "12 prompt tokens", "117 to generate", "129", "128", "--n_tokens_to_generate to 116")
    assert_mistake(inside("0" * 1000, *tiny_flags), "tokens", "128", "shorten the prompt\n")


# Options


def text_of(result):
    code, out, err = result
    assert (code, err) == (0, b"")
    return out.decode("utf-8").removesuffix("\n")


def test_greedy_is_the_default(inside, letters_flags):
    assert_prints(inside("x", "--n_tokens_to_generate", 60, *letters_flags), "a" * 60)


@pytest.mark.parametrize(
    ("flags", "letters"),
    [
        ("--temperature 1", "abcdé"),
        ("--temperature 1 --top_k 0 --top_p 1", "abcdé"),
        ("--temperature 1 --top_k 3", "abc"),
        ("--temperature 1 --top_p 0.6", "ab"),  # 0.4 is too little, 0.4 + 0.3 reaches it
        ("--temperature 1 --top_k 4 --top_p 0.6", "ab"),  # 0.4 / 0.95 is still too little
        ("--temperature 1 --top_k 2 --top_p 0.8", "ab"),
        ("--temperature 0.02", "a"),  # b is 0.75 ** 50 times as likely as a
    ],
)
def test_options_choose_the_sampled_tokens(inside, letters_flags, flags, letters):
    text = text_of(inside("x", "--n_tokens_to_generate", 120, "--seed", 1, *flags.split(), *letters_flags))
    assert len(text) == 120
    assert set(text) == set(letters)


@pytest.mark.parametrize("flags", [["--top_k", 3], ["--top_p", 0.9], ["--seed", 1]])
def test_options_without_effect_at_temperature_0_are_noted(inside, letters_flags, flags):
    code, out, err = inside("x", "--n_tokens_to_generate", 3, *flags, *letters_flags)
    assert (code, out) == (0, b"aaa\n")
    assert err.startswith(b"note: ") and b"set --temperature 1" in err and err.count(b"\n") == 1


@pytest.mark.parametrize("temperature", ["1e-310", "1e-30", "1e30", "1e308"])
@pytest.mark.filterwarnings("error")
def test_extreme_temperatures_give_no_warnings(inside, letters_flags, temperature):
    text = text_of(inside("x", "--temperature", temperature, "--seed", 1, *letters_flags))
    assert (text == "a" * 40) == (float(temperature) < 1)


def test_seed_is_that_of_numpys_generator(inside, letters_flags):
    numbers = np.random.default_rng(7).random(60)
    expected = "".join("abcdé"[i] for i in np.searchsorted(np.cumsum(list(LETTERS.values())), numbers))
    flags = ["x", "--n_tokens_to_generate", 60, "--temperature", 1, "--seed", 7]
    assert_prints(inside(*flags, *letters_flags), expected)


def test_without_a_seed_texts_differ(inside, tiny_flags):
    flags = ["Hello", "--n_tokens_to_generate", 30, "--temperature", 1, *tiny_flags]
    assert text_of(inside(*flags)) != text_of(inside(*flags))


def test_samples_are_those_of_the_following_seeds(inside, tiny_flags):
    flags = ["Hello", "--n_tokens_to_generate", 12, "--temperature", 1, *tiny_flags]
    alone = [text_of(inside(*flags, "--seed", seed)) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    expected = "".join(f"=== sample {i} ===\n{text}\n" for i, text in enumerate(alone, 1))
    assert_prints(inside(*flags, "--seed", 5, "--n_samples", 3), expected.removesuffix("\n"))


def test_stop_at_end_of_text(inside, letters_dir):
    flags = ["x", "--n_tokens_to_generate", 120, "--temperature", 1, "--models_dir", letters_dir]
    lengths = set()
    for seed in range(5):
        seeded = [*flags, "--seed", seed, "--model_size", "ending"]
        before, mark, _ = text_of(inside(*seeded)).partition("<|endoftext|>")
        assert mark and set(before) <= {"a", "b"}
        assert_prints(inside(*seeded, "--stop_at_end_of_text"), before)
        lengths.add(len(before))
    assert len(lengths) > 1


def test_end_of_text_at_once_is_an_empty_line(inside, letters_dir):
    flags = ["x", "--n_tokens_to_generate", 3, "--model_size", "ended", "--models_dir", letters_dir]
    assert_prints(inside(*flags), "<|endoftext|>" * 3)
    assert_prints(inside(*flags, "--stop_at_end_of_text"), "")


@pytest.mark.parametrize("prompt", ["Hello", "你好"])
def test_streamed_bytes_are_the_same(inside, tiny_flags, prompt):
    flags = [prompt, "--n_tokens_to_generate", 100, "--temperature", 2, "--seed", 3, "--n_samples", 2, *tiny_flags]
    streamed, whole, default = inside(*flags, "--stream"), inside(*flags, "--no-stream"), inside(*flags)
    assert streamed == whole == default
    assert len(whole[1]) > 200


def test_help_names_every_option():
    code, out, err = run("--help")
    assert (code, err) == (0, b"")
    options = "n_tokens_to_generate model_size models_dir temperature top_k top_p seed n_samples stop_at_end_of_text "
    options += "stream no-stream interactive prompts_file output batch_size speculate draft_model explain"
    for option in options.split():
        assert re.search(rf"--{option}\b", out.decode("utf-8")), option


# Mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        *("--n_tokens_to_generate -1", "--n_tokens_to_generate ten", "--n_tokens_to_generate 1.5"),
        *("--n_tokens_to_generate 1e3", "--n_tokens_to_generate ''", "--n_tokens_to_generate"),
        *("--n_tokens_to_generate 999999999999999999999999999999", "--n_samples 0", "--n_samples -2", "--top_k 4.5"),
        *("--seed -1", "--seed x", "--temperature -1", "--temperature=-0.1", "--temperature nan", "--temperature inf"),
        *("--temperature 1e999", "--temperature abc", "--top_p 0", "--top_p 1.5", "--top_p -1", "--top_p nan"),
        *("--n_token 3", "--temp 1", "--no_such_flag", "-x", "more", "--interactive", "--prompt_file some.txt"),
        *("--speculate often", "--speculate auto", "--explain out.png"),
    ],
)
def test_mistake_on_the_command_line_is_named(inside, tiny_flags, arguments):
    words = [word for argument in shlex.split(arguments) for word in argument.split("=")]
    assert_mistake(inside("Hello", *tiny_flags, *shlex.split(arguments)), *words)


def test_hints_for_mistakes(inside, tiny_flags):
    assert_mistake(inside("Hello", "more", "words", *tiny_flags), "more words", "quotes", "after --", "--help")
    assert_mistake(inside("Hello", "--interactive"), "a prompt, --prompts_file and --interactive")


@pytest.mark.parametrize("below", ["", "models"])
def test_models_dir_is_a_regular_file_or_below_one(inside, tmp_path, below):
    (tmp_path / "file").write_text("no folder")
    models_dir = tmp_path / "file" / below
    assert_mistake(inside("Hello", "--models_dir", models_dir), "cannot write", str(models_dir), "--models_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_models_dir_without_write_permission(inside, tmp_path):
    tmp_path.chmod(0o555)
    try:
        result = inside("Hello", "--model_size", "124M", "--models_dir", str(tmp_path))
    finally:
        tmp_path.chmod(0o755)
    assert_mistake(result, "cannot write", str(tmp_path), "Permission denied", "--models_dir")


def test_prompt_is_not_utf_8(inside, tiny_flags):
    result = inside("-", *tiny_flags, typed="Žluťoučký kůň".encode("iso-8859-2"))
    assert_mistake(result, "standard input is not UTF-8", "byte 0xae at position 0", "iconv")
    assert_mistake(run(b"abc\xff", *tiny_flags), "the prompt", "not UTF-8", "byte 0xff at position 3")


@pytest.mark.parametrize(
    "arguments",
    [[b"--prompts_file", b"/none/\xff"], [b"--models_dir", b"/dev/null/\xff"], [b"--model_size", b"\xff"], [b"--\xff"]],
)
def test_other_arguments_that_are_not_utf_8(tiny_flags, arguments, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    assert_mistake(run(*tiny_flags, "--model_size", "124M", *arguments))


def test_corrupt_model(inside, tiny_models_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    os.truncate(tmp_path / "tiny" / "model.safetensors", 5000)
    result = inside("Hello", "--model_size", "tiny", "--models_dir", str(tmp_path))
    assert_mistake(result, str(tmp_path / "tiny" / "model.safetensors"), "corrupt", "5000 bytes")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_standard_output_on_a_full_disk(letters_flags):
    with open("/dev/full", "wb") as full:
        code, _, err = run("x", *letters_flags, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert_mistake((code, b"", err), os.strerror(errno.ENOSPC))


def run_in_shell(line, *arguments):
    """Run a shell command in which "$@" is the program and its arguments."""
    whole = ["sh", "-c", line, "sh", *command(*arguments)]
    return subprocess.run(whole, capture_output=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize("line", ['"$@" >&-', '"$@" - <&-', '"$@" --interactive <&-'])
def test_closed_standard_streams_give_no_traceback(letters_flags, line):
    done = run_in_shell(line, *letters_flags)
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


# Character encodings


@pytest.fixture(
    params=[{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def another_encoding(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


def test_prompt_output_and_mistakes_are_utf_8_in_any_locale(another_encoding, letters_dir, tiny_flags, truth):
    flags = ["--model_size", "accents", "--models_dir", str(letters_dir), *N_8]
    for stream in ("--stream", "--no-stream"):
        assert_prints(run("x", *flags, stream), "é" * 8)
    prompt = "Ondřej 你好".encode()
    assert_prints(run(prompt, *N_8, *tiny_flags), truth("Ondřej 你好"))
    assert_prints(run("-", *N_8, *tiny_flags, input=prompt), truth("Ondřej 你好"))
    assert_mistake(run("--prompts_file", "žádný".encode(), *tiny_flags))


# Ctrl-C and closed pipes


def hanging(*arguments):
    return [sys.executable, "-c", HANGS_AT_THE_FOURTH, *arguments]


def interrupt(process):
    """Send Ctrl-C; return the exit code, standard output and standard error."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ("", b"", b"aaa\n"),
        ("--stream", b"aaa", b"\n"),
        ("--stream --n_samples 2", b"=== sample 1 ===\naaa", b"\n"),
        ("--n_samples 2", b"", b"=== sample 1 ===\naaa\n=== sample 2 ===\naaa\n"),
    ],
)
def test_tokens_are_printed_early_if_streamed_and_at_ctrl_c_in_any_case(letters_flags, flags, before, after):
    with started(hanging("x", *flags.split(), *letters_flags)) as process:
        assert process.stderr.readline() == b"three are out\n"
        os.set_blocking(process.stdout.fileno(), False)
        assert (process.stdout.read() or b"") == before
        os.set_blocking(process.stdout.fileno(), True)
        assert interrupt(process) == (130, after, b"")


def test_interrupt_of_a_working_model(inside, tmp_path, vocabulary_dir):
    hparams = TINY | {"n_ctx": 1024, "n_embd": 192, "n_layer": 6}  # about a second for 1000 tokens
    folder = shutil.copytree(vocabulary_dir, tmp_path / "slow")
    write_safetensors(folder, hparams, random_tensors(hparams))
    arguments = ["Hello", "--model_size", "slow", "--models_dir", str(tmp_path), "--n_tokens_to_generate"]
    with started(command(*arguments, "1000", "--stream")) as process:
        first = os.read(process.stdout.fileno(), 1)  # unbuffered: communicate() would miss the rest of a buffer
        code, out, err = interrupt(process)
    text = (first + out).decode("utf-8")
    assert (code, err) == (130, b"") and text.endswith("\n")
    begin = text_of(inside(*arguments, 100))
    assert begin.startswith(text[:-1]) or text.startswith(begin)


def test_interrupt_while_reading_the_prompt(letters_flags):
    with started(command("-", *letters_flags), stdin=subprocess.PIPE) as process:
        process.stdin.write(b"H")
        process.stdin.flush()
        end = time.monotonic() + SECONDS
        while n_unread(process.stdin) and time.monotonic() < end:
            time.sleep(0.01)
        assert interrupt(process) == (130, b"", b"")


def n_unread(pipe):
    """Return the number of bytes in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_head_closes_the_pipe(letters_flags):
    done = run_in_shell('"$@" | head -c 5', "x", "--n_tokens_to_generate", "120", "--stream", *letters_flags)
    assert (done.stdout, done.stderr) == (b"aaaaa", b"")


@pytest.mark.parametrize("flags", ["--stream", "--no-stream", "--n_samples 3", "--stream --n_samples 3"])
def test_nobody_reads_the_output(letters_flags, flags):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        code, _, err = run(
            "x", *flags.split(), *letters_flags, capture_output=False, stdout=pipe, stderr=subprocess.PIPE
        )
    assert (code, err) == (141, b"")


# Interactive


def test_piped_prompts_are_answered_one_by_one(tiny_flags, truth):
    typed = "Hello\n\n\r\nOndřej 你好\nbye".encode()
    result = run("--interactive", *N_8, *tiny_flags, input=typed)
    assert_prints(result, "\n".join(truth(prompt) for prompt in ("Hello", "Ondřej 你好", "bye")))


def test_no_prompts_at_all(inside, letters_flags):
    assert inside("--interactive", *letters_flags, typed=b"") == (0, b"", b"")


@pytest.mark.parametrize(
    ("line", "words"),
    [(TWELVE.encode() * 10, ["120 prompt tokens", "40 to generate", "160", "128"]), (b"a\xffb", ["not UTF-8", "0xff"])],
)
def test_a_bad_prompt_does_not_end_the_session(inside, tiny_flags, truth, line, words):
    code, out, err = inside("--interactive", *tiny_flags, typed=b"Hello\n" + line + b"\nbye\n")
    assert (code, out.decode("utf-8")) == (0, f"{truth('Hello', 40)}\n{truth('bye', 40)}\n")
    assert re.fullmatch(r"error: .*\n", err.decode("utf-8"))
    for word in words:
        assert word in err.decode("utf-8")


def test_each_answer_has_its_samples(inside, letters_flags):
    flags = ["--interactive", "--n_samples", 2, "--n_tokens_to_generate", 2, *letters_flags]
    one = "=== sample 1 ===\naa\n=== sample 2 ===\naa"
    assert_prints(inside(*flags, typed=b"x\ny\n"), one + "\n" + one)


# At a terminal


AT_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A program at a pseudo-terminal: the text on the screen, the keys that a person types."""

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
        """Return the output before the text, for which this waits; the next call continues after it."""
        while text not in self.shown:
            assert self.read_more(), f"{text!r} does not come after {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def read_to_the_end(self):
        """Return the rest of the output and the exit code."""
        while self.read_more():
            pass
        return self.shown, self.process.wait(SECONDS)

    def read_more(self):
        if not select.select([self.master], [], [], SECONDS)[0]:
            return False
        with contextlib.suppress(OSError):  # the program has ended
            data = os.read(self.master, 4096)
            self.shown += self.decoder.decode(data).replace("\r", "")
            return bool(data)
        return False


@pytest.fixture
def terminal():
    """A function that starts a program at a terminal of its own; the program ends with the test."""
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
    screen.type("\n")
    assert screen.read_until("prompt> ") == "\n"
    screen.type("Ondřej\n")
    assert screen.read_until("prompt> ") == "Ondřej\naaaa\n"
    screen.type("\x04")
    assert screen.read_to_the_end() == ("\n", 0)


def test_ctrl_c_at_the_prompt_ends_the_program(terminal, letters_flags):
    screen = terminal(command("--interactive", *letters_flags))
    screen.read_until("prompt> ")
    time.sleep(0.3)  # the least that a person takes: CPython misses a Ctrl-C at the instant when it shows the prompt
    screen.type("\x03")
    shown, code = screen.read_to_the_end()
    assert code == 130
    assert "Traceback" not in shown


def test_terminal_streams_and_ctrl_c_ends_the_answer(terminal, letters_flags):
    screen = terminal(hanging("--interactive", *letters_flags))
    screen.read_until("prompt> ")
    screen.type("Hello\n")
    assert screen.read_until("three are out\n") == "Hello\naaa"
    screen.type("\x03")
    assert screen.read_until("prompt> ").replace("^C", "") == "\n"
    screen.type("\x04")
    assert screen.read_to_the_end()[1] == 0


def test_terminal_shows_a_bar_only_if_tokens_are_not_streamed(terminal, letters_flags):
    arguments = ["x", "--n_tokens_to_generate", "5", *letters_flags]
    assert terminal(command(*arguments)).read_to_the_end() == ("aaaaa\n", 0)
    shown, code = terminal(command(*arguments, "--no-stream")).read_to_the_end()
    assert code == 0
    assert "generating" in shown and shown.endswith("aaaaa\n")


def test_a_bar_is_cleared_for_printed_items(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for item in with_bar(iter("abc"), 3, "letter", printed=True):
        print(item, file=sys.stderr)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() in ("a", "b", "c")] == ["a", "b", "c"]
    assert any("generating" in line for line in lines)
