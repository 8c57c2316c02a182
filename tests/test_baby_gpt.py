"""baby_gpt.py and explain/markov.py: each stage against PyTorch, what it has, sees and learns, and the command."""

import itertools
import math
import operator
import sys

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

N_VOCAB = 11
SMALL = CPU | {"batch_size": 3, "block_size": 7, "d_model": 10, "d_k": 3, "h": 4, "seed": 0}  # 4 * 3 is not 10
TEXT = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "gpt2.py"))
SHORT = "--steps 4 --eval_interval 2 --eval_iters 2 --block_size 8 --d_model 8 --d_k 4 --Nx 1"


def random_tensors(stage, dtype=np.float64):
    """Tensors with random biases and gains, so that a mistake in one of them shows."""
    rng, shapes = np.random.default_rng(len(stage)), baby_gpt.shapes(stage, N_VOCAB, SMALL)
    return {name: rng.normal(0, 0.4, shape).astype(dtype) for name, shape in shapes.items()}


def logits(stage, tensors, inputs, model=gpt2):
    return STAGES[stage](model, np.asarray(inputs), **baby_gpt.arguments(stage, tensors, SMALL))


def torch_logits(stage, w, inputs, sizes=SMALL, approximate="tanh"):
    """The same stage in PyTorch's functions."""
    torch.set_num_threads(1)  # faster for arrays as small as these
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


def test_stages_and_hyperparameters_are_the_originals():
    assert " ".join(STAGES) == (
        "bigram positions attention scaled heads feed_forward blocks residual layer_norm dropout scaled_up"
    )
    assert list(CPU.values()) == [16, 8, 16, 4, 2, 2, 0.2, 5e-3, 10000, 500, 100]
    assert list(GPU.values()) == [64, 256, 512, 16, 6, 6, 0.2, 1e-3, 10000, 500, 200]
    assert list(SCALED_UP.values()) == [16, 64, 96, 16, 3, 6, 0.1, 2e-3, 3000, 500, 100]
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
    def run():
        for stage in STAGES:
            logits(stage, random_tensors(stage), np.arange(6).reshape(2, 3))
        markov.transitions(operator.or_(*markov.new_tensors(0)))
        markov.frequencies()

    for module, least in ((baby_gpt, 14), (markov, 4)):
        traced(checker := Checker(module), run)
        assert checker.checked == set(checker.comments) and len(checker.checked) >= least


def test_stages_learn(monkeypatch):
    """The text repeats a pair of letters five times, then another pair: the previous letter says little, two say all.

    The first two stages learn the frequencies of pairs; the others, which look back, learn more.
    """
    monkeypatch.setattr(baby_gpt, "sample", lambda *_: "")
    rng = np.random.default_rng(0)
    letters = np.concatenate([np.tile(rng.permutation(8)[:2], 5) for _ in range(3500)])
    train, val = letters[:30_000], letters[30_000:]
    counts = np.zeros((8, 8))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    counted_loss = -np.mean(np.log((counts / counts.sum(axis=1, keepdims=True))[val[:-1], val[1:]]))
    options = CPU | {"num_iter": 150, "eval_interval": 150, "eval_iters": 20, "dropout_rate": 0.05, "lr_rate": 2e-2}
    for stage in ("bigram", "positions", "attention", "blocks", "dropout"):
        curve = baby_gpt.train(stage, options | {"seed": 0}, {"train": train, "val": val}, "abcdefgh").curve
        (_, _, before), (step, train_loss, after) = curve
        assert step == 150 and abs(before - math.log(8)) < 0.7 and abs(train_loss - after) < 0.2
        if stage in ("bigram", "positions"):
            assert abs(after - counted_loss) < 0.05
        else:
            assert after < counted_loss - 0.3


