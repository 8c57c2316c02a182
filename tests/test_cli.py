"""The command line of gpt2.py: the output for each option, the error lines, the end of an interrupted run."""

import codecs
import contextlib
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
from unittest.mock import Mock

import numpy as np
import pytest

import engines
from cli import engine, session
from encoder import bytes_to_unicode
from engines import compiled
from engines.compiled import import_kernels
from tests.conftest import ROOT, TINY
from tests.programs import SECONDS, assert_mistake, assert_prints, command, run, started
from tests.random_model import random_tensors, write_byte_vocabulary, write_safetensors
from weights import resources

TWELVE = "щфюэъы"  # twelve tokens, one per byte: the text that the vocabulary was learned from has no Cyrillic letters
N_8 = ["--n_tokens_to_generate", "8"]
SHAKESPEARE = ["--model_size", "shakespeare", "--models_dir", ROOT / "models"]  # whose vocabulary lacks <|endoftext|>
# the program, in which sampling the fourth token of a continuation takes forever: argv as for gpt2.py
HANGS_AT_THE_FOURTH = """
import itertools, sys, time
from cli import generate, session
def make_sampler(*arguments):
    sample, count = real(*arguments), itertools.count(1)
    def slow(logits):
        if next(count) == 4:
            print("three are out", file=sys.stderr, flush=True)
            while True:
                time.sleep(0.1)  # a signal just before a long sleep would not end it
        return sample(logits)
    return slow
real, session.make_sampler = session.make_sampler, make_sampler
sys.exit(generate.run())
"""
LETTERS = {"a": 0.4, "b": 0.3, "c": 0.15, "d": 0.1, "e": 0.05}  # probabilities of the letters model, for any prompt
CONTROLS = b"a\t\n\x1b\x07\r\x7f\x08"  # tokens of the controls model, equally likely


def make_letters_model(folder, probabilities):
    """Make a model that gives the tokens these probabilities, whatever the prompt."""
    folder.mkdir()
    write_byte_vocabulary(folder, 257)
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    hparams = TINY | {"n_vocab": 257}
    tensors = random_tensors(hparams)
    tensors["ln_f/g"][:] = 0
    tensors["ln_f/b"][:] = np.eye(1, hparams["n_embd"])[0]  # the logits are the first column of wte
    tensors["wte"][:, 0] = -40
    for token, probability in probabilities.items():
        tensors["wte"][vocabulary[token], 0] = np.log(probability)
    write_safetensors(folder, hparams, tensors)


@pytest.fixture(scope="session")
def letters_dir(tmp_path_factory):
    models_dir = tmp_path_factory.mktemp("letters")
    make_letters_model(models_dir / "letters", LETTERS)
    make_letters_model(models_dir / "ending", {"a": 0.6, "<|endoftext|>": 0.4})
    symbols = [bytes_to_unicode()[byte] for byte in CONTROLS]
    make_letters_model(models_dir / "controls", dict.fromkeys(symbols, 1 / len(symbols)))
    return models_dir


@pytest.fixture
def letters_flags(letters_dir):
    return ["--model_size", "letters", "--models_dir", str(letters_dir)]


needs_numba = pytest.mark.usefixtures("compiled_kernels")
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")


# The prompt and the text


@pytest.mark.parametrize(
    "arguments",
    [
        *(["Alan Turing theorized that"], ["def softmax(x):\n    return"], ["  two\n\n"], ["Ondřej 你好 🤗"], ["42"]),
        *(["-0.5"], ["- a list"], ["a\r\n"], ["\ufeffmark"], ["--", "--help"], ["--", "-x"], ["--", "--"]),
    ],
)
def test_a_prompt_is_text_that_continues_as_in_transformers(inside, tiny_flags, truth, arguments):
    assert_prints(inside(*N_8, *tiny_flags, *arguments), truth(arguments[-1]))


@pytest.mark.parametrize(
    ("typed", "prompt"),
    [
        *(("one", "one"), ("one\n\ntwo\n\n", "one\n\ntwo\n"), ("one\r\n\r\n", "one\r\n"), ("one\u2028\n", "one\u2028")),
        *(("\ufeffo\ufeffne\t\n", "o\ufeffne\t"), ("", ""), ("\n", ""), ("one\0two", "one\0two")),
    ],
)
def test_prompt_from_standard_input_lacks_only_its_last_line_break(inside, tiny_flags, truth, typed, prompt):
    assert_prints(inside("-", *N_8, *tiny_flags, typed=typed.encode()), truth(prompt))


