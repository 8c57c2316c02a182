"""The server beside those of llama.cpp, with the weights of models/random-124M in float32 and 2 threads each.

    python bench/serve.py [ROUNDS]        tokens per second and time to the first token for 1, 8 and 32 clients
    python bench/serve.py load [SECONDS]  64 clients of models/shakespeare at once (default: 120 seconds)

The others are llama-cpp-python's server, which answers one request at a time, and llama.cpp's llama-server, which
batches, if it is on the PATH. Clients send prompts of about 32 tokens and read greedy streams of N_TOKENS tokens. The
servers take turns. A speedup is a ratio of this server's tokens per second to another's; above 1, this one is faster.

load checks that each text is the one that the same request gets alone, compares the tokens per second with those of
generate_batch, which --prompts_file uses, with the same prompts and rows, in turns, and prints the server's memory.
"""

import asyncio
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import multiprocessing
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from common import MODELS_DIR, NAME, ROOT, in_turn, machine, median, model_124m, table
from inference_engines import N_THREADS, LlamaCpp, converted

from encoder import END_OF_TEXT
from engines.batching import generate_batch
from engines.compiled import compiled_model
from utils import load_encoder_hparams_and_params

N_TOKENS, N_REQUESTS = 32, 2  # of each client
CLIENTS, ROWS = (1, 8, 32), 32
IDLE = 0.5  # seconds before each turn
LOAD_CLIENTS, LOAD_ROWS, TURN = 64, 32, 5  # seconds of a turn of the load
SPEAKERS = ("ROMEO:", "JULIET:\nO", "First Citizen:\nWe", "What say you,", "KING RICHARD III:\n")


# Servers


class Ours:
    name = "serve.py"

    def command(self, port):
        options = ["--model_size", NAME, "--models_dir", str(MODELS_DIR), "--max_rows", str(ROWS), "--port", str(port)]
        return [sys.executable, str(ROOT / "serve.py"), *options]


class LlamaServer:
    """Each of the slots has a context of its own, as our rows have."""

    name = "llama-server"

    def __init__(self):
        self.path, self.file = shutil.which("llama-server"), gguf_with_vocabulary()
        if self.path is None:
            raise ImportError("llama-server is not on the PATH")

    def command(self, port):
        threads = ["-t", str(N_THREADS), "-tb", str(N_THREADS)]
        slots = ["-np", str(ROWS), "-c", str(256 * ROWS), "--no-webui"]
        return [self.path, "-m", self.file, "--port", str(port), *threads, *slots]


class LlamaCppPython:
    name = "llama-cpp-python"

    def __init__(self):
        if None in map(importlib.util.find_spec, ("llama_cpp", "fastapi", "sse_starlette")):
            raise ImportError("pip install 'llama-cpp-python[server]'")
        self.file = gguf_with_vocabulary()

    def command(self, port):
        threads = ["--n_threads", str(N_THREADS), "--n_threads_batch", str(N_THREADS)]
        options = ["--port", str(port), "--n_ctx", "1024", "--interrupt_requests", "false"]
        return [sys.executable, "-m", "llama_cpp.server", "--model", self.file, *threads, *options]


def gguf_with_vocabulary():
    """Return the path of the weights with GPT-2's vocabulary as a GGUF file."""

    def add_vocabulary(writer):
        encoder, hparams, _ = model_124m()
        tokens = [encoder.decoder.get(i, f"<{i}>") for i in range(hparams["n_vocab"])]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == END_OF_TEXT else 1 for token in tokens])  # control, normal
        writer.add_token_merges(list(encoder.ranks))
        writer.add_bos_token_id(encoder.encoder.get(END_OF_TEXT, 0))
        writer.add_eos_token_id(encoder.encoder.get(END_OF_TEXT, 0))
        writer.add_add_bos_token(False)

    folder = converted("llama.cpp-vocabulary", functools.partial(LlamaCpp.convert, add_vocabulary=add_vocabulary))
    return str(folder / "model.gguf")


