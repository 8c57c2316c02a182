"""train.py: the optimizer against PyTorch, the files of a run, resuming, and the mistakes a person can make."""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock

import gpt2
import train
from cli import train as train_cli
from encoder import END_OF_TEXT, get_encoder
from tests import gradients, programs
from tests.conftest import PROMPTS, ROOT, assert_transformers_agree, contents, need, one_line_error, set_free_space
from tests.programs import assert_mistake
from tests.random_model import DATA
from training import chunks, dataset, fused, kernels, trainer
from training import options as options_module
from training.adamw import AdamW, adamw, global_norm, learning_rate_at
from training.checkpoint import STATE, State
from training.initialization import gpt2_deviation, initial_tensors
from training.loss import lm_loss, loss_and_gradients
from training.memory import check_training_memory
from training.options import PRESETS, Options
from training.plan import STALE, Plan, new_optimizer
from training.report import read_log
from training.trainer import functions_of
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.names import count_params, flatten, nest, tensor_shapes
from weights.safetensors_file import load_safetensors, save_params, save_safetensors

NO_VOCABULARY = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --warmup_iters 2 --eval_iters 2"
SMALL = f"{NO_VOCABULARY} --vocab_size 300"
WEIGHTS = ("model.safetensors", STATE)
TWO_LAYERS = gradients.HPARAMS | {"n_layer": 2}
LINES = np.random.default_rng(0).integers(0, 10, 220)
TEXT = "".join(PROMPTS[i] + (".\n" if i % 3 else ".\n\n") for i in LINES)  # 9 kB, in sections of a few lines


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """Where `run` writes a model, unless it gets another name."""
    return tmp_path / "models" / "new"


@pytest.fixture
def run(folder, text_file, capsys):
    """Train a small model; returns (exit code, standard output, standard error)."""

    def run(options="", name="new", small=SMALL, dataset=text_file, models_dir=folder.parent):
        given = ["--name", name, "--models_dir", str(models_dir), *small.split(), *options.split()]
        code = train_cli.run(given + (["--dataset", str(dataset)] if dataset else []))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def resume(run):
    return lambda options="", name="new": run(f"--resume {options}", name, small="", dataset=None)


