"""train.py: the optimizer against PyTorch, what a run leaves, resuming, and every mistake a person can make."""

import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import gpt2
from cli import train as train_cli
from encoder import END_OF_TEXT, get_encoder
from tests import gradients
from tests.conftest import ROOT, need
from tests.random_model import DATA
from training import dataset as data
from training import fused
from training import trainer as train
from training.adamw import AdamW, global_norm, learning_rate_at
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import atomic_write
from weights.names import flatten, nest, tensor_shapes
from weights.safetensors_file import load_safetensors, save_params, save_safetensors

SMALL = (
    "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --vocab_size 300 --warmup_iters 2 --eval_iters 2"
)
WEIGHTS = ("model.safetensors", train.STATE)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """40 kB of this project's own words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "gpt2.py", "encoder.py"))
    )
    return path


@pytest.fixture
def run(tmp_path, text_file, capsys):
    """Trains a small model in tmp_path/models; returns (exit code, standard output, standard error)."""

    def run(options="", name="new", small=SMALL, dataset=text_file, models_dir=tmp_path / "models"):
        given = ["--name", name, "--models_dir", str(models_dir), *small.split(), *options.split()]
        code = train.main(given + (["--dataset", str(dataset)] if dataset else []))
        return code, *capsys.readouterr()

    return run


def tensors_of(path):
    return {name: np.array(tensor) for name, tensor in load_safetensors(str(path))[0].items()}


def assert_same_files(one, other, names=WEIGHTS):
    for name in names:
        left, right = tensors_of(one / name), tensors_of(other / name)
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            np.testing.assert_array_equal(tensor, right[key], err_msg=f"{name} {key}")


def mistake(result, *words):
    """Asserts that this is exit code 2 and one line that has all the words."""
    code, out, err = result
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0] == err.splitlines()[-1] and "Warning" not in err
    for word in words:
        assert word in lines[0], lines[0]


# The optimizer


@pytest.mark.parametrize("decays", ["matrices", "all"])
def test_ten_steps_of_adamw_are_pytorchs(decays):
    """The loss of each step within 1e-4 of torch.optim.AdamW's, from the same start, clipping included."""
    hparams = gradients.HPARAMS
    tensors, (inputs, targets) = train.initial_tensors(hparams, 0), gradients.batch(hparams, (2, 32))
    model, by_name = gradients.torch_model(hparams, tensors)
    matrices = [p for p in by_name.values() if p.ndim > 1 or decays == "all"]
    others = [p for p in by_name.values() if p.ndim == 1 and decays != "all"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), eps=1e-8)
    chosen = {} if decays == "matrices" else {"decays": lambda p: True}
    ours = AdamW(tensors, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, **chosen)
    trained = fused.training_model()
    for _ in range(10):
        theirs.zero_grad()
        expected = gradients.torch_loss(model, inputs, targets)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        theirs.step()
        loss, found = train.loss_and_gradients(tensors, hparams, inputs, targets, trained)
        norm = global_norm(found)
        ours.update(found, 3e-3, min(1, 0.5 / norm))
        assert abs(loss - expected.item()) < 1e-4
        np.testing.assert_allclose(norm, expected_norm, rtol=1e-4 if ours.step == 1 else 1e-2)
    assert loss < 4.5, "the loss must have moved for this to mean anything"


def test_a_tensor_that_cannot_be_updated_in_place_is_refused():
    with pytest.raises(ValueError, match=r"w; give np\.ascontiguousarray"):
        AdamW({"w": np.ones((2, 3), np.float32).T})


def test_the_largest_dropout_trains():
    _, found = trainer(dropout=0.9999999).all_gradients(0)
    assert all(np.all(np.isfinite(gradient)) for gradient in found.values())


def test_the_update_reaches_all_of_a_tensor_larger_than_a_piece():
    p, g = np.ones((300, 500), np.float32), np.full((300, 500), 2, np.float32)
    optimizer = AdamW({"w": p}, weight_decay=0.0)
    optimizer.update({"w": g.T.copy().T}, 0.5)  # in another memory order
    np.testing.assert_allclose(p, 0.5, rtol=1e-5)
    assert p.dtype == optimizer.m["w"].dtype == optimizer.v["w"].dtype == np.float32


