"""baby_gpt.py and markov.py: each rung against PyTorch, what it has, sees and learns, and what the command prints."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import baby_gpt
import gpt2
from baby_gpt import CPU, GPU, RUNGS, SCALED_UP
from cli import baby_gpt as baby_cli
from explain import markov
from tests.conftest import ROOT, need
from tests.random_model import DATA
from tests.test_shapes import Checker, traced
from tests.test_train import mistake
from training import fused
from training.autograd import Tensor

N_VOCAB = 11
SMALL = CPU | {"batch_size": 3, "block_size": 7, "d_model": 10, "d_k": 3, "h": 4, "seed": 0}  # 4 * 3 is not 10
SHORT = "--steps 4 --eval_interval 2 --eval_iters 2 --block_size 8 --d_model 8 --d_k 4 --Nx 1"
LOOK_BACK = list(RUNGS)[2:]


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's threads wait for each other in operations as small as these."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def random_tensors(rung, options=SMALL, dtype=np.float64):
    """Offsets and scales too are random: a mistake in one of them shows."""
    rng, shapes = np.random.default_rng(len(rung)), baby_gpt.shapes(rung, N_VOCAB, options)
    return {name: rng.normal(0, 0.4, shape).astype(dtype) for name, shape in shapes.items()}


def logits(rung, tensors, inputs, model=gpt2, options=SMALL):
    return RUNGS[rung](model, np.asarray(inputs), **baby_gpt.arrange(rung, tensors, options))


def torch_logits(rung, w, inputs, options=SMALL):
    """Each rung in PyTorch's own functions, by what its name says it has."""
    level = list(RUNGS).index(rung)
    x = F.embedding(inputs, w["wte"])
    if level >= 1:
        x = x + w["wpe"][: inputs.shape[-1]]
    if level < 2:
        return x
    n_head = options["h"] if level >= 4 else 1

    def linear(x, name):
        return F.linear(x, w[name + "/w"].T, w[name + "/b"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + "/g"], w[name + "/b"], 1e-5) if level >= 8 else x

    for scope in [f"h{i}/" for i in range(options["Nx"])] if level >= 6 else [""]:
        qkv = linear(norm(x, scope + "ln_1"), scope + "attn/c_attn")
        q, k, v = (part.unflatten(-1, (n_head, options["d_k"])).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0 if level == 2 else None)
        a = linear(a.transpose(1, 2).flatten(-2), scope + "attn/c_proj")
        x = x + a if level >= 7 else a
        if level >= 5:
            m = F.gelu(linear(norm(x, scope + "ln_2"), scope + "mlp/c_fc"), approximate="tanh")
            m = linear(m, scope + "mlp/c_proj")
            x = x + m if level >= 7 else m
    return norm(x, "ln_f") @ w["wte"].T


# The rungs


def test_the_rungs_and_the_numbers_are_the_originals():
    assert " ".join(RUNGS) == (
        "bigram positions attention scaled heads feed_forward blocks residual layer_norm dropout scaled_up"
    )
    assert list(CPU.values()) == [16, 8, 16, 4, 2, 2, 0.2, 5e-3, 10000, 500, 100]
    assert list(GPU.values()) == [64, 256, 512, 16, 6, 6, 0.2, 1e-3, 10000, 500, 200]
    assert list(CPU) == list(GPU) == list(SCALED_UP)


