"""baby_gpt.py and explain/markov.py: each stage against PyTorch, what it has, sees and learns, and the command."""

import itertools
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import baby_gpt
import gpt2
from baby_gpt import CPU, GPU, SCALED_UP, STAGES
from cli import baby_gpt as command
from explain import markov
from tests.conftest import ROOT, need
from tests.programs import assert_mistake
from tests.random_model import DATA
from tests.test_shapes import Checker, traced
from training import fused
from training.autograd import Tensor
from weights.names import n_params

N_VOCAB = 11
SMALL = CPU | {"batch_size": 3, "block_size": 7, "d_model": 10, "d_k": 3, "h": 4, "seed": 0}  # 4 * 3 is not 10
SHORT = "--steps 4 --eval_interval 2 --eval_iters 2 --block_size 8 --d_model 8 --d_k 4 --Nx 1"
LOOK_BACK = list(STAGES)[2:]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for PyTorch, which is faster for arrays as small as these."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def random_tensors(stage, dtype=np.float64):
    """Tensors with random biases and gains, so that a mistake in one of them shows."""
    rng, shapes = np.random.default_rng(len(stage)), baby_gpt.shapes(stage, N_VOCAB, SMALL)
    return {name: rng.normal(0, 0.4, shape).astype(dtype) for name, shape in shapes.items()}


def logits(stage, tensors, inputs, model=gpt2):
    return STAGES[stage](model, np.asarray(inputs), **baby_gpt.arguments(stage, tensors, SMALL))


def torch_logits(stage, w, inputs, sizes=SMALL, approximate="tanh"):
    """The same stage in PyTorch's functions."""
    level = list(STAGES).index(stage)
    x = F.embedding(inputs, w["wte"])
    if level >= 1:
        x = x + w["wpe"][: inputs.shape[-1]]
    if level < 2:
        return x
    n_head = sizes["h"] if level >= 4 else 1

    def linear(x, name):
        return F.linear(x, w[name + "/w"].T, w[name + "/b"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + "/g"], w[name + "/b"], 1e-5) if level >= 8 else x

    for scope in [f"h{i}/" for i in range(sizes["Nx"])] if level >= 6 else [""]:
        qkv = linear(norm(x, scope + "ln_1"), scope + "attn/c_attn")
        q, k, v = (part.unflatten(-1, (n_head, sizes["d_k"])).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0 if level == 2 else None)
        a = linear(a.transpose(1, 2).flatten(-2), scope + "attn/c_proj")
        x = x + a if level >= 7 else a
        if level >= 5:
            m = F.gelu(linear(norm(x, scope + "ln_2"), scope + "mlp/c_fc"), approximate=approximate)
            m = linear(m, scope + "mlp/c_proj")
            x = x + m if level >= 7 else m
    return norm(x, "ln_f") @ w["wte"].T


# The stages


def test_stages_and_hyperparameters_are_the_originals():
    assert " ".join(STAGES) == (
        "bigram positions attention scaled heads feed_forward blocks residual layer_norm dropout scaled_up"
    )
    assert list(CPU.values()) == [16, 8, 16, 4, 2, 2, 0.2, 5e-3, 10000, 500, 100]
    assert list(GPU.values()) == [64, 256, 512, 16, 6, 6, 0.2, 1e-3, 10000, 500, 200]
    assert list(CPU) == list(GPU) == list(SCALED_UP)


