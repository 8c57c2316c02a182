"""microgpt.py against the published run of Karpathy's microGPT, against PyTorch, and as a person would run it.

Published are the number of names, tokens and parameters. The losses and samples are the original's own, run on CPython
3.11 with its seed, 42, on makemore's names.txt.
"""

import ast
import functools
import hashlib
import http.server
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import types

import pytest
import scipy.stats
import torch

import microgpt
from microgpt import Value
from tests.conftest import DATA, ROOT, need
from tests.test_cli import started
from tests.test_shapes import Checker, traced

HEAD = ["num docs: 32033", "vocab size: 27", "num params: 4192"]
LOSSES = """3.3659669476 3.4242727839 3.1778021255 3.0663556842 3.2208830898
            2.9451597230 3.2894250644 3.3245295854 2.8990336424 3.2228882401"""
LAST_LOSS = 2.6496944697
SAMPLES = """kamon ann karai jaire vialan karia yeran anna areli kaina
             konna keylen liole alerin earan lenne kana lara alela anton"""
TEXT = "emma\nolivia\nava\nisabella\nsophia\n"
COMMAND = [sys.executable, str(ROOT / "microgpt.py")]
SECONDS = 100
tensor = functools.partial(torch.tensor, dtype=torch.float64)


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, encoding="utf-8", timeout=SECONDS, check=False, **options
    )