def test_no_prompt_is_end_of_text_which_is_ordinary_text_in_a_prompt(inside, tiny_flags, truth):
    for prompt in ([], [""]):
        assert_prints(inside(*prompt, *N_8, *tiny_flags), truth(""))
    code, out, _ = inside("<|endoftext|>", *N_8, *tiny_flags)
    assert code == 0 and out.decode() != truth("") + "\n"


def test_space_at_the_end_is_noted(inside, tiny_flags, truth):
    code, out, err = inside("Hello ", *N_8, *tiny_flags)
    assert (code, out.decode()) == (0, truth("Hello ") + "\n")
    assert re.fullmatch(r"note: .*space.*\n", err.decode())


def test_no_tokens_and_a_full_context_work_and_one_more_token_is_refused(inside, tiny_flags, truth):
    arguments = [TWELVE * 10, *tiny_flags, "--n_tokens_to_generate"]
    assert_prints(inside(*arguments, 0), "")
    assert_prints(inside(*arguments, 8), truth(TWELVE * 10, 8))
    words = ("120 prompt tokens", "9 to generate", "129", "128", "--n_tokens_to_generate to 8, or see --slide\n")
    assert_mistake(inside(*arguments, 9), *words)
    assert_mistake(inside("0" * 1000, *tiny_flags), "tokens", "128", "shorten the prompt, or see --slide\n")


# Options


@pytest.fixture
def compiled_kernels(monkeypatch):
    """The test needs numba, with one thread; no line announces that kernels are compiled, which the first run does."""
    numba = pytest.importorskip("numba")
    monkeypatch.setattr("engines.vectors.Announcement.announced", True)
    n_threads = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(n_threads)


@pytest.fixture(params=["numpy", "compiled"])
def engine_flags(request):
    if request.param == "compiled":
        request.getfixturevalue("compiled_kernels")
    return ["--engine", request.param]


def text_of(result):
    code, out, err = result
    assert (code, err) == (0, b"")
    return out.decode("utf-8").removesuffix("\n")


@pytest.mark.parametrize(
    ("flags", "letters"),
    [("1", "abcde"), ("1 --top_k 3", "abc"), ("1 --top_k 4 --top_p 0.6", "ab"), ("0.02", "a")],
)
def test_options_choose_the_sampled_tokens(inside, letters_flags, flags, letters):
    """Of the four, a has 0.4 / 0.95 < 0.6, a and b 0.7 / 0.95. At 0.02, b is 0.75 ** 50 times as likely as a."""
    flags = ["--temperature", *flags.split(), *letters_flags]
    text = text_of(inside("x", "--n_tokens_to_generate", 120, "--seed", 1, *flags))
    assert (len(text), set(text)) == (120, set(letters))


@pytest.mark.parametrize("flags", [["--top_k", 3], ["--top_p", 0.9], ["--seed", 1], ["--n_samples", 2]])
def test_options_without_effect_at_temperature_0_are_noted(inside, letters_flags, flags):
    code, out, err = inside("x", "--n_tokens_to_generate", 3, *flags, *letters_flags)
    assert code == 0 and out.endswith(b"aaa\n")
    assert err.startswith(b"note: ") and b"--temperature" in err and err.count(b"\n") == 1


def test_seed_is_that_of_numpys_generator_and_samples_have_the_following_seeds(inside, letters_flags):
    flags = ["x", "--n_tokens_to_generate", 60, "--temperature", 1, *letters_flags]
    alone = []
    for seed in (7, 8, 9):
        numbers = np.random.default_rng(seed).random(60)
        alone.append("".join("abcde"[i] for i in np.searchsorted(np.cumsum(list(LETTERS.values())), numbers)))
        assert_prints(inside(*flags, "--seed", seed), alone[-1])
    expected = "\n".join(f"=== sample {i} ===\n{text}" for i, text in enumerate(alone, 1))
    assert_prints(inside(*flags, "--seed", 7, "--n_samples", 3), expected)
    assert text_of(inside(*flags)) != text_of(inside(*flags))


