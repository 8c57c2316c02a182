"""docs/: its examples give what they say, its commands print what it shows, the code it quotes is the code.

Numbers with a decimal point, and percentages, may differ by two units of the last digit shown: another processor, or
another version of NumPy, rounds differently.
"""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import DATA, ROOT

READING = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
BACKWARD = (ROOT / "docs" / "backward.md").read_text(encoding="utf-8")
TEXTS = ("names.txt", "tinyshakespeare.txt")  # what commands read, from the tests' data


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


class NearlyEqual(doctest.OutputChecker):
    def check_output(self, shown, found, flags):
        return matches(found, shown)


def test_the_examples_of_reading_are_true(monkeypatch):
    monkeypatch.chdir(ROOT)
    runner = doctest.DocTestRunner(NearlyEqual())
    runner.run(doctest.DocTestParser().get_doctest(READING, {}, "reading.md", None, 0))
    assert runner.failures == 0
    assert runner.tries > 20


def commands():
    """Pairs of a command line and the output that is shown below it, "..." for what is left out."""
    for block in blocks(READING, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield pytest.param(command, shown, id=command)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with the data in place: commands may write there."""
    path = tmp_path_factory.mktemp("checkout")
    for source in ROOT.glob("*.py"):
        shutil.copy(source, path)
    shutil.copytree(ROOT / "models" / "shakespeare", path / "models" / "shakespeare")
    (path / "data").mkdir()
    for name in TEXTS:
        if (DATA / name).exists():
            shutil.copy(DATA / name, path / "data")
    return path


ROUNDED = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?%?|\d+%")


def matches(found, shown):
    """Whether a text is what is shown, up to the last digits; "..." is anything in a line, and alone any lines."""
    pattern = "(-?[0-9.e+-]+%?)".join(map(re.escape, ROUNDED.split(shown)))
    pattern = pattern.replace(re.escape("...\n"), "(?:.*\n)*?").replace(re.escape("..."), ".*")
    same = re.fullmatch(pattern, found)
    return same is not None and all(map(nearly_equal, same.groups(), ROUNDED.findall(shown)))


def nearly_equal(found, shown):
    """Whether a number is the one shown, give or take two units of the last digit shown."""
    digits, _, exponent = shown.rstrip("%").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(float(found.rstrip("%")) - float(shown.rstrip("%"))) <= 2.001 * unit


@pytest.mark.parametrize(("command", "shown"), list(commands()))
def test_a_command_of_reading_prints_what_it_shows(checkout, command, shown):
    for name in TEXTS:
        if name.removesuffix(".txt") in needed(command) and not (checkout / "data" / name).exists():
            pytest.skip(f"{name} is not here")
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # else lines are longer
    done = subprocess.run(
        words, check=False, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert matches(done.stdout, shown), done.stdout


def needed(command):
    """The data a command reads when nothing else is said."""
    if "microgpt.py" in command:
        return ["names"]
    return ["tinyshakespeare"] if "baby_gpt.py" in command and "--markov" not in command else []


@pytest.mark.parametrize(
    ("found", "shown", "same"),
    [
        ("a\nb\nc\n", "a\n...\nc\n", True),
        ("a\nc\n", "a\n...\nc\n", True),
        ("loss 1.5\n", "loss ...\n", True),
        ("a\nb\n", "a\n", False),
        ("a\nb\n", "a\nB\n", False),
        ("loss 0.461278, 56%\n", "loss 0.461279, 57%\n", True),
        ("loss 0.461276\n", "loss 0.461279\n", False),
        ("[-1.5e-08, 3.  ]\n", "[-1.6e-08, 3.  ]\n", True),
        ("1.6e-07\n", "1.6e-08\n", False),
        ("60%\n", "57%\n", False),
        ("12 ids\n", "13 ids\n", False),
    ],
)
def test_only_what_is_left_out_and_last_digits_may_differ(found, shown, same):
    assert matches(found, shown) == same


def test_the_code_that_backward_quotes_is_there():
    sources = [(ROOT / name).read_text(encoding="utf-8") for name in ("fused.py", "autograd.py")]
    quotes = blocks(BACKWARD, "python")
    assert len(quotes) > 5
    for quote in quotes:
        for line in filter(str.strip, quote.splitlines()):
            assert any(f"\n{line}\n" in source for source in sources), line