def assert_refused(done, *said):
    """One line on standard error, nothing on standard output, exit code 2."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("microgpt.py: error: ") and done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1
    for words in said:
        assert words in done.stderr


def loss_of(line):
    return float(line.partition("| loss ")[2])


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# The published run


def test_the_first_losses_are_the_published_ones():
    with started([*COMMAND, "--data", str(need(DATA / "names.txt"))]) as process:
        lines = [next(process.stdout).decode().rstrip("\n") for _ in range(3 + 10)]
    assert lines[:3] == HEAD
    assert [line.partition(" | ")[0] for line in lines[3:]] == [f"step {step:4d} / 1000" for step in range(1, 11)]
    published = [float(loss) for loss in LOSSES.split()]
    assert [loss_of(line) for line in lines[3:]] == pytest.approx(published, rel=0, abs=1e-9)


@pytest.mark.full_size
def test_the_whole_run_is_the_original_s(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(need(DATA / "names.txt"), tmp_path / "data")
    done = run(cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 3 + 1000 + 20)
    assert loss_of(lines[1002]) == pytest.approx(LAST_LOSS, rel=0, abs=1e-9)
    assert [line.partition(": ")[2] for line in lines[1003:]] == SAMPLES.split()


# Against PyTorch

OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "a + 2": lambda a, b: a + 2.0,
    "a * b": lambda a, b: a * b,
    "a * 3": lambda a, b: a * 3.0,
    "a ** 3": lambda a, b: a**3,
    "a ** -0.5": lambda a, b: a**-0.5,
    "exp": lambda a, b: a.exp(),
    "log": lambda a, b: a.log(),
    "relu of a negative": lambda a, b: b * (a.data < 0),
    "a value used twice": lambda a, b: a * a + a * b + a,
    "a result used twice": lambda a, b: (c := a * b).exp() + c * c,
    "a long way and a short one": lambda a, b: ((a * b).log() * 2.0 + a) * a,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    ours, theirs = [Value(0.7), Value(1.9)], [tensor(0.7, requires_grad=True), tensor(1.9, requires_grad=True)]
    y, expected = OPERATIONS[name](*ours), OPERATIONS[name](*theirs)
    y.backward()
    expected.backward()
    assert y.data == pytest.approx(expected.item(), rel=1e-14)
    gradients = [0.0 if x.grad is None else x.grad.item() for x in theirs]
    assert [x.grad for x in ours] == pytest.approx(gradients, rel=1e-14)


@pytest.mark.parametrize("function", [microgpt.softmax, microgpt.rms_norm], ids=lambda function: function.__name__)
def test_functions_of_a_vector(function):
    theirs = {
        "softmax": lambda x: torch.softmax(x, 0),
        "rms_norm": lambda x: torch.nn.functional.rms_norm(x, x.shape, eps=1e-5),
    }[function.__name__]
    numbers, weights = [0.3, -1.2, 800.0, 799.0], [1.0, 2.0, 3.0, 5.0]
    x, expected = [Value(number) for number in numbers], tensor(numbers, requires_grad=True)
    y = microgpt.dot(function(x), [Value(weight) for weight in weights])
    y.backward()
    (theirs(expected) * tensor(weights)).sum().backward()
    assert [v.grad for v in x] == pytest.approx(expected.grad.tolist(), rel=1e-12, abs=1e-18)


def test_dot_of_a_vector_with_itself():
    x, expected = [Value(2.0), Value(-3.0)], tensor([2.0, -3.0], requires_grad=True)
    microgpt.dot(x, x).backward()
    torch.dot(expected, expected).backward()
    assert [v.grad for v in x] == expected.grad.tolist()


def test_a_graph_deeper_than_the_recursion_limit():
    x = y = Value(1.0)
    depth = 20 * sys.getrecursionlimit()
    for _ in range(depth):
        y = y + 1.0
    y.backward()
    assert (y.data, x.grad) == (depth + 1, 1.0)


def test_a_graph_of_very_many_paths():
    x = y = Value(1.0)
    for _ in range(200):
        y = y + y
    y.backward()
    assert x.grad == 2.0**200


def torch_weights(model):
    return {
        name: tensor([[v.data for v in row] for row in matrix], requires_grad=True) for name, matrix in model.items()
    }


def torch_loss(tokens, weights):
    """The same model on all positions at once, of PyTorch's own functions."""
    functional, n_seq = torch.nn.functional, len(tokens) - 1
    norm = functools.partial(functional.rms_norm, normalized_shape=(microgpt.N_EMBD,), eps=1e-5)
    x = norm(weights["wte"][tokens[:-1]] + weights["wpe"][:n_seq])
    for i in range(microgpt.N_LAYER):
        w = {name.partition(".")[2]: matrix for name, matrix in weights.items() if name.startswith(f"h{i}.")}
        q, k, v = (norm(x) @ w[name].T for name in ("wq", "wk", "wv"))
        q, k, v = (a.view(n_seq, microgpt.N_HEAD, -1).transpose(0, 1) for a in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(n_seq, -1)
        x = x + mixed @ w["wo"].T
        x = x + torch.relu(norm(x) @ w["c_fc"].T) @ w["c_proj"].T
    return functional.cross_entropy(x @ weights["lm_head"].T, torch.tensor(tokens[1:]))


def new_model(n_vocab=27):
    """Weights four times as large as at the start: relu, softmax and norms matter more."""
    random.seed(1)
    model = microgpt.new_model(n_vocab)
    for p in parameters(model):
        p.data *= 4
    return model


def parameters(model):
    return [p for matrix in model.values() for row in matrix for p in row]


def gradient(matrix):
    return tensor([[v.grad for v in row] for row in matrix])


@pytest.mark.parametrize("n_layer", [1, 2])
def test_every_gradient_of_the_loss(monkeypatch, n_layer):
    monkeypatch.setattr(microgpt, "N_LAYER", n_layer)
    model, tokens = new_model(), [26, 4, 12, 12, 0, 9, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 26]
    weights = torch_weights(model)
    loss, expected = microgpt.mean_loss(tokens, model), torch_loss(tokens, weights)
    loss.backward()
    expected.backward()
    assert loss.data == pytest.approx(expected.item(), rel=1e-13)
    assert len(model) == 3 + 6 * n_layer
    for name, matrix in model.items():
        assert weights[name].grad.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient(matrix), weights[name].grad, rtol=1e-10, atol=1e-13, msg=name)


def test_training_steps():
    """Adam and its falling rate: five steps and what they do to the losses."""
    steps, docs = 5, [[3, 0, 1, 3], [3, 2, 2, 1, 0, 3]]
    model = new_model(4)
    weights = torch_weights(model)
    adam = torch.optim.Adam(weights.values(), lr=0.01, betas=(0.85, 0.99), eps=1e-8)
    losses = []
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        adam.zero_grad()
        loss = torch_loss(docs[step % 2], weights)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert list(microgpt.train(docs, model, parameters(model), steps)) == pytest.approx(losses, rel=1e-10)
    for name, matrix in model.items():
        torch.testing.assert_close(tensor([[v.data for v in row] for row in matrix]), weights[name].detach())


# Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities_at_a_temperature(monkeypatch, temperature):
    logits, chars, n = [1.0, 2.0, 0.5, 1.5], ["a", "b", "c", microgpt.BOS], 3000
    monkeypatch.setattr(microgpt, "gpt", lambda *_: [Value(x) for x in logits])
    random.seed(0)
    first = [microgpt.sample(chars, None, temperature)[:1] or microgpt.BOS for _ in range(n)]
    expected = torch.softmax(tensor(logits) / temperature, 0) * n
    assert scipy.stats.chisquare([first.count(char) for char in chars], expected).pvalue > 1e-3


@pytest.mark.parametrize(("logits", "text"), [([9.0, 0.0], "a" * microgpt.N_CTX), ([0.0, 9.0], "")])
def test_a_sample_ends_at_the_context_or_where_the_model_says_so(monkeypatch, logits, text):
    monkeypatch.setattr(microgpt, "gpt", lambda *_: [Value(x) for x in logits])
    assert microgpt.sample(["a", microgpt.BOS], None, 0.001) == text


# The command line


def test_seeds(text_file):
    flags = ["--data", str(text_file), "--steps", "2", "--n_samples", "3"]
    first, again, other = (run(*flags, "--seed", seed) for seed in ("7", "7", "8"))
    assert (first.returncode, first.stderr) == (0, "")
    assert len(first.stdout.splitlines()) == 3 + 2 + 3
    assert first.stdout == again.stdout != other.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps 0 is not a number from 1 up"),
        (["--steps", "ten"], "'ten'"),
        (["--n_samples", "0"], "--n_samples 0"),
        (["--temperature", "0"], "--temperature 0.0 is not a number from 0.001 up"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--seed", "x"], "--seed"),
        (["--step", "3"], "--step"),
        (["names.txt"], "names.txt"),
        (["--data", "nowhere.txt"], "nowhere.txt: [Errno 2] No such file"),
        (["--data", "."], "directory"),
    ],
)
def test_mistakes(tmp_path, arguments, said):
    assert_refused(run(*arguments, cwd=tmp_path), said)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no text in it"), (b" \n\r\n\t\n", "no text in it"), (b"caf\xe9\n", "can't decode byte 0xe9 in position 3")],
)
def test_texts_that_are_none(tmp_path, content, said):
    (tmp_path / "text.txt").write_bytes(content)
    assert_refused(run("--data", "text.txt", cwd=tmp_path), "text.txt: ", said)


def documents(monkeypatch, path, text):
    """What main() makes of a text: the tokens of each document, the shortest first."""
    found = []
    monkeypatch.setattr(microgpt, "train", lambda docs, *_: found.extend(docs) or [])
    path.write_bytes(text.encode())
    microgpt.main(["--data", str(path), "--n_samples", "1"])
    return sorted(found, key=len)


def test_documents(monkeypatch, tmp_path, capsys):
    """A byte order mark, Windows' line ends, a line without one; one character; more than the context holds."""
    text = "\ufeffb\r\n\r\n  bac\r\n" + "c" * 40
    found = documents(monkeypatch, tmp_path / "text.txt", text)
    assert found == [[3, 1, 3], [3, 1, 0, 2, 3], [3] + [2] * microgpt.N_CTX]
    assert capsys.readouterr().out.startswith("num docs: 3\nvocab size: 4\n")


@pytest.mark.parametrize("text", ["a", "ab\n" * 3, "x" * 40, "the quick brown fox jumps\nover the lazy dog", "é你🤗"])
def test_any_text_can_be_learned(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    done = run("--data", str(path), "--steps", "3", "--n_samples", "2", env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 8)
    assert all(math.isfinite(loss_of(line)) for line in done.stdout.splitlines()[3:6])


def test_check_gradients(text_file):
    done = run("--data", str(text_file), "--check_gradients")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in lines[3:-1]] == [name for name in microgpt.new_model(2) for _ in range(3)]
    for line in lines[3:-1]:
        analytic, numeric = (float(word) for word in line.split() if word.lstrip("-")[0] == "0")
        assert analytic == pytest.approx(numeric, rel=1e-5) and analytic != 0
    assert lines[-1].startswith("largest relative error: ")