@pytest.fixture(scope="module")
def trained_dir(text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    options = f"--name new --models_dir {path} --dataset {text_file} --max_iters 2 {SMALL}"
    assert train_cli.run(options.split()) == 0
    return path / "new"


@pytest.fixture
def trained(trained_dir, folder):
    """A copy of a folder after two steps, where `run` trains."""
    return shutil.copytree(trained_dir, folder)


@pytest.fixture
def tiny_folder(tiny_models_dir, folder):
    """A copy of the tiny pretrained model, where `run` finds it."""
    return shutil.copytree(tiny_models_dir / "tiny", folder.parent / "tiny")


def state_of(folder):
    return json.loads(load_safetensors(str(folder / STATE))[1]["state"])


def rewrite(folder, part, change):
    """Replace the JSON of a part of training.safetensors, "options" or "state", by change(its dict)."""
    tensors, metadata = load_safetensors(str(folder / STATE))
    metadata[part] = change(json.loads(metadata[part]))
    save_safetensors(str(folder / STATE), tensors, metadata)


def mistake(result, *words):
    """Assert that this is a mistake after what was reported before."""
    code, out, err = result
    assert err.count("train.py: error: ") == 1
    assert_mistake((code, out, err.splitlines()[-1] + "\n"), *words, script="train.py")


def write(path, content):
    path.write_bytes(content)
    return path


def new_tensors(hparams, seed=0):
    return initial_tensors(tensor_shapes(**hparams), seed, gpt2_deviation(hparams["n_layer"]))


# The optimizer


def test_ten_steps_of_adamw_are_pytorchs():
    """The loss of each step is within 1e-4 of torch.optim.AdamW's from the same start, with clipping."""
    tensors, (inputs, targets) = new_tensors(TWO_LAYERS), gradients.batch(TWO_LAYERS, (2, 32))
    model, by_name = gradients.torch_model(TWO_LAYERS, tensors)
    matrices, others = ([p for p in by_name.values() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), eps=1e-8)
    ours = AdamW(tensors, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    trained_model = fused.training_model()
    for _ in range(10):
        theirs.zero_grad()
        expected = gradients.torch_loss(model, inputs, targets)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        theirs.step()
        loss, found = loss_and_gradients(tensors, TWO_LAYERS, inputs, targets, trained_model)
        norm = global_norm(found)
        ours.update(found, 3e-3, min(1, 0.5 / norm))
        assert abs(loss - expected.item()) < 1e-4
        np.testing.assert_allclose(norm, expected_norm, rtol=1e-4 if ours.step == 1 else 1e-2)
    assert loss < 4.7, "the loss must have moved for this to mean anything"


@pytest.mark.parametrize("function", [adamw, kernels.adamw])
def test_an_update_is_in_place_and_in_chunks(monkeypatch, function):
    monkeypatch.setattr(chunks, "CHUNK_SIZE", 999)
    optimizer = AdamW({"w": np.ones((300, 500), np.float32)}, weight_decay=0.0)
    optimizer.adamw = function
    optimizer.update({"w": np.full((300, 500), 2, np.float32, order="F")}, 0.5)
    for arrays, expected in ((optimizer.tensors, 0.5), (optimizer.m, 0.1 * 2), (optimizer.v, 0.001 * 2**2)):
        np.testing.assert_allclose(arrays["w"], expected, rtol=1e-5)
        assert arrays["w"].dtype == np.float32
    with pytest.raises(ValueError, match=r"w; pass np\.ascontiguousarray"):
        AdamW({"w": np.ones((2, 3), np.float32).T})


def test_the_compiled_update_has_the_same_bits():
    arrays = np.random.default_rng(0).random((4, 1003), dtype=np.float32)  # w, gradient, m and v
    results = [arrays.copy(), arrays.copy()]
    for function, found in zip((adamw, kernels.adamw), results, strict=True):
        function(*found, 0.9, 0.99, 1e-8, 0.7, 0.999, 1e-3, 0.5)
    np.testing.assert_array_equal(*results)
    assert np.all(results[0][[0, 2, 3]] != arrays[[0, 2, 3]])


@pytest.mark.parametrize("engine", ["auto", "numpy", "compiled"])
def test_the_engine_of_training_without_numba(engine, monkeypatch):
    missing = mock.Mock(side_effect=UserError("the compiled engine needs numba; pip install numba"))
    monkeypatch.setattr("training.trainer.import_kernels", missing)
    if engine == "compiled":
        with pytest.raises(UserError, match="needs numba"):
            functions_of(engine)
    else:
        assert functions_of(engine) == (fused.training_model, adamw)


def test_learning_rate():
    rates = [learning_rate_at(step, 1.0, 0.1, 10, 110) for step in range(130)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose([rates[10], rates[60], rates[110], rates[129]], [1, 0.55, 0.1, 0.1])
    assert np.all(np.diff(rates[10:]) <= 0)
    assert learning_rate_at(0, 1.0, 0.1, 0, 10) == 1
    options = Options(name="new", dataset="text", **PRESETS["3min"])
    assert options.schedule == (4e-3, 2e-4, 100, 1000)


# Initial values and learning


def test_initialization_is_gpt2s_and_the_first_loss_that_of_equal_probabilities():
    hparams = {"n_vocab": 500, "n_ctx": 200, "n_embd": 120, "n_head": 4, "n_layer": 8}
    tensors = new_tensors(hparams)
    assert {name: t.shape for name, t in tensors.items()} == tensor_shapes(**hparams)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    expected = {"wte": 0.02, "wpe": 0.01, "h3/attn/c_attn/w": 0.02, "h3/mlp/c_fc/w": 0.02}
    expected |= {"h3/attn/c_proj/w": 0.02 / 4, "h7/mlp/c_proj/w": 0.02 / 4}
    for name, deviation in expected.items():
        np.testing.assert_allclose(np.std(tensors[name]), deviation, rtol=0.05, err_msg=name)
    assert np.all(tensors["ln_f/g"] == 1) and np.all(tensors["h0/mlp/c_fc/b"] == 0)
    assert np.any(new_tensors(hparams, seed=1)["wte"] != tensors["wte"])
    loss = lm_loss(nest(tensors, hparams["n_layer"]), *gradients.batch(hparams), hparams["n_head"])
    assert abs(loss - np.log(500)) < 0.1


# The files of a run


def test_a_run_learns_its_text_and_has_a_log_a_plot_and_samples(run, folder):
    path = write(folder.parent.parent / "text.txt", b"one two three four five six seven\n" * 200)
    code, out, err = run("--max_iters 80 --eval_interval 40 --learning_rate 1e-2 --dropout 0", dataset=path)
    assert code == 0 and re.fullmatch(f"{folder}: validation loss .* at step 80 of 80; .*\n", out)
    assert err.count("    | ") >= 3 and err.count("validation loss") == 3
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40, 40, 50, 60, 70, 80, 80]
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds"} <= lines[4].keys()
    assert {"train_loss", "val_loss", "val_nats_per_char"} <= lines[5].keys()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    encoder, hparams, params = load_encoder_hparams_and_params("new", str(folder.parent))
    ids = gpt2.generate(encoder.encode("one two three"), params, hparams["n_head"], 4)
    assert encoder.decode(ids).startswith(" four five")


def test_gpt2_and_transformers_load_the_result(trained):
    files = "hparams.json config.json vocab.json merges.txt train.bin val.bin log.jsonl loss.png"
    assert contents(trained).keys() == {*files.split(), *WEIGHTS}
    assert_transformers_agree(trained, "def softmax(x):")


def test_the_saved_model_has_the_lowest_validation_loss(run, resume, folder):
    run("--max_iters 10 --eval_interval 5 --dropout 0")
    resume("--max_iters 14 --learning_rate 0.5 --min_lr 0.5")  # makes it worse
    losses = [(line["val_loss"], line["step"]) for line in read_log(folder) if "val_loss" in line]
    assert losses[-1] > min(losses)
    _, hparams, params = load_encoder_hparams_and_params("new", str(folder.parent))
    inputs, targets = dataset.even_windows(np.fromfile(folder / "val.bin", "<u2"), 8, 16)
    np.testing.assert_allclose(lm_loss(params, inputs, targets, hparams["n_head"]), min(losses)[0], rtol=1e-5)
    assert state_of(folder)["best_step"] == min(losses)[1]


def test_without_matplotlib_there_is_no_plot(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--max_iters 1")[0] == 0
    assert not (folder / "loss.png").exists()


# Gradients of a step


def new_trainer(**options):
    """A NumpyTrainer of a small model, without a folder."""
    ids = np.random.default_rng(0).integers(0, TWO_LAYERS["n_vocab"], 999, dtype=np.uint16)
    chosen = PRESETS["3min"] | {"block_size": 16, "batch_size": 4, "threads": 1, "dropout": 0.0} | options
    options, tensors = Options(name="new", dataset="random", **chosen), new_tensors(TWO_LAYERS)
    state = State(tokens={"train": len(ids)}, val_chars_per_token=1.0)
    return trainer.NumpyTrainer(
        Plan("", options, state, None, TWO_LAYERS, new_optimizer(tensors, options), {"train": ids})
    )


def test_dropout_acts_in_training_and_not_in_evaluation_and_the_largest_is_finite():
    evaluated, losses = set(), set()
    for p in (0.0, 0.5, 0.9999999):
        with new_trainer(dropout=p).running() as of:
            loss, found, _ = of.compute_gradients()
            losses.add(loss)
            evaluated.add(of.estimate_loss("train"))
        assert all(np.all(np.isfinite(gradient)) for gradient in found.values())
    assert len(losses) == 3 and len(evaluated) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_of_accumulated_batches_and_shards_are_those_of_all_windows_at_once(threads, monkeypatch):
    """3 batches of 4, in shards of 4, 2 + 2 or 2 + 1 + 1, against the 12 windows in one batch."""
    monkeypatch.setattr(options_module, "SHARD_TOKENS", 1)
    of = new_trainer(gradient_accumulation_steps=3, threads=threads)
    of.state.step = 7
    assert of.n_shards == threads
    with of.running():
        loss, found, norm = of.compute_gradients()
    data = of.plan.data["train"]
    batches = [dataset.random_windows(data, np.random.default_rng([1337, 7, i]), 4, 16) for i in range(3)]
    inputs, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected_loss, expected = gradients.torch_gradients(TWO_LAYERS, of.tensors, inputs, targets)
    np.testing.assert_allclose([loss, norm], [expected_loss, global_norm(expected)], rtol=1e-5)
    for name in found:
        assert gradients.relative_error(found[name], expected[name]) < 1e-4, name


def test_every_step_batch_and_shard_has_random_numbers_of_its_own(monkeypatch):
    monkeypatch.setattr(options_module, "SHARD_TOKENS", 1)
    of = new_trainer(gradient_accumulation_steps=2, threads=2, dropout=0.5)
    windows, masks, sample, mask = [], [], dataset.random_windows, fused.Dropout.mask
    monkeypatch.setattr(trainer, "random_windows", lambda *args: windows.append(sample(*args)) or windows[-1])
    monkeypatch.setattr(fused.Dropout, "mask", lambda self, shape: masks.append(mask(self, shape)) or masks[-1])
    with of.running():
        for of.state.step in (0, 1):
            of.compute_gradients()
    assert len({inputs.tobytes() for inputs, _ in windows}) == 2 * 2
    assert len({m.tobytes() for m in masks}) == len(masks) == 2 * 2 * 2 * (1 + 3 * TWO_LAYERS["n_layer"])


def test_small_batches_are_split_into_fewer_shards():
    n_shards = [new_trainer(threads=3, block_size=128, batch_size=n).n_shards for n in (1, 3, 4, 5, 6, 64)]
    assert n_shards == [1, 1, 2, 2, 3, 3]


# Resuming


def at_step(step, act):
    """A context in which act() is called before this step of training."""

    def train_step(of, original=train.train_step):
        if of.state.step == step:
            act()
        return original(of)

    return mock.patch.object(train, "train_step", train_step)


def test_a_killed_and_resumed_run_is_the_whole_run_bit_for_bit(run, resume, folder, monkeypatch):
    """Parameters, moments and the log; with dropout, accumulation, shards, clipping and another number of steps."""
    monkeypatch.setattr(options_module, "SHARD_TOKENS", 1)
    options = "--eval_interval 4 --dropout 0.2 --gradient_accumulation_steps 2 --grad_clip 0.5 --lr_decay_iters 11"
    run(f"--max_iters 11 --threads 2 {options}", name="whole")
    whole, parts = folder.parent / "whole", folder.parent / "parts"
    with at_step(7, mock.Mock(side_effect=SystemExit)), pytest.raises(SystemExit):  # the last save was at step 4
        run(f"--max_iters 9 --threads 2 {options}", name="parts")
    with open(parts / "log.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 6, "loss": 1.0}\n[1]\n{"a": 1}\n\ufffe{"step": 8, "lo')
    code, _, err = resume("--max_iters 11", name="parts")
    assert code == 0 and "resuming from step 4 of 11" in err
    both = (parts, whole)
    for name in WEIGHTS:
        np.testing.assert_equal(*(load_safetensors(str(path / name))[0] for path in both))
    logs = [[(line["step"], line.get("loss"), line.get("val_loss")) for line in read_log(path)] for path in both]
    assert logs[0] == logs[1] and [step for step, *_ in logs[0]] == [0, 4, 8, 10, 11]


def test_a_run_saved_by_another_version_resumes(trained, resume):
    """It has options that are not known, lacks two, and has a second copy of the vocabulary under OpenAI's names."""
    write(trained / STATE, (trained / STATE).read_bytes().replace(b"threads", b"devices").replace(b"seed", b"root"))
    shutil.copy(trained / "vocab.json", trained / "encoder.json")
    shutil.copy(trained / "merges.txt", trained / "vocab.bpe")
    assert resume("--max_iters 3")[0] == 0
    assert state_of(trained)["step"] == 3


def test_resuming_a_finished_run_changes_nothing(trained, trained_dir, resume):
    for _ in range(2):
        assert resume()[0] == 0
        for name in WEIGHTS:
            np.testing.assert_equal(*(load_safetensors(str(path / name))[0] for path in (trained, trained_dir)))
        (trained / "model.safetensors").unlink()  # the best model is written again


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_says_how_to_resume_and_twice_stops_at_once(run, resume, folder, times):
    with at_step(3, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(times)]):
        code, out, err = run("--max_iters 1000 --eval_interval 1000")
    assert (code, out) == (130, "") and "press Ctrl-C again" in err
    assert state_of(folder)["step"] == state_of(folder)["saved_step"] == (4 if times == 1 else 0)
    remedy = f"resume with: python train.py --name new --models_dir {folder.parent} --resume"
    assert (f"stopped at step 4 of 1000 and saved; {remedy}" in err) == (times == 1)
    assert resume("--max_iters 5")[0] == 0


def test_a_stopped_run_ends_like_an_interrupted_one(folder, text_file):
    """exit_code() then ignores another Ctrl-C while Python exits."""
    options = vars(train_cli.make_parser().parse_args(["--name", "new", "--models_dir", str(folder.parent)]))
    options |= {"dataset": str(text_file), "n_embd": 16, "block_size": 16, "vocab_size": 300, "eval_iters": 1}
    with at_step(3, lambda: signal.raise_signal(signal.SIGINT)):
        assert train_cli.run_training(options) == 130
    assert state_of(folder)["saved_step"] == 4


def test_on_a_full_disk_the_previous_state_survives(trained, resume):
    """A limit on the size of files stands for the full disk; model.safetensors, of 49 kB, still fits."""
    before, (_, hard) = (trained / STATE).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        result = resume("--max_iters 4 --learning_rate 1e-3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    mistake(result, "cannot write", STATE, "make room")
    assert (trained / STATE).read_bytes() == before and not list(trained.glob("*.tmp"))
    assert resume("--max_iters 4")[0] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    ["1e12 --grad_clip 0 --warmup_iters 20 --eval_interval 5", "1e300", "1e9 --weight_decay 0 --grad_clip 0"],
)
def test_a_diverged_run_stops_and_keeps_what_was_finite(run, resume, folder, options):
    result = run(f"--max_iters 50 --learning_rate {options}")
    mistake(result, "training diverged: the ", "keeps step", "--resume --learning_rate 3e+")
    assert re.search(r"the [\w/ ]+ is -?(nan|inf) at step \d+\. .* keeps step \d+;", result[2].splitlines()[-1])
    assert all(np.all(np.isfinite(tensor)) for tensor in load_safetensors(str(folder / STATE))[0].values())
    assert resume("--learning_rate 1e-3 --max_iters 7")[0] == 0


def test_a_new_model_that_is_not_finite_is_not_called_damaged():
    with one_line_error("the loss is nan before the first step", "choose a smaller one"):
        new_trainer().check_finite({"loss": math.nan})


# Fine-tuning


def test_fine_tuning_lowers_the_loss_of_a_pretrained_model(run, tiny_folder, tiny, folder):
    before = contents(tiny_folder)
    assert run("--init_from tiny --max_iters 20 --eval_interval 10 --learning_rate 1e-3", small="")[0] == 0
    losses = [line["val_loss"] for line in read_log(folder) if "val_loss" in line]
    assert losses[0] > losses[1] > losses[2]
    encoder, hparams, params = tiny
    n_ctx = hparams["n_ctx"]  # less than the preset's block_size
    inputs, targets = dataset.even_windows(np.array(encoder.encode(dataset.split_text(TEXT)["val"])), 80, n_ctx)
    np.testing.assert_allclose(lm_loss(params, inputs, targets, hparams["n_head"]), losses[0], rtol=1e-4)
    tuned = load_encoder_hparams_and_params("new", str(folder.parent))
    assert tuned[1] == hparams and tuned[0].encoder == encoder.encoder and tuned[0].ranks == encoder.ranks
    assert contents(tiny_folder) == before


def test_models_that_cannot_be_fine_tuned(run, tiny_folder, tiny, monkeypatch):
    mistake(run("--init_from tiny --block_size 129", small=""), "--block_size 129", "context of 128")
    _, hparams, params = tiny
    save_params(str(tiny_folder), params | {"wpe": np.full_like(params["wpe"], np.nan)}, hparams)
    result = run("--init_from tiny", small="")
    mistake(result, "before the first step", "weights of tiny are damaged")
    assert "--resume" not in result[2]
    monkeypatch.delenv("GPT2_BASE_URL")
    mistake(run("--init_from nothing", small=""), "unknown model size 'nothing'")
    assert not (tiny_folder.parent / "new").exists()


LLM_C = "5.270007 4.059707 3.375123 2.800783 2.315382 1.849029 1.394656 0.999147 0.624080 0.376511"
LLM_CU = "5.270009 4.060681 3.320085 2.717550 2.181066 1.653923 1.168050 0.736873 0.401021 0.187493"


@pytest.mark.real_weights
@pytest.mark.parametrize(
    ("beta2", "weight_decay", "clip", "expected"), [(0.999, 0.01, np.inf, LLM_C), (0.95, 0.0, 1.0, LLM_CU)]
)
def test_ten_steps_from_openais_weights_are_llm_cs(beta2, weight_decay, clip, expected):
    """llm.c's test_gpt2.c and test_gpt2.cu: 257 tokens of its tinyshakespeare validation set, as 4 x 64."""
    need(ROOT / "models" / "124M" / "model.safetensors")
    text = need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params("124M", str(ROOT / "models"))
    ids = np.array(dataset.encode_splits(text, encoder, "sections")[1][:257])
    inputs, targets = ids[:-1].reshape(4, 64), ids[1:].reshape(4, 64)
    tensors = {name: np.array(tensor) for name, tensor in flatten(params, hparams).items()}
    optimizer = AdamW(tensors, beta2=beta2, weight_decay=weight_decay, decays=lambda p: True)
    model = fused.training_model()
    for loss in map(float, expected.split()):
        found_loss, found = loss_and_gradients(tensors, hparams, inputs, targets, model)
        assert abs(found_loss - loss) < 1e-2
        optimizer.update(found, 1e-4, min(1, clip / global_norm(found)))


# Mistakes


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, "", ["no data file", "give the path"]),
        (b"\xef\xbb\xbf", "", ["data.txt is empty"]),
        (b"too short a text\n", "", ["--block_size 16", "longer text"]),
        (b"x", "", ["0 tokens", "longer text"]),
        (b"\xef\xbb\xbfabc\xfe", "", ["not UTF-8", "0xfe at position 3"]),
        (b"a line\r\n\r\nanother line\r\n" * 40, "--layout sections", ["no blank line", "--layout plain"]),
    ],
)
def test_a_data_file_that_cannot_be_trained_on(run, tmp_path, folder, content, options, words):
    path = write(tmp_path / "data.txt", content) if content else tmp_path
    mistake(run(options, dataset=path), *words)
    assert not folder.exists()


