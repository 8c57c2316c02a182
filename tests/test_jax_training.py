"""train.py --engine jax: the losses of PyTorch and of NumPy, on several devices and processes; runs that end early."""

import re
import signal
import subprocess
import sys
import time
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import gpt2
from cli import options as cli_options
from cli import train as train_cli
from tests import gradients
from tests.conftest import assert_transformers_agree, contents
from tests.programs import SECONDS, assert_mistake, assert_runs_on_8_devices, command, free_port, on_devices, started
from tests.random_model import random_tensors
from tests.test_train import STATE, TEXT, TWO_LAYERS, new_tensors, read_log, state_of
from train import train_step
from training.checkpoint import State
from training.options import PRESETS, Options
from training.plan import Plan, new_optimizer
from weights.names import nest
from weights.safetensors_file import load_safetensors

pytest.importorskip("jax")
pytest.importorskip("optax")

import jax
import jax.numpy as jnp

from training import jax_model, jax_trainer

pytestmark = pytest.mark.usefixtures("compilation")
SMALL = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --warmup_iters 2 --eval_iters 2"
STEPS = "--learning_rate 1e-2 --dropout 0 --grad_clip 0.5 --gradient_accumulation_steps 2 --lr_decay_iters 20"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def arguments(tmp_path, text_file):
    """The arguments that train a small model with JAX in tmp_path."""

    def arguments(options, name="new", resume=False, engine="jax"):
        new = ["--resume"] if resume else ["--dataset", str(text_file), *SMALL.split(), "--vocab_size", "300"]
        return ["--name", name, "--models_dir", str(tmp_path), "--engine", engine, *new, *options.split()]

    return arguments


@pytest.fixture
def run(arguments, capsys):
    """Run train.py with these arguments; returns (exit code, standard output, standard error)."""

    def run(*given, **options):
        return train_cli.run(arguments(*given, **options)), *capsys.readouterr()

    return run


def new_trainer(shape=(1, 1), hparams=TWO_LAYERS, tensors=None, **options):
    """A JaxTrainer of a small model, without a folder."""
    ids = (np.arange(999, dtype=np.uint16) ** 2 % 89).astype(np.uint16)
    chosen = PRESETS["3min"] | {"block_size": 16, "batch_size": 4, "dropout": 0.0, "engine": "jax"} | options
    options, tensors = Options(name="new", dataset="random", **chosen), tensors or new_tensors(hparams)
    state = State(tokens={"train": len(ids)}, val_chars_per_token=1.0)
    plan = Plan("", options, state, None, hparams, new_optimizer(tensors, options), {"train": ids, "val": ids})
    return jax_trainer.JaxTrainer(plan, shape)


def lowered_step(trainer):
    """Return what JAX compiles for a step."""
    inputs = *trainer.on_devices, trainer.random_batches(0), np.zeros(2, np.uint32), np.float32(0)
    return trainer.compiled_step.lower(*inputs)


def losses(trainer, n_steps):
    return [train_step(trainer)["loss"] for _ in range(n_steps)]


def log(path):
    """[step, loss, validation loss] of each line."""
    return [[line["step"], line.get("loss", 0), line.get("val_loss", 0)] for line in read_log(path)]


# The losses of others