def test_stop_at_end_of_text(inside, letters_dir):
    flags = ["x", "--temperature", 1, "--models_dir", letters_dir, "--model_size", "ending"]
    lengths = set()
    for seed in range(5):
        before, mark, _ = text_of(inside(*flags, "--seed", seed)).partition("<|endoftext|>")
        assert mark
        assert_prints(inside(*flags, "--seed", seed, "--stop_at_end_of_text"), before)
        lengths.add(len(before))
    assert 0 in lengths and len(lengths) > 1


def test_without_end_of_text_there_is_no_stop_and_unconditional_generation_starts_a_line(inside):
    expected = inside("\n", *N_8, *SHAKESPEARE)
    assert expected[0] == 0 and inside(*N_8, *SHAKESPEARE) == expected
    mistake = inside("x", *SHAKESPEARE, "--stop_at_end_of_text")
    assert_mistake(mistake, "shakespeare has no <|endoftext|>", "leave out --stop_at_end_of_text")


def test_streamed_bytes_are_the_same(inside, tiny_flags):
    flags = ["你好", "--n_tokens_to_generate", 100, "--temperature", 2, "--seed", 3, "--n_samples", 2, *tiny_flags]
    streamed, whole, default = inside(*flags, "--stream"), inside(*flags, "--no-stream"), inside(*flags)
    assert streamed == whole == default
    assert len(whole[1]) > 200


# The engine

GPT2_124M, GPT2_1558M, TINY_GPT = 124_439_808, 1_557_611_200, 2_800_000  # parameters


@pytest.mark.parametrize(
    ("n_params", "n_prompt_tokens", "n_passes", "n_rows", "expected"),
    [
        *((GPT2_124M, 32, 1, 1, False), (GPT2_124M, 32, 40, 1, False), (GPT2_124M, 5, 900, 1, True)),
        *((GPT2_124M, 5, 60, 8, True), (GPT2_124M, 1000, 5, 1, False), (GPT2_124M, 100_000, 0, 1, True)),
        *((TINY_GPT, 20, 500, 1, False), (TINY_GPT, 20, 100, 8, False), (GPT2_1558M, 5, 200, 1, True)),
    ],
)
def test_the_compiled_engine_is_chosen_if_it_pays_back_its_start(n_params, n_prompt_tokens, n_passes, n_rows, expected):
    assert engine.pays_off(n_params, n_prompt_tokens, n_passes, n_rows) == expected


@needs_numba
@pytest.mark.parametrize("choice", ["compiled", "auto"])
@pytest.mark.parametrize("flags", ["ROMEO:", "ROMEO: --n_samples 3 --temperature 1 --seed 4", "--prompts_file -"])
def test_the_text_is_the_same_on_both_engines(inside, always_worth_it, flags, choice):
    flags = [*flags.split(), *SHAKESPEARE, "--n_tokens_to_generate", 30]
    expected = inside(*flags, "--engine", "numpy", typed=b"To be\nor not\n")
    assert always_worth_it.call_count == 0
    assert inside(*flags, "--engine", choice, typed=b"To be\nor not\n") == expected
    assert always_worth_it.call_count == 1


@pytest.fixture
def always_worth_it(monkeypatch):
    """Make auto take the compiled engine; return a Mock in the place of compiled_model, which it calls."""
    for module in (compiled, engine):
        monkeypatch.setattr(module, "import_kernels", import_kernels.__wrapped__)  # forgets earlier imports
    monkeypatch.setattr(engine, "START", -1)
    monkeypatch.setattr(engine, "compiled_model", Mock(wraps=engine.compiled_model))
    return engine.compiled_model


@needs_numba
@pytest.mark.parametrize("drafts", ["--speculate lookup", "--speculate self", "--draft_model shakespeare"])
@pytest.mark.parametrize("flags", ["ROMEO:", "--interactive --temperature 0.8 --seed 1"])
def test_drafts_on_the_compiled_engine_do_not_change_the_text(inside, flags, drafts):
    flags = [*flags.split(), *SHAKESPEARE, "--n_tokens_to_generate", 40, "--engine"]
    code, out, err = inside(*flags, "compiled", *drafts.split(), typed=b"To be\n")
    assert (code, out, b"") == inside(*flags, "numpy", typed=b"To be\n")
    assert re.fullmatch(r"note: tokens: 40, .*tokens/s\n", err.decode())