def test_without_a_dataset_a_remedy_is_named(run):
    mistake(run(dataset=None), "--dataset is missing", "give the path")


def test_the_advised_block_size_works(run, tmp_path):
    path = write(tmp_path / "short.txt", b"to be or not to be, that is " * 5)
    advised = run(dataset=path)[2].rpartition("--block_size ")[2].strip()
    assert run(f"--max_iters 1 --block_size {advised}", dataset=path)[0] == 0


def test_paths_may_begin_with_a_tilde_and_control_characters_in_samples_are_replaced(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.txt", b"\x1b[2Jx\r\n" * 400)
    code, _, err = run("--max_iters 2", dataset="~/mine.txt", models_dir="~/m")
    assert code == 0 and (tmp_path / "m" / "new" / "model.safetensors").exists()
    assert "    | " in err and not {"\x1b", "\r"} & set(err)


def test_a_model_is_replaced_only_when_asked_and_when_nothing_can_fail(run, trained, tmp_path, monkeypatch):
    for name in ("encoder.json", "vocab.bpe", "tokenizer.json"):  # of a model made elsewhere
        write(trained / name, b"{}")
    before = contents(trained)
    mistake(run(), "new exists", "--resume", "--overwrite")
    mistake(run("--overwrite", dataset=write(tmp_path / "short.txt", b"short")), "longer text")
    needed = 7 * 4 * count_params(300, 16, 16, 2, 2)
    freed = sum(len(before[name]) for name in set(STALE) & set(before))
    set_free_space(monkeypatch, needed - freed - 1)
    mistake(run("--overwrite"), "make room")
    set_free_space(monkeypatch, needed - freed)
    with mock.patch.object(trainer, "loss_and_gradients", side_effect=MemoryError("Unable to allocate 3 GiB")):
        mistake(run("--overwrite"), "not enough memory", "batch")
    assert contents(trained) == before
    assert run("--max_iters 3 --overwrite --n_layer 1")[0] == 0
    assert len(read_log(trained)) == 2
    assert not {"encoder.json", "vocab.bpe", "tokenizer.json"} & contents(trained).keys()


def test_resuming_with_other_options_or_what_was_never_trained(trained, resume, tiny_folder):
    mistake(resume(name="missing"), "no training to resume", "check --name")
    mistake(resume(name="tiny"), "to resume from", "--init_from tiny")
    for option in ("--n_layer 3", "--n_embd 32", "--n_head 4", "--block_size 8", "--vocab_size 400", "--seed 1"):
        mistake(resume(option), option, "leave it out")
    mistake(resume("--preset 1h"), "--preset is for new models")
    mistake(resume("--max_iters 1"), "is at step 2", "--max_iters")
    with FileLock(trained.parent / ".new.lock"):
        mistake(resume(), "another process")
    assert resume("--n_layer 2 --dropout 0.3 --max_iters 3")[0] == 0


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (STATE, lambda content: content[:-100]),
        (STATE, lambda content: content.replace(b'"options"', b'"another"')),
        ("hparams.json", lambda content: content.replace(b'"n_layer": 2', b'"n_layer": 1')),
        ("train.bin", lambda content: b""),
        ("train.bin", lambda content: content[:20]),
        ("val.bin", lambda content: content[:-1]),
        ("val.bin", lambda content: b"\xff" * len(content)),
        ("val.bin", None),
        ("hparams.json", lambda content: content.replace(b'"n_layer": 2', b'"n_layer": 2147483647')),
        ("hparams.json", lambda content: content.replace(b'"n_head": 2', b'"n_head": 4')),
        ("hparams.json", lambda content: content.replace(b'"n_ctx": 16', b'"n_ctx": 8')),
    ],
)
def test_resuming_from_damaged_files(trained, resume, name, damage):
    content = (trained / name).read_bytes()
    (trained / name).unlink()
    if damage:
        write(trained / name, damage(content))
    mistake(resume(), STATE if name == "hparams.json" else name, "is corrupt")


