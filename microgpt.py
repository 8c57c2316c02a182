"""A GPT in pure Python, after Andrej Karpathy's microGPT (2026): python microgpt.py

It learns names, letter by letter. The idea, the model and the hyperparameters are microGPT's, and so are the results.
"""

import argparse
import hashlib
import itertools
import math
import os
import pathlib
import random
import sys
import tempfile
from urllib.request import urlopen

N_LAYER, N_EMBD, N_HEAD, N_CTX = 1, 16, 4, 16  # blocks, embedding size, heads, context length
BOS, NAMES = "\n", pathlib.Path("data/names.txt")  # the token before and after each document; the documents
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
tape = []  # the Values of the sequence so far, in the order in which they were computed


class Value:  # a number, the operands it was computed from, and its slopes: its derivative with respect to each of them
    def __init__(self, data, operands=(), slopes=()):
        self.data, self.grad, self.operands, self.slopes = data, 0.0, operands, slopes
        tape.append(self)

    def __add__(self, other):
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def backward(self):
        """Add d self / d x to x.grad for every Value x on the tape and every parameter; self is the newest Value."""
        self.grad = 1.0
        while tape:
            v = tape.pop()  # its grad is complete, since all that was computed from v was newer
            for x, slope in zip(v.operands, v.slopes, strict=True):  # the chain rule
                x.grad += slope * v.grad


def differentiable(f, derivative):  # a function of a float and its derivative -> the function of a Value
    return lambda x: Value(f(x.data), (x,), (derivative(x.data),))


exp = differentiable(math.exp, math.exp)
log = differentiable(math.log, lambda x: 1 / x)
inverse = differentiable(lambda x: x**-1, lambda x: -(x**-2))
inverse_root = differentiable(lambda x: x**-0.5, lambda x: -0.5 * x**-1.5)


def dot(a, b):  # [n], [n] -> sum(a[i] * b[i]) as one Value, ten times faster than with 2n from + and *
    return Value(sum(x.data * y.data for x, y in zip(a, b, strict=True)), (*a, *b), [x.data for x in (*b, *a)])


def linear(x, w):  # [n_in], [n_out, n_in] -> [n_out]: matrix-vector product
    return [dot(row, x) for row in w]


def softmax(x):  # [n] -> [n]: positive, with sum 1
    largest = max(v.data for v in x)  # subtracted so that exp cannot overflow
    powers = [exp(v + Value(-largest)) for v in x]
    one_by_sum = inverse(sum(powers, Value(0.0)))
    return [v * one_by_sum for v in powers]


def rms_norm(x):  # [n] -> [n]: x divided by its root mean square (Zhang & Sennrich 2019, equation 4)
    one_by_root = inverse_root(dot(x, x) * Value(1 / len(x)) + Value(1e-5))
    return [v * one_by_root for v in x]


def attention(x, keys, values, wq, wk, wv, wo):  # [n_embd] -> [n_embd] (Vaswani et al. 2017, section 3.2)
    d, q, mixed = N_EMBD // N_HEAD, linear(x, wq), []  # size of a head, query, outputs of the heads
    keys.append(linear(x, wk))  # keys and values of all positions so far
    values.append(linear(x, wv))
    for head in (slice(i, i + d) for i in range(0, N_EMBD, d)):  # d elements of query, keys and values per head
        weights = softmax([dot(q[head], k[head]) * Value(d**-0.5) for k in keys])  # [n_seq]: the attention weights
        mixed += [dot(weights, column) for column in zip(*(v[head] for v in values), strict=True)]
    return linear(mixed, wo)


def gpt(token, model, cache):  # -> [n_vocab]: the logits of the next token; appends to cache, two lists per block
    x = rms_norm([a + b for a, b in zip(model["wte"][token], model["wpe"][len(cache[0][0])], strict=True)])
    for i, (keys, values) in enumerate(cache):
        wq, wk, wv, wo, c_fc, c_proj = (model[f"h{i}.{name}"] for name in ("wq", "wk", "wv", "wo", "c_fc", "c_proj"))
        x = [a + b for a, b in zip(x, attention(rms_norm(x), keys, values, wq, wk, wv, wo), strict=True)]
        hidden = [v * Value(v.data > 0) for v in linear(rms_norm(x), c_fc)]  # relu
        x = [a + b for a, b in zip(x, linear(hidden, c_proj), strict=True)]
    return linear(x, model["lm_head"])