@needs_numba
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("flags", ["ROMEO:", "ROMEO: --speculate lookup", "--prompts_file -", "--interactive"])
def test_quantized_weights_are_said_to_be_lossy(inside, dtype, flags):
    code, out, err = inside(*flags.split(), *SHAKESPEARE, *N_8, "--dtype", dtype, typed=b"ROMEO:")
    assert code == 0 and len(out) > 8
    assert err.decode().splitlines()[0] == f"note: --dtype {dtype} is lossy: results differ from those of float32"
    assert err.count(b"\n") == 1 + ("--speculate" in flags)


@pytest.mark.parametrize("problem", ["numba is not installed", "numba cannot be imported", "memory is short"])
def test_without_numba_or_memory_auto_takes_numpy_and_compiled_says_why(inside, always_worth_it, monkeypatch, problem):
    expected = inside("ROMEO:", *SHAKESPEARE, *N_8, "--engine", "numpy")
    if problem == "memory is short":
        monkeypatch.setattr(resources, "available_memory", lambda: 2**20)
        words = ["needs about", "1.05 MB are available"]
    else:
        monkeypatch.setitem(sys.modules, "numba", None)
        if problem == "numba cannot be imported":
            monkeypatch.setattr(engine, "is_installed", lambda: True)
        for name in ("attention", "functions", "kernels", "panels", "program", "vectors"):
            monkeypatch.delitem(sys.modules, f"engines.{name}", raising=False)
            monkeypatch.delattr(engines, name, raising=False)
        words = ["numba", "pip install numba"]
    assert inside("ROMEO:", *SHAKESPEARE, *N_8) == expected
    for flags in (["--engine", "compiled"], ["--dtype", "int8"], ["--speculate", "self"]):
        code, out, err = inside("ROMEO:", *SHAKESPEARE, *N_8, *flags)
        remedy = "set --engine numpy" if "--engine" in flags else f"leave out {' '.join(flags)}"
        assert_mistake((code, out, err.splitlines(keepends=True)[-1]), *words, remedy)


@needs_numba
def test_kernels_that_do_not_compile(inside, always_worth_it, monkeypatch):
    """auto prints a line and takes NumPy; --engine compiled is an error."""
    expected = inside("ROMEO:", *SHAKESPEARE, *N_8, "--engine", "numpy")
    monkeypatch.setattr("engines.panels.packed", Mock(side_effect=ValueError("no such\nprocessor")))
    line = "numba cannot compile the kernels (no such processor); set --engine numpy"
    assert inside("ROMEO:", *SHAKESPEARE, *N_8) == (*expected[:2], f"note: {line}\n".encode())
    assert_mistake(inside("ROMEO:", *SHAKESPEARE, *N_8, "--engine", "compiled"), line)


