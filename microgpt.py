"""A whole GPT, trained and sampled, with Python's standard library alone: python microgpt.py

It learns from 32,033 names which letter comes next, and makes up new ones. All arithmetic is on single numbers: slow,
and nothing is hidden. Model, settings and losses are those of Karpathy's microGPT (2026).
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

N_LAYER, N_EMBD, N_HEAD, N_CTX = 1, 16, 4, 16  # blocks, numbers that stand for a token, heads, positions
BOS, NAMES = "\n", pathlib.Path("data/names.txt")  # the token that begins and ends each document; the documents
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
numbers = itertools.count()


class Value:
    """A number that remembers what it was made of: its parents, and the derivative of itself by each of them."""

    def __init__(self, data, parents=(), local_grads=()):
        self.data, self.parents, self.local_grads = data, parents, local_grads
        self.grad, self.number = 0.0, next(numbers)  # made after its parents, it has a higher number

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, n):  # n: a plain number
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),))

    def exp(self):
        return Value(y := math.exp(self.data), (self,), (y,))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def backward(self):
        """Adds d self / d v to v.grad for every Value v that self was made of: the chain rule, from self backwards."""
        made, new, self.grad = {self}, {self}, 1.0  # made: all of these but the ones that were made of nothing
        while new:  # a loop, for a recursion would end at Python's depth of 1000
            new = {parent for v in new for parent in v.parents if parent.parents} - made
            made |= new
        for v in sorted(made, key=lambda v: v.number, reverse=True):  # each when all that was made of it is done
            for parent, local_grad in zip(v.parents, v.local_grads, strict=True):
                parent.grad += local_grad * v.grad


def dot(a, b):  # [n], [n] -> sum(a[i] * b[i]) as one Value; + and * make 2n, and take ten times as long (bench/)
    a_data, b_data = [v.data for v in a], [v.data for v in b]
    return Value(sum(x * y for x, y in zip(a_data, b_data, strict=True)), (*a, *b), (*b_data, *a_data))


def linear(x, w):  # [n_in], [n_out, n_in] -> [n_out]: a weighted sum of x for each row of weights
    return [dot(row, x) for row in w]


def softmax(x):  # [n] -> [n], positive, of sum 1
    largest = max(v.data for v in x)  # subtracted, so that no exponential overflows
    exps = [(v + -largest).exp() for v in x]
    scale = sum(exps, Value(0.0)) ** -1
    return [v * scale for v in exps]


def rms_norm(x):  # [n] -> [n], of root mean square 1 (Zhang & Sennrich 2019, equation 4)
    scale = (dot(x, x) * (1 / len(x)) + 1e-5) ** -0.5
    return [v * scale for v in x]


def attention(x, keys, values, wq, wk, wv, wo):  # [n_embd] -> [n_embd] (Vaswani et al. 2017, section 3.2)
    d, q, mixed = N_EMBD // N_HEAD, linear(x, wq), []  # q: what this position looks for
    keys.append(linear(x, wk))  # what it is found by, behind the keys of those before it
    values.append(linear(x, wv))  # what it then gives
    for head in (slice(i, i + d) for i in range(0, N_EMBD, d)):  # each has its own d numbers of q, keys and values
        weights = softmax([dot(q[head], k[head]) * d**-0.5 for k in keys])  # [n_seq]: how well each key fits
        mixed += [dot(weights, column) for column in zip(*(v[head] for v in values), strict=True)]
    return linear(mixed, wo)


def gpt(token, model, cache):  # -> [n_vocab]
    """Scores (logits) for each token to be the next one, after this one and those whose keys are in the cache."""
    x = rms_norm([a + b for a, b in zip(model["wte"][token], model["wpe"][len(cache[0][0])], strict=True)])
    for i, (keys, values) in enumerate(cache):
        wq, wk, wv, wo, c_fc, c_proj = (model[f"h{i}.{name}"] for name in ("wq", "wk", "wv", "wo", "c_fc", "c_proj"))
        x = [a + b for a, b in zip(x, attention(rms_norm(x), keys, values, wq, wk, wv, wo), strict=True)]
        hidden = [v * (v.data > 0) for v in linear(rms_norm(x), c_fc)]  # relu: 0 for what is negative
        x = [a + b for a, b in zip(x, linear(hidden, c_proj), strict=True)]
    return linear(x, model["lm_head"])


def new_model(n_vocab):  # random matrices by name: embeddings of tokens and positions, the last layer, the blocks
    shapes = {"wte": (n_vocab, N_EMBD), "wpe": (N_CTX, N_EMBD), "lm_head": (n_vocab, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"h{i}.{name}": (N_EMBD, N_EMBD) for name in ("wq", "wk", "wv", "wo")}
        shapes |= {f"h{i}.c_fc": (4 * N_EMBD, N_EMBD), f"h{i}.c_proj": (N_EMBD, 4 * N_EMBD)}
    return {k: [[Value(random.gauss(0, 0.08)) for _ in range(n)] for _ in range(m)] for k, (m, n) in shapes.items()}


def mean_loss(tokens, model):  # the mean of -log p(token), for each token but the first, given those before it
    cache = [([], []) for _ in range(N_LAYER)]  # the keys and values of each block: none yet
    logs = [softmax(gpt(token, model, cache))[target].log() for token, target in itertools.pairwise(tokens)]
    return sum(logs, Value(0.0)) * (-1 / len(logs))


def train(docs, model, params, steps, rate=0.01, beta1=0.85, beta2=0.99, eps=1e-8):
    """Yields the loss of a document, then takes a step of Adam (Kingma & Ba 2015, algorithm 1); the rate falls to 0."""
    m, v = [0.0] * len(params), [0.0] * len(params)
    for step in range(steps):
        loss = mean_loss(docs[step % len(docs)], model)
        loss.backward()
        for i, p in enumerate(params):
            m[i] = beta1 * m[i] + (1 - beta1) * p.grad
            v[i] = beta2 * v[i] + (1 - beta2) * p.grad**2
            m_hat, v_hat = m[i] / (1 - beta1 ** (step + 1)), v[i] / (1 - beta2 ** (step + 1))
            p.data, p.grad = p.data - rate * (1 - step / steps) * m_hat / (v_hat**0.5 + eps), 0.0
        yield loss.data


def check_gradients(tokens, model, h=1e-5):  # whether the largest derivatives of each matrix agree with differences
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


def sample(chars, model, temperature):  # a new document; the lower the temperature, the likelier the likely tokens
    cache, char, text = [([], []) for _ in range(N_LAYER)], BOS, ""
    while char and len(text) < N_CTX:
        probs = softmax([v * (1 / temperature) for v in gpt(chars.index(char), model, cache)])
        text += (char := random.choices(chars, [p.data for p in probs])[0].strip(BOS))
    return text


def read_docs(path):  # the lines of a UTF-8 text; names.txt is downloaded where it is missing, and its hash is checked
    content = path.read_bytes() if path != NAMES or path.exists() else urlopen(URL, timeout=30).read(2**20)
    if path == NAMES and (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"sha256 is {found}, not {SHA256}: remove the file if it is there, to fetch it anew")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".tmp").write_bytes(content)
        path.with_suffix(".tmp").replace(path)
    if not (docs := [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]):
        raise ValueError("no text in it")
    return docs


def main(argv=None):
    parser = argparse.ArgumentParser(prog="microgpt.py", allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=1000, help="training steps, a document each (default 1000)")
    parser.add_argument("--seed", type=int, default=42, help="of all random numbers (default 42)")
    parser.add_argument("--temperature", type=float, default=0.5, help="1: draw as learned, 0.1: tamer (default 0.5)")
    parser.add_argument("--n_samples", type=int, default=20, help="names to make up (default 20)")
    parser.add_argument("--data", type=pathlib.Path, default=NAMES, help="text, a document a line (default names.txt)")
    parser.add_argument("--check_gradients", action="store_true", help="hold derivatives against differences, no more")
    options = parser.parse_args(argv)
    for name, least in {"steps": 1, "n_samples": 1, "temperature": 0.001}.items():
        if not least <= vars(options)[name] < math.inf:
            parser.error(f"--{name} {vars(options)[name]} is not a number from {least} up")
    try:
        docs = read_docs(options.data)
    except Exception as error:
        parser.error(f"{options.data}: {error}; --data FILE takes another text, and {NAMES} is from {URL}")
    random.seed(options.seed)
    random.shuffle(docs)
    chars = [*sorted(set("".join(docs))), BOS]  # the tokens; the id of each is its place here
    docs = [[chars.index(char) for char in (BOS, *doc, BOS)[: N_CTX + 1]] for doc in docs]  # longer ones are cut
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
        sys.stdout and sys.stdout.reconfigure(errors="replace")  # where the terminal lacks a letter
        main()
    except (KeyboardInterrupt, BrokenPipeError) as stop:  # Ctrl-C, or the reader of the output has gone
        os._exit(130 if isinstance(stop, KeyboardInterrupt) else 141)
