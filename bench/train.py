"""Time one training step of ours and of PyTorch in turns, same shape and batch: python bench/train.py [ROUNDS]

A step is a forward pass, a backward pass and AdamW's update of every parameter, in float32, on two threads. Each side
runs in its own process, so that its peak memory can be measured; PyTorch runs transformers' GPT2LMHeadModel in eager
mode. Needs torch and transformers (requirements-dev.txt).
"""

import contextlib
import json
import pathlib
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
from common import SIZE_124M, machine, median, seconds, spread, table

from train import train_step
from training.checkpoint import State
from training.initialization import gpt2_deviation, initial_tensors
from training.options import PRESETS, Options
from training.plan import Plan, new_optimizer
from training.trainer import Trainer
from weights.names import tensor_shapes

THREADS, UNTIL_EXIT = 2, contextlib.ExitStack()
SHAPES = {"124M, 4 x 64": (SIZE_124M, {"batch_size": 4, "block_size": 64, "dropout": 0.0})}
for preset in ("3min", "1h"):
    options = PRESETS[preset]
    hparams = {name: options[name] for name in ("n_embd", "n_head", "n_layer")}
    hparams |= {"n_vocab": options["vocab_size"], "n_ctx": options["block_size"]}
    chosen = {name: options[name] for name in ("batch_size", "block_size", "dropout")}
    SHAPES[f"preset {preset}, {options['batch_size']} x {options['block_size']}"] = hparams, chosen


def our_step(hparams, chosen):
    """Return a function that makes a step of train.py on random tokens."""
    data = {"train": np.random.default_rng(0).integers(0, hparams["n_vocab"], 9999, dtype=np.uint16)}
    options = PRESETS["3min"] | chosen | {"threads": THREADS, "grad_clip": 0.0}
    options = Options(name="bench", dataset="random", **options)
    tensors = initial_tensors(tensor_shapes(**hparams), 0, gpt2_deviation(hparams["n_layer"]))
    state = State(tokens={"train": 9999}, val_chars_per_token=1.0)
    trainer = Trainer(Plan("", options, state, None, hparams, new_optimizer(tensors, options), data))
    UNTIL_EXIT.enter_context(trainer.threads())
    return lambda: train_step(trainer)


def their_step(hparams, chosen):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), chosen["dropout"])
    shape = {name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}
    config = GPT2Config(vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"], use_cache=False, **shape, **pdrop)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = (chosen["batch_size"], chosen["block_size"] + 1)

    def step():
        ids = torch.randint(0, hparams["n_vocab"], size)
        optimizer.zero_grad()
        logits = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def work(side, shape):
    """Worker main loop: for each line of standard input, make a step and print its seconds and the peak memory."""
    step = (our_step if side == "ours" else their_step)(*SHAPES[shape])
    for _ in sys.stdin:
        print(json.dumps([seconds(step), peak_memory()]), flush=True)


def peak_memory():
    """Return the peak memory of this process in bytes (Linux; getrusage would include the parent's)."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


class Worker:
    def __init__(self, side, shape):
        command = [sys.executable, __file__, "--worker", side, shape]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def row(shape, rounds):
    ours, theirs = Worker("ours", shape), Worker("theirs", shape)
    for worker in (ours, theirs):
        worker.step()
        worker.step()
    pairs = []
    for turn in range(rounds):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        results = {worker: worker.step() for worker in order}
        pairs.append((results[ours], results[theirs]))
    for worker in (ours, theirs):
        worker.stop()
    a, b = (median(pair[side][0] for pair in pairs) for side in (0, 1))
    memory = [max(pair[side][1] for pair in pairs) / 2**30 for side in (0, 1)]
    _, chosen = SHAPES[shape]
    tokens = chosen["batch_size"] * chosen["block_size"]
    return [
        shape,
        f"{1000 * a:.0f}",
        f"{1000 * b:.0f}",
        spread([pair[1][0] / pair[0][0] for pair in pairs]),
        f"{tokens / a:.0f}",
        f"{tokens / b:.0f}",
        f"{memory[0]:.2f}",
        f"{memory[1]:.2f}",
    ]


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(*sys.argv[2:])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print(f"{machine()}; torch {version('torch')}, {THREADS} threads, medians of {rounds} rounds in turns")
    head = [
        "shape",
        "ms per step: ours",
        "theirs",
        "speedup",
        "tokens/s: ours",
        "theirs",
        "peak GiB: ours",
        "theirs",
    ]
    return table(head, [row(shape, rounds) for shape in SHAPES])


if __name__ == "__main__":
    main()