@pytest.mark.parametrize("rung", RUNGS)
def test_logits_loss_and_gradients_are_pytorchs(rung):
    tensors = random_tensors(rung)
    inputs, targets = np.random.default_rng(1).integers(0, N_VOCAB, (2, 3, 7))
    theirs = {name: torch.from_numpy(tensor).requires_grad_() for name, tensor in tensors.items()}
    expected_logits = torch_logits(rung, theirs, torch.from_numpy(inputs))
    expected = F.cross_entropy(expected_logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    expected.backward()
    for model in (gpt2, fused.training_model()):
        leaves = {name: Tensor(tensor) for name, tensor in tensors.items()}
        found = logits(rung, leaves, inputs, model)
        loss = fused.cross_entropy(found, targets)
        loss.backward()
        np.testing.assert_allclose(found.data, expected_logits.detach().numpy(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-12)
        for name, leaf in leaves.items():
            np.testing.assert_allclose(leaf.grad, theirs[name].grad.numpy(), rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("rung", RUNGS)
def test_logits_are_float32(rung):
    assert logits(rung, random_tensors(rung, dtype=np.float32), [[1, 2, 3]]).dtype == np.float32


HEAD = 16 * 12 + 12 + 4 * 16 + 16  # c_attn, c_proj
TWO_HEADS = 16 * 24 + 24 + 8 * 16 + 16
MLP = 16 * 64 + 64 + 64 * 16 + 16
EMBEDDINGS = 65 * 16 + 8 * 16
BLOCKS = EMBEDDINGS + 2 * (TWO_HEADS + MLP)
NORMS = (2 * 2 + 1) * 32
N_PARAMS = {
    "bigram": 65 * 65,
    "positions": 65 * 65 + 8 * 65,
    "attention": EMBEDDINGS + HEAD,
    "scaled": EMBEDDINGS + HEAD,
    "heads": EMBEDDINGS + TWO_HEADS,
    "feed_forward": EMBEDDINGS + TWO_HEADS + MLP,
    "blocks": BLOCKS,
    "residual": BLOCKS,
    "layer_norm": BLOCKS + NORMS,
    "dropout": BLOCKS + NORMS,
}


def n_params(rung, options):
    return sum(t.size for t in baby_gpt.initial_tensors(rung, 65, options | {"seed": 0}).values())


def test_parameter_counts():
    assert {rung: n_params(rung, CPU) for rung in N_PARAMS} == N_PARAMS
    block = 512 * 288 + 288 + 96 * 512 + 512 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
    assert n_params("scaled_up", GPU) == (65 + 256) * 512 + 6 * block + 2 * 512
    block = 96 * 288 + 288 + 96 * 96 + 96 + 2 * 96 * 384 + 384 + 96 + 4 * 96
    assert n_params("scaled_up", SCALED_UP) == (65 + 64) * 96 + 3 * block + 2 * 96


@pytest.mark.parametrize("rung", RUNGS)
def test_a_position_sees_itself_and_from_attention_on_those_before_it(rung):
    tensors, inputs = random_tensors(rung), np.array([1, 2, 3, 4, 5])
    before = logits(rung, tensors, inputs[None])[0]
    for i in range(5):
        changed = np.where(np.arange(5) == i, 9, inputs)
        moved = np.any(logits(rung, tensors, changed[None])[0] != before, axis=-1)
        sees = np.arange(5) >= i if rung in LOOK_BACK else np.arange(5) == i
        np.testing.assert_array_equal(moved, sees)


def test_where_a_token_stands_matters_from_positions_on():
    for rung in RUNGS:
        rows = logits(rung, random_tensors(rung), [[4, 4, 4]])[0]
        assert np.allclose(rows[0], rows[2]) == (rung == "bigram")


def test_the_last_rungs_are_gpt2_itself():
    class Model:
        def gpt2(inputs, **params):
            return inputs, params

    for rung in ("layer_norm", "dropout", "scaled_up"):
        params = baby_gpt.arrange(rung, random_tensors(rung), SMALL)
        assert RUNGS[rung](Model, "inputs", **params) == ("inputs", params)
        assert set(params) == {"wte", "wpe", "blocks", "ln_f", "n_head"}
        assert set(params["blocks"][0]) == {"attn", "mlp", "ln_1", "ln_2"}


def test_only_the_last_two_rungs_drop_and_only_while_training(monkeypatch):
    text = np.arange(200) % 5
    made = []

    def recording(dropout=0.0):
        made.append(dropout)
        return make(dropout)

    make = fused.training_model
    monkeypatch.setattr(fused, "training_model", recording)
    options = SMALL | {"num_iter": 1, "eval_interval": 1, "eval_iters": 1}
    for rung in RUNGS:
        baby_gpt.train(rung, options, {"train": text, "val": text}, "abcde")
        assert made == [0.0, 0.2 if rung in ("dropout", "scaled_up") else 0.0]
        made.clear()


def test_evaluations_drop_nothing_and_see_the_same_batches():
    text = np.arange(200) % 5
    options = SMALL | {"num_iter": 2, "eval_interval": 1, "eval_iters": 2, "lr_rate": 1e-30}  # no weight moves
    curve = baby_gpt.train("dropout", options, {"train": text, "val": text}, "abcde").curve
    assert len(curve) == 3 and len({losses for _, *both in curve for losses in both}) == 1


def test_the_training_split_is_trained_on():
    splits = {"train": np.zeros(100, int), "val": np.ones(100, int)}
    options = SMALL | {"num_iter": 30, "eval_interval": 30, "eval_iters": 2, "lr_rate": 0.1}
    _, train_loss, val_loss = baby_gpt.train("bigram", options, splits, "abcde").curve[-1]
    assert train_loss < 0.5 < val_loss


def test_the_shape_comments_are_true():
    checker = Checker(baby_gpt)

    def run():
        for rung in RUNGS:
            logits(rung, random_tensors(rung), np.arange(6).reshape(2, 3))

    traced(checker, run)
    assert checker.checked == set(checker.comments)
    assert len(checker.checked) >= 14
    checker = Checker(markov)
    tensors, zeros = markov.new_tensors(0)
    traced(checker, lambda: (markov.transitions(tensors | zeros), markov.in_the_text()))
    assert checker.checked == set(checker.comments)
    assert len(checker.checked) == 4


# Learning


def pairs(n, seed):
    """Two of eight letters by turns, ten in all, then another two: the letter before says little, two before all."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.tile(rng.permutation(8)[:2], 5) for _ in range(n)])


def counted_bigram_loss(train, val):
    """The cross-entropy of val under the frequencies of pairs in train."""
    counts = np.zeros((8, 8))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    return -np.mean(np.log(counts / counts.sum(axis=1, keepdims=True))[val[:-1], val[1:]])


@pytest.fixture(scope="module")
def learned():
    """The curve of every rung in a short training, and the loss of counted pairs; scaled_up is dropout here."""
    splits = {"train": pairs(3000, 0), "val": pairs(500, 1)}
    options = CPU | {"num_iter": 300, "eval_interval": 300, "lr_rate": 1e-2, "dropout_rate": 0.05, "seed": 0}
    curves = {rung: baby_gpt.train(rung, options, splits, "abcdefgh").curve for rung in RUNGS if rung != "scaled_up"}
    return curves, counted_bigram_loss(splits["train"], splits["val"])


@pytest.mark.parametrize("rung", list(RUNGS)[:-1])
def test_a_rung_learns(learned, rung):
    """The first two rungs what pairs of letters say, the same as counting them; the others more than that."""
    (first, _, before), (last, train_loss, after) = learned[0][rung]
    assert (first, last) == (0, 300)
    assert abs(before - math.log(8)) < 0.6
    assert abs(train_loss - after) < 0.2
    if rung in LOOK_BACK:
        assert after < learned[1] - 0.3
    else:
        assert abs(after - learned[1]) < 0.05


def test_the_characters_are_nanogpts():
    """Its shakespeare_char/prepare.py prints these counts: 65 characters, 1,003,854 and 111,540 of them."""
    found, chars = baby_cli.read_characters({"dataset": str(need(DATA / "tinyshakespeare.txt"))})
    assert chars == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert (len(found["train"]), len(found["val"])) == (1_003_854, 111_540)
    assert "".join(chars[i] for i in found["train"][:14]) == "First Citizen:"


# The command


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """The command in a folder with a text; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "gpt2.py"))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    def run(options, dataset="--dataset text.txt"):
        code = baby_gpt.main([*options.split(), *dataset.split()])
        return code, *capsys.readouterr()

    return run


def test_one_rung_prints_its_row_and_what_it_writes(run, tmp_path):
    code, out, err = run(f"--rung heads {SHORT}")
    header, line, row, empty, *text = out.splitlines()
    assert code == 0 and empty == "" and len("\n".join(text)) == 200
    titles, cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row))
    assert titles == ["rung", "parameters", "seconds", "train loss", "validation loss", "change", "sample"]
    assert len(header) == len(line) == len(row)
    assert cells[0] == "heads" and cells[5] == "" and "\n".join(text).startswith(cells[6].replace("⏎", "\n"))
    assert [line.split(":")[0] for line in err.splitlines()] == [f"heads, step {i}" for i in (0, 2, 4)]
    assert f"train loss {cells[3]}, validation loss {cells[4]}" in err.splitlines()[-1]
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt"}


