"""training/scaling.py: what XLA says of programs compiled for eight devices, published figures, the document."""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cli.scaling import run
from tests.conftest import ROOT
from tests.programs import SECONDS, assert_mistake
from training.loss import lm_loss
from training.scaling import Device, Step, flops, hparams_near, limit, memory, reduced, seconds, sent
from weights.names import count_params, nest, tensor_shapes
from weights.releases import HPARAMS

SMALL = {"n_vocab": 512, "n_ctx": 64, "n_embd": 128, "n_head": 8, "n_layer": 2}
STEPS = {
    "8x1": Step(SMALL, 8, 1, 1),
    "4x2": Step(SMALL, 4, 2, 2),
    "2x4": Step(SMALL, 2, 4, 4),
    "1x8": Step(SMALL, 1, 8, 8),
    "2x4 remat": Step(SMALL, 2, 4, 4, n_batches=3, remat=True),
    "8x1 shard_optimizer": Step(SMALL, 8, 1, 1, shard_optimizer=True),
}


# XLA


def compiled_step(step):
    """Return the compiled program of the step of train.py."""
    from tests.test_jax_training import lowered_step, new_trainer

    options = {name: getattr(step, name) for name in ("dtype", "remat", "shard_optimizer")}
    options |= {
        "block_size": step.hparams["n_ctx"],
        "batch_size": step.n_data * step.windows,
        "gradient_accumulation_steps": step.n_batches,
    }
    return lowered_step(new_trainer((step.n_data, step.n_model), step.hparams, **options)).compile()


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"f32\[([\d,]*)\]")


def what_xla_says(step):
    """Return the analyses of the compiled program and, by kind, the bytes of the results of its collectives."""
    compiled = compiled_step(step)
    collectives = {}
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in ARRAY.findall(shapes)]
        collectives[kind] = collectives.get(kind, 0) + 4 * sum(sizes)
    found = compiled.memory_analysis()
    return {
        "flops": compiled.cost_analysis()["flops"],
        "arguments": found.argument_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "collectives": collectives,
    }


def print_what_xla_says():
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps(dict(zip(STEPS, pool.map(what_xla_says, STEPS.values()), strict=True))))


@pytest.fixture(scope="module")
def xla():
    """What XLA says of each of STEPS, compiled for eight devices of the CPU in a process of its own."""
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # 0: only LLVM's, for speed
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "from tests.test_scaling import *; print_what_xla_says()"]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 3 * SECONDS}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", STEPS)
def test_weights_and_moments_are_the_arguments_of_the_program(xla, name):
    step, found = STEPS[name], memory(STEPS[name])
    windows = 4 * step.n_batches * step.windows * (step.hparams["n_ctx"] + 1)
    expected = found["weights"] + found["moments"] + windows
    assert xla[name]["arguments"] == pytest.approx(expected, abs=100, rel=0.01 * step.shard_optimizer)


@pytest.mark.parametrize("name", STEPS)
def test_operations_are_those_of_the_products_and_a_few_percent(xla, name):
    """XLA counts per device, a loop once, and elementwise functions and AdamW too."""
    step = STEPS[name]
    assert 1 <= xla[name]["flops"] * step.n_batches / flops(step) < 1.12


@pytest.mark.parametrize("name", STEPS)
def test_bytes_of_the_collectives(xla, name):
    """XLA for the CPU has no reduce-scatter: with shard_optimizer it adds up all gradients, then gathers the weights.

    The text of the program has the loop over batches once, and the gradients after it.
    """
    step, expected = STEPS[name], reduced(STEPS[name])
    found = dict(xla[name]["collectives"])
    assert found.pop("all-reduce") == pytest.approx(expected["model"] / step.n_batches + expected["data"], abs=1000)
    if step.shard_optimizer:
        assert found.pop("all-gather") == pytest.approx(expected["data"], rel=0.01)
    assert found == {}


@pytest.mark.parametrize("name", ["8x1", "4x2", "2x4", "1x8"])
def test_temporary_memory(xla, name):
    """XLA computes some of what JAX would keep again, and has temporary arrays; on the CPU remat seldom helps it."""
    found = memory(STEPS[name])
    expected = found["gradients"] + found["activations"] + found["logits"]
    assert 0.7 < xla[name]["temporary"] / expected < 1.4


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_jax_keeps_for_the_backward_pass(dtype, remat):
    """Without the scores in bfloat16, which flash attention does without."""
    jax = pytest.importorskip("jax")
    training_model = importlib.import_module("training.jax_model").training_model

    def kept(n_layer):  # the bytes of arrays whose first axis is of windows or tokens
        hparams = {"n_vocab": 100, "n_ctx": 14, "n_embd": 48, "n_head": 4, "n_layer": n_layer}
        step = Step(hparams, 1, 1, 5, dtype=dtype, remat=remat)
        inputs = jax.ShapeDtypeStruct((5, 14), int)
        shapes, model = tensor_shapes(**hparams), training_model(4, dtype=dtype, remat=remat)
        params = nest({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}, n_layer)
        loss = lambda params, inputs: lm_loss(params, inputs, inputs, 4, model)  # noqa: E731
        pullback = jax.eval_shape(lambda params, inputs: jax.vjp(loss, params, inputs)[1], params, inputs)
        arrays = [array for array in jax.tree.leaves(pullback) if array.ndim and array.shape[0] in (5, 70)]
        if dtype == "bfloat16":
            arrays = [array for array in arrays if array.shape[:3] != (5, 4, 14) or array.shape[3] == 12]
        return sum(array.size * array.dtype.itemsize for array in arrays), memory(step)["activations"]

    (few, few_bytes), (more, more_bytes) = kept(2), kept(3)
    assert more - few == pytest.approx(more_bytes - few_bytes, rel=0.03)