def test_learning_rate():
    rates = [learning_rate_at(step, 1.0, 0.1, 10, 110) for step in range(130)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose([rates[10], rates[60], rates[110], rates[129]], [1, 0.55, 0.1, 0.1])
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate_at(0, 1.0, 0.1, 0, 10) == 1


# Starting values and learning


@pytest.mark.parametrize(("n_vocab", "expected"), [(65, 4.174), (300, math.log(300)), (5000, math.log(5000))])
def test_a_new_model_starts_at_the_logarithm_of_its_vocabulary(n_vocab, expected):
    hparams = {"n_vocab": n_vocab, "n_ctx": 64, "n_embd": 96, "n_head": 4, "n_layer": 4}
    params = nest(train.initial_tensors(hparams, seed=0), hparams["n_layer"])
    inputs, targets = gradients.batch(hparams)
    assert abs(train.lm_loss(params, inputs, targets, hparams["n_head"]) - expected) < 0.1


def test_initialization_is_gpt2s():
    hparams = {"n_vocab": 500, "n_ctx": 200, "n_embd": 120, "n_head": 4, "n_layer": 8}
    tensors = train.initial_tensors(hparams, seed=0)
    assert {name: t.shape for name, t in tensors.items()} == tensor_shapes(**hparams)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    expected = {"wte": 0.02, "wpe": 0.01, "h3/attn/c_attn/w": 0.02, "h3/mlp/c_fc/w": 0.02}
    expected |= {"h3/attn/c_proj/w": 0.02 / 4, "h7/mlp/c_proj/w": 0.02 / 4}
    for name, deviation in expected.items():
        np.testing.assert_allclose(np.std(tensors[name]), deviation, rtol=0.05, err_msg=name)
    assert np.all(tensors["ln_f/g"] == 1) and np.all(tensors["h0/mlp/c_fc/b"] == 0)
    assert np.any(train.initial_tensors(hparams, seed=1)["wte"] != tensors["wte"])


def test_one_batch_of_tinyshakespeare_is_learned_by_heart():
    text = need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    encoder = data.train_encoder(text[:100_000], 300, False)
    hparams = {"n_vocab": 300, "n_ctx": 32, "n_embd": 64, "n_head": 4, "n_layer": 2}
    ids = np.array(encoder.encode(text[:4000]))
    inputs, targets = data.random_windows(ids, np.random.default_rng(0), 4, 32)
    tensors, model = train.initial_tensors(hparams, 0), fused.training_model()
    optimizer = AdamW(tensors, weight_decay=0.0)
    for _ in range(150):
        loss, found = train.loss_and_gradients(tensors, hparams, inputs, targets, model)
        optimizer.update(found, 5e-3, min(1, 1 / global_norm(found)))
    assert loss < 0.1


def test_what_is_generated_is_what_was_learned(run, tmp_path):
    """A text that repeats: the loss falls to what is left of chance, and gpt2.py goes on with the text."""
    (tmp_path / "abc.txt").write_text("one two three four five six seven\n" * 400, encoding="utf-8")
    code, out, _ = run(
        "--max_iters 120 --eval_interval 60 --learning_rate 1e-2 --dropout 0", dataset=tmp_path / "abc.txt"
    )
    assert code == 0 and "step 120 of 120" in out
    encoder, hparams, params = load_encoder_hparams_and_params("new", str(tmp_path / "models"))
    ids = gpt2.generate(encoder.encode("one two three"), params, hparams["n_head"], 4)
    assert encoder.decode(ids).startswith(" four five")


# What a run leaves


def test_the_result_is_a_model_that_gpt2_and_transformers_load(run, tmp_path):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    code, out, _ = run("--max_iters 6 --eval_interval 3")
    folder = tmp_path / "models" / "new"
    assert code == 0 and str(folder) in out and out.count("\n") == 1
    assert {"hparams.json", "config.json", "encoder.json", "vocab.bpe", "train.bin", "val.bin", *WEIGHTS} <= set(
        os.listdir(folder)
    )
    encoder, hparams, params = load_encoder_hparams_and_params("new", str(tmp_path / "models"))
    ids = encoder.encode("def softmax(x):")
    logits = gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(folder)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, theirs, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("def softmax(x):\n    return é") == encoder.encode("def softmax(x):\n    return é")


def test_the_model_kept_is_the_one_of_the_lowest_validation_loss(run, tmp_path):
    run("--max_iters 30 --eval_interval 5 --learning_rate 0.05 --dropout 0")
    folder = tmp_path / "models" / "new"
    losses = [(line["val_loss"], line["step"]) for line in train.read_log(folder) if "val_loss" in line]
    _, hparams, params = load_encoder_hparams_and_params("new", str(tmp_path / "models"))
    inputs, targets = data.even_windows(np.fromfile(folder / "val.bin", "<u2"), 8, 16)
    np.testing.assert_allclose(train.lm_loss(params, inputs, targets, hparams["n_head"]), min(losses)[0], rtol=1e-5)
    assert json.loads(load_safetensors(str(folder / train.STATE))[1]["state"])["best_step"] == min(losses)[1]


def test_log_picture_and_samples(run, tmp_path):
    _, _, err = run("--max_iters 20 --eval_interval 10")
    folder = tmp_path / "models" / "new"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 10, 20, 20]
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds"} <= lines[1].keys()
    assert {"train_loss", "val_loss", "val_nats_per_char"} <= lines[2].keys()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert err.count("    | ") >= 3 and err.count("validation loss") == 3


