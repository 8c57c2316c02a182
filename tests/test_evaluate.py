"""evaluate.py: every token is scored once, with the context it is said to have; figures against PyTorch's."""

import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import gpt2
from cli import generate as cli
from tests import gradients
from tests.conftest import ROOT, need
from tests.random_model import DATA, random_tensors
from training.dataset import split_text
from utils import load_encoder_hparams_and_params
from weights.names import nest
from weights.safetensors_file import save_params

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness.\n" * 3
SHAKESPEARE = ROOT / "models" / "shakespeare"
CASES = [(2, 64, 64), (50, 64, 32), (64, 64, 1), (65, 64, 64), (200, 64, 64), (150, 40, 7), (90, 8, 1)]


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_every_token_is_scored_once_with_enough_before_it(n_inputs, context, stride):
    context, stride = min(context, n_inputs), min(stride, context, n_inputs)
    seen = []
    for start, scored in evaluate.windows(n_inputs, context, stride):
        assert start >= 0 and start + context <= n_inputs and 0 <= scored < context
        assert start == 0 or scored >= context - stride
        seen += range(start + scored, start + context)
    assert seen == list(range(n_inputs))


def naive_loss(tensors, ids, context, stride):
    """Hugging Face's recipe, window by window, one at a time, in PyTorch."""
    model, _ = gradients.torch_model(gradients.HPARAMS, tensors)
    total, done = 0.0, 0
    with torch.no_grad():
        while done < len(ids) - 1:
            end = context if done == 0 else done + stride
            end = min(end, len(ids) - 1)
            start = max(0, end - context)
            losses = torch.nn.functional.cross_entropy(
                model(torch.tensor([ids[start:end]])).logits[0],
                torch.tensor(ids[start + 1 : end + 1]),
                reduction="none",
            )
            total, done = total + losses[done - start :].double().sum().item(), end
    return total


@pytest.mark.parametrize(("n", "context", "stride"), CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_total_loss_is_pytorchs(n, context, stride, threads):
    tensors = random_tensors(gradients.HPARAMS)
    ids = np.random.default_rng(n).integers(0, gradients.HPARAMS["n_vocab"], n).tolist()
    params = nest(tensors, gradients.HPARAMS["n_layer"])
    found = evaluate.total_loss(ids, params, gradients.HPARAMS["n_head"], context, stride, threads)
    np.testing.assert_allclose(found, naive_loss(tensors, ids, context, stride), rtol=1e-5)


def test_batches_of_windows_are_windows_one_by_one(monkeypatch):
    tensors, ids = random_tensors(gradients.HPARAMS), list(range(300))
    params = nest(tensors, gradients.HPARAMS["n_layer"])
    losses = []
    for at_once in (1, 2**12, 2**25):
        monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", at_once)
        losses.append(evaluate.total_loss(ids, params, gradients.HPARAMS["n_head"], 16, 8, threads=2))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(65, 1), (10, 11), (10, 0)])
def test_windows_that_do_not_fit_are_refused(context, stride):
    params = nest(random_tensors(gradients.HPARAMS), gradients.HPARAMS["n_layer"])
    with pytest.raises(ValueError, match="in this order"):
        evaluate.total_loss(range(100), params, gradients.HPARAMS["n_head"], context, stride)


@pytest.fixture
def run(tmp_path, tiny_models_dir, capsys):
    def run(*options, content=None):
        path = tmp_path / "text.txt"
        path.write_bytes(TEXT.encode() if content is None else content)
        code = evaluate.main([str(path), "--model_size", "tiny", "--models_dir", str(tiny_models_dir), *options])
        return code, *capsys.readouterr()

    return run