WRONG_OPTIONS = [("seed", -1), ("seed", "1"), ("seed", 1.5), ("max_iters", True), ("max_iters", None), ("n_layer", [2])]
WRONG_OPTIONS += [(name, 0) for name in ("batch_size", "block_size", "eval_interval", "eval_iters", "threads")]
WRONG_OPTIONS += [("learning_rate", x) for x in (math.nan, math.inf, 0, -1.0, "1e-3", 10**400)]
WRONG_OPTIONS += [
    ("dropout", 1),
    ("beta2", 1.0),
    ("min_lr", -1),
    ("dataset", 7),
    ("name", None),
    ("max_iters", 10**200),
]
WRONG_STATE = [("step", -1), ("step", 0.5), ("best_loss", math.nan), ("best_loss", "low"), ("seconds", -1)]
WRONG_STATE += [("tokens", [1, 2]), ("tokens", {"train": "9", "val": 9}), ("tokens", {"train": 9}), ("best_step", 3)]
WRONG_STATE += [("val_chars_per_token", 0)]


@pytest.mark.parametrize(("part", "wrong"), [("options", WRONG_OPTIONS), ("state", WRONG_STATE)])
def test_resuming_from_wrong_metadata(trained, resume, part, wrong):
    good = (trained / STATE).read_bytes()
    for name, value in wrong:
        rewrite(trained, part, lambda fields, wrong=(name, value): json.dumps(fields | dict([wrong])))
        mistake(resume(), STATE, "is corrupt", "tokens" if name == "tokens" else "steps" if value == 3 else name)
        write(trained / STATE, good)
    for text in ("[1]", "null", '"a"', "", "[" * 100_000):
        rewrite(trained, part, lambda fields, text=text: text)
        mistake(resume(), STATE, "is corrupt")
        write(trained / STATE, good)
    required = "max_iters" if part == "options" else "step"
    rewrite(trained, part, lambda fields: json.dumps({name: fields[name] for name in fields if name != required}))
    mistake(resume(), STATE, "is corrupt", f"no {required}")


