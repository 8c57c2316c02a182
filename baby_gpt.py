"""Baby GPT: from a table of letter pairs to GPT-2 in eleven rungs, each a few lines more and each a model that trains.

    python baby_gpt.py --rung attention     trains one rung on the characters of tinyshakespeare
    python baby_gpt.py --all                trains them all: a table on standard output, a picture of the curves
    python baby_gpt.py --markov             another baby, of 0s and 1s, which is a Markov chain (markov.py)

The rungs, the hyperparameters and their names are those of "BabyGPT, build GPT from scratch" (github.com/TatevKaren);
the parts are gpt2.py's wherever it has them, up to gpt2() itself in the last rungs. So this differs from the original:

- Scores are divided by sqrt(d_k), d_k the width of a query and a key (Vaswani et al. 2017, section 3.2.1). The original
  divides by sqrt(d_model): by the numbers it lists, 2 times too much on the CPU, 5.7 times on the GPU.
- The token embedding gives the logits too (wte.T), as in GPT-2, where the original has another matrix for them. The
  first two rungs have nothing between these two: there a token's row in the table is n_vocab wide, and is its logits.
- Queries, keys and values come from one matrix, c_attn, [d_model, 3*h*d_k]; c_proj, [h*d_k, d_model], leads back. The
  h heads of d_k do not fill d_model, as in the list of the original; its code takes d_model // h for d_k.
- Every matrix has offsets, and gelu is where the original's relu is.
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
from weights.errors import UserError
from weights.names import nest

CPU = {
    "batch_size": 16,  # pieces of text at a time
    "block_size": 8,  # characters in a piece: the context
    "d_model": 16,  # gpt2.py's n_embd: numbers that stand for a character
    "d_k": 4,  # width of a query, a key and a value
    "Nx": 2,  # blocks
    "h": 2,  # heads
    "dropout_rate": 0.2,
    "lr_rate": 5e-3,
    "num_iter": 10000,  # steps
    "eval_interval": 500,
    "eval_iters": 100,  # batches in an evaluation
}
# The original's last rung is the one before it with these. On one core of a CPU a step takes 28 s, all of it four days:
GPU = dict(zip(CPU, (64, 256, 512, 16, 6, 6, 0.2, 1e-3, 10000, 500, 200), strict=True))
# Instead, in two minutes, down to a validation loss of 1.83:
SCALED_UP = {**CPU, "block_size": 64, "d_model": 96, "d_k": 16, "Nx": 3, "h": 6}
SCALED_UP |= {"dropout_rate": 0.1, "lr_rate": 2e-3, "num_iter": 3000}


# The rungs, from token ids to logits. What a rung has is named as in the checkpoint; `model` has gpt2.py's functions.


def bigram(model, inputs, wte):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Row i of wte, [n_vocab, n_vocab], scores every token as the one to follow token i."""
    return wte[inputs]


def positions(model, inputs, wte, wpe):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """What follows depends on where a token stands, too: wpe is [block_size, n_vocab]."""
    return model.embed(inputs, wte, wpe)


def unscaled_attention(model, q, k, v):  # [..., n_seq, d], [..., n_seq, d], [..., n_seq, d] -> [..., n_seq, d]
    """Each position gathers from those before it and itself, most where its query and their key agree."""
    scores = q @ np.swapaxes(k, -1, -2)  # [..., n_seq, d], [..., d, n_seq] -> [..., n_seq, n_seq]
    scores += (1 - np.tri(q.shape[-2], dtype=q.dtype)) * -1e10  # what comes later cannot be seen
    return model.softmax(scores) @ v


def one_head(model, x, c_attn, c_proj, attend):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Queries, keys and values of width d_k, and back to n_embd."""
    q, k, v = np.split(model.linear(x, **c_attn), 3, axis=-1)  # -> [..., n_seq, d_k] each
    return model.linear(attend(q, k, v), **c_proj)


def attention(model, inputs, wte, wpe, attn):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """A token is n_embd (d_model) numbers now; what it gathers is compared with every token's own."""
    x = model.embed(inputs, wte, wpe)  # [..., n_seq] -> [..., n_seq, n_embd]
    x = one_head(model, x, **attn, attend=lambda q, k, v: unscaled_attention(model, q, k, v))
    return model.linear(x, wte.T, 0)


