"""Baby GPT: eleven models from a table of letter pairs to GPT-2, each with a few more lines than the one before.

    python baby_gpt.py --stage attention    train the model of one stage on the characters of tinyshakespeare
    python baby_gpt.py --all                train all stages; print a table and draw the loss curves
    python baby_gpt.py --markov             train a GPT with two tokens; show it as a Markov chain (explain/markov.py)

The stages, the hyperparameters and their names are those of "BabyGPT, build GPT from scratch" (github.com/TatevKaren).
The layers are gpt2.py's where gpt2.py has them, and the last stages are gpt2() itself. This differs from the original:

- Attention scores are divided by sqrt(d_k), where d_k is the width of a query and a key (Vaswani et al. 2017, section
  3.2.1). The original divides by sqrt(d_model), which is too much: 2 times on the CPU, 5.7 times on the GPU.
- The output layer is the transposed token embedding, wte.T, as in GPT-2; the original has a separate matrix. The first
  two stages need no output layer: their wte is [n_vocab, n_vocab], and its rows are logits.
- One matrix, c_attn, [d_model, 3*h*d_k], computes queries, keys and values; another, c_proj, [h*d_k, d_model], projects
  the concatenated heads. h*d_k differs from d_model, as in the original's hyperparameters; the original's code does not
  use its d_k, but d_model // h.
- Every linear layer has a bias, and the activation function is gelu instead of relu.
"""

import math
import sys
import time
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from sampling import make_sampler
from training import fused
from training.adamw import AdamW
from training.autograd import value_and_gradients
from training.dataset import random_windows
from training.initialization import initial_tensors
from training.loss import estimate_loss
from training.memory import training_bytes
from weights.errors import UserError
from weights.names import n_params, nest

CPU = {
    "batch_size": 16,  # sequences per batch
    "block_size": 8,  # characters per sequence: the context length
    "d_model": 16,  # embedding size: gpt2.py's n_embd
    "d_k": 4,  # width of a query, a key and a value
    "Nx": 2,  # blocks
    "h": 2,  # heads
    "dropout_rate": 0.2,
    "lr_rate": 5e-3,
    "num_iter": 10000,  # training steps
    "eval_interval": 500,  # steps
    "eval_iters": 100,  # batches per evaluation
}
# The original's last stage has these. On one CPU core, a step takes 28 s and the whole training four days:
GPU = dict(zip(CPU, (64, 256, 512, 16, 6, 6, 0.2, 1e-3, 10000, 500, 200), strict=True))
# Instead, this takes two minutes and reaches a validation loss of 1.83:
SCALED_UP = {**CPU, "block_size": 64, "d_model": 96, "d_k": 16, "Nx": 3, "h": 6}
SCALED_UP |= {"dropout_rate": 0.1, "lr_rate": 2e-3, "num_iter": 3000}


# The stages: functions from token ids to logits. Parameters are named as in the checkpoint. `model` is the module gpt2,
# or fused.training_model(), which has the same functions.


def bigram(model, inputs, wte):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Return rows of wte, [n_vocab, n_vocab]: row i has the logits of the token that follows token i."""
    return wte[inputs]


def positions(model, inputs, wte, wpe):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Add a row of wpe, [block_size, n_vocab], for each position."""
    return model.embed(inputs, wte, wpe)


def unscaled_attention(model, q, k, v):  # [..., n_seq, d], [..., n_seq, d], [..., n_seq, d] -> [..., n_seq, d]
    """Causal dot-product attention, without the division by sqrt(d)."""
    scores = q @ np.swapaxes(k, -1, -2)  # [..., n_seq, d], [..., d, n_seq] -> [..., n_seq, n_seq]
    scores += (1 - np.tri(q.shape[-2], dtype=q.dtype)) * -1e10  # causal mask
    return model.softmax(scores) @ v