def test_characters_and_splits_are_nanogpts():
    """Its shakespeare_char/prepare.py prints these counts: 65 characters, 1,003,854 and 111,540 of them."""
    found, chars = command.read_characters({"dataset": str(need(DATA / "tinyshakespeare.txt"))})
    assert chars == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert (len(found["train"]), len(found["val"])) == (1_003_854, 111_540)
    assert "".join(chars[i] for i in found["train"][:14]) == "First Citizen:"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """The command in a folder with a text; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

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
        assert abs(float(row[5].split()[0]) - (float(row[4]) - float(previous[4]))) < 2e-4
    lines = figures[0].axes[0].lines
    for line, row in zip(lines, rows, strict=True):
        last = line.get_ydata()[-1]
        assert (f"{last:.4f}", line.get_label()) == (row[4], f"{last:.3f}  {row[0]}")
    assert len({tuple(line.get_color()) for line in lines}) == len(STAGES)
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt", tmp_path / "baby_gpt.png"}
    assert (tmp_path / "baby_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_change_of_the_loss():
    previous, *results = (baby_gpt.Result("bigram", 1, 0.0, [(0, 2.0, x)], "a") for x in (2.75, 2.5, 2.75, 2.74999))
    changes = [command.cells(result, previous)[5] for result in results]
    assert changes == ["-0.2500", "+0.0000 no better", "-0.0000 no better"]


def test_a_seed_repeats_a_run(run):
    first, again, other = (
        [row[:2] + row[3:] for row in table(run(f"--stage dropout {SHORT} --seed {seed}")[1].splitlines())]
        for seed in (1, 1, 2)
    )
    assert first == again and first[2] != other[2]


def test_the_estimate_of_memory_counts_outputs_scores_and_parameters():
    """Of 21 tokens: the logits and their gradient, the outputs of each linear layer, and the scores three times."""
    for stage, n_layer, outputs in (("bigram", 0, 0), ("scaled", 1, 9 + 10), ("residual", 2, 36 + 10 + 40 + 10)):
        found = baby_gpt.training_memory(stage, N_VOCAB, SMALL) - 50_000 * n_layer
        n_params = sum(map(math.prod, baby_gpt.shapes(stage, N_VOCAB, SMALL).values()))
        scores = n_layer * 7 * (4 if stage == "residual" else 1)
        activations = 21 * (2 * N_VOCAB + n_layer * outputs + 3 * scores)
        assert found == 4 * (3 * n_params + max(activations, n_params))


def test_options_override_the_preset(run, monkeypatch):
    monkeypatch.setattr(baby_gpt, "sample", lambda *_: "")
    code, out, _ = run("--stage scaled_up --preset gpu --steps 1 --d_model 8 --Nx 1 --batch_size 1 --eval_iters 1")
    block = 8 * 288 + 288 + 96 * 8 + 8 + 2 * 8 * 32 + 32 + 8 + 4 * 8  # 6 heads of 16, as in the preset
    assert code == 0 and f"| {(len(set(TEXT)) + 256) * 8 + block + 16} " in out


def test_control_characters_of_the_text_do_not_reach_the_terminal(run, tmp_path):
    (tmp_path / "text.txt").write_text("\x1b[31m\x07\u202e\0" * 100, encoding="utf-8")
    code, out, _ = run(f"--stage bigram {SHORT}")
    assert code == 0 and "\ufffd" in out and not set(out) & set("\x1b\x07\u202e\0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ["--stage --all --markov is required"]),
        ("--stage atention", ["invalid choice: 'atention'", *STAGES]),
        ("--all bigram", ["goes after --stage"]),
        ("--stage bigram --steps 0", ["--steps", "at least 1", "--help"]),
        ("--stage dropout --dropout_rate 1", ["--dropout_rate"]),
        ("--stage bigram --dataset nowhere.txt", ["'nowhere.txt'"]),
        ("--stage bigram --block_size 5000", ["characters", "--block_size 5000", "longer text"]),
        ("--stage bigram --batch_size 99999999999999999999", ["--batch_size", "10000"]),
        (
            "--stage layer_norm --block_size 99 --batch_size 9999 --d_model 9999",
            ["layer_norm needs", "--d_model"],
        ),
        ("--stage bigram --draw nowhere/x.png", ["cannot write nowhere/x.png", "No such file"]),
        ("--stage bigram --draw text.svg --dataset text.svg", ["--draw text.svg would overwrite the dataset"]),
        ("--all --draw text.txt", ["'text.txt'", ".png, .svg or .pdf"]),
        ("--markov --draw x.pgf", ["x.pgf", ".png, .svg or .pdf"]),
        ("--markov --d_model 32", ["--d_model is an option of the stages", "--steps"]),
    ],
)
def test_mistakes(run, tmp_path, options, words):
    (tmp_path / "text.svg").write_text("kept", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    result = run(options, "" if "--markov" in options or "--dataset" in options else "--dataset text.txt")
    assert_error(result, *words)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "text.svg").read_text(encoding="utf-8") == "kept"


def test_without_matplotlib_only_a_figure_is_refused(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_error(run("--all"), "baby_gpt.png", "pip install matplotlib")
    assert run(f"--stage bigram {SHORT}")[0] == 0


def test_a_training_that_diverges_ends_with_a_remedy(run):
    code, _, err = run("--stage layer_norm --lr_rate 1e30 --steps 8 --eval_interval 4 --eval_iters 1")
    assert code == 2 and "Warning" not in err
    assert "nan: training diverged; set --lr_rate below 1e+30" in err.splitlines()[-1]


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
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    transitions = torch.softmax(theirs(torch.cartesian_prod(*[torch.arange(2)] * 3)), dim=-1).detach().numpy()
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


def test_markov_draws_the_chain_that_it_prints(run, tmp_path, monkeypatch):
    """test_docs.py compares every line that it prints with the default options."""
    figures, save = [], markov.save_figure
    monkeypatch.setattr(markov, "save_figure", lambda *arguments: (figures.append(arguments[0]), save(*arguments)))
    code, out, err = run("--markov --seed 3 --steps 20", "")
    assert (code, err) == (0, "wrote markov.png\n")
    assert set(tmp_path.iterdir()) == {tmp_path / "text.txt", tmp_path / "markov.png"}
    rows = table(out.splitlines()[-9:-1])
    for column, axes in zip((2, 3), figures[0].axes, strict=True):  # before and after
        percents = [cell for row in rows for cell in row[column::4]]
        assert [text.get_text() for text in axes.texts if text.get_text().endswith("%")] == percents
        arrows = [text.arrow_patch for text in axes.texts if getattr(text, "arrow_patch", None)]
        widths = [0.5 + 5 * int(percent.rstrip("%")) / 100 for percent in percents]
        np.testing.assert_allclose([arrow.get_linewidth() for arrow in arrows], widths, atol=0.026)
