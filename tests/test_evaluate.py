"""evaluate.py: every token is scored once, with the context it should have; losses against PyTorch's."""

import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

import evaluate
from cli import evaluate as evaluate_cli
from cli import generate
from engines.compiled import compiled_model
from tests import gradients
from tests.conftest import ROOT, assert_transformers_agree, need
from tests.programs import assert_mistake
from tests.random_model import DATA, random_tensors
from training.dataset import split_text
from weights.names import nest
from weights.safetensors_file import save_params

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness.\n" * 3
SHAKESPEARE = ROOT / "models" / "shakespeare"
HPARAMS = gradients.HPARAMS | {"n_layer": 2}
TENSORS = random_tensors(HPARAMS)


def total_loss(ids, *options):
    return evaluate.total_loss(ids, nest(TENSORS, HPARAMS["n_layer"]), HPARAMS["n_head"], *options)


def torch_total_loss(ids, context, stride):
    """Hugging Face's recipe in PyTorch, one window at a time."""
    model, _ = gradients.torch_model(HPARAMS, TENSORS)
    total, done = 0.0, 0
    with torch.no_grad():
        while done < len(ids) - 1:
            end = min(context if done == 0 else done + stride, len(ids) - 1)
            start = max(0, end - context)
            logits, targets = model(torch.tensor([ids[start:end]])).logits[0], torch.tensor(ids[start + 1 : end + 1])
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total, done = total + losses[done - start :].double().sum().item(), end
    return total


SIZES = [(2, 64, 64), (50, 64, 32), (64, 64, 1), (65, 64, 64), (81, 40, 20), (150, 40, 7), (90, 8, 1), (99, 20, 19)]


@pytest.mark.parametrize(("n", "context", "stride"), SIZES)
def test_total_loss_is_pytorchs_whatever_the_threads_and_batches(n, context, stride, monkeypatch):
    ids = np.random.default_rng(n).integers(0, HPARAMS["n_vocab"], n).tolist()
    expected = torch_total_loss(ids, context, stride)
    for threads, logits_per_batch in ((1, evaluate.LOGITS_PER_BATCH), (2, 1), (2, 2**16)):
        monkeypatch.setattr(evaluate, "LOGITS_PER_BATCH", logits_per_batch)
        np.testing.assert_allclose(total_loss(ids, context, stride, threads), expected, rtol=1e-5)


@pytest.mark.parametrize(("n", "context", "stride"), SIZES)
def test_total_loss_of_the_compiled_model(n, context, stride):
    pytest.importorskip("numba")
    sizes = HPARAMS | {"n_embd": 16 * HPARAMS["n_head"]}
    ids, tensors = np.random.default_rng(n).integers(0, sizes["n_vocab"], n).tolist(), random_tensors(sizes)
    params = nest(tensors, sizes["n_layer"])
    expected = evaluate.total_loss(ids, params, sizes["n_head"], context, stride)
    model, params = compiled_model(params)
    found = evaluate.total_loss(ids, params, sizes["n_head"], context, stride, model=model)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(65, 1), (10, 11), (10, 0)])
def test_windows_that_do_not_fit_are_refused(context, stride):
    with pytest.raises(ValueError, match=f"stride {stride} <= context {context} <="):
        total_loss(range(100), context, stride)


@pytest.fixture
def run(tmp_path, tiny_flags, capsys):
    def run(*options, content=TEXT, flags=tiny_flags):
        (tmp_path / "text.txt").write_text(content, encoding="utf-8")
        code = evaluate_cli.run([str(tmp_path / "text.txt"), *flags, *options])
        return code, *capsys.readouterr()

    return run