# Published figures


def test_sizes_of_gpt2_and_gpt3():
    """Brown et al. 2020, table 2.1; 13B has 5140 there, which its 40 heads of 128 do not give."""
    assert [hparams_near(n, 1024) for n in (124e6, 355e6, 774e6, 1558e6)] == [*HPARAMS.values()]
    for n_params, n_layer, n_embd, n_head in ((6.7e9, 32, 4096, 32), (13e9, 40, 5120, 40), (175e9, 96, 12288, 96)):
        found = hparams_near(n_params, 2048)
        assert (found["n_layer"], found["n_embd"], found["n_head"]) == (n_layer, n_embd, n_head)
        assert count_params(**found) == pytest.approx(n_params, rel=0.02)


def test_operations_are_those_of_nanogpt():
    """Its estimate_mfu: 6 per parameter but wpe, and 12 * n_layer * n_ctx * n_embd."""
    hparams = HPARAMS["124M"]
    n_params = count_params(**hparams) - 1024 * 768
    found = flops(Step(hparams, 1, 1, windows=1)) / 1024
    assert found == pytest.approx(6 * n_params + 12 * 12 * 1024 * 768, rel=1e-3)


def test_memory_is_16_bytes_per_parameter():
    """Rajbhandari et al. 2020, section 3.1."""
    hparams = hparams_near(7.5e9, 1024)
    found = memory(Step(hparams, 64, 1, windows=1))
    assert found["weights"] + found["gradients"] + found["moments"] == 16 * count_params(**hparams)


# The network


def test_a_ring_sends_almost_twice_its_bytes_and_a_single_device_nothing():
    n_bytes = 4 * count_params(**SMALL)
    assert sent(Step(SMALL, 8, 1, 1)) == {"model": 0, "data": 2 * 7 / 8 * n_bytes}
    assert sent(Step(SMALL, 1, 1, 8)) == {"model": 0, "data": 0}


def test_time_along_an_axis_depends_on_where_its_devices_are():
    """Eight devices per node at 450 and 50: rings within a node, of all devices, and of one device per node."""
    device = Device()
    for step, axis, rate in (
        (Step(SMALL, 8, 1, 1), "data", 450e9),
        (Step(SMALL, 16, 1, 1), "data", 400e9),
        (Step(SMALL, 4, 4, 1), "data", 100e9),
        (Step(SMALL, 4, 8, 1), "data", 50e9),
        (Step(SMALL, 4, 8, 1), "model", 450e9),
    ):
        assert seconds(step, device)[axis] == pytest.approx(sent(step)[axis] / rate)


def test_what_limits():
    large = hparams_near(7e9, 2048)
    assert limit(Step(large, 1, 1, 1), Device()) == "memory"
    assert limit(Step(large, 1, 8, 8, dtype="bfloat16"), Device()) == "compute"
    assert limit(Step(large, 8, 8, 1, dtype="bfloat16"), Device(memory=1000)) == "network: data"
    assert limit(Step(large, 1, 8, 8, dtype="bfloat16"), Device(node_size=1, network_bandwidth=5)) == "network: model"


# The command line and the document

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def shown():
    """Pairs of a command and the table below it."""
    pattern = r"python -m training\.scaling ((?:.*\\\n)*.*)\n```\n\n((?:\|.*\n)+)"
    return [pytest.param(command.replace("\\\n", ""), table) for command, table in re.findall(pattern, DOCUMENT)]


@pytest.mark.parametrize(("command", "table"), shown())
def test_the_tables_of_the_document(capsys, command, table):
    assert run(shlex.split(command)) == 0
    assert capsys.readouterr() == (table, "")


def test_the_document_has_tables():
    assert len(shown()) >= 3


def test_the_program_runs():
    command = [sys.executable, "-m", "training.scaling", "--n_params", "124M", "--devices", "1x1"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--n_params 7x --devices 1x1", ["7x", "124M"]),
        ("--n_params 0B --devices 1x1", ["0B"]),
        ("--n_params 1558M --devices 4x2", ["25 heads", "2 devices", "1, 5, 25"]),
        ("--n_params 7B --devices 4y2", ["4y2"]),
        ("--n_params 7B", ["--devices"]),
        ("--n_params 7B --devices 1x1 --utilization 2", ["'2'"]),
    ],
)
def test_mistakes(capsys, options, words):
    code = run(options.split())
    assert_mistake((code, *capsys.readouterr()), *words, script="training/scaling.py")