def one_head(model, x, c_attn, c_proj, attend):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Self-attention with one head of width d_k. attend: function of queries, keys and values."""
    q, k, v = np.split(model.linear(x, **c_attn), 3, axis=-1)  # -> [..., n_seq, d_k] each
    return model.linear(attend(q, k, v), **c_proj)


def attention(model, inputs, wte, wpe, attn):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """One head of self-attention on embeddings of size n_embd (d_model); wte.T is the output layer."""
    x = model.embed(inputs, wte, wpe)  # [..., n_seq] -> [..., n_seq, n_embd]
    x = one_head(model, x, **attn, attend=lambda q, k, v: unscaled_attention(model, q, k, v))
    return model.linear(x, wte.T, 0)


def scaled(model, inputs, wte, wpe, attn):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Divide the scores by sqrt(d_k), because the standard deviation of a dot product grows with sqrt(d_k)."""
    x = model.embed(inputs, wte, wpe)
    x = one_head(model, x, **attn, attend=model.attention)
    return model.linear(x, wte.T, 0)


def heads(model, inputs, wte, wpe, attn, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Several heads in parallel, each with its own queries, keys and values of width d_k."""
    x = model.embed(inputs, wte, wpe)
    x = model.mha(x, **attn, n_head=n_head)
    return model.linear(x, wte.T, 0)


def feed_forward(model, inputs, wte, wpe, attn, mlp, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """A feed-forward network after the attention."""
    x = model.embed(inputs, wte, wpe)
    x = model.mha(x, **attn, n_head=n_head)
    x = model.ffn(x, **mlp)
    return model.linear(x, wte.T, 0)


def blocks(model, inputs, wte, wpe, blocks, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Nx blocks of attention and feed-forward network."""
    x = model.embed(inputs, wte, wpe)
    for block in blocks:
        x = model.mha(x, **block["attn"], n_head=n_head)
        x = model.ffn(x, **block["mlp"])
    return model.linear(x, wte.T, 0)


def residual(model, inputs, wte, wpe, blocks, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Residual connections: the output of a layer is added to its input instead of replacing it."""
    x = model.embed(inputs, wte, wpe)
    for block in blocks:
        x = x + model.mha(x, **block["attn"], n_head=n_head)
        x = x + model.ffn(x, **block["mlp"])
    return model.linear(x, wte.T, 0)


def layer_norm(model, inputs, **params):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Layer normalization of the input of each layer: this is GPT-2."""
    return model.gpt2(inputs, **params)


STAGES = {
    stage.__name__: stage for stage in (bigram, positions, attention, scaled, heads, feed_forward, blocks, residual)
}
# The same function twice more: train() adds dropout, and scaled_up has other hyperparameters.
STAGES |= {"layer_norm": layer_norm, "dropout": layer_norm, "scaled_up": layer_norm}


def includes(stage, name):
    """Return whether a stage is the stage of this name or a later one."""
    return list(STAGES).index(stage) >= list(STAGES).index(name)


def shapes(stage, n_vocab, options):
    """Return the shapes of the tensors of a stage, by checkpoint name."""
    n_embd = options["d_model"] if includes(stage, "attention") else n_vocab
    d_heads = options["d_k"] * (options["h"] if includes(stage, "heads") else 1)
    model, block = {"wte": (n_vocab, n_embd)}, {}
    if includes(stage, "positions"):
        model["wpe"] = (options["block_size"], n_embd)
    if includes(stage, "attention"):
        block |= linear_shapes("attn/c_attn", n_embd, 3 * d_heads) | linear_shapes("attn/c_proj", d_heads, n_embd)
    if includes(stage, "feed_forward"):
        block |= linear_shapes("mlp/c_fc", n_embd, 4 * n_embd) | linear_shapes("mlp/c_proj", 4 * n_embd, n_embd)
    if includes(stage, "layer_norm"):
        block |= norm_shapes("ln_1", n_embd) | norm_shapes("ln_2", n_embd)
        model |= norm_shapes("ln_f", n_embd)
    scopes = [f"h{i}/" for i in range(options["Nx"])] if includes(stage, "blocks") else [""]
    return model | {scope + name: shape for scope in scopes for name, shape in block.items()}


def training_memory(stage, n_vocab, options):
    """Return a lower bound of the memory that training a stage takes, in bytes."""
    sizes = shapes(stage, n_vocab, options)
    n_layer = options["Nx"] if includes(stage, "blocks") else int(includes(stage, "attention"))
    n_head = options["h"] if includes(stage, "heads") else 1
    n_outputs = 2 * n_vocab + sum(shape[1] for name, shape in sizes.items() if name.endswith("/w"))
    n_tokens, n_scores = options["batch_size"] * options["block_size"], n_layer * n_head * options["block_size"]
    return training_bytes(n_params(sizes), n_layer, n_tokens, n_outputs, n_scores)


def linear_shapes(name, n_in, n_out):
    return {f"{name}/w": (n_in, n_out), f"{name}/b": (n_out,)}


def norm_shapes(name, n):
    return {f"{name}/g": (n,), f"{name}/b": (n,)}


def deviation(name, shape):
    """Return the standard deviation of the initial weights: 1/sqrt(n), where n is the length of the dot products."""
    n = shape[0] if name.endswith("/w") else shape[1]  # x @ w, x @ wte.T
    return n**-0.5


def arguments(stage, tensors, options):
    """Return the keyword arguments of a stage's function for tensors by checkpoint name."""
    params = nest(tensors, options["Nx"] if includes(stage, "blocks") else 0)
    if not includes(stage, "blocks"):
        del params["blocks"]
    return params | ({"n_head": options["h"]} if includes(stage, "heads") else {})


# Training, the same for every stage.


class Result(NamedTuple):
    stage: str
    n_params: int
    seconds: float
    curve: list  # (step, training loss, validation loss) per evaluation
    text: str  # a sample of the trained model


def train(stage, options, data, chars):
    """Train the model of one stage and return its Result.

    data: dict of arrays of token ids by split, "train" and "val". chars: string of the character of each token id.
    Raises UserError if the loss is not finite.
    """
    stage_shapes = shapes(stage, len(chars), options)
    tensors = initial_tensors(stage_shapes, options["seed"], deviation)
    params = arguments(stage, tensors, options)  # views of the tensors, which the optimizer updates in place
    eval_model = fused.training_model()
    model = fused.training_model(options["dropout_rate"] * includes(stage, "dropout"))
    model.drop.seed(options["seed"])
    optimizer, rng = AdamW(tensors), np.random.default_rng([options["seed"], 1])
    curve, started, n_steps = [], time.perf_counter(), options["num_iter"]

    def predict(inputs):
        return STAGES[stage](eval_model, inputs, **params)

    def train_step():
        inputs, targets = get_batch(data["train"], rng, options)

        def loss(leaves):
            return fused.cross_entropy(STAGES[stage](model, inputs, **arguments(stage, leaves, options)), targets)

        optimizer.update(value_and_gradients(loss, tensors)[1], options["lr_rate"])

    bar = tqdm(total=n_steps, desc=stage, unit="step", disable=None, leave=False)
    with bar, threadpool_limits(1), np.errstate(all="ignore"):  # matrices are too small for more than one thread
        for i in range(n_steps + 1):
            if i % options["eval_interval"] == 0 or i == n_steps:
                losses = [estimate_loss(predict, eval_batches(data[split], options)) for split in ("train", "val")]
                report = f"{stage}, step {i}: train loss {losses[0]:.4f}, validation loss {losses[1]:.4f}"
                if not math.isfinite(sum(losses)):
                    raise UserError(f"{report}: training diverged; set --lr_rate below {options['lr_rate']:g}")
                bar.write(report, file=sys.stderr)
                curve.append((i, *losses))
            if i < n_steps:
                train_step()
                bar.update()
    seconds = time.perf_counter() - started
    return Result(stage, n_params(stage_shapes), seconds, curve, sample(predict, chars, options))


def get_batch(tokens, rng, options):
    return random_windows(tokens, rng, options["batch_size"], options["block_size"])


def eval_batches(tokens, options):
    """Return an iterator over eval_iters random batches, the same on every call."""
    rng = np.random.default_rng([options["seed"], 2])
    return (get_batch(tokens, rng, options) for _ in range(options["eval_iters"]))


def sample(predict, chars, options, n=200):
    """Return n characters sampled from a model, with a context of block_size; the prompt is a line feed."""
    ids, choose = [max(0, chars.find("\n"))], make_sampler(temperature=1.0, seed=options["seed"])
    for _ in range(n):
        ids.append(int(choose(predict(np.array([ids[-options["block_size"] :]]))[0, -1])))
    return "".join(chars[i] for i in ids[1:])


if __name__ == "__main__":
    from cli.baby_gpt import run

    raise SystemExit(run())
