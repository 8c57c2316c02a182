"""What documents show is true: examples, commands and their output, quoted code, file names, links.

Numbers with a decimal point, and percentages, may differ by two units of the last digit shown: another processor, or
another version of NumPy, rounds differently.
"""

import doctest
import importlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from encoder import get_encoder
from tests.conftest import DATA, ROOT, need
from tests.test_layout import FOLDERS

DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("official/*.md"), *ROOT.glob("models/*/*.md")]
}
READING, BACKWARD = DOCUMENTS["docs/reading.md"], DOCUMENTS["docs/backward.md"]
OPENAI_FILES = ("model.py", "sample.py", "src/interactive_conditional_samples.py")
# By program, the module of cli whose make_parser() returns its parser
PARSERS = {"gpt2.py": "generate", "train.py": "train", "evaluate.py": "evaluate", "baby_gpt.py": "baby_gpt"}
PARSERS |= {"serve.py": "serve", "official/compare.py": "compare"}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


ROUNDED = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?%?|\d+%")


def matches(found, shown):
    """Whether a text equals the one shown up to last digits; "..." is anything in a line, alone any number of lines."""
    pattern = "(-?[0-9.e+-]+%?)".join(map(re.escape, ROUNDED.split(shown)))
    pattern = pattern.replace(re.escape("...\n"), "(?:.*\n)*?").replace(re.escape("..."), ".*")
    same = re.fullmatch(pattern, found)
    return same is not None and all(map(nearly_equal, same.groups(), ROUNDED.findall(shown)))


def nearly_equal(found, shown):
    """Whether a number differs from the one shown by at most two units of the last digit shown."""
    digits, _, exponent = shown.rstrip("%").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(float(found.rstrip("%")) - float(shown.rstrip("%"))) <= 2.001 * unit


def test_only_last_digits_and_omitted_text_may_differ():
    assert matches("a\nb\nc 1.5\n0.461278, 56%\n", "a\n...\nc ...\n0.461279, 57%\n")
    for found, shown in (("a\nb\n", "a\n"), ("0.461276", "0.461279"), ("1.6e-07", "1.6e-08"), ("12 ids", "13 ids")):
        assert not matches(found, shown)


def test_the_examples_of_reading_are_true(monkeypatch):
    monkeypatch.chdir(ROOT)
    checker = doctest.OutputChecker()
    checker.check_output = lambda shown, found, flags: matches(found, shown)
    runner = doctest.DocTestRunner(checker)
    runner.run(doctest.DocTestParser().get_doctest(READING, {}, "reading.md", None, 0))
    assert runner.failures == 0 and runner.tries > 20


def test_reading_names_its_sources_and_gpt2s_ids_of_its_example():
    for source in ("GPT in 60 Lines of NumPy", "microGPT", "BabyGPT", "finite-state Markov chain"):
        assert source in READING.partition("\n| | file")[0]
    text, ids = re.search(r'With GPT-2\'s 50,257, "([^"]*)" is 8 tokens,\n`([0-9 ]*)`', READING).groups()
    need(DATA / "gpt2" / "vocab.bpe")
    assert get_encoder("gpt2", str(DATA)).encode(text) == [int(i) for i in ids.split()]


def commands():
    """Pairs of a command line and the output shown below it, "..." for omitted text."""
    for block in blocks(READING, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield pytest.param(command, shown, id=command)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the programs, the bundled model and the data, in which commands may write."""
    path = tmp_path_factory.mktemp("checkout")
    for source in ROOT.glob("*.py"):
        shutil.copy(source, path)
    for folder in (*FOLDERS, "models/shakespeare"):
        shutil.copytree(ROOT / folder, path / folder)
    (path / "data").mkdir()
    for source in filter(pathlib.Path.exists, (DATA / "names.txt", DATA / "tinyshakespeare.txt")):
        shutil.copy(source, path / "data")
    return path


@pytest.mark.parametrize(("command", "shown"), list(commands()))
def test_a_command_of_reading_prints_what_it_shows(checkout, monkeypatch, command, shown):
    if "microgpt.py" in command:
        need(checkout / "data" / "names.txt")
    elif "baby_gpt.py" in command and "--markov" not in command:
        need(checkout / "data" / "tinyshakespeare.txt")
    monkeypatch.delenv("COLUMNS", raising=False)  # else lines are longer
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, check=False, cwd=checkout, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert matches(done.stdout, shown), done.stdout


def test_the_code_that_backward_quotes_is_in_the_source():
    names = ("fused.py", "kernels.py", "autograd.py")
    sources = [(ROOT / "training" / name).read_text(encoding="utf-8") for name in names]
    quotes = blocks(BACKWARD, "python")
    assert len(quotes) > 5
    for quote in quotes:
        for line in filter(str.strip, quote.splitlines()):
            assert any(f"\n{line}\n" in source for source in sources), line


def test_the_readme_has_at_most_10_kilobytes():
    assert len(DOCUMENTS["README.md"].encode("utf-8")) <= 10_000


def anchors(text):
    """GitHub's anchors of the headings of a document."""
    headings = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_file_names_exist(document):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", DOCUMENTS[document]):
        path = (ROOT / document).parent.joinpath(target).resolve() if target else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"
    paths = [f"/{path.relative_to(ROOT)}" for pattern in ("*.*", "*/*.*") for path in ROOT.glob(pattern)]
    for name in re.findall(r"(?<![\w/.:-])\w[\w/]*\.(?:py|md)\b", DOCUMENTS[document]):
        assert name in OPENAI_FILES or any(path.endswith(f"/{name}") for path in paths), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_options_that_exist(document):
    for line in DOCUMENTS[document].splitlines():
        for program, rest in re.findall(r"python (\S+\.py)\b([^`|<>]*?)(?=  |[`|<>]|$)", line):
            words = shlex.split(rest, comments=True)
            if program in PARSERS and "--help" not in words:
                importlib.import_module(f"cli.{PARSERS[program]}").make_parser().parse_args(words)