def new_model(n_vocab):  # random matrices by name: token and position embeddings, output layer, blocks
    shapes = {"wte": (n_vocab, N_EMBD), "wpe": (N_CTX, N_EMBD), "lm_head": (n_vocab, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"h{i}.{name}": (N_EMBD, N_EMBD) for name in ("wq", "wk", "wv", "wo")}
        shapes |= {f"h{i}.c_fc": (4 * N_EMBD, N_EMBD), f"h{i}.c_proj": (N_EMBD, 4 * N_EMBD)}
    return {k: [[Value(random.gauss(0, 0.08)) for _ in range(n)] for _ in range(m)] for k, (m, n) in shapes.items()}


def mean_loss(tokens, model):  # mean of -log p(token) over all tokens but the first, each given the earlier ones
    tape.clear()
    cache = [([], []) for _ in range(N_LAYER)]  # keys and values of each block
    logs = [log(softmax(gpt(token, model, cache))[target]) for token, target in itertools.pairwise(tokens)]
    return sum(logs, Value(0.0)) * Value(-1 / len(logs))


def train(docs, model, params, steps, rate=0.01, beta1=0.85, beta2=0.99, eps=1e-8):
    """Train with Adam (Kingma & Ba 2015, algorithm 1), one document per step; yield each loss. The rate falls to 0."""
    means = squares = [0.0] * len(params)  # running means of each gradient and of its square
    for t, doc in zip(range(1, steps + 1), itertools.cycle(docs)):
        (loss := mean_loss(doc, model)).backward()
        means = [beta1 * m + (1 - beta1) * p.grad for m, p in zip(means, params, strict=True)]
        squares = [beta2 * s + (1 - beta2) * p.grad**2 for s, p in zip(squares, params, strict=True)]
        rate_now, bias1, bias2 = rate * (1 - (t - 1) / steps), 1 - beta1**t, 1 - beta2**t
        for p, m, s in zip(params, means, squares, strict=True):
            p.data, p.grad = p.data - rate_now * (m / bias1) / ((s / bias2) ** 0.5 + eps), 0.0
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
        tape.clear()  # nothing is differentiated here
        probs = softmax([v * Value(1 / temperature) for v in gpt(chars.index(char), model, cache)])
        text += (char := random.choices(chars, [p.data for p in probs])[0].strip(BOS))
    return text


def read_docs(path):  # the lines of a UTF-8 text; names.txt is downloaded if it is missing, and its hash is checked
    if path.exists() and not (path.is_file() and path.stat().st_size <= 2**26):
        raise ValueError("not a regular file of at most 64 MiB")
    content = path.read_bytes() if path != NAMES or path.exists() else urlopen(URL, timeout=30).read(2**20)
    if path == NAMES and (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"SHA-256 is {found}, not {SHA256}; delete the file, if there is one, to download it again")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # removed at the end, also after an error
            (new := pathlib.Path(folder, path.name)).write_bytes(content)
            new.replace(path)
    if not (docs := [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]):
        raise ValueError("the file has no text")
    return docs


def main(argv=None):
    parser = argparse.ArgumentParser(prog="microgpt.py", allow_abbrev=False, usage=argparse.SUPPRESS)
    option = parser.add_argument
    option("--steps", type=int, default=1000, help="training steps, one document per step (default 1000)")
    option("--seed", type=int, default=42, help="seed of the random numbers (default 42)")
    option("--temperature", type=float, default=0.5, help="below 1: likely letters become more likely (default 0.5)")
    option("--n_samples", type=int, default=20, help="number of names to generate (default 20)")
    option("--data", type=pathlib.Path, default=NAMES, help="text with one document per line (default data/names.txt)")
    option("--check_gradients", action="store_true", help="compare gradients with finite differences and exit")
    options = parser.parse_args(argv)
    for name, least in {"steps": 1, "n_samples": 1, "temperature": 0.001}.items():
        if not least <= vars(options)[name] < math.inf:
            parser.error(f"--{name} {vars(options)[name]}: must be a finite number, at least {least}")
    try:
        docs = read_docs(options.data)
    except Exception as error:
        parser.error(f"{str(options.data)!r}: {error}; use another text with --data FILE, or save {URL} as {NAMES}")
    random.seed(options.seed)
    random.shuffle(docs)
    chars = [*sorted(set("".join(docs))), BOS]  # the tokens; the id of a token is its index
    docs = [[chars.index(char) for char in (BOS, *doc, BOS)[: N_CTX + 1]] for doc in docs]  # truncated to the context
    model = new_model(len(chars))
    params = [p for matrix in model.values() for row in matrix for p in row]
    print(f"{len(docs)} documents, {len(chars)} different tokens, {len(params)} parameters")
    if options.check_gradients:
        parser.exit(not check_gradients(docs[0], model))
    for step, loss in enumerate(train(docs, model, params, options.steps), 1):
        print(f"step {step} of {options.steps}: loss {loss:.10f}")
    for i in range(options.n_samples):
        print(f"{i + 1:2}. {sample(chars, model, options.temperature)}")


if __name__ == "__main__":
    try:
        sys.stdout and sys.stdout.reconfigure(errors="replace", line_buffering=True)  # if a terminal lacks a letter
        main()
    except (KeyboardInterrupt, OSError) as stop:  # Ctrl-C, a closed pipe, a full disk
        code = {KeyboardInterrupt: 130, BrokenPipeError: 141}.get(type(stop), 2)
        code == 2 and print(f"microgpt.py: error: cannot write the output: {stop.strerror}", file=sys.stderr)
        os._exit(code)
