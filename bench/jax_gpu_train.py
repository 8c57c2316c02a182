"""Training with JAX on a GPU, beside nanoGPT: python bench/jax_gpu_train.py --nanogpt PATH. Not run on a GPU yet.

PATH is a checkout of github.com/karpathy/nanoGPT, which is not part of this repository. Needs what jax_gpu.py needs.
With --shape tiny it also runs on the CPU, which shows that the script works and nothing else.

A step updates every parameter once, from --accumulation batches of --batch_size windows of random tokens. Ours is that
of train.py --engine jax --preset 124M. nanoGPT's is that of its train.py with its defaults: no biases, 50304 tokens,
torch.compile, autocast to bfloat16, fused AdamW, clipping; float32 on the CPU. The sides take turns within each round,
after steps that compile. A speedup is nanoGPT's time divided by ours; above 1, ours is faster. The share of the GPU's
peak counts operations as nanoGPT does: 6N + 12LHQT per token, without recomputation and for N without wpe.
"""

import argparse
import contextlib
import sys

import jax
import numpy as np
import torch
from common import in_turn, median, seconds, spread, table
from jax_gpu import DEVICE, SHAPES, machine_line

from engines.jax_engine import use_compilation_cache
from train import train_step
from training.checkpoint import State
from training.initialization import gpt2_deviation, initial_tensors
from training.jax_trainer import JaxTrainer
from training.options import PRESETS, Options
from training.plan import Plan, new_optimizer
from weights.names import count_params, tensor_shapes

PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312}  # bfloat16, dense, by part of the GPU's name
GOALS = "Goals on an H200, 124M: > 300,000 tokens/s and speedup >= 0.9"
N_STEPS = 5  # of each turn


def jax_train_step(hparams, data, options):
    """Return a step of train.py, which ends with the loss on the host."""
    chosen = {"batch_size": options.batch_size, "gradient_accumulation_steps": options.accumulation}
    settings = Options(name="bench", dataset="random", **PRESETS["124M"] | chosen | {"block_size": hparams["n_ctx"]})
    tensors = initial_tensors(tensor_shapes(**hparams), 0, gpt2_deviation(hparams["n_layer"]))
    state = State(tokens={"train": len(data)}, val_chars_per_token=1.0)
    optimizer = new_optimizer(tensors, settings)
    trainer = JaxTrainer(Plan("", settings, state, None, hparams, optimizer, {"train": data}), (1, 1))
    return lambda: train_step(trainer)


def nanogpt_train_step(hparams, data, options):
    """Return a step of nanoGPT's train.py, which does not wait for the GPU."""
    sys.path.insert(0, options.nanogpt)
    from model import GPT, GPTConfig

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sizes = {name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}
    n_ctx, n_vocab = hparams["n_ctx"], -(-hparams["n_vocab"] // 64) * 64
    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(GPTConfig(block_size=n_ctx, vocab_size=n_vocab, bias=False, **sizes)).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), DEVICE)
    compiled, scaler = torch.compile(model), torch.amp.GradScaler(DEVICE, enabled=False)
    autocast = torch.autocast(DEVICE, torch.bfloat16) if DEVICE == "cuda" else contextlib.nullcontext()

    def new_batch():
        starts = torch.randint(len(data) - n_ctx, (options.batch_size,)).tolist()
        windows = (np.stack([data[i + k : i + k + n_ctx] for i in starts]).astype(np.int64) for k in (0, 1))
        batch = map(torch.from_numpy, windows)
        return [a.pin_memory().to(DEVICE, non_blocking=True) for a in batch] if DEVICE == "cuda" else list(batch)

    batch = new_batch()

    def step():
        nonlocal batch
        for _ in range(options.accumulation):
            with autocast:
                _, loss = compiled(*batch)
            batch = new_batch()  # while the GPU computes
            scaler.scale(loss / options.accumulation).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_seconds(step):
    """Return the seconds per step of several in a row."""

    def steps():
        for _ in range(N_STEPS):
            step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return seconds(steps) / N_STEPS


def rows(sides, hparams, options):
    """Return the rows of the table, one per side, ours first."""
    for step in sides.values():
        step_seconds(step)  # untimed: compiles
    results = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in in_turn(list(sides), turn):
            results[name].append(step_seconds(sides[name]))
    return [[options.shape, name, *columns(results["this program"], results[name], hparams, options)] for name in sides]


def columns(ours, theirs, hparams, options):
    """One row from the seconds of each round; a speedup is the median of the rounds' ratios."""
    n_ctx, n_embd = hparams["n_ctx"], hparams["n_embd"]
    speed = options.batch_size * options.accumulation * n_ctx / median(theirs)  # tokens per second
    flops = 6 * (count_params(**hparams) - n_ctx * n_embd) + 12 * hparams["n_layer"] * n_embd * n_ctx  # per token
    speedup = "" if theirs is ours else spread([b / a for a, b in zip(ours, theirs, strict=True)])
    peak = options.peak_tflops
    share = f"{speed * flops / (peak * 1e12):.1%}" if peak else ""
    return [f"{1000 * median(theirs):.1f}", speedup, f"{speed:.0f}", share]


def main():
    kind = jax.devices()[0].device_kind
    known = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in kind), None)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT; without it, ours alone")
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--batch_size", type=int, default=32, help="windows per batch")
    parser.add_argument("--accumulation", type=int, default=4, help="batches per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peak_tflops", type=float, default=known, help="of the GPU in bfloat16 (default: by its name)"
    )
    options = parser.parse_args()
    print(machine_line(options.rounds))
    use_compilation_cache()
    hparams = SHAPES[options.shape]
    data = np.random.default_rng(0).integers(0, hparams["n_vocab"], 10**7, dtype=np.uint16)
    sides = {"this program": jax_train_step(hparams, data, options)}
    if options.nanogpt:
        sides["nanoGPT (torch.compile)"] = nanogpt_train_step(hparams, data, options)
    head = ["shape", "engine", "ms per step", "speedup", "tokens/s", "share of peak"]
    table(head, rows(sides, hparams, options))
    print(GOALS)


if __name__ == "__main__":
    main()
