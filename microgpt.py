"""Train a GPT and sample from it with Python's standard library alone: python microgpt.py

It learns names, letter by letter. Model, hyperparameters and losses are those of Karpathy's microGPT (2026).
"""

import argparse
import hashlib
import itertools
import math
import os
import pathlib
import random
import sys
from urllib.request import urlopen

N_LAYER, N_EMBD, N_HEAD, N_CTX = 1, 16, 4, 16  # blocks, embedding size, heads, context length
BOS, NAMES = "\n", pathlib.Path("data/names.txt")  # the token before and after each document; the documents
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
serial_numbers = itertools.count()


class Value:
    """A float that records how it was computed: its parents, and its derivative with respect to each of them."""

    def __init__(self, data, parents=(), local_grads=()):
        self.data, self.parents, self.local_grads = data, parents, local_grads
        self.grad, self.number = 0.0, next(serial_numbers)  # the parents have lower numbers

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, n):  # n: a float, not a Value
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),))

    def exp(self):
        return Value(y := math.exp(self.data), (self,), (y,))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def backward(self):
        """Add d self / d v to v.grad for every Value v that self depends on, by the chain rule."""
        nodes, new, self.grad = {self}, {self}, 1.0  # nodes: self and those it depends on, except those without parents
        while new:  # a loop, because the graph is deeper than Python's recursion limit
            new = {parent for v in new for parent in v.parents if parent.parents} - nodes
            nodes |= new
        for v in sorted(nodes, key=lambda v: v.number, reverse=True):  # v.grad is complete when v is reached
            for parent, local_grad in zip(v.parents, v.local_grads, strict=True):
                parent.grad += local_grad * v.grad


def dot(a, b):  # [n], [n] -> sum(a[i] * b[i]) as one Value, ten times faster than with 2n from + and *
    a_data, b_data = [v.data for v in a], [v.data for v in b]
    return Value(sum(x * y for x, y in zip(a_data, b_data, strict=True)), (*a, *b), (*b_data, *a_data))


def linear(x, w):  # [n_in], [n_out, n_in] -> [n_out]: matrix-vector product
    return [dot(row, x) for row in w]


def softmax(x):  # [n] -> [n]: positive, with sum 1
    largest = max(v.data for v in x)  # subtracted so that exp cannot overflow
    exps = [(v + -largest).exp() for v in x]
    scale = sum(exps, Value(0.0)) ** -1
    return [v * scale for v in exps]


def rms_norm(x):  # [n] -> [n]: x divided by its root mean square (Zhang & Sennrich 2019, equation 4)
    scale = (dot(x, x) * (1 / len(x)) + 1e-5) ** -0.5
    return [v * scale for v in x]


def attention(x, keys, values, wq, wk, wv, wo):  # [n_embd] -> [n_embd] (Vaswani et al. 2017, section 3.2)
    d, q, mixed = N_EMBD // N_HEAD, linear(x, wq), []  # size of a head, query, outputs of the heads
    keys.append(linear(x, wk))  # keys and values of all positions so far
    values.append(linear(x, wv))
    for head in (slice(i, i + d) for i in range(0, N_EMBD, d)):  # d elements of query, keys and values per head
        weights = softmax([dot(q[head], k[head]) * d**-0.5 for k in keys])  # [n_seq]: the attention weights
        mixed += [dot(weights, column) for column in zip(*(v[head] for v in values), strict=True)]
    return linear(mixed, wo)


def gpt(token, model, cache):  # -> [n_vocab]
    """Return the logits of the next token and append this token's keys and values to the cache, two lists per block."""
    x = rms_norm([a + b for a, b in zip(model["wte"][token], model["wpe"][len(cache[0][0])], strict=True)])
    for i, (keys, values) in enumerate(cache):
        wq, wk, wv, wo, c_fc, c_proj = (model[f"h{i}.{name}"] for name in ("wq", "wk", "wv", "wo", "c_fc", "c_proj"))
        x = [a + b for a, b in zip(x, attention(rms_norm(x), keys, values, wq, wk, wv, wo), strict=True)]
        hidden = [v * (v.data > 0) for v in linear(rms_norm(x), c_fc)]  # relu
        x = [a + b for a, b in zip(x, linear(hidden, c_proj), strict=True)]
    return linear(x, model["lm_head"])