@pytest.mark.parametrize("stage", STAGES)
def test_logits_loss_and_gradients_equal_pytorchs(stage):
    tensors = random_tensors(stage)
    inputs, targets = np.random.default_rng(1).integers(0, N_VOCAB, (2, 3, 7))
    theirs = {name: torch.from_numpy(tensor).requires_grad_() for name, tensor in tensors.items()}
    expected_logits = torch_logits(stage, theirs, torch.from_numpy(inputs))
    expected = F.cross_entropy(expected_logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    expected.backward()
    for model in (gpt2, fused.training_model()):
        leaves = {name: Tensor(tensor) for name, tensor in tensors.items()}
        found = logits(stage, leaves, inputs, model)
        loss = fused.cross_entropy(found, targets)
        loss.backward()
        np.testing.assert_allclose(found.data, expected_logits.detach().numpy(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-12)
        for name, leaf in leaves.items():
            np.testing.assert_allclose(leaf.grad, theirs[name].grad.numpy(), rtol=1e-8, atol=1e-10, err_msg=name)
    assert logits(stage, random_tensors(stage, np.float32), inputs).dtype == np.float32


def test_parameter_counts():
    counts = [n_params(baby_gpt.shapes(stage, 65, CPU)) for stage in list(STAGES)[:-1]]
    embeddings, head, two_heads = 65 * 16 + 8 * 16, 16 * 12 + 12 + 4 * 16 + 16, 16 * 24 + 24 + 8 * 16 + 16
    mlp, norms = 16 * 64 + 64 + 64 * 16 + 16, (2 * 2 + 1) * 32
    single, double = embeddings + two_heads, embeddings + 2 * (two_heads + mlp)
    assert counts[:4] == [65 * 65, 65 * 65 + 8 * 65, embeddings + head, embeddings + head]
    assert counts[4:] == [single, single + mlp, double, double, double + norms, double + norms]
    block = 512 * 288 + 288 + 96 * 512 + 512 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
    assert n_params(baby_gpt.shapes("scaled_up", 65, GPU)) == (65 + 256) * 512 + 6 * block + 2 * 512
    block = 96 * 288 + 288 + 96 * 96 + 96 + 2 * 96 * 384 + 384 + 96 + 4 * 96
    assert n_params(baby_gpt.shapes("scaled_up", 65, SCALED_UP)) == (65 + 64) * 96 + 3 * block + 2 * 96


@pytest.mark.parametrize("stage", STAGES)
def test_logits_depend_on_position_and_on_earlier_tokens_only(stage):
    tensors, inputs = random_tensors(stage), np.array([1, 2, 3, 4, 5])
    before = logits(stage, tensors, inputs[None])[0]
    for i in range(5):
        changed = np.where(np.arange(5) == i, 9, inputs)
        moved = np.any(logits(stage, tensors, changed[None])[0] != before, axis=-1)
        np.testing.assert_array_equal(moved, np.arange(5) >= i if stage in LOOK_BACK else np.arange(5) == i)
    rows = logits(stage, tensors, [[4, 4, 4]])[0]
    assert np.allclose(rows[0], rows[2]) == (stage == "bigram")


def test_the_last_stages_are_gpt2_itself():
    model = types.SimpleNamespace(gpt2=lambda inputs, **params: (inputs, params))
    for stage in ("layer_norm", "dropout", "scaled_up"):
        params = baby_gpt.arguments(stage, random_tensors(stage), SMALL)
        assert STAGES[stage](model, "inputs", **params) == ("inputs", params)
        assert set(params) == {"wte", "wpe", "blocks", "ln_f", "n_head"}
        assert set(params["blocks"][0]) == {"attn", "mlp", "ln_1", "ln_2"}


def test_dropout_is_in_the_last_two_stages_and_in_training_only(monkeypatch):
    """Evaluations without dropout, of the same batches, and a learning rate near 0 give the same losses three times."""
    text, make, rates = np.arange(200) % 5, fused.training_model, []
    monkeypatch.setattr(fused, "training_model", lambda dropout=0.0: (rates.append(dropout), make(dropout))[1])
    monkeypatch.setattr(baby_gpt, "sample", lambda *_: "")
    options = SMALL | {"num_iter": 2, "eval_interval": 1, "eval_iters": 2, "lr_rate": 1e-30}
    for stage in STAGES:
        curve = baby_gpt.train(stage, options, {"train": text, "val": text}, "abcde").curve
        assert rates == [0.0, 0.2 if stage in ("dropout", "scaled_up") else 0.0]
        assert len(curve) == 3 and len({losses for _, *both in curve for losses in both}) == 1
        rates.clear()


def test_training_uses_the_training_split():
    splits = {"train": np.zeros(100, int), "val": np.ones(100, int)}
    options = SMALL | {"num_iter": 30, "eval_interval": 30, "eval_iters": 2, "lr_rate": 0.1}
    _, train_loss, val_loss = baby_gpt.train("bigram", options, splits, "abcde").curve[-1]
    assert train_loss < 0.5 < val_loss


def test_the_shape_comments_are_true():
    def run_stages():
        for stage in STAGES:
            logits(stage, random_tensors(stage), np.arange(6).reshape(2, 3))

    def run_markov():
        tensors, zeros = markov.new_tensors(0)
        markov.transitions(tensors | zeros), markov.frequencies()

    for module, run, least in ((baby_gpt, run_stages, 14), (markov, run_markov, 4)):
        checker = Checker(module)
        traced(checker, run)
        assert checker.checked == set(checker.comments)
        assert len(checker.checked) >= least


# Learning


def pairs(n, seed):
    """Two of eight letters in turns, ten in all, then another two: the previous letter says little, two say all."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.tile(rng.permutation(8)[:2], 5) for _ in range(n)])


@pytest.fixture(scope="module")
def splits():
    return {"train": pairs(3000, 0), "val": pairs(500, 1)}


@pytest.fixture(scope="module")
def counted_loss(splits):
    """The cross-entropy of the validation split under the frequencies of pairs in the training split."""
    counts = np.zeros((8, 8))
    np.add.at(counts, (splits["train"][:-1], splits["train"][1:]), 1)
    probs = counts / counts.sum(axis=1, keepdims=True)
    return -np.mean(np.log(probs[splits["val"][:-1], splits["val"][1:]]))


@pytest.mark.parametrize("stage", list(STAGES)[:-1])
def test_a_stage_learns(monkeypatch, splits, counted_loss, stage):
    """The first two stages learn the frequencies of pairs; the others, which look back, learn more."""
    monkeypatch.setattr(baby_gpt, "sample", lambda *_: "")
    options = {
        "num_iter": 150,
        "eval_interval": 150,
        "eval_iters": 20,
        "lr_rate": 2e-2,
        "dropout_rate": 0.05,
        "seed": 0,
    }
    (_, _, before), (step, train_loss, after) = baby_gpt.train(stage, CPU | options, splits, "abcdefgh").curve
    assert step == 150 and abs(before - math.log(8)) < 0.7 and abs(train_loss - after) < 0.2
    if stage in LOOK_BACK:
        assert after < counted_loss - 0.3
    else:
        assert abs(after - counted_loss) < 0.05


def test_characters_and_splits_are_nanogpts():
    """Its shakespeare_char/prepare.py prints these counts: 65 characters, 1,003,854 and 111,540 of them."""
    found, chars = command.read_characters({"dataset": str(need(DATA / "tinyshakespeare.txt"))})
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
        code = command.run([*options.split(), *dataset.split()])
        return code, *capsys.readouterr()

    return run


def assert_error(result, *words):
    code, out, err = result
    assert_mistake((code, out.encode(), err.encode()), *words, script="baby_gpt.py")


def table(lines):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_one_stage_prints_its_row_and_a_sample(run, tmp_path):
    code, out, err = run(f"--stage heads {SHORT}")
    header, line, row, empty, *text = out.splitlines()
    assert code == 0 and empty == "" and len("\n".join(text)) == 200
    assert len(header) == len(line) == len(row)
    titles, cells = table([header, row])
    assert titles == ["stage", "parameters", "seconds", "train loss", "validation loss", "change", "sample"]
    assert cells[0] == "heads" and cells[5] == "" and "\n".join(text).startswith(cells[6].replace("⏎", "\n"))
    assert [line.split(":")[0] for line in err.splitlines()] == [f"heads, step {i}" for i in (0, 2, 4)]
    assert f"train loss {cells[3]}, validation loss {cells[4]}" in err.splitlines()[-1]
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt"}


def test_all_prints_a_table_and_draws_it(run, tmp_path, monkeypatch):
    figures, save = [], command.save_figure
    monkeypatch.setattr(command, "save_figure", lambda *arguments: (figures.append(arguments[0]), save(*arguments)))
    code, out, err = run(f"--all {SHORT}")
    assert code == 0 and err.splitlines()[-1] == "wrote baby_gpt.png"
    rows = table(out.splitlines()[2:])
    assert [row[0] for row in rows] == list(STAGES)
    for previous, row in itertools.pairwise(rows):
        change = float(row[5].split()[0])
        assert abs(change - (float(row[4]) - float(previous[4]))) < 2e-4
        assert row[5].endswith("no better") == (change >= 0)
    lines = figures[0].axes[0].lines
    assert [f"{line.get_ydata()[-1]:.4f}" for line in lines] == [row[4] for row in rows]
    labels = [f"{line.get_ydata()[-1]:.3f}  {stage}" for line, stage in zip(lines, STAGES, strict=True)]
    assert [line.get_label() for line in lines] == labels
    assert len({tuple(line.get_color()) for line in lines}) == len(STAGES)
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt", tmp_path / "baby_gpt.png"}
    assert (tmp_path / "baby_gpt.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("loss", "change"),
    [(2.5, "-0.2500"), (2.75, "+0.0000 no better"), (2.74999, "-0.0000 no better"), (3.0, "+0.2500 no better")],
)
def test_change_of_the_loss(loss, change):
    now, previous = (baby_gpt.Result("bigram", 1, 0.0, [(0, 2.0, x)], "a") for x in (loss, 2.75))
    assert command.cells(now, previous)[5] == change


def test_a_seed_repeats_a_run(run):
    first, again, other = (
        [row[:2] + row[3:] for row in table(run(f"--stage dropout {SHORT} --seed {seed}")[1].splitlines())]
        for seed in (1, 1, 2)
    )
    assert first == again and first[2] != other[2]


def test_options_override_the_preset(run, monkeypatch):
    monkeypatch.setattr(baby_gpt, "sample", lambda *_: "")
    code, out, _ = run("--stage scaled_up --preset gpu --steps 1 --d_model 8 --Nx 1 --batch_size 1 --eval_iters 1")
    n_vocab = len(set((ROOT / "LICENSE").read_text() + (ROOT / "gpt2.py").read_text()))
    block = 8 * 288 + 288 + 96 * 8 + 8 + 2 * 8 * 32 + 32 + 8 + 4 * 8  # 6 heads of 16, as in the preset
    assert code == 0 and f"| {(n_vocab + 256) * 8 + block + 16} " in out


def test_the_figure_does_not_overwrite_the_dataset(run, tmp_path):
    (tmp_path / "text.txt").rename(tmp_path / "text.svg")
    result = run(f"--stage bigram --draw text.svg {SHORT}", "--dataset text.svg")
    assert_error(result, "--draw text.svg would overwrite the dataset")
    assert "MIT License" in (tmp_path / "text.svg").read_text(encoding="utf-8")


def test_control_characters_of_the_text_do_not_reach_the_terminal(run, tmp_path):
    (tmp_path / "text.txt").write_text("\x1b[31m\x07\u202e" * 100, encoding="utf-8")
    code, out, _ = run(f"--stage bigram {SHORT}")
    assert code == 0 and "\ufffd" in out and not set(out) & set("\x1b\x07\u202e")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ["--stage --all --markov is required"]),
        ("--stage atention", ["invalid choice: 'atention'", *STAGES]),
        ("--stage bigram --all", ["not allowed with"]),
        ("--all bigram", ["goes after --stage"]),
        ("--stage bigram --steps 0", ["--steps: 0 is", "--help"]),
        ("--stage bigram --lr_rate 0", ["--lr_rate"]),
        ("--stage dropout --dropout_rate 1", ["--dropout_rate"]),
        ("--stage bigram --preset tpu", ["cpu", "gpu"]),
        ("--stage bigram --dataset nowhere.txt", ["'nowhere.txt'"]),
        ("--stage bigram --block_size 5000", ["characters", "--block_size 5000", "longer text"]),
        ("--stage bigram --batch_size 99999999999999999999", ["--batch_size", "at most 10000"]),
        ("--stage blocks --Nx 10001", ["--Nx", "at most 10000"]),
        ("--stage bigram --draw nowhere/x.png", ["cannot write nowhere/x.png", "No such file"]),
        ("--stage bigram --draw text.txt", ["'text.txt'", ".png, .svg or .pdf"]),
        ("--all --draw curves", ["'curves'", ".png"]),
        ("--stage bigram --draw folder.png", ["folder.png"]),
        ("--markov --draw x.pgf", ["x.pgf", ".png, .svg or .pdf"]),
        ("--markov --draw nowhere/x.png", ["cannot write nowhere/x.png"]),
        ("--markov --d_model 32", ["--d_model is an option of the stages", "--steps"]),
    ],
)
def test_mistakes(run, tmp_path, options, words):
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    result = run(options, "" if "--markov" in options or "--dataset" in options else "--dataset text.txt")
    assert_error(result, *words)
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_only_a_figure_is_refused(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_error(run("--all"), "baby_gpt.png", "pip install matplotlib")
    assert run(f"--stage bigram {SHORT}")[0] == 0


def test_a_training_that_diverges_ends_with_a_remedy(run):
    code, _, err = run("--stage layer_norm --lr_rate 1e30 --steps 8 --eval_interval 4 --eval_iters 1")
    assert code == 2 and "Warning" not in err
    assert "nan: training diverged; set --lr_rate below 1e+30" in err.splitlines()[-1]


def test_as_a_program(tmp_path):
    program = [sys.executable, ROOT / "baby_gpt.py", "--markov", "--steps", "1"]
    found = subprocess.run(program, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "wrote markov.png\n") and "step  0: loss 0." in found.stdout


# --markov


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_markov_training_equals_pytorchs(approximate):
    """50 steps of torch.optim.AdamW, with the gelu of gpt2.py and with the exact one of the original."""
    tensors, zeros = markov.new_tensors(3)
    w = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in tensors.items()}
    biases = {name: torch.tensor(zero) for name, zero in zeros.items()}
    optimizer = torch.optim.AdamW(w.values(), lr=1e-3, weight_decay=0.1)
    tokens = [int(token) for token in "111101111011110"]
    inputs, targets = torch.tensor([tokens[i : i + 3] for i in range(12)]), torch.tensor(tokens[3:])
    losses = []

    def theirs(inputs):
        return torch_logits("layer_norm", w | biases, inputs, {"h": 4, "d_k": 4, "Nx": 4}, approximate)[:, -1]

    for _ in range(50):
        loss = F.cross_entropy(theirs(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    states = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    transitions = torch.softmax(theirs(states), dim=-1).detach().numpy()
    np.testing.assert_allclose(markov.train(tensors, zeros), losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(markov.transitions(tensors | zeros), transitions, rtol=0, atol=1e-4)
    assert all(not np.any(zero) for zero in zeros.values()) and len(zeros) == 4 * 4


def test_markov_is_near_the_published_run():
    """12,656 parameters; losses 0.663539, 0.596775 and 0.469983 at steps 0, 10 and 49, from other initial weights."""
    losses = []
    for seed in range(5):
        tensors, zeros = markov.new_tensors(seed)
        assert sum(tensor.size for tensor in tensors.values()) == 12_656
        losses.append(np.array(markov.train(tensors, zeros))[[0, 10, 49]])
    np.testing.assert_allclose(np.median(losses, axis=0), [0.663539, 0.596775, 0.469983], atol=0.03)
    assert np.min(losses) > 0.5 * math.log(2)


def test_markov_prints_the_chain_and_draws_it(run, tmp_path):
    code, out, err = run("--markov --seed 3", "")
    assert (code, err) == (0, "wrote markov.png\n")
    first, *losses = out.splitlines()[:4]
    assert first == "12656 parameters; the text is 111101111011110"
    assert [line[:14] for line in losses] == ["step  0: loss ", "step 10: loss ", "step 49: loss "]
    rows = table(out.splitlines()[6:14])
    in_text = {3: ("0%", "100%"), 5: ("0%", "100%"), 6: ("0%", "100%"), 7: ("50%", "50%")}
    for i, (state, next_0, *shares_0, next_1, before, after, text) in enumerate(rows):
        assert (state, next_0, next_1) == (f"{i:03b}", f"{2 * i % 8:03b}", f"{2 * i % 8 + 1:03b}")
        shares = [int(cell.rstrip("%")) for cell in (*shares_0[:2], before, after)]
        assert 99 <= shares[0] + shares[2] <= 101 and 99 <= shares[1] + shares[3] <= 101
        assert 35 <= shares[0] <= 65
        assert (shares_0[2], text) == in_text.get(i, ("-", "-"))
    assert int(rows[5][7].rstrip("%")) > 70, "101 is followed by 1"
    sample = out.splitlines()[-1].removeprefix("from 111: ")
    assert len(sample) == 23 and sample.startswith("111") and set(sample) == {"0", "1"}
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt", tmp_path / "markov.png"}


def test_widths_of_the_arrows_are_the_probabilities(monkeypatch):
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