def test_settings_of_numba_and_openmp(tmp_path):
    """Kernels that are not compiled are an error; more threads than cores are not started."""
    arguments = "ROMEO:", *SHAKESPEARE, *N_8, "--engine", "compiled"
    done = run(*arguments, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    assert_mistake(done, "NUMBA_DISABLE_JIT is set", "--engine numpy")
    assert run(*arguments, env=os.environ | {"OMP_NUM_THREADS": "99999999999"})[0] == 0


def test_numba_is_not_imported_for_few_tokens_and_its_error_is_one_line(tmp_path):
    options = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    (tmp_path / "numba.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    assert run("ROMEO:", *SHAKESPEARE, *N_8, **options)[::2] == (0, b"")
    assert run("ROMEO:", *SHAKESPEARE, "--engine", "compiled", **options) == (1, b"", b"imported\n")
    (tmp_path / "numba.py").write_text("raise ImportError('it needs\\nanother NumPy')", encoding="utf-8")
    assert_mistake(run("ROMEO:", *SHAKESPEARE, "--engine", "compiled", **options), "numba (it needs another NumPy)")


# Resources


@pytest.mark.parametrize("flags", [[], ["--prompts_file", "-", "--batch_size", 5]])
def test_samples_are_started_when_there_is_room_in_the_batch(inside, letters_flags, monkeypatch, flags):
    made, make = [], session.make_sampler

    def make_sampler(*arguments):
        if len(made) == 30:
            raise KeyboardInterrupt
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(session, "make_sampler", make_sampler)
    flags = ["--n_samples", 10**6, "--temperature", 1, "--n_tokens_to_generate", 5, *flags]
    code, out, err = inside(*flags, *letters_flags, typed=b"x\n" * 3)
    assert (code, err) == (130, b"") and 20 <= out.count(b"sample") <= 30


def test_a_batch_that_does_not_fit_into_memory_is_refused(inside, tiny_flags, monkeypatch):
    flags = ["x", *N_8, *tiny_flags, "--n_samples", 1000, "--temperature", 1, "--batch_size"]
    per_row = 4 * (TINY["n_layer"] * 2 * TINY["n_embd"] * (1 + 8) + TINY["n_vocab"])
    monkeypatch.setattr(resources, "available_memory", lambda: 1000 * per_row - 1)
    words = ["a batch of 1000 continuations", resources.format_bytes(1000 * per_row), "set a smaller --batch_size"]
    assert_mistake(inside(*flags, 10**9), *words)
    assert inside(*flags, 999)[0] == 0
    monkeypatch.setattr(resources, "available_memory", lambda: 0)
    assert_mistake(inside(*flags, 1), "needs about", "0 bytes")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
@pytest.mark.parametrize("flags", ["--prompts_file /dev/zero", "--prompts_file -", "-", "--interactive"])
def test_an_endless_input_is_refused(tiny_flags, flags):
    with open("/dev/zero", "rb") as endless:
        assert_mistake(run(*flags.split(), *tiny_flags, input=None, stdin=endless), "has more than", "MB")


@pytest.fixture(scope="session")
def damaged_dir(tmp_path_factory, tiny_models_dir, tiny_tensors):
    """Copies of the tiny model in which one parameter is NaN or infinite, and the tiny model itself."""
    models_dir = tmp_path_factory.mktemp("damaged")
    (models_dir / "tiny").symlink_to(tiny_models_dir / "tiny")
    for name, tensor, value in (("nan", "h1/mlp/c_proj/w", np.nan), ("infinite", "wte", -np.inf)):
        folder = shutil.copytree(tiny_models_dir / "tiny", models_dir / name)
        tensors = tiny_tensors | {tensor: tiny_tensors[tensor].copy()}
        tensors[tensor].flat[7] = value
        write_safetensors(folder, TINY, tensors)
    return models_dir


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("model", ["nan", "infinite"])
@pytest.mark.parametrize(
    "flags",
    [
        *("x", "x --stream", "x --n_samples 3 --temperature 1", "x --temperature 0.7 --top_k 9 --top_p 0.5"),
        *("x --speculate lookup", "x --draft_model tiny", "--interactive"),
        *("--prompts_file - --output out.jsonl", "x --explain", "x --explain out.html"),
    ],
)
def test_damaged_weights_give_one_line_and_no_text(
    inside, damaged_dir, tmp_path, monkeypatch, engine_flags, model, flags
):
    monkeypatch.chdir(tmp_path)
    flags = flags.split() if "--explain" in flags else [*flags.split(), *engine_flags]
    code, out, err = inside("--models_dir", damaged_dir, "--model_size", model, *flags, typed=b"x\n")
    assert_mistake((code, out.strip(), err), "the logits are not finite: the weights are damaged")
    assert list(tmp_path.iterdir()) == []


# Mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        *("--n_tokens_to_generate 1.5", "--n_tokens_to_generate ''", "--n_tokens_to_generate"),
        *("--n_tokens_to_generate 999999999999999999999999999999", "--n_samples 0", "--seed -1", "--seed x"),
        *("--temperature=-0.1", "--temperature nan", "--temperature 1e999", "--temperature abc"),
        *("--top_p 0", "--top_p 1.5", "--top_p nan", "--n_token 3", "--no_such_flag"),
        *("--interactive", "--speculate often", "--explain out.png", "--engine fast", "--dtype int2"),
        *("--engine numpy --dtype int8", "--engine numpy --speculate self", "--speculate self --dtype int4"),
    ],
)
def test_mistake_on_the_command_line_is_named(inside, tiny_flags, arguments):
    words = [word for argument in shlex.split(arguments) for word in argument.split("=")]
    assert_mistake(inside("Hello", *tiny_flags, *shlex.split(arguments)), *words)