def test_without_matplotlib_there_is_no_picture(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--max_iters 1")[0] == 0
    assert not (tmp_path / "models" / "new" / "loss.png").exists()


def test_dropout_is_off_at_evaluation(run, tmp_path):
    run("--max_iters 0 --dropout 0")
    run("--max_iters 0 --dropout 0.5", name="dropped")
    lines = [train.read_log(tmp_path / "models" / name)[0] for name in ("new", "dropped")]
    assert lines[0]["val_loss"] == lines[1]["val_loss"]


def test_training_uses_dropout(run, tmp_path):
    for name, p in (("new", 0), ("dropped", 0.5)):
        run(f"--max_iters 10 --dropout {p}", name=name)
    losses = [train.read_log(tmp_path / "models" / name)[1]["loss"] for name in ("new", "dropped")]
    assert losses[0] != losses[1]


def trainer(**options):
    """A Trainer of a small model, without a folder."""
    hparams = gradients.HPARAMS
    ids = {"train": np.random.default_rng(0).integers(0, hparams["n_vocab"], 999, dtype=np.uint16)}
    chosen = train_cli.PRESETS["3min"] | {"block_size": 16, "batch_size": 4, "threads": 1, "dropout": 0.0} | options
    return train.Trainer(None, chosen, None, hparams, train.initial_tensors(hparams, 0), ids)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_of_accumulated_batches_and_shards_are_those_of_all_windows_at_once(threads, monkeypatch):
    """3 batches of 4, in shards of 4, 2 + 2 or 2 + 1 + 1, against the 12 windows in one batch."""
    monkeypatch.setattr(train, "SHARD_TOKENS", 1)
    of = trainer(gradient_accumulation_steps=3, threads=threads)
    assert of.n_shards == threads
    loss, found = of.all_gradients(step=7)
    batches = [data.random_windows(of.data["train"], np.random.default_rng([1337, 7, i]), 4, 16) for i in range(3)]
    inputs, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected_loss, expected = gradients.torch_gradients(gradients.HPARAMS, of.tensors, inputs, targets)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name in found:
        assert gradients.relative_error(found[name], expected[name]) < 1e-4, name


def test_every_step_batch_and_shard_draws_anew(monkeypatch):
    monkeypatch.setattr(train, "SHARD_TOKENS", 1)
    of = trainer(gradient_accumulation_steps=2, threads=2, dropout=0.5)
    windows, masks, draw, mask = [], [], train.random_windows, fused.Dropout.mask
    monkeypatch.setattr(train, "random_windows", lambda *args: windows.append(draw(*args)) or windows[-1])
    monkeypatch.setattr(fused.Dropout, "mask", lambda self, shape: masks.append(mask(self, shape)) or masks[-1])
    for step in (0, 1):
        of.all_gradients(step)
    assert len({inputs.tobytes() for inputs, _ in windows}) == 2 * 2
    assert len({m.tobytes() for m in masks}) == len(masks) == 2 * 2 * 2 * (1 + 3 * gradients.HPARAMS["n_layer"])


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 1), (3, 1), (4, 2), (5, 2), (6, 3), (64, 3)])
def test_small_batches_are_cut_into_fewer_shards(batch_size, expected):
    assert trainer(threads=3, block_size=128, batch_size=batch_size).n_shards == expected


def test_shards_train_the_same_model_as_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD_TOKENS", 1)
    run("--max_iters 3 --dropout 0 --threads 1", name="one")
    run("--max_iters 3 --dropout 0 --threads 3", name="shards")
    one, shards = (tensors_of(tmp_path / "models" / name / "model.safetensors") for name in ("one", "shards"))
    for name in one:
        np.testing.assert_allclose(one[name], shards[name], rtol=1e-3, atol=1e-4)


# Resuming


def test_ten_steps_are_five_and_five_more_bit_for_bit(run, tmp_path, monkeypatch):
    """Weights, moments and the log; with dropout, accumulation, shards and clipping."""
    monkeypatch.setattr(train, "SHARD_TOKENS", 1)
    options = "--eval_interval 4 --dropout 0.2 --gradient_accumulation_steps 2 --grad_clip 0.5 --lr_decay_iters 10"
    run(f"--max_iters 10 {options}", name="whole")
    run(f"--max_iters 5 {options}", name="parts")
    code, _, err = run("--resume --max_iters 10", name="parts", small="", dataset=None)
    assert code == 0 and "going on from step 5 of 10" in err
    whole, parts = tmp_path / "models" / "whole", tmp_path / "models" / "parts"
    assert_same_files(whole, parts, [train.STATE])
    log = [[line.get("loss") for line in train.read_log(folder) if "loss" in line] for folder in (whole, parts)]
    assert log[0] == log[1]


