"""Time one training step of ours and of transformers in turns, same shape and batch: python bench/train.py [ROUNDS]

A step is a forward pass, a backward pass and AdamW's update of every parameter, in float32, on two threads. The others
train transformers' GPT2LMHeadModel on PyTorch: in eager mode with AdamW's default implementation, with the fused one
(torch.optim.AdamW(fused=True)), and with forward and backward pass compiled too (torch.compile, which needs a C++
compiler). Each runs in its own process, so that its peak memory can be measured. Needs torch and transformers
(requirements-dev.txt). A speedup is the time of the other's step divided by ours; above 1, ours is faster.
"""

import contextlib
import functools
import json
import pathlib
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
from common import SIZE_124M, in_turn, machine, median, seconds, spread, table

from train import train_step
from training.checkpoint import State
from training.initialization import gpt2_deviation, initial_tensors
from training.options import PRESETS, Options
from training.plan import Plan, new_optimizer
from training.trainer import NumpyTrainer
from weights.names import tensor_shapes

THREADS, WARM_UP, UNTIL_EXIT = 2, 3, contextlib.ExitStack()
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
    trainer = NumpyTrainer(Plan("", options, state, None, hparams, new_optimizer(tensors, options), data))
    UNTIL_EXIT.enter_context(trainer.running())
    return lambda: train_step(trainer)


def their_step(hparams, chosen, fused=False, compiled=False):
    """Return a function that makes a step of transformers' GPT2LMHeadModel on random tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), chosen["dropout"])
    shape = {name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}
    config = GPT2Config(vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"], use_cache=False, **shape, **pdrop)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    size = (chosen["batch_size"], chosen["block_size"] + 1)

    def loss(ids):
        logits = model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss = torch.compile(loss) if compiled else loss

    def step():
        ids = torch.randint(0, hparams["n_vocab"], size)
        optimizer.zero_grad()
        loss(ids).backward()
        optimizer.step()

    return step


SIDES = {
    "ours": our_step,
    "transformers (eager)": their_step,
    "transformers (eager, fused AdamW)": functools.partial(their_step, fused=True),
    "transformers (torch.compile, fused AdamW)": functools.partial(their_step, fused=True, compiled=True),
}


def work(side, shape):
    """Worker main loop: for each line of standard input, make a step and print its seconds and the peak memory."""
    step = SIDES[side](*SHAPES[shape])
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


def rows(shape, rounds):
    """The table's rows for a shape, one per side, ours first."""
    workers = {side: Worker(side, shape) for side in SIDES}
    for worker in workers.values():
        for _ in range(WARM_UP):
            worker.step()
    results = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in in_turn(list(SIDES), turn):
            results[side].append(workers[side].step())
    for worker in workers.values():
        worker.stop()
    return [[shape, side, *columns(shape, results["ours"], results[side])] for side in SIDES]


def columns(shape, ours, theirs):
    """One row from (seconds, peak memory) of each round; a speedup is the median of the rounds' ratios."""
    chosen, spent = SHAPES[shape][1], median(seconds for seconds, _ in theirs)
    speedup = spread([b / a for (a, _), (b, _) in zip(ours, theirs, strict=True)])
    speed = chosen["batch_size"] * chosen["block_size"] / spent
    memory = max(peak for _, peak in theirs) / 2**30
    return [f"{1000 * spent:.0f}", "" if theirs is ours else speedup, f"{speed:.0f}", f"{memory:.2f}"]


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(*sys.argv[2:])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    versions = f"transformers {version('transformers')} on torch {version('torch')}"
    print(f"{machine()}; {versions}, {THREADS} threads, medians of {rounds} rounds in turns")
    head = ["shape", "engine", "ms per step", "speedup", "tokens/s", "peak GiB"]
    return table(head, [row for shape in SHAPES for row in rows(shape, rounds)])


if __name__ == "__main__":
    main()