def test_resuming_with_parameters_that_are_not_finite_or_data_shorter_than_a_window(trained, resume):
    good = (trained / STATE).read_bytes()
    write(trained / STATE, good[:-4] + b"\xff\xff\xff\xff")
    mistake(resume(), STATE, "infinite or NaN")
    write(trained / STATE, good)
    rewrite(trained, "state", lambda state: json.dumps(state | {"tokens": {"train": 0, "val": 0}}))
    mistake(resume(), "0 tokens for training", "--block_size 16")


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", None])
def test_a_damaged_best_model_is_evaluated_and_written_again_at_once(trained, resume, damage):
    path = trained / "model.safetensors"
    before, content = contents(trained), path.read_bytes()
    path.unlink()
    if damage:
        write(path, damage(content))
    with at_step(3, mock.Mock(side_effect=SystemExit)), pytest.raises(SystemExit):
        resume("--max_iters 1000 --eval_interval 1000")
    assert path.read_bytes() == content and state_of(trained)["best_step"] == 2
    code, _, err = resume("--max_iters 2")
    assert code == 0 and err.count("written again") == 1  # by the run that was killed
    for name in ("config.json", "vocab.json", "train.bin"):
        assert (trained / name).read_bytes() == before[name]


@pytest.mark.parametrize("content", [None, b"{}", b"{", b'{"model_type": "bert"}'])
def test_a_damaged_config_is_written_again_and_the_best_model_kept(trained, resume, content):
    path, weights = trained / "config.json", (trained / "model.safetensors").read_bytes()
    good = path.read_bytes()
    path.unlink()
    if content:
        write(path, content)
    rewrite(trained, "state", lambda state: json.dumps(state | {"best_loss": 0.5, "best_step": 1}))
    code, out, err = resume("--max_iters 3")
    assert code == 0 and "config.json" in err and "at step 1 of 3" in out
    assert path.read_bytes() == good and (trained / "model.safetensors").read_bytes() == weights
    write(path, good.replace(b'"n_head": 2', b'"n_head": 4'))
    mistake(resume(), "config.json and hparams.json differ")