def test_a_run_that_was_killed_goes_on_from_its_last_save(run, tmp_path, monkeypatch):
    """The process dies at step 7, after the save at step 5; what the log has from then on is dropped."""
    options = "--max_iters 12 --eval_interval 5 --dropout 0.1"
    run(options, name="whole")
    step = train.Trainer.train_step

    def dying(self):
        if self.state["step"] == 7:
            self.log({"loss": 1.0})
            raise SystemExit
        return step(self)

    monkeypatch.setattr(train.Trainer, "train_step", dying)
    with pytest.raises(SystemExit):
        run(options, name="killed")
    monkeypatch.undo()
    with open(tmp_path / "models" / "killed" / "log.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 8, "lo')  # and half a line
    assert run("--resume", name="killed", small="", dataset=None)[0] == 0
    assert_same_files(tmp_path / "models" / "whole", tmp_path / "models" / "killed")
    steps = [line["step"] for line in train.read_log(tmp_path / "models" / "killed")]
    assert steps == [0, 5, 10, 10, 12]


def test_a_best_model_that_was_deleted_is_written_again(run, tmp_path):
    run("--max_iters 2")
    (tmp_path / "models" / "new" / "model.safetensors").unlink()
    assert run("--resume", small="", dataset=None)[0] == 0
    assert load_encoder_hparams_and_params("new", str(tmp_path / "models"))


def test_resuming_what_is_finished_changes_nothing(run, tmp_path):
    run("--max_iters 3")
    shutil.copytree(tmp_path / "models" / "new", tmp_path / "before")
    assert run("--resume", small="", dataset=None)[0] == 0
    assert_same_files(tmp_path / "before", tmp_path / "models" / "new")


def start(tmp_path, text_file, *options):
    command = [sys.executable, str(ROOT / "train.py"), "--name", "new", "--models_dir", str(tmp_path), *options]
    command += ["--dataset", str(text_file)] if "--resume" not in options else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, text_file):
    process = start(tmp_path, text_file, *SMALL.split(), "--max_iters", "1000000", "--eval_interval", "1000000")
    while "step 0:" not in (line := process.stderr.readline()):
        assert line, "it ended before its first evaluation"
    while not (tmp_path / "new" / "log.jsonl").read_text(encoding="utf-8").count("tokens_per_second"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"go on with: python train.py --name new --models_dir {tmp_path} --resume" in err
    assert "Traceback" not in err
    state = json.loads(load_safetensors(str(tmp_path / "new" / train.STATE))[1]["state"])
    assert state["step"] == state["saved_step"] >= 10
    stopped = state["step"]
    process = start(tmp_path, text_file, "--resume", "--max_iters", str(stopped + 2))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and f"going on from step {stopped} of {stopped + 2}" in err


def test_on_a_full_disk_the_old_checkpoint_survives(tmp_path, text_file):
    """A limit on the size of files stands for the full disk."""
    process = start(tmp_path, text_file, *SMALL.split(), "--max_iters", "4", "--eval_interval", "2")
    assert process.communicate(timeout=60) and process.returncode == 0
    before = {name: (tmp_path / "new" / name).read_bytes() for name in WEIGHTS}

    for n_bytes in (20_000, 40_000):  # model.safetensors, of 49 kB, is written first if it is the best so far
        process = start(tmp_path, text_file, "--resume", "--max_iters", "8")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "") and "cannot write" in err and "make room" in err
        assert {name: (tmp_path / "new" / name).read_bytes() for name in WEIGHTS} == before
    process = start(tmp_path, text_file, "--resume", "--max_iters", "8")
    assert process.communicate(timeout=60) and process.returncode == 0


def test_a_state_that_cannot_be_written_leaves_the_old_one(run, tmp_path, monkeypatch):
    import errno

    run("--max_iters 2")
    before = (tmp_path / "models" / "new" / train.STATE).read_bytes()

    def full(path, *_):
        with atomic_write(path) as f:
            f.write(b"the first few bytes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "save_safetensors", full)
    mistake(run("--resume --max_iters 4", small="", dataset=None), "cannot write", train.STATE, "No space left")
    assert (tmp_path / "models" / "new" / train.STATE).read_bytes() == before
    assert not list((tmp_path / "models" / "new").glob("*.tmp"))


def test_a_loss_that_is_no_number_stops_and_keeps_what_was_good(run, tmp_path):
    code, out, err = run("--max_iters 50 --eval_interval 5 --learning_rate 1e12 --grad_clip 0 --warmup_iters 20")
    folder = tmp_path / "models" / "new"
    mistake((code, out, err), "diverged", "keeps step", "--resume --learning_rate 3e+11", "at step")
    kept = tensors_of(folder / train.STATE)
    assert all(np.all(np.isfinite(tensor)) for tensor in kept.values())
    assert run("--resume --learning_rate 1e-3 --max_iters 7", small="", dataset=None)[0] == 0


@pytest.mark.parametrize("options", ["--learning_rate 1e300", "--learning_rate 1e9 --weight_decay 0 --grad_clip 0"])
def test_a_divergence_is_one_line_that_names_what_is_not_finite(tmp_path, text_file, options):
    process = start(tmp_path, text_file, *SMALL.split(), "--max_iters", "90", *options.split())
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "") and "Warning" not in err and "Traceback" not in err
    assert re.search(
        r"training diverged: the [\w/ ]+ is -?(nan|inf) at step \d+\. .* keeps step \d+;", err.splitlines()[-1]
    )