def test_hints_for_mistakes(inside, tiny_flags, tmp_path):
    """In error lines, control characters of the user's names are replaced."""
    assert_mistake(inside("Hello", "more", "words", *tiny_flags), "more words", "quotes", "after --", "--help")
    assert_mistake(inside("Hello", "--interactive"), "a prompt, --prompts_file and --interactive")
    assert_mistake(inside("Hello", "--output", "/none/out"), "--output", "--prompts_file")
    assert_mistake(inside("Hello", "--models_dir", "/dev/null/x"), "cannot write", "/dev/null/x", "--models_dir")
    (tmp_path / "a\x1b[31m\nb").touch()
    assert_mistake(inside("--prompts_file", tmp_path / "a\x1b[31m\nb", *tiny_flags), "a\ufffd[31m b is empty")
    assert_mistake(result := inside("Hello", "--temperature", "x" * 5000), " ... ", "see python gpt2.py --help")
    assert len(result[2]) < 1100


def test_arguments_or_an_input_that_are_not_utf_8(inside, tiny_flags, monkeypatch):
    result = inside("-", *tiny_flags, typed="Žluťoučký kůň".encode("iso-8859-2"))
    assert_mistake(result, "standard input is not UTF-8", "byte 0xae at position 0", "iconv")
    assert_mistake(run(b"abc\xff", *tiny_flags), "the prompt", "not UTF-8", "byte 0xff at position 3")
    monkeypatch.delenv("GPT2_BASE_URL")
    for option in ("--prompts_file", "--models_dir", "--model_size", "--prompt"):
        assert_mistake(inside(*tiny_flags, "--model_size", "124M", option, "/dev/null/\udcff"))


@needs_dev_full
@pytest.mark.parametrize("script", ["gpt2.py", "train.py", "evaluate.py", "baby_gpt.py", "official/compare.py"])
def test_standard_output_on_a_full_disk(script):
    with open("/dev/full", "wb") as full:
        code, _, err = run("--help", script=script, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert_mistake((code, b"", err), "cannot write the output: No space left on device", script=script)


@needs_dev_full
@pytest.mark.parametrize(
    ("arguments", "expected"), [(["x ", "--n_tokens_to_generate", "3"], (0, b"aaa\n")), (["--no_such_flag"], (2, b""))]
)
def test_messages_are_lost_if_standard_error_is_on_a_full_disk(letters_flags, arguments, expected):
    with open("/dev/full", "wb") as full:
        streams = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": full}
        assert run(*arguments, *letters_flags, **streams)[:2] == expected


def test_an_error_of_a_stream_is_named(tiny_flags, tmp_path):
    with open(tmp_path / "written", "wb") as f:
        assert_mistake(run("-", *tiny_flags, input=None, stdin=f), "input or output failed: Bad file descriptor")


def test_names_that_are_not_utf_8_are_printed(tmp_path):
    (tmp_path / "text").write_text("To be, or not to be", encoding="utf-8")
    os.rename(tmp_path / "text", name := os.fsencode(tmp_path) + b"/\xff")
    code, out, err = run(name, *SHAKESPEARE, script="evaluate.py")
    assert (code, err) == (0, b"") and b"\\udcff (all)" in out


@pytest.mark.parametrize("line", ['"$@" x >&-', '"$@" - <&-'])
def test_closed_standard_streams_give_no_traceback(letters_flags, line):
    in_shell = ["sh", "-c", line, "sh", *command(*letters_flags)]
    done = subprocess.run(in_shell, capture_output=True, timeout=SECONDS, check=False)
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_prompt_output_and_mistakes_are_utf_8_in_any_locale(environment, tiny_models_dir, truth, tmp_path):
    """From another directory, in which nothing is written."""
    options = {"env": os.environ | environment, "cwd": tmp_path}
    tiny_flags = ["--model_size", "tiny", "--models_dir", os.path.relpath(tiny_models_dir, tmp_path)]
    prompt, expected = "Ondřej 你好".encode(), truth("Ondřej 你好")
    assert not expected.isascii()
    assert_prints(run(prompt, *N_8, *tiny_flags, "--stream", **options), expected)
    assert_prints(run("-", *N_8, *tiny_flags, "--no-stream", input=prompt, **options), expected)
    assert_mistake(run("--prompts_file", "žádný".encode(), *tiny_flags, **options))
    assert list(tmp_path.iterdir()) == []


# Ctrl-C and closed pipes


def hanging(*arguments):
    return [sys.executable, "-c", HANGS_AT_THE_FOURTH, *arguments]


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ("", b"", b"aaa\n"),
        ("--stream --n_samples 2 --temperature 0.02", b"=== sample 1 ===\naaa", b"\n"),
        ("--n_samples 2 --temperature 0.02", b"", b"=== sample 1 ===\naaa\n=== sample 2 ===\naaa\n"),
    ],
)
def test_tokens_are_printed_early_if_streamed_and_at_ctrl_c_in_any_case(letters_flags, flags, before, after):
    with started(hanging("x", *flags.split(), *letters_flags)) as process:
        assert process.stderr.readline() == b"three are out\n"
        os.set_blocking(process.stdout.fileno(), False)
        assert (process.stdout.read() or b"") == before
        os.set_blocking(process.stdout.fileno(), True)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (after, b"")
        assert process.returncode == 130