@pytest.mark.parametrize("wrong", [lambda g: 1.001 * g, lambda g: 0.0, lambda g: math.nan])
def test_check_gradients_finds_a_wrong_derivative(monkeypatch, text_file, wrong):
    def log(self):
        return Value(math.log(self.data), (self,), (wrong(1 / self.data),))

    monkeypatch.setattr(Value, "log", log)
    with pytest.raises(SystemExit) as exit:
        microgpt.main(["--data", str(text_file), "--check_gradients"])
    assert exit.value.code == 1


def test_a_terminal_that_lacks_a_letter(tmp_path):
    (tmp_path / "text.txt").write_text("ñ\n" * 3, encoding="utf-8")
    done = run("--steps", "1", "--data", str(tmp_path / "text.txt"), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "sample 20:" in done.stdout and "?" in done.stdout


def test_a_proxy_that_is_none(tmp_path):
    done = run("--steps", "1", cwd=tmp_path, env=os.environ | {"https_proxy": "http://127.0.0.1:abc"})
    assert_refused(done, "--data FILE")


def test_interrupt(text_file):
    with started([*COMMAND, "--data", str(text_file)]) as process:
        for _ in range(4):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (130, b"")


def test_a_reader_that_has_seen_enough(text_file):
    with started([*COMMAND, "--data", str(text_file)]) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=SECONDS) == 141


# Getting names.txt


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A folder to be in, and a server that sends its `content`, `length` long it says, instead of names.txt."""
    monkeypatch.chdir(tmp_path)
    state = types.SimpleNamespace(content=TEXT.encode(), length=len(TEXT), status=200, requests=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.length))
            self.end_headers()
            self.wfile.write(state.content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(microgpt, "URL", f"http://127.0.0.1:{httpd.server_port}/names.txt")
        monkeypatch.setattr(microgpt, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
        yield state
        httpd.shutdown()


def refused(capsys):
    with pytest.raises(SystemExit) as exit:
        microgpt.main(["--steps", "1"])
    out, err = capsys.readouterr()
    assert_refused(types.SimpleNamespace(returncode=exit.value.code, stdout=out, stderr=err), "data/names.txt: ")
    return err


def test_names_are_downloaded_once(server, tmp_path, capsys):
    for _ in range(2):
        microgpt.main(["--steps", "1", "--n_samples", "1"])
        assert capsys.readouterr().out.startswith("num docs: 5\n")
    assert server.requests == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["names.txt"]
    assert (tmp_path / "data" / "names.txt").read_text(encoding="utf-8") == TEXT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"content": TEXT.upper().encode()}, "sha256 is "),
        ({"content": TEXT[:9].encode()}, "sha256 is "),
        ({"status": 404}, "HTTP Error 404"),
    ],
)
def test_downloads_that_go_wrong_leave_nothing(server, tmp_path, capsys, changes, said):
    vars(server).update(changes)
    assert said in refused(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_altered_file_is_not_used(server, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "names.txt").write_text("anna\n", encoding="utf-8")
    assert "remove the file" in refused(capsys)
    assert server.requests == 0


def test_a_folder_that_cannot_be_written(server, tmp_path, capsys):
    (tmp_path / "data").touch()
    assert "data" in refused(capsys)
    assert (tmp_path / "data").read_bytes() == b""


def test_no_network(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    done = run(cwd=tmp_path, env=environment | nowhere)
    assert_refused(done, "Connection refused", "--data FILE", microgpt.URL)
    assert list(tmp_path.iterdir()) == []


# The file


def test_the_file_is_short_and_stands_alone():
    source = (ROOT / "microgpt.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert imported and {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_the_hash_is_that_of_names():
    assert hashlib.sha256(need(DATA / "names.txt").read_bytes()).hexdigest() == microgpt.SHA256


def test_the_shape_comments_are_true():
    checker = Checker(microgpt)
    model, cache = new_model(), [([], [])]
    traced(checker, lambda: [microgpt.gpt(token, model, cache) for token in range(3)])
    assert checker.checked == set(checker.comments)
    assert len(checker.checked) == 5
