"""microgpt.py against the published run of Karpathy's microGPT, against PyTorch, and as a command.

Published are the number of names, tokens and parameters. The losses and samples are the original's own, run on CPython
3.11 with its seed, 42, on makemore's names.txt.
"""

import errno
import functools
import hashlib
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import scipy.stats
import torch
from torch.nn import functional as F

import microgpt
from microgpt import Value
from tests import programs
from tests.conftest import DATA, ROOT, need
from tests.programs import SECONDS, assert_mistake, started
from tests.test_shapes import Checker, traced

LOSSES = """3.3659669476 3.4242727839 3.1778021255 3.0663556842 3.2208830898
            2.9451597230 3.2894250644 3.3245295854 2.8990336424 3.2228882401"""
SAMPLES = """kamon ann karai jaire vialan karia yeran anna areli kaina
             konna keylen liole alerin earan lenne kana lara alela anton"""
TEXT = "emma\nolivia\nava\nisabella\nsophia\n"
COMMAND = [sys.executable, str(ROOT / "microgpt.py")]
tensor = functools.partial(torch.tensor, dtype=torch.float64)
assert_error = functools.partial(assert_mistake, script="microgpt.py")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """A function from arguments to (exit code, standard output, standard error), in a folder with a text.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def run(arguments):
        try:
            code = microgpt.main(arguments.split()) or 0
        except SystemExit as exit:
            code = int(exit.code)
        return code, *capsys.readouterr()

    return run


def losses_of(lines):
    return [float(line.partition(": loss ")[2]) for line in lines]


def test_first_losses_are_the_published_ones():
    names = need(DATA / "names.txt")
    assert hashlib.sha256(names.read_bytes()).hexdigest() == microgpt.SHA256
    with started([*COMMAND, "--data", str(names)]) as process:
        lines = [next(process.stdout).decode().rstrip("\n") for _ in range(1 + 10)]
    assert lines[0] == "32033 documents, 27 different tokens, 4192 parameters"
    assert [line.partition(": ")[0] for line in lines[1:]] == [f"step {step} of 1000" for step in range(1, 11)]
    assert losses_of(lines[1:]) == pytest.approx([float(loss) for loss in LOSSES.split()], rel=0, abs=1e-9)


@pytest.mark.full_size
def test_whole_run_equals_the_original(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(need(DATA / "names.txt"), tmp_path / "data")
    done = subprocess.run(COMMAND, capture_output=True, encoding="utf-8", timeout=SECONDS, check=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert (done.stderr, len(lines)) == ("", 1 + 1000 + 20)
    assert losses_of(lines[1000:1001]) == pytest.approx([2.6496944697], rel=0, abs=1e-9)
    assert [line.partition(". ")[2] for line in lines[1001:]] == SAMPLES.split()


def test_a_graph_may_be_deeper_than_the_recursion_limit():
    sum([Value(1.0)] * 20 * sys.getrecursionlimit(), x := Value(1.0)).backward()
    assert x.grad == 1.0


def torch_weights(model):
    return {name: tensor([[v.data for v in row] for row in w], requires_grad=True) for name, w in model.items()}


def torch_loss(tokens, weights):
    """The loss of the same model in PyTorch, for all positions at once."""
    n_seq = len(tokens) - 1
    norm = functools.partial(F.rms_norm, normalized_shape=(microgpt.N_EMBD,), eps=1e-5)
    x = norm(weights["wte"][tokens[:-1]] + weights["wpe"][:n_seq])
    for i in range(microgpt.N_LAYER):
        w = {name.partition(".")[2]: matrix for name, matrix in weights.items() if name.startswith(f"h{i}.")}
        q, k, v = (norm(x) @ w[name].T for name in ("wq", "wk", "wv"))
        q, k, v = (a.view(n_seq, microgpt.N_HEAD, -1).transpose(0, 1) for a in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(n_seq, -1)
        x = x + mixed @ w["wo"].T
        x = x + torch.relu(norm(x) @ w["c_fc"].T) @ w["c_proj"].T
    return F.cross_entropy(x @ weights["lm_head"].T, torch.tensor(tokens[1:]))


def new_model(n_vocab=27):
    """A model with four times the initial weights, so that relu, softmax and norms matter more."""
    random.seed(1)
    model = microgpt.new_model(n_vocab)
    for p in parameters(model):
        p.data *= 4
    return model


def parameters(model):
    return [p for matrix in model.values() for row in matrix for p in row]


def test_loss_and_every_gradient_equal_pytorchs(monkeypatch):
    monkeypatch.setattr(microgpt, "N_LAYER", 2)
    model, tokens = new_model(), [26, 4, 12, 12, 0, 9, 3, 0, 1, 26]
    weights = torch_weights(model)
    (loss := microgpt.mean_loss(tokens, model)).backward()
    (expected := torch_loss(tokens, weights)).backward()
    assert loss.data == pytest.approx(expected.item(), rel=1e-13)
    for name, matrix in model.items():
        gradient = tensor([[v.grad for v in row] for row in matrix])
        assert weights[name].grad.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-10, atol=1e-13, msg=name)


def test_training_steps_equal_pytorchs_adam():
    steps, docs, losses = 5, [[3, 0, 1, 3], [3, 2, 2, 1, 0, 3]], []
    weights = torch_weights(model := new_model(4))
    adam = torch.optim.Adam(weights.values(), lr=0.01, betas=(0.85, 0.99), eps=1e-8)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        adam.zero_grad()
        (loss := torch_loss(docs[step % 2], weights)).backward()
        adam.step()
        losses.append(loss.item())
    assert list(microgpt.train(docs, model, parameters(model), steps)) == pytest.approx(losses, rel=1e-10)
    torch.testing.assert_close(torch_weights(model), weights)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_follow_the_probabilities_at_a_temperature(monkeypatch, temperature):
    logits, chars, n = [1.0, 2.0, 0.5, 1.5], ["a", "b", "c", microgpt.BOS], 3000
    monkeypatch.setattr(microgpt, "gpt", lambda *_: [Value(x) for x in logits])
    monkeypatch.setattr(microgpt, "N_CTX", 1)
    random.seed(0)
    first = [microgpt.sample(chars, None, temperature) or microgpt.BOS for _ in range(n)]
    expected = torch.softmax(tensor(logits) / temperature, 0) * n
    assert scipy.stats.chisquare([first.count(char) for char in chars], expected).pvalue > 1e-3


def test_a_sample_ends_at_bos_or_when_the_context_is_full(monkeypatch):
    for logits, text in (([9.0, 0.0], "a" * microgpt.N_CTX), ([0.0, 9.0], "")):
        monkeypatch.setattr(microgpt, "gpt", lambda *_, logits=logits: [Value(x) for x in logits])
        assert microgpt.sample(["a", microgpt.BOS], None, 0.001) == text


def test_a_seed_repeats_a_run(run):
    first, again, other = (run(f"--data text.txt --steps 2 --n_samples 3 --seed {seed}") for seed in (7, 7, 8))
    assert (first[0], first[2], len(first[1].splitlines())) == (0, "", 1 + 2 + 3)
    assert first[1] == again[1] != other[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--steps 0", "--steps 0: must be a finite number, at least 1"),
        ("--temperature 0", "--temperature 0.0: must be a finite number, at least 0.001"),
        ("--temperature inf", "--temperature inf"),
        ("--data nowhere.txt", "'nowhere.txt': [Errno 2] No such file"),
        ("--data blank.txt", "the file has no text"),
        ("--data .", "'.': not a regular file"),
        ("--data large", "at most 64 MiB"),
        ("--data latin1.txt", "latin1.txt': 'utf-8' codec can't decode byte 0xe9 in position 3"),
    ],
)
def test_mistakes(run, tmp_path, arguments, said):
    (tmp_path / "blank.txt").write_bytes(b" \n\r\n\t\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**26 + 1)
    assert_error(run(arguments), said)


def test_documents(monkeypatch, run, tmp_path):
    """A byte order mark, Windows line ends, a missing last line end, any letter, more than the context."""
    found, train = [], microgpt.train
    monkeypatch.setattr(microgpt, "train", lambda docs, *others: found.extend(docs) or train(docs, *others))
    (tmp_path / "text.txt").write_bytes(("\ufeffé\r\n\r\n  éa🤗\r\n" + "x" * 40).encode())
    code, out, err = run("--data text.txt --steps 3 --n_samples 2")
    assert sorted(found, key=len) == [[4, 2, 4], [4, 2, 0, 3, 4], [4] + [1] * microgpt.N_CTX]
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 1 + 3 + 2)
    assert lines[0].startswith("3 documents, 5 different tokens, ")
    assert all(map(math.isfinite, losses_of(lines[1:4])))


def test_check_gradients(monkeypatch, run, tmp_path):
    """It prints the three largest gradients of each matrix, and fails if a derivative is wrong."""
    (tmp_path / "text.txt").write_text("ab", encoding="utf-8")
    monkeypatch.setattr(microgpt, "N_EMBD", 8)
    code, out, err = run("--data text.txt --check_gradients")
    rows = [line.split() for line in out.splitlines()[1:-1]]
    assert (code, err, [row[0] for row in rows]) == (0, "", [name for name in microgpt.new_model(2) for _ in range(3)])
    assert all(float(row[2]) == pytest.approx(float(row[4]), rel=1e-5) and float(row[2]) != 0 for row in rows)
    for wrong in (1.001, 0.0, math.nan):
        monkeypatch.setattr(microgpt, "log", microgpt.differentiable(math.log, lambda x, wrong=wrong: wrong / x))
        assert run("--data text.txt --check_gradients")[0] == 1


def test_letters_that_the_terminal_lacks(tmp_path):
    (tmp_path / "text.txt").write_text("ñ\n" * 3, encoding="utf-8")
    ascii_only = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    code, out, _ = programs.run("--steps", "1", "--data", tmp_path / "text.txt", script="microgpt.py", **ascii_only)
    assert code == 0 and b"\n20. " in out and b"?" in out


@pytest.mark.parametrize(("stop", "code"), [("interrupt", 130), ("close", 141)])
def test_ctrl_c_and_a_closed_pipe_end_it_without_a_message(tmp_path, stop, code):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with started([*COMMAND, "--data", str(tmp_path / "text.txt")]) as process:
        for _ in range(4):
            process.stdout.readline()
        process.send_signal(signal.SIGINT) if stop == "interrupt" else process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=SECONDS) == code


@pytest.fixture
def source(monkeypatch, tmp_path_factory):
    """A file with TEXT in the place of the URL of names.txt."""
    path = tmp_path_factory.mktemp("source") / "names.txt"
    path.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(microgpt, "URL", path.as_uri())
    monkeypatch.setattr(microgpt, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    return path


def test_names_are_downloaded_once_and_checked(source, run, tmp_path):
    for _ in range(2):
        assert run("--steps 1 --n_samples 1")[1].startswith("5 documents, ")
        source.unlink(missing_ok=True)
    names = tmp_path / "data" / "names.txt"
    assert [*names.parent.iterdir()] == [names] and names.read_text(encoding="utf-8") == TEXT
    names.write_text("altered", encoding="utf-8")
    assert_error(run("--steps 1"), "data/names.txt': SHA-256 is ", "delete the file")
    assert names.read_text(encoding="utf-8") == "altered"


def test_a_failed_download_leaves_no_file_and_follows_no_link(source, run, tmp_path, monkeypatch):
    source.write_text(TEXT.upper(), encoding="utf-8")
    assert_error(run("--steps 1"), "data/names.txt': SHA-256 is ")
    source.unlink()
    assert_error(run("--steps 1"), "data/names.txt': ", "No such", "--data FILE", microgpt.URL)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

    source.write_text(TEXT, encoding="utf-8")
    (link := tmp_path / "data" / "names.tmp").parent.mkdir()
    link.symlink_to(tmp_path / "text.txt")
    monkeypatch.setattr(pathlib.Path, "replace", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    assert_error(run("--steps 1"), "data/names.txt': ", "No space left")
    assert [*link.parent.iterdir()] == [link] and link.is_symlink()


def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert_error(programs.run("--data", tmp_path / "fifo", script="microgpt.py"), "fifo': not a regular file")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--check_gradients"]])
def test_a_full_disk_is_an_error_in_one_line(tmp_path, arguments):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with open("/dev/full", "wb") as full:
        streams = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        code, _, err = programs.run("--data", tmp_path / "text.txt", *arguments, script="microgpt.py", **streams)
    assert_error((code, b"", err), "No space left")


def test_the_file_is_as_short_as_the_documents_say_and_needs_no_package():
    source = (ROOT / "microgpt.py").read_text(encoding="utf-8")
    assert source.count("\n") == 200 and "Karpathy" in source.partition("\n")[0]
    assert "in pure Python, 200 lines:" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    imported = set(re.findall(r"^\s*(?:import|from) (\w+|\.)", source, flags=re.MULTILINE))
    assert "urllib" in imported and imported <= sys.stdlib_module_names


def test_the_shape_comments_are_true():
    model, cache = new_model(), [([], [])]
    traced(checker := Checker(microgpt), lambda: [microgpt.gpt(token, model, cache) for token in range(3)])
    assert checker.checked == set(checker.comments) and len(checker.checked) == 5