def scaled(model, inputs, wte, wpe, attn):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Scores are divided by sqrt(d_k): they are sums of d_k products, and spread as much more widely."""
    x = model.embed(inputs, wte, wpe)
    x = one_head(model, x, **attn, attend=model.attention)
    return model.linear(x, wte.T, 0)


def heads(model, inputs, wte, wpe, attn, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Several heads at once, each with a d_k of its own, gather different things."""
    x = model.embed(inputs, wte, wpe)
    x = model.mha(x, **attn, n_head=n_head)
    return model.linear(x, wte.T, 0)


def feed_forward(model, inputs, wte, wpe, attn, mlp, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """A network makes something of what each position has gathered."""
    x = model.embed(inputs, wte, wpe)
    x = model.mha(x, **attn, n_head=n_head)
    x = model.ffn(x, **mlp)
    return model.linear(x, wte.T, 0)


def blocks(model, inputs, wte, wpe, blocks, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """The two, Nx times over."""
    x = model.embed(inputs, wte, wpe)
    for block in blocks:
        x = model.mha(x, **block["attn"], n_head=n_head)
        x = model.ffn(x, **block["mlp"])
    return model.linear(x, wte.T, 0)


def residual(model, inputs, wte, wpe, blocks, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Each adds to what is there, and no longer replaces it."""
    x = model.embed(inputs, wte, wpe)
    for block in blocks:
        x = x + model.mha(x, **block["attn"], n_head=n_head)
        x = x + model.ffn(x, **block["mlp"])
    return model.linear(x, wte.T, 0)


def layer_norm(model, inputs, **params):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Each reads numbers of mean 0 and variance 1, scaled and offset: this is GPT-2."""
    return model.gpt2(inputs, **params)


RUNGS = {rung.__name__: rung for rung in (bigram, positions, attention, scaled, heads, feed_forward, blocks, residual)}
# dropout: of a model that drops, in train(); scaled_up: with other numbers
RUNGS |= {"layer_norm": layer_norm, "dropout": layer_norm, "scaled_up": layer_norm}


def has(rung, name):
    """Whether a rung is the one of this name or above it."""
    return list(RUNGS).index(rung) >= list(RUNGS).index(name)


def shapes(rung, n_vocab, options):
    """The shape of every tensor of a rung, by its name in the checkpoint."""
    n_embd = options["d_model"] if has(rung, "attention") else n_vocab
    d_heads = options["d_k"] * (options["h"] if has(rung, "heads") else 1)
    found, block = {"wte": (n_vocab, n_embd)}, {}
    if has(rung, "positions"):
        found["wpe"] = (options["block_size"], n_embd)
    if has(rung, "attention"):
        block |= matrix("attn/c_attn", n_embd, 3 * d_heads) | matrix("attn/c_proj", d_heads, n_embd)
    if has(rung, "feed_forward"):
        block |= matrix("mlp/c_fc", n_embd, 4 * n_embd) | matrix("mlp/c_proj", 4 * n_embd, n_embd)
    if has(rung, "layer_norm"):
        block |= norm("ln_1", n_embd) | norm("ln_2", n_embd)
        found |= norm("ln_f", n_embd)
    scopes = [f"h{i}/" for i in range(options["Nx"])] if has(rung, "blocks") else [""]
    return found | {scope + name: shape for scope in scopes for name, shape in block.items()}


def matrix(name, n_in, n_out):
    return {f"{name}/w": (n_in, n_out), f"{name}/b": (n_out,)}


def norm(name, n):
    return {f"{name}/g": (n,), f"{name}/b": (n,)}


def initial_tensors(rung, n_vocab, options):
    """Matrices normal with deviation 1/sqrt(n), n the numbers in each of their products; scales 1, offsets 0."""
    rng, tensors = np.random.default_rng(options["seed"]), {}
    for name, shape in shapes(rung, n_vocab, options).items():
        tensors[name] = np.full(shape, name.endswith("/g"), np.float32)
        if len(shape) > 1:
            n = shape[0] if name.endswith("/w") else shape[1]  # x @ w, x @ wte.T
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(n**-0.5)
    return tensors


def arrange(rung, tensors, options):
    """Tensors by checkpoint name to what a rung takes besides the inputs."""
    params = nest(tensors, options["Nx"] if has(rung, "blocks") else 0)
    if not has(rung, "blocks"):
        del params["blocks"]
    return params | ({"n_head": options["h"]} if has(rung, "heads") else {})


# Training, the same for every rung.


class Result(NamedTuple):
    rung: str
    n_params: int
    seconds: float
    curve: list  # of each evaluation: step, loss on the training text, loss on the validation text
    text: str  # written by the trained model


def train(rung, options, data, chars):
    """data: arrays of ids by split; chars: the character of each id. Raises UserError where the loss is not finite."""
    tensors = initial_tensors(rung, len(chars), options)
    params = arrange(rung, tensors, options)  # of the same memory: each update shows there
    plain, model = fused.training_model(), fused.training_model(options["dropout_rate"] * has(rung, "dropout"))
    model.drop.seed(options["seed"])
    optimizer, rng = AdamW(tensors), np.random.default_rng([options["seed"], 1])
    curve, started, last = [], time.perf_counter(), options["num_iter"]

    def predict(inputs):
        return RUNGS[rung](plain, inputs, **params)

    def step():
        inputs, targets = get_batch(data["train"], rng, options)

        def loss(leaves):
            return fused.cross_entropy(RUNGS[rung](model, inputs, **arrange(rung, leaves, options)), targets)

        optimizer.update(value_and_gradients(loss, tensors)[1], options["lr_rate"])

    bar = tqdm(total=last, desc=rung, unit="step", disable=None, leave=False)
    with bar, threadpool_limits(1), np.errstate(all="ignore"):  # matrices this small: more threads mostly wait
        for i in range(last + 1):
            if i % options["eval_interval"] == 0 or i == last:
                losses = [estimate_loss(predict, data[split], options) for split in ("train", "val")]
                report = f"{rung}, step {i}: train loss {losses[0]:.4f}, validation loss {losses[1]:.4f}"
                if not math.isfinite(sum(losses)):
                    raise UserError(f"{report}: it diverged; set --lr_rate below {options['lr_rate']:g}")
                bar.write(report, file=sys.stderr)
                curve.append((i, *losses))
            if i < last:
                step()
                bar.update()
    seconds, n_params = time.perf_counter() - started, sum(array.size for array in tensors.values())
    return Result(rung, n_params, seconds, curve, sample(predict, chars, options))


def get_batch(tokens, rng, options):
    return random_windows(tokens, rng, options["batch_size"], options["block_size"])


def estimate_loss(predict, tokens, options):
    """The mean loss of eval_iters random batches, nothing dropped: the same batches each time, and for every rung."""
    rng, n = np.random.default_rng([options["seed"], 2]), options["eval_iters"]
    batches = (get_batch(tokens, rng, options) for _ in range(n))
    return sum(float(fused.cross_entropy(predict(inputs), targets)) for inputs, targets in batches) / n


def sample(predict, chars, options, n=200):
    """n characters, each drawn from what the model says after the block_size before it; a line feed comes first."""
    ids, choose = [max(0, chars.find("\n"))], make_sampler(temperature=1.0, seed=options["seed"])
    for _ in range(n):
        ids.append(int(choose(predict(np.array([ids[-options["block_size"] :]]))[0, -1])))
    return "".join(chars[i] for i in ids[1:])


if __name__ == "__main__":
    from cli.baby_gpt import run

    raise SystemExit(run())