def test_all_prints_a_table_and_draws_it(run, tmp_path):
    code, out, err = run(f"--all {SHORT}")
    assert code == 0 and err.splitlines()[-1] == "drawn: baby_gpt.png"
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    assert [line[0] for line in lines] == list(RUNGS)
    for (_, *below), (_, *cells) in itertools.pairwise(lines):
        change = float(cells[3]) - float(below[3])
        assert abs(float(cells[4].split()[0]) - change) < 2e-4
        assert cells[4].endswith("no better") == (float(cells[4].split()[0]) >= 0)
    assert any("no better" in line[5] for line in lines) and not all("no better" in line[5] for line in lines[1:])
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt", tmp_path / "baby_gpt.png"}
    assert (tmp_path / "baby_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_no_change_is_no_better():
    def result(loss):
        return baby_gpt.Result("bigram", 1, 0.0, [(0, 2.0, loss)], "a")

    assert baby_cli.cells(result(2.5), result(2.75))[5] == "-0.2500"
    assert baby_cli.cells(result(2.5), result(2.5))[5] == "+0.0000 no better"
    assert baby_cli.cells(result(2.49999), result(2.5))[5].endswith("no better"), "what is printed is the same"
    assert baby_cli.cells(result(2.75), result(2.5))[5] == "+0.2500 no better"


def test_the_curves_are_those_of_the_table(monkeypatch):
    figures = []
    monkeypatch.setattr(baby_cli, "save_figure", lambda figure, _: figures.append(figure))
    curve = [(0, 4.0, 4.1), (10, 3.0, 3.2)]
    baby_cli.draw_curves([baby_gpt.Result(rung, 1, 0.0, curve, "") for rung in RUNGS], "x.png")
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == [f"3.200  {rung}" for rung in RUNGS]
    assert len({tuple(line.get_color()) for line in lines}) == len(RUNGS)
    np.testing.assert_array_equal(lines[0].get_xydata(), [(0, 4.1), (10, 3.2)])


def without_seconds(out):
    return [line.split("|")[:3] + line.split("|")[4:] for line in out.splitlines()]


def test_a_seed_repeats_a_run(run):
    first, again, other = (run(f"--rung dropout {SHORT} --seed {seed}")[1] for seed in (1, 1, 2))
    assert without_seconds(first) == without_seconds(again)
    assert without_seconds(first)[2] != without_seconds(other)[2]


def test_what_is_given_goes_over_the_preset(run):
    code, out, _ = run("--rung scaled_up --preset gpu --steps 1 --d_model 8 --Nx 1 --batch_size 1 --eval_iters 1")
    n_vocab = len(set((ROOT / "LICENSE").read_text() + (ROOT / "gpt2.py").read_text()))
    block = 8 * 288 + 288 + 96 * 8 + 8 + 2 * 8 * 32 + 32 + 8 + 4 * 8  # 6 heads of 16, as in the preset
    assert code == 0 and f"| {(n_vocab + 256) * 8 + block + 16} " in out


def test_the_picture_does_not_take_the_text_s_place(run, tmp_path):
    (tmp_path / "text.txt").rename(tmp_path / "text.svg")
    mistake(run(f"--rung bigram --draw text.svg {SHORT}", "--dataset text.svg"), "--draw text.svg is the text itself")
    assert "MIT License" in (tmp_path / "text.svg").read_text(encoding="utf-8")


def test_control_characters_of_the_text_do_not_reach_the_terminal(run, tmp_path):
    (tmp_path / "text.txt").write_text("\x1b[31m\x07\u202e" * 100, encoding="utf-8")
    code, out, _ = run(f"--rung bigram {SHORT}")
    assert code == 0 and "\ufffd" in out and not set(out) & set("\x1b\x07\u202e")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ["--rung --all --markov is required"]),
        ("--rung atention", ["invalid choice: 'atention'", *RUNGS]),
        ("--rung", ["--rung"]),
        ("--rung bigram --all", ["not allowed with"]),
        ("--all bigram", ["goes after --rung"]),
        ("--rung bigram --steps 0", ["--steps: 0 is too few", "--help"]),
        ("--rung bigram --steps -1", ["--steps"]),
        ("--rung bigram --steps many", ["--steps", "'many'"]),
        ("--rung bigram --lr_rate 0", ["--lr_rate"]),
        ("--rung dropout --dropout_rate 1", ["--dropout_rate"]),
        ("--rung heads --h 0", ["--h"]),
        ("--rung bigram --preset tpu", ["cpu", "gpu"]),
        ("--rung bigram --dataset nowhere.txt", ["no data file 'nowhere.txt'"]),
        ("--rung bigram --block_size 5000", ["characters to train on", "--block_size 5000", "longer text"]),
        ("--rung bigram --batch_size 99999999999999999999", ["--batch_size", "at most 10000"]),
        ("--rung blocks --Nx 10001", ["--Nx", "at most 10000"]),
        ("--markov --draw x.pgf", ["x.pgf", ".png, .svg or .pdf"]),
        ("--rung bigram --draw nowhere/x.png", ["cannot write nowhere/x.png", "No such file"]),
        ("--rung bigram --draw text.txt", ["'text.txt'", ".png, .svg or .pdf"]),
        ("--all --draw curves", ["'curves'", ".png"]),
        ("--rung bigram --draw folder.png", ["folder.png", "is no file"]),
        ("--markov --draw nowhere/x.png", ["cannot write nowhere/x.png"]),
        ("--markov --d_model 32", ["--d_model is for the rungs", "--steps"]),
        ("--markov --steps 0", ["--steps: 0 is too few"]),
    ],
)
def test_mistakes(run, tmp_path, options, words):
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    mistake(run(options, "" if "--markov" in options or "--dataset" in options else "--dataset text.txt"), *words)
    assert sorted(tmp_path.iterdir()) == before