def test_a_model_of_nans_is_not_fine_tuned(run, tmp_path, tiny_models_dir, tiny):
    _, hparams, params = tiny
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path / "models" / "tiny")
    params = params | {"wpe": np.full_like(params["wpe"], np.nan)}
    save_params(str(folder), params, hparams)
    result = run("--init_from tiny --block_size 32", small="")
    mistake(result, "before the first step", "tiny are not sound")
    assert "--resume" not in result[2]


# Fine-tuning


def test_fine_tuning_lowers_the_loss_of_a_model_that_is_there(run, tmp_path, tiny_models_dir, text_file):
    models_dir = tmp_path / "models"
    shutil.copytree(tiny_models_dir, models_dir)
    original = tensors_of(models_dir / "tiny" / "model.safetensors")
    options = "--init_from tiny --max_iters 20 --eval_interval 10 --block_size 32 --learning_rate 1e-3"
    code, _, _ = run(options, small="")
    assert code == 0
    losses = [line["val_loss"] for line in train.read_log(models_dir / "new") if "val_loss" in line]
    assert losses[0] > losses[1] > losses[2]
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", str(models_dir))
    text = data.split_text(text_file.read_text(encoding="utf-8"))[1]
    inputs, targets = data.even_windows(np.array(encoder.encode(text)), 80, 32)
    np.testing.assert_allclose(train.lm_loss(params, inputs, targets, hparams["n_head"]), losses[0], rtol=1e-4)
    tuned = load_encoder_hparams_and_params("new", str(models_dir))
    assert tuned[1] == hparams and tuned[0].encoder == encoder.encoder and tuned[0].ranks == encoder.ranks
    for name, tensor in tensors_of(models_dir / "tiny" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, original[name])


@pytest.mark.real_weights
@pytest.mark.parametrize(
    ("options", "clip", "expected"),
    [
        (
            {"beta2": 0.999, "weight_decay": 0.01, "decays": lambda p: True},
            math.inf,
            "5.270007 4.059707 3.375123 2.800783 2.315382 1.849029 1.394656 0.999147 0.624080 0.376511",
        ),
        (
            {"beta2": 0.95, "weight_decay": 0.0},
            1.0,
            "5.270009 4.060681 3.320085 2.717550 2.181066 1.653923 1.168050 0.736873 0.401021 0.187493",
        ),
    ],
    ids=["test_gpt2.c", "test_gpt2.cu"],
)
def test_ten_steps_from_openais_weights_are_llm_cs(options, clip, expected):
    """llm.c's test_gpt2.c and test_gpt2.cu: the first 257 tokens of its tinyshakespeare validation set, as 4 x 64."""
    need(ROOT / "models" / "124M" / "model.safetensors")
    text = need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params("124M", str(ROOT / "models"))
    ids = np.array(data.encode_splits(text, encoder, "sections")[1][:257])
    inputs, targets = ids[:-1].reshape(4, 64), ids[1:].reshape(4, 64)
    tensors = {name: np.array(tensor) for name, tensor in flatten(params, hparams).items()}
    optimizer, model = AdamW(tensors, **options), fused.training_model()
    for loss in map(float, expected.split()):
        found_loss, found = train.loss_and_gradients(tensors, hparams, inputs, targets, model)
        assert abs(found_loss - loss) < 1e-2
        optimizer.update(found, 1e-4, min(1, clip / global_norm(found)))


# Mistakes


def write(path, content):
    path.write_bytes(content)
    return path


def test_a_data_file_that_is_not_there(run, tmp_path):
    mistake(run(dataset=tmp_path / "no.txt"), "no data file", "no.txt", "give the path")
    assert not (tmp_path / "models" / "new").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf", ["is empty"]),
        (b"too short a text\n", ["--block_size 16", "take a longer text"]),
        (b"x", ["0 tokens", "take a longer text"]),
        (b"abc" * 100 + b"\xff", ["not UTF-8", "0xff at position 300"]),
        (b"\xef\xbb\xbfabc\xfe", ["not UTF-8", "0xfe at position 3"]),
    ],
)
def test_a_data_file_that_cannot_be_trained_on(run, tmp_path, content, words):
    mistake(run(dataset=write(tmp_path / "bad.txt", content)), *words)
    assert not (tmp_path / "models" / "new").exists()


def test_a_folder_is_no_data_file(run, tmp_path):
    mistake(run(dataset=tmp_path), "no data file")