def test_interrupt_while_reading_the_prompt(inside, letters_flags, monkeypatch):
    monkeypatch.setattr(session, "read_prompt", Mock(side_effect=KeyboardInterrupt))
    assert inside("-", *letters_flags) == (130, b"", b"")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # for who called run()


@pytest.mark.parametrize(
    ("arguments", "stream", "code"),
    [
        *(("x --stream", "stdout", 141), ("x --no-stream", "stdout", 141)),
        *(("x --top_k 3", "stderr", 141), ("x --no_such_flag", "stderr", 2)),
    ],
)
def test_nobody_reads_the_output(letters_flags, arguments, stream, code):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        options = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: pipe}
        found, out, err = run(*arguments.split(), *letters_flags, **options)
    assert (found, out or b"", err or b"") == (code, b"", b"")


def test_each_line_is_answered_and_a_bad_one_does_not_end_the_session(inside, tiny_flags, truth):
    typed = b"Hello\n\n\r\n%b\na\xffb\nOnd\xc5\x99ej\nbye" % (TWELVE.encode() * 10)
    code, out, err = inside("--interactive", *tiny_flags, typed=typed)
    expected = "".join(truth(prompt, 40) + "\n" for prompt in ("Hello", "Ondřej", "bye"))
    assert (code, out.decode("utf-8")) == (0, expected)
    lines = r"error: 120 prompt tokens \+ 40 to generate = 160, .*128.*\nerror: .*not UTF-8.*0xff.*\n"
    assert re.fullmatch(lines, err.decode("utf-8"))


def test_each_answer_has_its_samples(inside, letters_flags):
    flags = ["--interactive", "--n_samples", 2, "--n_tokens_to_generate", 2, "--temperature", 0.02, *letters_flags]
    one = "=== sample 1 ===\naa\n=== sample 2 ===\naa"
    assert_prints(inside(*flags, typed=b"x\ny\n"), one + "\n" + one)
    assert inside(*flags, typed=b"") == (0, b"", b"")


# At a terminal