def test_printed_losses_follow_from_the_total_loss(run, tiny):
    encoder, hparams, params = tiny
    ids = encoder.encode(TEXT * 3)[:300]
    text = encoder.decode(ids)
    assert encoder.encode(text) == ids
    total = evaluate.total_loss(ids, params, hparams["n_head"], 128, 64)
    loss, n_chars = total / (len(ids) - 1), len(encoder.decode(ids[1:]))
    code, out, err = run(content=text)
    assert (code, err) == (0, "")
    assert f"300 tokens, {len(text)} characters\ncontext 128, stride 64\n" in out
    shown = "loss # nats per token\nperplexity # per token\n# nats per character\n# bits per byte\n"
    found = list(map(float, re.search(shown.replace("#", r" *(\S+)"), out).groups()))
    expected = [loss, math.exp(loss), total / n_chars, total / n_chars / math.log(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_compiled_engine_finds_the_same_losses_and_quantized_weights_are_labelled(run, monkeypatch):
    pytest.importorskip("numba")
    expected, threads = run("--engine", "numpy"), []
    monkeypatch.setattr(evaluate_cli, "set_threads", threads.append)
    assert run("--engine", "compiled", "--threads", "1")[:2] == expected[:2]
    for dtype in ("int8", "int4"):
        code, out, err = run("--dtype", dtype, "--threads", "3")
        assert code == 0 and f"context 128, stride 64, weights {dtype} (lossy)\n" in out and "lossy" in err
        found = [float(re.search(r"loss +(\S+)", text)[1]) for text in (out, expected[1])]
        assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.2)
    assert threads == [1, 3, 3]


def test_threads_of_the_compiled_engine(run):
    numba = pytest.importorskip("numba")
    n_most = numba.config.NUMBA_NUM_THREADS
    for n_asked, n_used in ((1, 1), (n_most + 1, n_most)):
        assert run("--engine", "compiled", "--threads", str(n_asked))[0] == 0
        assert numba.get_num_threads() == n_used


def test_splits(run):
    found = [run("--split", split)[1].partition(" characters")[0].split()[-1] for split in ("all", "train", "val")]
    assert list(map(int, found)) == [len(TEXT), *map(len, split_text(TEXT).values())]


@pytest.mark.parametrize(
    ("options", "content", "words"),
    [
        ("--context 129", "text", ["--context 129", "128"]),
        ("--context 10 --stride 11", "text", ["--stride 11", "--context 10"]),
        ("--stride 0", "text", ["--stride"]),
        ("--split test", "text", ["--split"]),
        ("--engine numpy --dtype int4", "text", ["--dtype int4 needs the compiled engine", "--engine numpy"]),
        ("--threads 1000000000", "text", ["--threads", "the maximum is 1024"]),
        ("", "", ["text.txt is empty"]),
        ("", "a", ["1 tokens", "at least 2"]),
    ],
)
def test_mistakes(run, options, content, words):
    assert_mistake(run(*options.split(), content=content), *words, script="evaluate.py")


def test_memory_and_progress(run, monkeypatch):
    """Without a terminal, lines are printed now and then; a run that cannot fit is refused."""
    monkeypatch.setattr(evaluate, "LOGITS_PER_BATCH", 1)
    assert run()[2] == ""
    monkeypatch.setattr("training.progress.LINE_INTERVAL", 0)
    lines = run("--context", "32", "--stride", "32")[2].splitlines()
    assert lines == [f"evaluated {i + 1} of {len(lines)} batches" for i in range(len(lines))] and len(lines) > 3
    monkeypatch.setattr("weights.resources.available_memory", lambda: 2**18)
    assert run("--threads", "1", "--context", "16")[0] == 0
    assert_mistake(run("--threads", "9", "--context", "16"), "needs about", "lower --threads", script="evaluate.py")


def test_damaged_weights(run, tmp_path, tiny_models_dir, tiny):
    _, hparams, params = tiny
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    for scale, expected, word in ((np.nan, 2, "are damaged"), (1e6, 0, "perplexity  inf")):
        save_params(str(folder), params | {"ln_f": {name: x * scale for name, x in params["ln_f"].items()}}, hparams)
        code, out, err = run(flags=["--model_size", "tiny", "--models_dir", str(tmp_path)])
        assert code == expected and word in out + err and "Warning" not in err


# models/shakespeare


def test_the_bundled_model_is_as_good_as_its_card_says(capsys):
    """On the last tenth of tinyshakespeare, which it was not trained on, in adjacent windows."""
    need(DATA / "tinyshakespeare.txt")
    card = (SHAKESPEARE / "README.md").read_text(encoding="utf-8")
    command, stated = re.search(r"\$ python evaluate\.py (.*--stride 128)\n((?:.+\n){6})", card).groups()
    folders = ["--models_dir", str(SHAKESPEARE.parent), "--data_dir", str(DATA)]
    assert evaluate_cli.run([*shlex.split(command), *folders]) == 0
    (*found, nats, _), (*stated, stated_nats, _) = capsys.readouterr().out.splitlines(), stated.splitlines()
    assert found[:2] == stated[:2]
    np.testing.assert_allclose(float(nats.split()[0]), float(stated_nats.split()[0]), atol=2e-4)
    assert float(nats.split()[0]) < 1.47


def test_the_bundled_model_is_small_and_transformers_load_it():
    files = "README.md config.json hparams.json log.jsonl loss.png merges.txt model.safetensors vocab.json"
    assert sorted(path.name for path in SHAKESPEARE.iterdir()) == files.split()
    assert sum(path.stat().st_size for path in SHAKESPEARE.iterdir()) < 12_000_000
    assert_transformers_agree(SHAKESPEARE, "ROMEO:\nBut soft, what light")


@pytest.mark.parametrize("path", ["README.md", "models/shakespeare/README.md"])
def test_the_sample_shown_is_what_the_program_prints(path, capsys):
    shown = (ROOT / path).read_text(encoding="utf-8")
    pattern = r"python gpt2\.py (\"ROMEO:\" .*--seed.*)\n(?:```\n\n```\n)?((?:.|\n)*?)```"
    command, rest = re.search(pattern, shown).groups()
    assert generate.run([*shlex.split(command), "--models_dir", str(ROOT / "models")]) == 0
    assert capsys.readouterr().out == rest


def test_the_snippet_of_docs_training_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippet = re.search(r"```python\n((?:.|\n)*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"))[1]
    exec(snippet, {})
    loss, shape = capsys.readouterr().out.split(" ", 1)
    assert 1 < float(loss) < 5 and shape == "(512, 192)\n"