def test_ten_steps_are_pytorchs():
    """Loss and norm of the gradients of each step, with accumulation, clipping, decay, warm-up and cosine."""
    schedule = {"max_iters": 10, "warmup_iters": 3, "learning_rate": 3e-3}
    trainer = new_trainer(gradient_accumulation_steps=2, grad_clip=0.5, beta2=0.95, **schedule)
    model, by_name = gradients.torch_model(TWO_LAYERS, trainer.tensors)
    matrices, others = ([p for p in by_name.values() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(10):
        ids = np.concatenate(np.asarray(trainer.random_batches(step), dtype=int))  # -> [8, n_seq+1]
        optimizer.zero_grad()
        loss = gradients.torch_loss(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        found = train_step(trainer)
        for group in optimizer.param_groups:
            group["lr"] = found["learning_rate"]
        optimizer.step()
        assert abs(found["loss"] - loss.item()) < 1e-4
        np.testing.assert_allclose(found["gradient_norm"], norm.item(), rtol=1e-2)
    trainer.fetch()
    for name, parameter in by_name.items():
        np.testing.assert_allclose(trainer.tensors[name], parameter.detach(), atol=2e-3, err_msg=name)
        assert trainer.tensors[name].dtype == np.float32
    assert found["loss"] < np.log(300) - 0.1, "the loss must have moved for this to mean anything"


def test_a_run_begun_with_numpy_resumes_with_jax_and_the_reverse(run, tmp_path):
    """20 steps: all with one engine, or the last ten with the other."""
    for name, first, second in (
        ("n", "numpy", "numpy"),
        ("j", "jax", "jax"),
        ("nj", "numpy", "jax"),
        ("jn", "jax", "numpy"),
    ):
        options = f"--max_iters 10 --eval_interval 5 {STEPS}"
        assert run(options, name, engine=first)[0] == 0
        result = run("--max_iters 20", name, resume=True, engine=second)
        assert result[0] == 0, result[2]
    expected = np.array(log(tmp_path / "n"))
    assert expected[0, 2] - expected[-1, 2] > 1
    for name in ("j", "nj", "jn"):
        np.testing.assert_allclose(log(tmp_path / name), expected, atol=1e-4)
        assert contents(tmp_path / name).keys() == contents(tmp_path / "n").keys()
    assert_transformers_agree(tmp_path / "j", "def softmax(x):")


def test_a_resumed_run_is_the_whole_run_bit_for_bit(run, tmp_path):
    """With dropout, accumulation, bfloat16 and remat; --resume without --engine goes on with JAX."""
    options = f"--eval_interval 4 {STEPS} --dropout 0.2 --dtype bfloat16 --remat"
    assert run(f"--max_iters 8 {options}", "whole")[0] == 0
    assert run(f"--max_iters 5 {options}", "parts")[0] == 0
    assert train_cli.run(["--name", "parts", "--models_dir", str(tmp_path), "--resume", "--max_iters", "8"]) == 0
    both = tmp_path / "whole", tmp_path / "parts"
    np.testing.assert_equal(*(load_safetensors(str(path / STATE))[0] for path in both))
    assert log(both[0])[-1] == log(both[1])[-1]


# bfloat16, rematerialization, dropout, attention


def test_bfloat16_remat_and_a_sharded_optimizer_change_little_and_the_parameters_stay_float32():
    """Remat changes nothing but rounding; on one device neither does --shard_optimizer."""
    fast = {"learning_rate": 1e-2, "warmup_iters": 1}
    expected = losses(new_trainer(**fast), 8)
    for options, tolerance in (({"remat": True, "shard_optimizer": True}, 1e-5), ({"dtype": "bfloat16"}, 5e-3)):
        trainer = new_trainer(**fast, **options)
        np.testing.assert_allclose(losses(trainer, 8), expected, rtol=tolerance)
        dtypes = {str(array.dtype) for array in jax.tree.leaves(trainer.on_devices)}
        assert dtypes == {"float32", "int32"}  # the latter is the number of steps
    assert expected[0] - expected[-1] > 0.5


def test_remat_computes_the_blocks_twice():
    flops = {}
    for remat in (False, True):
        trainer = new_trainer(remat=remat)
        flops[remat] = lowered_step(trainer).compile().cost_analysis()["flops"]
    assert 1.1 < flops[True] / flops[False] < 1.33  # logits are not computed again


def test_products_are_of_bfloat16_and_softmax_layer_norms_and_the_loss_are_not():
    """The types in the program that JAX traces."""
    trainer = new_trainer(dtype="bfloat16")
    jaxpr = str(jax.make_jaxpr(trainer.loss)(trainer.on_devices[0], jnp.zeros((2, 17), int), jax.random.key(0)))
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", jaxpr)
    assert len(products) == 2 * 6 + 1 and set(products) == {"bf16"}
    for name in ("exp", "rsqrt", "sqrt", "log"):
        assert set(re.findall(rf"(\w+)\[[\d,]*\] = {name} ", jaxpr)) <= {"f32"}


def test_the_gradient_of_the_loss_has_no_scatter():
    """Those of the embeddings have one each; one over the logits would be slow on GPUs."""
    assert lowered_step(new_trainer()).as_text().count('"stablehlo.scatter"(') == 2


def test_dropout_keeps_a_share_and_the_mean_and_follows_from_seed_step_and_batch():
    drop = jax_model.Dropout(0.3)
    drop.seed(jax.random.key(0))
    first, second = (np.asarray(drop.after(lambda x: x)(jnp.ones((200, 500)))) for _ in range(2))
    assert set(np.unique(first)) == {np.float32(0), np.float32(1 / 0.7)} and np.any(first != second)
    np.testing.assert_allclose([np.mean(first > 0), np.mean(first)], [0.7, 1.0], atol=0.01)
    found = [
        losses(new_trainer(**{"dropout": 0.5, **options}), 2) for options in ({}, {}, {"remat": True}, {"dropout": 0})
    ]
    assert found[0] == found[1] and found[0] != found[3]
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
    trainer = new_trainer(dropout=0.5, gradient_accumulation_steps=2)
    params, batch, keys = trainer.on_devices[0], jnp.zeros((2, 4, 17), int), [jax.random.key(i) for i in range(2)]
    assert trainer.loss(params, batch[0], keys[0]) != trainer.loss(params, batch[1], keys[1])
    assert trainer.estimate_loss("val") == new_trainer().estimate_loss("val")


def test_the_attention_of_a_gpu_gets_heads_where_it_expects_them(monkeypatch):
    """cuDNN needs a GPU: JAX's other implementation, which takes the same arguments, stands for it."""
    calls, attention = [], jax.nn.dot_product_attention

    def without_cudnn(*arrays, implementation, **options):
        calls.append((implementation, options))
        return attention(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 3, 10, 16), dtype=np.float32)
    np.testing.assert_allclose(jax_model.flash_attention(q, k, v), gpt2.attention(q, k, v), atol=1e-5)
    params, ids = nest(random_tensors(TWO_LAYERS | {"n_embd": 64}), 2), jnp.zeros((1, 9), int)
    for options, n_calls in (({}, 2), ({"dropout": 0.1}, 0), ({"dtype": "float32"}, 0), ({"flash": False}, 0)):
        calls.clear()
        model = jax_model.training_model(4, **{"dtype": "bfloat16", "flash": True} | options)
        model.drop.seed(jax.random.key(0))
        model.gpt2(ids, **params, n_head=4)
        assert calls == [("cudnn", {"is_causal": True})] * n_calls


def test_devices_and_heads_that_have_flash_attention():
    takes = jax_model.takes_flash_attention
    assert not takes(jax.devices()[0], 64)
    for version, capability, d, expected in (
        ("PJRT C API\ncuda 13000", "9.0", 64, True),
        ("PJRT C API\ncuda 13000", "8.0", 80, True),
        ("PJRT C API\ncuda 13000", "7.5", 64, False),
        ("PJRT C API\nrocm 60300", "gfx942", 64, False),
        ("PJRT C API\ncuda 13000", "9.0", 20, False),
        ("PJRT C API\ncuda 13000", "12.0", 256, False),
    ):
        client = types.SimpleNamespace(platform_version=version)
        assert takes(types.SimpleNamespace(client=client, compute_capability=capability), d) == expected


# Several devices


ON_8_DEVICES = """
import re
import numpy as np
from tests.test_jax_training import losses, lowered_step, new_trainer, train_step

hparams = {"n_vocab": 97, "n_ctx": 16, "n_embd": 64, "n_head": 8, "n_layer": 2}
options = {"batch_size": 8, "gradient_accumulation_steps": 2, "warmup_iters": 2, "learning_rate": 1e-2}
expected = None
for shape in [(1, 1), (8, 1), (4, 2), (2, 4)]:
    for zero in [False] if shape == (1, 1) else [False, True] if shape == (4, 2) else [True]:
        trainer = new_trainer(shape, hparams, shard_optimizer=zero, **options)
        found = [*losses(trainer, 5), trainer.estimate_loss("val")]
        assert trainer.compiled_step._cache_size() == trainer.compiled_losses._cache_size() == 1, "compiled once"
        expected = expected or found
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(shape))
        trainer.fetch()
        parameters = np.concatenate([tensor.reshape(-1) for tensor in trainer.tensors.values()])
        at_first = parameters if shape == (1, 1) else at_first
        np.testing.assert_allclose(parameters, at_first, atol=1e-3)

        n_data, n_model = shape
        params, state = trainer.on_devices
        mu = next(part.mu for part in state[1] if hasattr(part, "mu"))
        w, m = (tree["blocks"][0]["mlp"]["c_fc"]["w"] for tree in (params, mu))
        assert w.sharding.shard_shape(w.shape) == (64, 256 // n_model)
        assert m.sharding.shard_shape(m.shape) == (64 // n_data if zero else 64, 256 // n_model)
        e = mu["wte"]
        assert e.sharding.shard_shape(e.shape) == (97, 64 // n_data if zero else 64)
assert expected[0] - expected[5] > 0.1, expected

trainer = new_trainer((8, 1), hparams, **options)
program = lowered_step(trainer).compile().as_text()
entry = program[program.index("ENTRY"):]
assert " all-reduce(" in entry and program.count(" all-reduce(") == entry.count(" all-reduce(")
"""


def test_losses_are_equal_on_1_to_8_devices_and_gradients_are_exchanged_once_per_step():
    """Meshes of 8x1, 4x2 and 2x4, the optimizer's state sharded or not."""
    assert_runs_on_8_devices(ON_8_DEVICES)


# Several processes

IN_A_PROCESS = """
import sys
from cli import devices, train
from training import jax_trainer

devices.SECONDS_TO_NOTICE = 5
read, n_read = jax_trainer.windows, []
jax_trainer.windows = lambda tokens, starts, n: (n_read.append(len(starts)), read(tokens, starts, n))[1]
code = train.run()
print("windows", sorted(set(n_read)), file=sys.stderr)
sys.exit(code)
"""


def two_processes(arguments):
    """Start two processes with two devices each; return them."""
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--n_processes", "2", "--process_id"]
    return [
        started([sys.executable, "-c", IN_A_PROCESS, *arguments, *together, str(i)], env=on_devices(2))
        for i in range(2)
    ]


def test_two_processes_train_to_the_losses_of_one(run, arguments, tmp_path):
    """5 steps on a mesh of 2x2. The first process writes and prints; each reads its own half of every batch."""
    options = f"--max_iters 5 --eval_interval 1 {STEPS}"
    assert run(options, "one")[0] == 0
    first, second = two_processes(arguments(f"{options} --devices 2x2 --shard_optimizer", "two"))
    with first as first, second as second:
        found = [process.communicate(timeout=SECONDS) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], found
    assert b"validation loss" in found[0][0] and found[1] == (b"", b"windows [2, 4]\n")
    assert found[0][1].endswith(b"windows [2, 4]\n")
    np.testing.assert_allclose(log(tmp_path / "two"), log(tmp_path / "one"), atol=1e-4)
    both = [load_safetensors(str(tmp_path / name / STATE))[0] for name in ("one", "two")]
    for name, tensor in both[0].items():
        np.testing.assert_allclose(both[1][name], tensor, atol=1e-3, err_msg=name)


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(run, arguments, tmp_path, killed):
    first, second = two_processes(arguments(f"--max_iters 100000 --eval_interval 5 {STEPS}"))
    with first as first, second as second:
        wait_for(lambda: (tmp_path / "new" / STATE).exists() and state_of(tmp_path / "new")["step"] >= 5)
        processes = [first, second]
        processes[killed].kill()
        other = processes[1 - killed]
        errors = other.communicate(timeout=SECONDS)[1]
    assert other.returncode not in (0, None) and b"rror" in errors
    saved = state_of(tmp_path / "new")["step"]
    assert run(f"--max_iters {saved + 2}", resume=True)[0] == 0
    assert state_of(tmp_path / "new")["step"] == saved + 2


def test_ctrl_c_in_one_process_stops_both_after_the_same_step(arguments, tmp_path):
    first, second = two_processes(arguments(f"--max_iters 100000 --eval_interval 100000 {STEPS}"))
    with first as first, second as second:
        wait_for(lambda: (tmp_path / "new" / STATE).exists() and len(read_log(tmp_path / "new")) > 2)
        second.send_signal(signal.SIGINT)
        found = [process.communicate(timeout=SECONDS) for process in (first, second)]
    assert [first.returncode, second.returncode] == [130, 130], found
    assert b"and saved; resume with: python train.py" in found[0][1]
    assert state_of(tmp_path / "new")["step"] == state_of(tmp_path / "new")["saved_step"] > 0


def test_two_processes_with_different_options_end_at_once(arguments, tmp_path):
    """They would wait for each other's steps for ever."""
    port = free_port()
    together = f"--coordinator 127.0.0.1:{port} --n_processes 2 --process_id"
    processes = [
        started(command(*arguments(f"--max_iters {n} {together} {i}"), script="train.py"), env=on_devices(2))
        for i, n in enumerate((4, 9))
    ]
    with processes[0] as first, processes[1] as second:
        found = [process.communicate(timeout=SECONDS) for process in (first, second)]
    assert b"the processes do not agree on max_iters;" in found[0][1], found
    assert first.returncode == 2 and second.returncode != 0 and not (tmp_path / "new").exists()


def test_two_processes_write_a_missing_model_again(run, arguments, tmp_path):
    """Both evaluate, although only the first writes."""
    assert run(f"--max_iters 3 {STEPS}")[0] == 0
    (tmp_path / "new" / "model.safetensors").unlink()
    first, second = two_processes(arguments("--max_iters 4", resume=True))
    with first as first, second as second:
        found = [process.communicate(timeout=SECONDS) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], found
    assert (tmp_path / "new" / "model.safetensors").exists() and state_of(tmp_path / "new")["step"] == 4


def test_an_interrupted_process_of_several_does_not_wait_for_the_others(monkeypatch):
    codes = []
    monkeypatch.setattr(cli_options, "one_of_several", lambda: True)
    monkeypatch.setattr(cli_options.os, "_exit", codes.append)
    cli_options.exit_code("train.py", Mock(side_effect=KeyboardInterrupt), [])
    assert codes == [130]


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--engine numpy --dtype bfloat16", ["--dtype bfloat16 needs JAX", "--engine jax"]),
        ("--engine auto --remat", ["--remat needs JAX", "--engine jax"]),
        ("--engine compiled --shard_optimizer", ["--shard_optimizer needs JAX", "--engine jax"]),
        ("--engine numpy --devices 2", ["--devices needs JAX", "--engine jax"]),
        ("--devices 2", ["takes 2 devices; JAX finds 1", "set --devices to 1"]),
        ("--devices 1x2", ["takes 2 devices; JAX finds 1", "set --devices to 1"]),
        ("--process_id 0", ["need --coordinator HOST:PORT"]),
        ("--coordinator 127.0.0.1:1", ["--process_id", "--n_processes"]),
    ],
)
def test_mistakes(run, tmp_path, options, words):
    code, out, err = run(options)
    assert_mistake((code, out, err.splitlines()[-1] + "\n"), *words, script="train.py")
    assert not (tmp_path / "new").exists()