ATTACH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal(contextlib.AbstractContextManager):
    """A program at a pseudo-terminal: the text on the screen, the keys that a person types."""

    def __init__(self, arguments, **environment):
        self.master, screen = pty.openpty()
        termios.tcsetwinsize(screen, (24, 80))
        arguments = [sys.executable, "-c", ATTACH, *arguments]
        streams = {
            "stdin": screen,
            "stdout": screen,
            "stderr": screen,
            "env": os.environ | {"TERM": "dumb"} | environment,
        }
        self.process = subprocess.Popen(arguments, start_new_session=True, cwd=ROOT, **streams)
        os.close(screen)
        self.decoder, self.shown = codecs.getincrementaldecoder("utf-8")("replace"), ""

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

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal():
    """A function that starts a program at a terminal of its own; the program ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda arguments, **environment: stack.enter_context(Terminal(arguments, **environment))


def test_terminal_answers_until_ctrl_d(terminal, letters_flags):
    screen = terminal(command("--interactive", "--n_tokens_to_generate", "4", *letters_flags))
    for expected, typed in (("", "\n"), ("\n", "Ondřej\n"), ("Ondřej\naaaa\n", "\x04")):
        assert screen.read_until("prompt> ") == expected
        screen.type(typed)
    assert screen.read_to_the_end() == ("\n", 0)


def test_terminal_reports_bytes_that_are_not_utf8(terminal, letters_flags, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")  # strict, as in a locale with a country
    screen = terminal(command("--interactive", "--n_tokens_to_generate", "4", *letters_flags))
    screen.read_until("prompt> ")
    os.write(screen.master, b"\xff\n")
    assert "error: the prompt is not UTF-8 (byte 0xff at position 0)" in screen.read_until("prompt> ")
    screen.type("\x04")
    assert screen.read_to_the_end()[1] == 0


def test_terminal_streams_and_ctrl_c_ends_the_answer_and_at_the_prompt_the_program(terminal, letters_flags):
    screen = terminal(hanging("--interactive", *letters_flags))
    screen.read_until("prompt> ")
    screen.type("Hello\n")
    assert screen.read_until("three are out\n") == "Hello\naaa"
    screen.type("\x03")
    assert screen.read_until("prompt> ").replace("^C", "") == "\n"
    time.sleep(0.3)  # the least that a person takes: CPython misses a Ctrl-C at the instant when it shows the prompt
    screen.type("\x03")
    shown, code = screen.read_to_the_end()
    assert code == 130 and "Traceback" not in shown


def test_terminal_shows_a_bar_only_if_tokens_are_not_streamed(terminal, letters_flags):
    arguments = ["x", "--n_tokens_to_generate", "5", *letters_flags]
    assert terminal(command(*arguments)).read_to_the_end() == ("aaaaa\n", 0)
    shown, code = terminal(command(*arguments, "--no-stream")).read_to_the_end()
    assert code == 0
    assert "generating" in shown and shown.endswith("aaaaa\n")


@pytest.mark.parametrize("arguments", [["--help"], ["x", "--no-stream"]])
def test_no_color(terminal, letters_flags, arguments):
    """From Python 3.14 on, argparse colors the help at a terminal; it honours NO_COLOR itself."""
    screen = terminal(command(*arguments, *letters_flags), TERM="xterm-256color", NO_COLOR="1")
    shown, code = screen.read_to_the_end()
    assert code == 0 and len(shown) > 40 and "\x1b" not in shown


@pytest.mark.parametrize("flags", ["", "--no-stream", "--n_samples 2", "--interactive", "--prompts_file -"])
def test_control_characters_are_shown_at_a_terminal_and_exact_elsewhere(terminal, inside, letters_dir, flags):
    model = ["--models_dir", letters_dir, "--model_size", "controls", "--temperature", "1", "--seed", "1"]
    arguments = [*model, *flags.split(), "--n_tokens_to_generate", "100"]
    screen, is_interactive = terminal(command(*arguments)), "--interactive" in arguments
    if is_interactive:
        screen.read_until("prompt> ")
    screen.type("x\n" if is_interactive else "x\n\x04")
    shown = screen.read_until("prompt> ") if is_interactive else screen.read_to_the_end()[0]
    assert "\ufffd" in shown and not set(shown) & set("\x1b\x07\x7f\x08")
    text = inside(*arguments, typed=b"x\n")[1]
    assert set(json.loads(text)["text"].encode() if "--prompts_file" in arguments else text) >= set(CONTROLS)


def test_a_bar_is_cleared_for_printed_items(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for item in session.with_bar(iter("abc"), 3, "letter", printed=True):
        print(item, file=sys.stderr)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() in ("a", "b", "c")] == ["a", "b", "c"]
    assert any("generating" in line for line in lines)