def test_an_altered_text_is_not_trained_on(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinyshakespeare.txt").write_text("First Citizen!", encoding="utf-8")
    mistake(run("--rung bigram", ""), "tinyshakespeare.txt was altered (14 bytes", "remove it")


def test_without_matplotlib_a_picture_is_refused_before_the_work(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    mistake(run("--all"), "baby_gpt.png takes matplotlib", "pip install")
    code, _, _ = run(f"--rung bigram {SHORT}")
    assert code == 0


def test_a_training_that_diverges_says_so(run):
    code, _, err = run("--rung layer_norm --lr_rate 1e30 --steps 8 --eval_interval 4 --eval_iters 1")
    assert code == 2 and "Warning" not in err
    assert "nan: it diverged; set --lr_rate below 1e+30" in err.splitlines()[-1]


def test_as_a_program(tmp_path):
    command = [sys.executable, ROOT / "baby_gpt.py", "--markov", "--steps", "1"]
    found = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "drawn: markov.png\n") and "step  0: loss 0." in found.stdout


def test_ctrl_c(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(baby_cli, "train", interrupted)
    assert run("--all")[0] == 130


# --markov


def torch_markov_logits(w, inputs, approximate):
    """Karpathy's model: no offsets in the matrices, the logits of the last position, the token embedding once more."""
    x = F.embedding(inputs, w["wte"]) + w["wpe"]
    for i in range(4):
        own = {name.removeprefix(f"h{i}/"): tensor for name, tensor in w.items()}
        qkv = F.layer_norm(x, (16,), own["ln_1/g"], own["ln_1/b"]) @ own["attn/c_attn/w"]
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        x = (
            x
            + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ own["attn/c_proj/w"]
        )
        m = F.gelu(F.layer_norm(x, (16,), own["ln_2/g"], own["ln_2/b"]) @ own["mlp/c_fc/w"], approximate=approximate)
        x = x + m @ own["mlp/c_proj/w"]
    return F.layer_norm(x[:, -1], (16,), w["ln_f/g"], w["ln_f/b"]) @ w["wte"].T


def torch_markov(tensors, approximate):
    """The 50 losses of torch.optim.AdamW from these tensors, and the transitions after them."""
    w = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in tensors.items()}
    optimizer = torch.optim.AdamW(w.values(), lr=1e-3, weight_decay=0.1)
    tokens = [int(token) for token in "111101111011110"]
    inputs = torch.tensor([tokens[i : i + 3] for i in range(12)])
    targets = torch.tensor(tokens[3:])
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(torch_markov_logits(w, inputs, approximate), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    states = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    return losses, torch.softmax(torch_markov_logits(w, states, approximate), dim=-1).detach().numpy()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_losses_of_markov_are_pytorchs(approximate):
    """With the gelu of gpt2.py, and with the exact one of the original."""
    tensors, zeros = markov.new_tensors(3)
    expected, transitions = torch_markov(tensors, approximate)
    np.testing.assert_allclose(markov.train(tensors, zeros), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(markov.transitions(tensors | zeros), transitions, rtol=0, atol=1e-4)
    assert all(not np.any(zero) for zero in zeros.values()) and len(zeros) == 4 * 4


def test_markov_is_near_the_published_run():
    """12,656 parameters; losses 0.663539, 0.596775 and 0.469983 at steps 0, 10 and 49, of another random start."""
    losses = []
    for seed in range(5):
        tensors, zeros = markov.new_tensors(seed)
        assert sum(tensor.size for tensor in tensors.values()) == 12_656
        losses.append(np.array(markov.train(tensors, zeros))[[0, 10, 49]])
    np.testing.assert_allclose(np.median(losses, axis=0), [0.663539, 0.596775, 0.469983], atol=0.03)
    assert np.min(losses) > 0.5 * math.log(2)


def test_what_the_text_says():
    inputs, targets = markov.examples()
    assert len(inputs) == len(targets) == 12
    expected = {"011": [0, 1], "101": [0, 1], "110": [0, 1], "111": [0.5, 0.5]}
    for state, shares in zip(markov.STATES, markov.in_the_text(), strict=True):
        np.testing.assert_array_equal(shares, expected.get(state, [np.nan, np.nan]))


def test_markov_prints_the_chain_and_draws_it(run, tmp_path):
    code, out, err = run("--markov --seed 3", "")
    assert (code, err) == (0, "drawn: markov.png\n")
    first, *losses = out.splitlines()[:4]
    assert first == "12656 parameters; the text is 111101111011110"
    assert [line[:14] for line in losses] == ["step  0: loss ", "step 10: loss ", "step 49: loss "]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[6:14]]
    in_text = {3: ("0%", "100%"), 5: ("0%", "100%"), 6: ("0%", "100%"), 7: ("50%", "50%")}
    for i, (state, by_0, *shares_0, by_1, before, after, text) in enumerate(table):
        assert (state, by_0, by_1) == (f"{i:03b}", f"{2 * i % 8:03b}", f"{2 * i % 8 + 1:03b}")
        shares = [int(cell.rstrip("%")) for cell in (*shares_0[:2], before, after)]
        assert 99 <= shares[0] + shares[2] <= 101 and 99 <= shares[1] + shares[3] <= 101
        assert 35 <= shares[0] <= 65
        assert (shares_0[2], text) == in_text.get(i, ("-", "-"))
    assert int(table[5][7].rstrip("%")) > 70, "101 is followed by 1"
    walk = out.splitlines()[-1].removeprefix("from 111: ")
    assert len(walk) == 23 and walk.startswith("111") and set(walk) == {"0", "1"}
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt", tmp_path / "markov.png"}


def test_the_arrows_of_the_picture_are_as_wide_as_likely(monkeypatch):
    figures = []
    monkeypatch.setattr(markov, "save_figure", lambda figure, _: figures.append(figure))
    chain = np.stack([np.arange(8) / 8, 1 - np.arange(8) / 8], axis=1)
    markov.draw({"before": chain, "after": chain}, "x.png")
    for axes in figures[0].axes:
        arrows = [text.arrow_patch for text in axes.texts if getattr(text, "arrow_patch", None)]
        widths = np.array([arrow.get_linewidth() for arrow in arrows]).reshape(8, 2)
        np.testing.assert_allclose(widths, 0.5 + 5 * chain)
        labels = [text.get_text() for text in axes.texts if text.get_text().endswith("%")]
        assert labels == [f"{share:.0%}" for share in chain.reshape(-1)]