def test_what_it_prints(run, tiny):
    """Loss, perplexity and nats a character, from the conditional probabilities one by one."""
    encoder, hparams, params = tiny
    ids = encoder.encode(TEXT)[:100]
    text = encoder.decode(ids)
    assert encoder.encode(text) == ids
    total = 0.0
    for i in range(1, len(ids)):
        logits = gpt2.gpt2(ids[:i], **params, n_head=hparams["n_head"])[-1].astype(np.float64)
        total += np.log(np.sum(np.exp(logits))) - logits[ids[i]]
    loss, n_chars = total / (len(ids) - 1), len(encoder.decode(ids[1:]))
    code, out, err = run(content=text.encode())
    assert (code, err) == (0, "")
    assert f"100 tokens, {len(text)} characters\ncontext 128, stride 64\n" in out
    found = [float(re.search(r"\d+\.\d+", line)[0]) for line in out.splitlines()[2:]]
    expected = [loss, math.exp(loss), total / n_chars, total / n_chars / math.log(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_splits(run):
    def characters(*options):
        return int(run(*options)[1].partition(" characters")[0].split()[-1])

    parts = split_text(TEXT)
    assert [characters("--split", split) for split in ("all", "train", "val")] == [len(TEXT), *map(len, parts)]


@pytest.mark.parametrize(
    ("options", "content", "words"),
    [
        (["--context", "129"], None, ["--context 129", "128"]),
        (["--context", "10", "--stride", "11"], None, ["--stride 11", "--context 10"]),
        (["--stride", "0"], None, ["--stride"]),
        ([], b"", ["empty"]),
        ([], b"a", ["1 tokens", "at least 2"]),
        ([], b"\xff", ["not UTF-8"]),
        (["--split", "test"], None, ["--split"]),
    ],
)
def test_mistakes(run, options, content, words):
    code, out, err = run(*options, content=content)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err


def test_weights_that_make_no_sense(tmp_path, tiny_models_dir, tiny, capsys):
    _, hparams, params = tiny
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for scale, code, word in ((np.nan, 2, "not sound"), (1e6, 0, "perplexity  inf")):
        save_params(str(folder), params | {"ln_f": {name: x * scale for name, x in params["ln_f"].items()}}, hparams)
        found = evaluate.main([str(tmp_path / "text.txt"), "--model_size", "tiny", "--models_dir", str(tmp_path)])
        out, err = capsys.readouterr()
        assert found == code and word in out + err and "Warning" not in err


def test_a_file_that_is_not_there(capsys, tiny_models_dir):
    assert evaluate.main(["no.txt", "--model_size", "tiny", "--models_dir", str(tiny_models_dir)]) == 2
    assert "no data file 'no.txt'" in capsys.readouterr().err


# models/shakespeare


def test_the_bundled_model_is_as_good_as_its_card_says():
    """On the last tenth of tinyshakespeare, which it was not trained on: nats a character, windows side by side."""
    text = need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))
    ids = encoder.encode(split_text(text)[1])
    total = evaluate.total_loss(ids, params, hparams["n_head"], context=128, stride=128, threads=2)
    found = total / len(encoder.decode(ids[1:]))
    card = (SHAKESPEARE / "README.md").read_text(encoding="utf-8")
    stated = float(re.search(r"stride 128\n(?:.*\n){2} +(\S+) nats a character", card)[1])
    np.testing.assert_allclose(found, stated, atol=2e-4)
    assert found < 1.47


def test_the_bundled_model_is_small_and_transformers_load_it():
    from transformers import AutoTokenizer, GPT2LMHeadModel

    bundled = "model.safetensors config.json hparams.json encoder.json vocab.bpe vocab.json merges.txt"
    names = [*bundled.split(), "README.md", "log.jsonl", "loss.png"]
    assert sum((SHAKESPEARE / name).stat().st_size for name in names) < 12_000_000
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))
    ids = encoder.encode("ROMEO:\nBut soft, what light")
    assert AutoTokenizer.from_pretrained(SHAKESPEARE).encode("ROMEO:\nBut soft, what light") == ids
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(SHAKESPEARE)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(gpt2.gpt2(ids, **params, n_head=hparams["n_head"]), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["README.md", "models/shakespeare/README.md"])
def test_the_sample_shown_is_what_the_program_prints(path, capsys):
    shown = (ROOT / path).read_text(encoding="utf-8")
    command, rest = re.search(
        r"python gpt2\.py (\"ROMEO:\" .*--seed.*)\n(?:```\n\n```\n)?((?:.|\n)*?)```", shown
    ).groups()
    assert cli.run([*shlex.split(command), "--models_dir", str(ROOT / "models")]) == 0
    assert capsys.readouterr().out == rest


def test_the_training_snippet_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippet = re.search(r"```python\n(from autograd(?:.|\n)*?)```", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    exec(snippet, {})
    loss, shape = capsys.readouterr().out.split(" ", 1)
    assert 1 < float(loss) < 5 and shape == "(512, 192)\n"