def test_a_batch_that_does_not_divide_by_the_devices_and_heads_that_do_not(arguments):
    for options, words in (
        ("--batch_size 5", ["--batch_size 5 does not divide by 2", "--batch_size 6"]),
        ("--devices 1x2 --n_head 1", ["1 heads and 64 hidden units do not divide by 2 devices"]),
    ):
        done = subprocess.run(
            command(*arguments(options), script="train.py"), check=False, capture_output=True, env=on_devices(2)
        )
        line = done.stderr.splitlines(keepends=True)[-1]
        assert_mistake((done.returncode, done.stdout, line), *words, script="train.py")


def test_without_optax_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    monkeypatch.delitem(sys.modules, "training.jax_trainer")
    code, out, err = run("")
    assert_mistake((code, out, err.splitlines()[-1] + "\n"), "pip install -r requirements-jax.txt", script="train.py")


def test_a_diverged_run_keeps_what_was_finite(run, tmp_path):
    code, out, err = run(
        f"--max_iters 50 {STEPS} --learning_rate 1e12 --grad_clip 0 --warmup_iters 20 --eval_interval 5"
    )
    assert_mistake((code, out, err.splitlines()[-1] + "\n"), "training diverged: the ", "--resume", script="train.py")
    assert all(np.all(np.isfinite(tensor)) for tensor in load_safetensors(str(tmp_path / "new" / STATE))[0].values())


def test_the_presets_for_gpus_are_complete():
    assert {PRESETS[name]["engine"] for name in ("gpu", "124M")} == {"jax"}
    options = Options(name="new", dataset="text", **PRESETS["124M"])
    assert options.tokens_per_step == 2**19 and options.schedule == (6e-4, 0.0, 700, 18_865)  # llm.c's