def test_the_advised_block_size_works(run, tmp_path):
    path = write(tmp_path / "short.txt", b"to be or not to be, that is " * 5)
    _, _, err = run(dataset=path)
    advised = err.rpartition("--block_size ")[2].strip()
    assert run(f"--max_iters 1 --block_size {advised}", dataset=path)[0] == 0


def test_a_block_beyond_the_context_of_the_model(run, tmp_path, tiny_models_dir):
    shutil.copytree(tiny_models_dir, tmp_path / "models")
    mistake(run("--init_from tiny --block_size 129", small=""), "--block_size 129", "context of 128")


def refuse(*_):
    raise UserError("no room")


def no_memory(*_):
    raise MemoryError("Unable to allocate 3 GiB")


def test_failing_leaves_no_folder_and_does_not_offer_it(run, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    result = run("--init_from nothing", small="")
    mistake(result, "unknown model size 'nothing'")
    assert "new" not in result[2] and not list((tmp_path / "models").iterdir())


def test_paths_may_begin_at_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.txt", b"to be or not to be, that is the question\n" * 40)
    assert run("--max_iters 1", dataset="~/mine.txt", models_dir="~/m")[0] == 0
    assert (tmp_path / "m" / "new" / "model.safetensors").exists()


def test_control_characters_in_samples_are_shown_as_such(run, tmp_path):
    path = write(tmp_path / "escape.txt", b"\x1b[2Jx\r\n" * 400)
    code, _, err = run("--max_iters 2", dataset=path)
    assert code == 0 and "    | " in err and not {"\x1b", "\r"} & set(err)


def test_sections_need_a_blank_line(run, tmp_path):
    path = write(tmp_path / "windows.txt", b"a line\r\n\r\nanother line\r\n" * 40)
    mistake(run("--layout sections", dataset=path), "no blank line", "--layout plain")


def test_a_block_that_was_not_asked_for_fits_the_model(run, tmp_path, tiny_models_dir):
    shutil.copytree(tiny_models_dir, tmp_path / "models")
    assert run("--init_from tiny --max_iters 1 --eval_iters 1", small="")[0] == 0


def test_a_name_that_exists(run, tmp_path, monkeypatch):
    run("--max_iters 2")
    before = {path.name: path.read_bytes() for path in (tmp_path / "models" / "new").iterdir()}
    mistake(run("--max_iters 2"), "new exists", "--resume", "--overwrite")
    mistake(run("--max_iters 2 --overwrite", dataset=tmp_path / "no.txt"), "no data file")
    mistake(run("--max_iters 2 --overwrite", dataset=write(tmp_path / "short.txt", b"short")), "longer text")
    with monkeypatch.context() as patch:
        patch.setattr(train_cli, "check_space", refuse)
        mistake(run("--max_iters 2 --overwrite"), "no room")
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_and_gradients", no_memory)
        mistake(run("--max_iters 2 --overwrite"), "not enough memory", "batch")
    assert {path.name: path.read_bytes() for path in (tmp_path / "models" / "new").iterdir()} == before
    assert run("--max_iters 3 --overwrite --n_layer 1")[0] == 0
    assert len(train.read_log(tmp_path / "models" / "new")) == 2


@pytest.mark.parametrize("option", ["--n_layer 3", "--n_embd 32", "--n_head 4", "--block_size 8", "--vocab_size 400"])
def test_resuming_with_another_shape(run, tmp_path, option):
    run("--max_iters 2")
    mistake(run(f"--resume {option}", small="", dataset=None), option, "leave it out")


def test_resuming_with_the_same_shape_or_another_dropout(run):
    run("--max_iters 2")
    assert run("--resume --n_layer 2 --dropout 0.3 --max_iters 3", small="", dataset=None)[0] == 0


def test_resuming_what_was_never_trained(run, tmp_path, tiny_models_dir):
    mistake(run("--resume", dataset=None), "no training to resume", "check --name")
    shutil.copytree(tiny_models_dir, tmp_path / "models", dirs_exist_ok=True)
    mistake(run("--resume", name="tiny", dataset=None), "to resume from", "--init_from tiny")


def damage_options(folder):
    tensors, metadata = load_safetensors(str(folder / train.STATE))
    save_safetensors(str(folder / train.STATE), tensors_of(folder / train.STATE), {"state": metadata["state"]})
    return len(tensors)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (train.STATE, lambda path: path.write_bytes(path.read_bytes()[:-100])),
        (train.STATE, lambda path: shutil.copy(path.parent / "model.safetensors", path)),
        (train.STATE, lambda path: damage_options(path.parent)),
        (train.STATE, lambda path: write(path.parent / "hparams.json", shape_of(path.parent, n_layer=1))),
        ("train.bin", lambda path: path.write_bytes(b"")),
        ("train.bin", lambda path: path.unlink()),
        ("train.bin", lambda path: path.write_bytes(path.read_bytes()[:20])),
        ("val.bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("val.bin", lambda path: path.write_bytes(b"\xff\xff" * 100)),
    ],
)
def test_resuming_from_damaged_files(run, tmp_path, name, damage):
    run("--max_iters 2")
    damage(tmp_path / "models" / "new" / name)
    mistake(run("--resume", small="", dataset=None), name, "is corrupt")