def test_a_vocabulary_of_another_model_is_noticed(trained, resume):
    """It is consistent, but has a merge and its token less."""
    merges = (trained / "merges.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = json.loads((trained / "vocab.json").read_text(encoding="utf-8"))
    del vocabulary[merges[-1].replace(" ", "")]
    write(trained / "vocab.bpe", "\n".join(merges[:-1]).encode())
    write(trained / "encoder.json", json.dumps(vocabulary).encode())
    mistake(resume(), "has 299 tokens", "has 300", "put the right vocabulary there")


def test_lines_of_the_log_that_are_not_its_own_are_dropped(trained, resume):
    wrong = ['{"step": "x", "loss": 1}', '{"step": 1, "loss": null}', '{"step": 1.5}', '{"step": 1, "loss": [1]}']
    wrong += ['{"step": 1, "loss": NaN}', f'{{"step": 1, "loss": {10**400}}}', "[" * 100_000, "1", '{"step": 1, "lo']
    log = trained / "log.jsonl"
    before = read_log(trained)
    write(log, "\n".join([*wrong, *log.read_text(encoding="utf-8").splitlines(), *wrong]).encode() + b"\xff\n")
    assert resume()[0] == 0
    assert read_log(trained) == before and len(log.read_text(encoding="utf-8").splitlines()) == len(before)


def test_the_picture_is_drawn_again_and_leftovers_of_a_killed_run_are_removed(trained, resume):
    (trained / "loss.png").unlink()
    write(trained / ".0123456789abcdef.tmp", b"half")
    assert resume()[0] == 0
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(trained.glob(".*"))


def test_a_fifo_in_place_of_a_file_is_an_error(trained):
    """In a process of its own, since reading a FIFO would wait for ever."""
    for name in ("log.jsonl", STATE, "hparams.json", "train.bin"):
        (trained / name).rename(trained / "kept")
        os.mkfifo(trained / name)
        options = ("--name", "new", "--models_dir", trained.parent, "--resume")
        code, out, err = programs.run(*options, script="train.py")
        mistake((code, out, err.decode()), name, "is corrupt")
        (trained / "kept").rename(trained / name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--n_embd 18 --n_head 4", ["--n_embd 18", "--n_head 4", "--n_embd 16 is"]),
        ("--resume --overwrite", ["--resume", "--overwrite"]),
        ("stray", ["unrecognized arguments: stray (a text goes after --dataset"]),
        ("--vocab_size 255", ["--vocab_size 255", "256"]),
        ("--vocab_size 256 --layout sections", ["--vocab_size 256", "257"]),
        ("--vocab_size 65537", ["65537", "65536"]),
        ("--preset finetune", ["--preset finetune", "--init_from"]),
        *((f"--{option}", option.split()) for option in ("dropout 1", "learning_rate 0", "preset 2min")),
        ("--tokenizer bytes", ["--vocab_size", "bytes"]),
        ("--init_from nothing-there", ["--n_layer", "nothing-there"]),
        *((f"--name={name}", ["--name"]) for name in ("124M", "a/b", "..", "", "a%b")),
        ("--batch_size 99999999", ["needs about", "lower --batch_size"]),
        ("--batch_size 1 --n_layer 1000000000", ["needs", "make room"]),
        ("--block_size 1000000000", ["--block_size 1000000000"]),
        (f"--n_embd {2 * 10**99} --n_layer {10**99}", ["needs", "make room"]),
        ("--threads 1000000000", ["--threads", "the maximum is 1024"]),
    ],
)
def test_options_that_make_no_sense(run, folder, options, words):
    mistake(run(options), *words)
    assert not folder.parent.exists()


def test_options_that_only_take_long_are_accepted(run):
    """Each is far more than one training needs."""
    options = f"--eval_iters {10**12} --max_iters 1 --lr_decay_iters {10**99} --seed {10**99} --eval_interval {10**99}"
    assert run(options)[0] == 0


def test_a_name_that_is_a_file_and_a_folder_that_cannot_be_written(run, folder):
    folder.parent.mkdir()
    write(folder, b"mine")
    for options in ("", "--overwrite", "--resume"):
        mistake(run(options), "new is not a folder")
    assert folder.read_bytes() == b"mine"
    mistake(run(models_dir="/proc"), "/proc/new", "0 bytes free", "--models_dir")
    with one_line_error("cannot write /proc/.new.lock (", "--models_dir"), train_cli.lock("/proc/new"):
        pass