def new_model(n_vocab):  # random matrices by name: token and position embeddings, output layer, blocks
    shapes = {"wte": (n_vocab, N_EMBD), "wpe": (N_CTX, N_EMBD), "lm_head": (n_vocab, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"h{i}.{name}": (N_EMBD, N_EMBD) for name in ("wq", "wk", "wv", "wo")}
        shapes |= {f"h{i}.c_fc": (4 * N_EMBD, N_EMBD), f"h{i}.c_proj": (N_EMBD, 4 * N_EMBD)}
    return {k: [[Value(random.gauss(0, 0.08)) for _ in range(n)] for _ in range(m)] for k, (m, n) in shapes.items()}


def mean_loss(tokens, model):  # mean of -log p(token) over all tokens but the first, each given the earlier ones
    cache = [([], []) for _ in range(N_LAYER)]  # keys and values of each block
    logs = [softmax(gpt(token, model, cache))[target].log() for token, target in itertools.pairwise(tokens)]
    return sum(logs, Value(0.0)) * (-1 / len(logs))


def train(docs, model, params, steps, learning_rate=0.01, beta1=0.85, beta2=0.99, eps=1e-8):
    """Train with Adam (Kingma & Ba 2015, algorithm 1), one document per step, linear decay to 0; yield each loss."""
    m, v = [0.0] * len(params), [0.0] * len(params)
    for step in range(steps):
        loss = mean_loss(docs[step % len(docs)], model)
        loss.backward()
        for i, p in enumerate(params):
            m[i] = beta1 * m[i] + (1 - beta1) * p.grad
            v[i] = beta2 * v[i] + (1 - beta2) * p.grad**2
            m_hat, v_hat = m[i] / (1 - beta1 ** (step + 1)), v[i] / (1 - beta2 ** (step + 1))
            p.data, p.grad = p.data - learning_rate * (1 - step / steps) * m_hat / (v_hat**0.5 + eps), 0.0
        yield loss.data


def check_gradients(tokens, model, h=1e-5):  # True if the largest gradients of each matrix agree with differences
    mean_loss(tokens, model).backward()
    errors = []
    for name, matrix in model.items():
        for p in sorted(itertools.chain(*matrix), key=lambda p: -abs(p.grad))[:3]:
            x = p.data
            low, high = (mean_loss(tokens, model).data for p.data in (x - h, x + h))
            p.data, numeric = x, (high - low) / (2 * h)
            errors.append(abs(p.grad - numeric) / (max(abs(p.grad), abs(numeric)) or 1))
            print(f"{name:9} backward() {p.grad:13.10f}  difference {numeric:13.10f}  relative error {errors[-1]:.1e}")
    print(f"largest relative error: {max(errors):.1e} (rounding explains up to 1e-6)")
    return all(error <= 1e-6 for error in errors)


def sample(chars, model, temperature):  # a new document; a temperature below 1 favors the most likely tokens
    cache, char, text = [([], []) for _ in range(N_LAYER)], BOS, ""
    while char and len(text) < N_CTX:
        probs = softmax([v * (1 / temperature) for v in gpt(chars.index(char), model, cache)])
        text += (char := random.choices(chars, [p.data for p in probs])[0].strip(BOS))
    return text


def read_docs(path):  # lines of a UTF-8 text; names.txt is downloaded if it is missing, and its hash is checked
    content = path.read_bytes() if path != NAMES or path.exists() else urlopen(URL, timeout=30).read(2**20)
    if path == NAMES and (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"SHA-256 is {found}, not {SHA256}; delete the file, if there is one, to download it again")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".tmp").write_bytes(content)
        path.with_suffix(".tmp").replace(path)
    if not (docs := [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]):
        raise ValueError("the file has no text")
    return docs


def main(argv=None):
    parser = argparse.ArgumentParser(prog="microgpt.py", allow_abbrev=False, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="training steps, one document per step (default 1000)")
    add("--seed", type=int, default=42, help="seed of the random numbers (default 42)")
    add("--temperature", type=float, default=0.5, help="below 1: likely letters become more likely (default 0.5)")
    add("--n_samples", type=int, default=20, help="number of names to generate (default 20)")
    add("--data", type=pathlib.Path, default=NAMES, help="text with one document per line (default data/names.txt)")
    add("--check_gradients", action="store_true", help="compare gradients with finite differences and exit")
    options = parser.parse_args(argv)
    for name, least in {"steps": 1, "n_samples": 1, "temperature": 0.001}.items():
        if not least <= vars(options)[name] < math.inf:
            parser.error(f"--{name} {vars(options)[name]}: must be a finite number, at least {least}")
    try:
        docs = read_docs(options.data)
    except Exception as error:
        parser.error(f"{options.data}: {error}; use another text with --data FILE, or save {URL} as {NAMES}")
    random.seed(options.seed)
    random.shuffle(docs)
    chars = [*sorted(set("".join(docs))), BOS]  # the tokens; the id of a token is its index
    docs = [[chars.index(char) for char in (BOS, *doc, BOS)[: N_CTX + 1]] for doc in docs]  # truncated to the context
    model = new_model(len(chars))
    params = [p for matrix in model.values() for row in matrix for p in row]
    print(f"num docs: {len(docs)}\nvocab size: {len(chars)}\nnum params: {len(params)}")
    if options.check_gradients:
        parser.exit(not check_gradients(docs[0], model))
    for step, loss in enumerate(train(docs, model, params, options.steps), 1):
        print(f"step {step:4d} / {options.steps:4d} | loss {loss:.10f}", flush=True)
    for i in range(options.n_samples):
        print(f"sample {i + 1:2d}: {sample(chars, model, options.temperature)}", flush=True)


if __name__ == "__main__":
    try:
        sys.stdout and sys.stdout.reconfigure(errors="replace")  # if the terminal cannot show a letter
        main()
    except (KeyboardInterrupt, BrokenPipeError) as stop:  # Ctrl-C, or the output pipe was closed
        os._exit(130 if isinstance(stop, KeyboardInterrupt) else 141)