def shape_of(folder, **changed):
    return json.dumps(json.loads((folder / "hparams.json").read_text(encoding="utf-8")) | changed).encode()


def test_a_damaged_log_does_not_matter(run, tmp_path):
    run("--max_iters 2")
    write(tmp_path / "models" / "new" / "log.jsonl", b'{"step": 0}\n{"step": oh}\n{"a": 1}\n[1]\n\xff\xfe\n')
    assert run("--resume --max_iters 3", small="", dataset=None)[0] == 0
    assert [line["step"] for line in train.read_log(tmp_path / "models" / "new")] == [0, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--n_embd 18 --n_head 4", ["--n_embd 18", "--n_head 4", "--n_embd 16 is"]),
        ("stray", ["unrecognized arguments: stray (a text goes after --dataset"]),
        ("--vocab_size 255", ["--vocab_size 255", "256"]),
        ("--vocab_size 65537", ["65537", "65536"]),
        ("--device cuda", ["--device", "cuda"]),
        ("--dropout 1", ["--dropout", "'1'"]),
        ("--learning_rate 0", ["--learning_rate"]),
        ("--learning_rate nan", ["--learning_rate"]),
        ("--batch_size 0", ["--batch_size"]),
        ("--max_iters -1", ["--max_iters"]),
        ("--preset 2min", ["--preset", "3min"]),
        ("--preset finetune", ["--preset finetune", "--init_from"]),
        ("--resume --overwrite", ["--resume", "--overwrite"]),
        ("--batch_sise 4", ["--batch_sise 4 (a text goes after --dataset"]),
        ("--tokenizer bytes", ["--vocab_size", "bytes"]),
        ("--init_from nothing-there", ["--n_layer", "nothing-there"]),
    ],
)
def test_options_that_make_no_sense(run, tmp_path, options, words):
    mistake(run(options), *words)
    assert not (tmp_path / "models" / "new").exists()