def test_without_a_dataset_nothing_is_created(run, folder):
    mistake(run(dataset=None), "--dataset is missing")
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("hparams", "options"),
    [
        ((300, 128, 128, 4, 4), {"batch_size": 48, "dropout": 0.1}),  # mostly activations
        ((300, 128, 128, 4, 4), {"batch_size": 48, "dropout": 0.1, "engine": "compiled"}),
        ((300, 16, 1024, 4, 1), {"batch_size": 1, "block_size": 16}),  # parameters
        ((300, 256, 16, 16, 2), {"batch_size": 12, "block_size": 256, "gradient_accumulation_steps": 2}),  # scores
        ((20_000, 16, 64, 2, 1), {"batch_size": 32, "block_size": 16}),  # logits
        ((300, 1, 1, 1, 600), {"batch_size": 1, "block_size": 1}),  # Python objects
    ],
)
def test_the_estimate_of_memory_is_below_the_measured_peak_and_above_a_third_of_it(hparams, options, monkeypatch):
    hparams = dict(zip(("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"), hparams, strict=True))
    estimates = []
    monkeypatch.setattr("training.memory.check_memory", lambda what, n_bytes, remedy: estimates.append(n_bytes))
    required = {"name": "new", "dataset": "random", "threads": 2, "engine": "numpy"}
    options = Options(**PRESETS["3min"] | required | options)
    check_training_memory(options, hparams)
    command = [sys.executable, "-c", PEAK, repr(options), repr(hparams)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert int(done.stdout) / 3 < estimates[0] < int(done.stdout)


PEAK = """
import re, sys
import numpy as np
from train import train_step
from training.checkpoint import State
from training.initialization import gpt2_deviation, initial_tensors
from training.options import Options
from training.plan import Plan, new_optimizer
from training.trainer import NumpyTrainer, functions_of
from weights.names import tensor_shapes

def memory(name):
    with open("/proc/self/status", encoding="utf-8") as f:
        return 1024 * int(re.search(name + r":\\s*(\\d+) kB", f.read())[1])

options, hparams = eval(sys.argv[1]), eval(sys.argv[2])
functions_of(options.engine)  # imports numba
before = memory("VmRSS")
optimizer = new_optimizer(initial_tensors(tensor_shapes(**hparams), 0, gpt2_deviation(hparams["n_layer"])), options)
data = {"train": np.arange(999, dtype=np.uint16) % 99}
state = State(tokens={}, val_chars_per_token=1.0)
with NumpyTrainer(Plan("", options, state, None, hparams, optimizer, data)).running() as of:
    for _ in range(2):  # the moments take memory from the first update on
        train_step(of)
print(memory("VmHWM") - before)
"""


def test_without_a_terminal_there_are_lines_of_progress(run, monkeypatch):
    assert "step 1 of 2: loss" not in run("--max_iters 2")[2]
    monkeypatch.setattr("training.progress.LINE_INTERVAL", 0)
    assert re.findall(r"^step \d of 2: loss 5\.\d+, \d+ tokens/s$", run("--max_iters 2 --overwrite")[2], re.M) != []


# Data


def test_splits_have_nanogpts_and_llm_cs_hashes():
    """Token counts of nanoGPT's prepare.py and llm.c's tinyshakespeare.py, and SHA-256 of the uint16 ids."""
    encoder, path = get_encoder("gpt2", str(need(DATA / "gpt2").parent)), need(DATA / "tinyshakespeare.txt")
    content, text = path.read_bytes(), dataset.read_dataset(str(path), "")
    assert dataset.TINYSHAKESPEARE[1:] == (len(content), hashlib.sha256(content).hexdigest())
    assert len(dataset.sections(text)) == 7222
    found = []
    for layout in ("plain", "sections"):
        *splits, _ = dataset.encode_splits(text, encoder, layout)
        found += [(len(ids), hashlib.sha256(np.asarray(ids, "<u2").tobytes()).hexdigest()) for ids in splits]
    assert found == [
        (301_966, "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"),
        (36_059, "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"),
        (305_260, "25f64f50080b1237d8d70e36d9ae43ca00855bbb7d5dcac6118c3cb75eeb7b2f"),
        (32_768, "d5ad4a9d91976783859c221697e3e0488675d095f676fe3fedac339caa4c193a"),
    ]


def test_tinyshakespeare_is_downloaded_once_and_an_altered_copy_refused(run, tmp_path, monkeypatch):
    path, published = tmp_path / "tinyshakespeare.txt", (14, hashlib.sha256(b"First Citizen:").hexdigest())
    monkeypatch.setattr(dataset, "TINYSHAKESPEARE", ("http://127.0.0.1:9/input.txt", *published))
    fetch = mock.Mock(side_effect=lambda *_, **remedies: write(path, b"First Citizen:"))
    monkeypatch.setattr(dataset, "download_file", fetch)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert dataset.read_dataset("tinyshakespeare", str(tmp_path)) == "First Citizen:"
    remedy = "give the path of a copy instead"
    fetch.assert_called_once_with("http://127.0.0.1:9/input.txt", str(path), *published, remedy=remedy)
    write(path, b"First Citizen!")
    result = run(f"--data_dir {tmp_path}", dataset="tinyshakespeare")
    mistake(result, "tinyshakespeare.txt was altered (14 bytes and", "remove it")


@pytest.mark.parametrize(("vocab_size", "end_of_text"), [(256, False), (257, False), (257, True), (300, True)])
def test_vocabularies_have_their_size_and_encode_everything(vocab_size, end_of_text):
    encoder = dataset.train_encoder(TEXT, vocab_size, end_of_text)
    assert sorted(encoder.encoder.values()) == list(range(vocab_size))
    assert len(encoder.ranks) == vocab_size - 256 - end_of_text
    assert (encoder.encoder.get(END_OF_TEXT) == vocab_size - 1) == end_of_text
    for sample in (TEXT, "é 你好 \x00\r\n"):
        assert encoder.decode(encoder.encode(sample)) == sample
    assert len(dataset.train_encoder("ab " * 400, vocab_size, end_of_text).encoder) < 260  # few pairs to merge


def test_sections_begin_with_end_of_text():
    encoder = dataset.train_encoder(TEXT, 300, True)
    train_ids, val_ids, val_chars = dataset.encode_splits(TEXT, encoder, "sections")
    ids, end = val_ids + train_ids, encoder.encoder[END_OF_TEXT]
    assert ids[0] == end and ids.count(end) == TEXT.count("\n\n") + 1 > 20 and len(val_ids) == len(ids) // 10
    assert encoder.decode(i for i in ids if i != end) == TEXT
    assert val_chars == len(encoder.decode(i for i in val_ids if i != end))


@pytest.mark.parametrize(
    "text", [TEXT, "a" * 500 + "\n\n" + "b" * 30, "a\n\n" + "bc " * 900, "ab " * 40 + "\n\ncd" * 500]
)
def test_the_vocabulary_is_learned_from_text_that_is_not_for_validation(text):
    learned_from = dataset.training_text(text, "sections")
    encoder = dataset.train_encoder(learned_from, 300, True)
    train_ids, val_ids, _ = dataset.encode_splits(text, encoder, "sections")
    held_out = encoder.decode(i for i in val_ids if i != encoder.encoder[END_OF_TEXT])
    assert text.startswith(held_out) and text.endswith(learned_from)
    assert 0 < len(learned_from) <= len(text) - len(held_out) and train_ids
    assert dataset.training_text(text, "plain") == dataset.split_text(text)["train"]


def test_windows():
    tokens = np.arange(100, dtype=np.uint16)
    inputs, targets = dataset.random_windows(tokens, np.random.default_rng(0), 5000, 10)
    assert inputs.shape == targets.shape == (5000, 10)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert (inputs.min(), targets.max()) == (0, 99)
    inputs, targets = dataset.even_windows(tokens, 1000, 10)
    assert set(np.diff(inputs[:, 0])) <= {11, 12}
    assert (inputs[0, 0], targets[-1, -1]) == (0, 99) and len(inputs) == 9
    inputs, targets = dataset.even_windows(np.arange(11), 1000, 10)
    np.testing.assert_array_equal(targets, np.arange(1, 11)[None])


def test_bytes_and_gpt2s_own_tokenizer(run, folder):
    assert run("--max_iters 1 --tokenizer bytes", small=NO_VOCABULARY)[0] == 0
    assert load_encoder_hparams_and_params("new", str(folder.parent))[1]["n_vocab"] == 256
    shutil.copytree(need(DATA / "gpt2"), folder.parent / "124M")
    assert run("--max_iters 1 --tokenizer gpt2", name="wide", small=NO_VOCABULARY)[0] == 0
    encoder, hparams, _ = load_encoder_hparams_and_params("wide", str(folder.parent))
    assert hparams["n_vocab"] == 50257 and encoder.encode("zjqfl") == [89, 73, 80, 2704]


# Token files


def llm_c_file(path, ids):
    """Write a file as llm.c's dev/data/data_common.py does: 256 numbers, then the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())


@pytest.fixture
def bins(tmp_path, tiny, monkeypatch):
    """Options for token files of both formats, three of them for training. GPT-2's tokenizer is the tiny model's."""
    monkeypatch.setattr("training.plan.load_gpt2_encoder", lambda models_dir: tiny[0])
    ids = tiny[0].encode(TEXT)
    llm_c_file(tmp_path / "val.bin", ids[:500])
    llm_c_file(tmp_path / "train_1.bin", ids[500:1000])
    np.array(ids[1000:1003], "<u2").tofile(tmp_path / "train_2.bin")
    llm_c_file(tmp_path / "train_3.bin", ids[1003:])
    return f"--train_bin {tmp_path}/train_*.bin --val_bin {tmp_path}/val.bin"


def test_a_slice_of_token_files_is_that_of_their_ids(bins, tmp_path, tiny):
    ids, tokens = np.array(tiny[0].encode(TEXT)[500:]), dataset.TokenFiles(f"{tmp_path}/train_*.bin", 400)
    assert len(tokens) == len(ids)
    for chosen in (slice(0, 10), slice(490, 510), slice(499, 504), slice(500, 503), slice(len(ids) - 3, len(ids))):
        np.testing.assert_array_equal(tokens[chosen], ids[chosen])


def test_training_on_token_files_is_training_on_their_ids(run, resume, folder, bins, tmp_path, tiny):
    """With 20 steps, 10 of them resumed; the ids are not copied."""
    small = f"{NO_VOCABULARY} {bins} --eval_interval 10 --dropout 0"
    assert run("--max_iters 10", small=small, dataset=None)[0] == 0
    assert resume("--max_iters 20")[0] == 0
    assert not {"train.bin", "val.bin"} & contents(folder).keys()
    losses = [line["val_loss"] for line in read_log(folder) if "val_loss" in line]
    assert losses[0] > losses[1] > losses[2]
    _, hparams, params = load_encoder_hparams_and_params("new", str(folder.parent))
    assert hparams["n_vocab"] == 400
    inputs, targets = dataset.even_windows(np.array(tiny[0].encode(TEXT)[:500]), 8, 16)
    np.testing.assert_allclose(lm_loss(params, inputs, targets, hparams["n_head"]), losses[-1], rtol=1e-5)
    chars_per_token = len(tiny[0].decode(tiny[0].encode(TEXT)[:500])) / 500
    np.testing.assert_allclose(state_of(folder)["val_chars_per_token"], chars_per_token)
    llm_c_file(tmp_path / "train_3.bin", [1] * 50)
    mistake(resume("--max_iters 21"), "train_*.bin", "553 tokens", "when the run began")


def test_mistakes_with_token_files(run, bins, tmp_path, folder):
    for options, words in (
        ("--train_bin a", ["--val_bin is missing"]),
        ("--val_bin a", ["--train_bin is missing"]),
        (f"{bins} --dataset a", ["--dataset does not work with --train_bin"]),
        (f"{bins} --layout plain", ["--layout does not work with --train_bin"]),
        (f"{bins} --vocab_size 300", ["--vocab_size does not work with --train_bin"]),
        (f"{bins} --tokenizer bytes", ["--tokenizer does not work with --train_bin"]),
        (f"{bins} --val_bin {tmp_path}/none_*", ["no token file", "none_*"]),
        (f"{bins} --train_bin=", ["no token file ''"]),
        (f"{bins} --block_size 500", ["500 for validation", "--block_size 499"]),
    ):
        mistake(run(options, small=NO_VOCABULARY, dataset=None), *words)
    path = tmp_path / "val.bin"
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], ["odd number"]),
        (whole[:8], ["8 bytes, the header alone has 1024"]),
        (whole[:-2], ["998 bytes after the header, expected 1000 for 500 ids"]),
        (np.array([20240801, 7, 500], "<i4").tobytes(), ["20240801", "not for GPT-2's tokens"]),
        (whole[:600], ["600 bytes, the header alone has 1024"]),
        (whole[:-2] + b"\xff\xff", ["token id 65535 in a vocabulary of 400"]),
    ):
        path.write_bytes(content)
        mistake(run(bins, small=NO_VOCABULARY, dataset=None), "val.bin is corrupt", *words)
    assert not folder.exists()