@contextlib.contextmanager
def running(command, port):
    """Yield the process of a server that answers."""
    with subprocess.Popen(command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        try:
            while not answers(port):
                if process.poll() is not None:
                    raise RuntimeError(f"{command(port)} has ended")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()


def answers(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


# Clients


async def post(port, body):
    """Send a request over a connection of its own; return its text, and the seconds until each part of a stream."""
    data, start, marks = json.dumps(body).encode(), time.perf_counter(), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"]
    writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    try:
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        if " 200 " not in status:
            raise RuntimeError(f"{status} {await reader.read()}")
        if "transfer-encoding: chunked" not in headers:
            return json.loads(await reader.read())["choices"][0]["text"], marks
        content = b""
        while n := int(await reader.readline(), 16):
            content += (await reader.readexactly(n + 2))[:-2]
            marks.append(time.perf_counter() - start)
    finally:
        writer.close()
    events = [line.removeprefix("data: ") for line in content.decode().replace("\r\n", "\n").split("\n\n")]
    choices = [json.loads(event)["choices"] for event in events if event.startswith("{")]
    return "".join(choice[0]["text"] for choice in choices if choice), marks


async def client(port, bodies):
    """Send requests one after another; return the results of post."""
    return [await post(port, body) for body in bodies]


async def clients(port, bodies_of_each):
    return await asyncio.gather(*(client(port, bodies) for bodies in bodies_of_each))


def prompts(n):
    """Return n different texts of about 32 tokens."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    words = [word for word in words if word.isascii() and word.isalpha()]
    return [" ".join(words[25 * i % len(words) :][:28]) for i in range(n)]


# Tables


def measure(port, n_clients, n_requests=N_REQUESTS):
    """Return tokens per second and the median of the times to the first token."""
    time.sleep(IDLE)
    texts, start = iter(prompts(n_clients * n_requests)), time.perf_counter()
    options = {"max_tokens": N_TOKENS, "temperature": 0, "stream": True}
    bodies = [[{"prompt": next(texts)} | options for _ in range(n_requests)] for _ in range(n_clients)]
    results = asyncio.run(clients(port, bodies))
    spent = time.perf_counter() - start
    return n_clients * n_requests * N_TOKENS / spent, median(marks[0] for result in results for _, marks in result)


def compare(rounds):
    found = []
    for server in (Ours, LlamaServer, LlamaCppPython):
        try:
            found.append(server())
        except ImportError as error:
            print(f"without {server.name}: {error}", file=sys.stderr)
    results = {(n, server): [] for n in CLIENTS for server in found}
    with contextlib.ExitStack() as stack:
        ports = {server: free_port() for server in found}
        for server, port in ports.items():
            stack.enter_context(running(server.command, port))
            measure(port, 4, n_requests=1)  # untimed
        for turn, n in itertools.product(range(rounds), CLIENTS):
            for server in in_turn(found, turn):
                results[n, server].append(measure(ports[server], n))
                print(f"{n} clients, {server.name}: {results[n, server][-1][0]:.0f} tokens/s", file=sys.stderr)
    rows = []
    for (n, server), of_server in results.items():
        speeds, firsts = zip(*of_server, strict=True)
        ratio = median(a[0] / b for a, b in zip(results[n, found[0]], speeds, strict=True))
        rows.append([n, server.name, f"{median(speeds):.0f}", f"{ratio:.2f}", f"{1000 * median(firsts):.0f}"])
    table(["clients", "server", "tokens/s", "speedup", "ms to first token"], rows)


# Load


def load_bodies():
    """Yield different requests, half of them streams."""
    for i in itertools.count():
        yield {"prompt": SPEAKERS[i % 5], "max_tokens": 20 + 10 * (i % 9), "temperature": 0, "stream": i % 2 == 1}


async def load(port, seconds, expected):
    """Return tokens per second of LOAD_CLIENTS clients, each of which checks its texts."""
    start, n_tokens = time.perf_counter(), 0

    async def one(bodies):
        nonlocal n_tokens
        while time.perf_counter() - start < seconds:
            body = next(bodies)
            text, _ = await post(port, body)
            if text != expected[body["prompt"], body["max_tokens"]]:
                raise RuntimeError(f"{body}: {text!r}")
            n_tokens += body["max_tokens"]

    bodies = load_bodies()
    await asyncio.gather(*(one(bodies) for _ in range(LOAD_CLIENTS)))
    return n_tokens / (time.perf_counter() - start)


@functools.cache
def shakespeare():
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", str(MODELS_DIR))
    return encoder, hparams["n_head"], *compiled_model(params)


def batch_speed(seconds):
    """Return tokens per second of generate_batch, with requests of the lengths of the load."""
    encoder, n_head, model, params = shakespeare()
    start, n_tokens, bodies = time.perf_counter(), 0, load_bodies()
    while time.perf_counter() - start < seconds:  # requests of one length at a time
        some = [next(bodies) for _ in range(4 * LOAD_ROWS)]
        requests = ((i, encoder.encode(body["prompt"]), [np.argmax]) for i, body in enumerate(some))
        n_new = some[0]["max_tokens"]
        n_tokens += sum(
            len(ids) for _, ids, _ in generate_batch(requests, params, n_head, n_new, LOAD_ROWS, None, model)
        )
    return n_tokens / (time.perf_counter() - start)


def memory(process):
    """Return the megabytes that a process holds."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def run_load(seconds):
    def command(port):
        options = ["--model_size", "shakespeare", "--max_rows", str(LOAD_ROWS), "--port", str(port)]
        return [sys.executable, str(ROOT / "serve.py"), *options]

    port = free_port()
    with running(command, port) as process, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        alone = [body | {"stream": False} for body in itertools.islice(load_bodies(), 90)]
        texts = asyncio.run(client(port, alone))
        expected = {(b["prompt"], b["max_tokens"]): text for b, (text, _) in zip(alone, texts, strict=True)}
        other.submit(batch_speed, 1).result()
        ratios, held = [], []
        for _ in range(-(-seconds // TURN)):
            ours, theirs = asyncio.run(load(port, TURN, expected)), other.submit(batch_speed, TURN).result()
            ratios.append(ours / theirs)
            held.append(memory(process))
            print(
                f"{ours:.0f} tokens/s, generate_batch {theirs:.0f}, ratio {ratios[-1]:.2f}, {held[-1]:.0f} MB",
                flush=True,
            )
    print(f"no error; median ratio {median(ratios):.2f}; memory {held[0]:.0f} MB, at the end {held[-1]:.0f} MB")


def main():
    print(machine())
    if sys.argv[1:2] == ["load"]:
        run_load(int(sys.argv[2]) if len(sys.argv) > 2 else 120)
    else:
        compare(int(sys.argv[1]) if len(sys.argv) > 1 else 3)


if __name__ == "__main__":
    main()