def test_a_model_to_start_from_that_is_not_there(run, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    mistake(run("--init_from nothing-there", small=""), "unknown model size 'nothing-there'")


@pytest.mark.parametrize("name", ["124M", "a/b", "..", ".hidden", "", "-x", "a b"])
def test_names_that_a_new_model_cannot_have(run, name):
    mistake(run(name=name))


def test_a_dataset_is_needed(run):
    mistake(run(dataset=None), "--dataset")


def test_two_trainings_of_one_model(run, tmp_path):
    from filelock import FileLock

    run("--max_iters 1")
    with FileLock(tmp_path / "models" / ".new.lock"):
        mistake(run("--resume", small="", dataset=None), "another process")


def test_a_text_with_few_pairs_gets_a_smaller_vocabulary(run, tmp_path):
    path = write(tmp_path / "ab.txt", b"ab " * 400)
    code, _, err = run("--max_iters 1", dataset=path)
    assert code == 0 and "n_vocab 25" in err


# Data


def test_splits_have_nanogpts_and_llm_cs_hashes():
    """ORACLES: token counts of nanoGPT's prepare.py and llm.c's tinyshakespeare.py, and sha256 of the uint16 ids."""
    need(DATA / "gpt2")
    text = data.read_dataset(str(need(DATA / "tinyshakespeare.txt")), "")
    encoder = get_encoder("gpt2", str(DATA))
    assert len(data.sections(text)) == 7222
    expected = {
        "plain": [
            (301_966, "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"),
            (36_059, "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"),
        ],
        "sections": [
            (305_260, "25f64f50080b1237d8d70e36d9ae43ca00855bbb7d5dcac6118c3cb75eeb7b2f"),
            (32_768, "d5ad4a9d91976783859c221697e3e0488675d095f676fe3fedac339caa4c193a"),
        ],
    }
    for layout, splits in expected.items():
        *ids, _ = data.encode_splits(text, encoder, layout)
        found = [(len(part), hashlib.sha256(np.asarray(part, "<u2").tobytes()).hexdigest()) for part in ids]
        assert found == splits
        start = hashlib.sha256(np.asarray(ids[1][:257], "<u2").tobytes()).hexdigest()
    assert start == "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"


def test_the_pinned_tinyshakespeare_is_the_one_here():
    content = need(DATA / "tinyshakespeare.txt").read_bytes()
    assert data.TINYSHAKESPEARE[1:] == (len(content), hashlib.sha256(content).hexdigest())


def test_tinyshakespeare_is_downloaded_once(tmp_path, monkeypatch):
    fetched = []

    def fake(url, path, size, sha256, remedy):
        fetched.append((url, size, sha256))
        write(tmp_path / "data" / "tinyshakespeare.txt", b"First Citizen:")

    published = ("http://127.0.0.1:9/input.txt", 14, hashlib.sha256(b"First Citizen:").hexdigest())
    monkeypatch.setattr(data, "TINYSHAKESPEARE", published)
    monkeypatch.setattr(data, "download_file", fake)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert data.read_dataset("tinyshakespeare", str(tmp_path / "data")) == "First Citizen:"
    assert fetched == [published]
    write(tmp_path / "data" / "tinyshakespeare.txt", b"First Citizen!")
    with pytest.raises(UserError, match=r"tinyshakespeare\.txt was altered \(14 bytes and .* remove it"):
        data.read_dataset("tinyshakespeare", str(tmp_path / "data"))


def test_without_a_network_a_copy_of_tinyshakespeare_will_do(run, tmp_path, monkeypatch):
    from weights import download

    monkeypatch.setattr(download, "BACK_OFF", 0)
    monkeypatch.setattr(data, "TINYSHAKESPEARE", ("http://127.0.0.1:9/input.txt", *data.TINYSHAKESPEARE[1:]))
    options = f"--data_dir {tmp_path / 'data'}"
    mistake(run(options, dataset="tinyshakespeare"), "cannot fetch http://127.0.0.1:9", "give the path of a copy")


@pytest.mark.parametrize("vocab_size", [256, 257, 400])
@pytest.mark.parametrize("end_of_text", [False, True])
def test_vocabularies_have_their_size_and_encode_everything(text_file, vocab_size, end_of_text):
    if vocab_size == 256 and end_of_text:
        with pytest.raises(UserError, match="257"):
            data.train_encoder("text", vocab_size, end_of_text)
        return
    text = text_file.read_text(encoding="utf-8")
    encoder = data.train_encoder(text, vocab_size, end_of_text)
    assert sorted(encoder.encoder.values()) == list(range(vocab_size))
    assert len(encoder.ranks) == vocab_size - 256 - end_of_text
    assert (encoder.encoder.get(END_OF_TEXT) == vocab_size - 1) == end_of_text
    for sample in (text, "é 你好 \x00\r\n"):
        assert encoder.decode(encoder.encode(sample)) == sample


def test_a_learned_vocabulary_encodes_as_hugging_faces_own(text_file):
    from tokenizers import ByteLevelBPETokenizer

    text = text_file.read_text(encoding="utf-8")
    encoder = data.train_encoder(text, 400, False)
    theirs = ByteLevelBPETokenizer(encoder.encoder, [tuple(merge.split(" ")) for merge in encoder.ranks])
    assert encoder.encode(text) == theirs.encode(text).ids


def test_sections_begin_with_end_of_text(text_file):
    text = text_file.read_text(encoding="utf-8")
    encoder = data.train_encoder(text, 300, True)
    train_ids, val_ids, val_chars = data.encode_splits(text, encoder, "sections")
    ids = val_ids + train_ids
    end = encoder.encoder[END_OF_TEXT]
    assert ids[0] == end and ids.count(end) == text.count("\n\n") + 1
    assert encoder.decode(i for i in ids if i != end) == text
    assert val_chars == len(encoder.decode(i for i in val_ids if i != end))


def test_windows():
    tokens = np.arange(100, dtype=np.uint16)
    inputs, targets = data.random_windows(tokens, np.random.default_rng(0), 5000, 10)
    assert inputs.shape == targets.shape == (5000, 10)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert (inputs.min(), targets.max()) == (0, 99)
    inputs, targets = data.even_windows(tokens, 1000, 10)
    assert set(np.diff(inputs[:, 0])) <= {11, 12}
    assert (inputs[0, 0], targets[-1, -1]) == (0, 99) and len(inputs) == 9
    inputs, targets = data.even_windows(np.arange(11), 1000, 10)
    np.testing.assert_array_equal(targets, np.arange(1, 11)[None])


def test_bytes_and_gpt2s_own_tokenizer(run, tmp_path, monkeypatch):
    assert run("--max_iters 1 --tokenizer bytes", small=SMALL.replace("--vocab_size 300", ""))[0] == 0
    assert load_encoder_hparams_and_params("new", str(tmp_path / "models"))[1]["n_vocab"] == 256
    shutil.copytree(need(DATA / "gpt2"), tmp_path / "models" / "124M")
    assert run("--max_iters 1 --tokenizer gpt2", name="wide", small=SMALL.replace("--vocab_size 300", ""))[0] == 0
    encoder, hparams, _ = load_encoder_hparams_and_params("wide", str(tmp_path / "models"))
    assert hparams["n_vocab"] == 50257 and encoder.encode("zjqfl") == [89, 73, 80, 2704]
