"""Shared by the benchmarks: a model of 124M shape, the machine's read bandwidth and description, and tables."""

import functools
import math
import os
import pathlib
import platform
import sys
import threading
import time
from importlib.metadata import version
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from engines.compiled import is_installed  # noqa: E402
from tests.random_model import (  # noqa: E402
    DATA,
    SIZE_124M,
    copy_vocabulary,
    random_tensors,
    write_byte_vocabulary,
    write_safetensors,
)
from utils import load_encoder_hparams_and_params  # noqa: E402
from weights.names import tensor_shapes  # noqa: E402

IDLE = 0.15  # seconds for which the threads of BLAS spin after a product, at most
MODELS_DIR, NAME = ROOT / "models", "random-124M"
BYTES_A_TOKEN = 4 * sum(math.prod(shape) for name, shape in tensor_shapes(**SIZE_124M).items() if name != "wpe")


def model_124m():
    """Load (encoder, hparams, params) of models/random-124M, which the first call creates.

    It has random weights, 498 MB, and OpenAI's vocabulary if the tests' data are present, else one of bytes (which
    loads faster).
    """
    folder = MODELS_DIR / NAME
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if (DATA / "gpt2").exists():
            copy_vocabulary(folder, DATA / "gpt2")
        else:
            write_byte_vocabulary(folder, SIZE_124M["n_vocab"])
        write_safetensors(folder, SIZE_124M, random_tensors(SIZE_124M))
    return load_encoder_hparams_and_params(NAME, str(MODELS_DIR))


def some_tensors(hparams):
    """Return tensors that repeat a few random elements: faster than random_tensors, for time and memory as good."""
    elements = 0.02 * np.random.default_rng(0).standard_normal(10**6, dtype=np.float32)
    return {name: np.resize(elements, shape) for name, shape in tensor_shapes(**hparams).items()}


def random_ids(n):
    return np.random.default_rng(n).integers(0, SIZE_124M["n_vocab"], n).tolist()


def read_seconds():
    """Return the seconds in which two threads read a 500 MB array in each of three ways.

    The ways are np.max over integers, a sum that numba compiles (if it is installed), and a matrix-vector product of
    BLAS. Waits until BLAS's threads no longer spin.
    """
    buffer = read_buffer()
    halves = np.array_split(buffer.reshape(-1).view(np.int64), 2)
    row = np.ones((1, 768), dtype=np.float32)

    def maximum():
        threads = [threading.Thread(target=np.max, args=(half,)) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    ways = [maximum, lambda: row @ buffer]
    if is_installed():
        sum_of = compiled_sum()
        ways.insert(0, lambda: sum_of(buffer))
    spent = [seconds(way) for way in ways]
    time.sleep(IDLE)
    return spent


def bandwidth(passes):
    """Bytes per second in the fastest of the ways, from a list of results of read_seconds (the median)."""
    return read_buffer().nbytes / min(median(way) for way in zip(*passes, strict=True))


@functools.cache
def read_buffer():
    return np.ones((768, 500_000_000 // 4 // 768), dtype=np.float32)


@functools.cache
def compiled_sum():
    """Return a function that sums a float32 array of two axes, compiled before its first use."""
    from numba import njit, prange

    @njit(parallel=True, fastmath=True)
    def sum_of(a):
        a, s = a.reshape(-1), np.float32(0)
        for i in prange(a.size):
            s += a[i]
        return s

    sum_of(np.ones((1, 1), np.float32))
    return sum_of


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def seconds_for(tokens):
    """Return the time of all tokens after the first, which is the prompt's."""
    next(tokens)
    return seconds(lambda: sum(1 for _ in tokens))


def in_turn(found, turn):
    """Return the list in the order of a round, another element first in each."""
    first = turn % len(found)
    return found[first:] + found[:first]


def machine():
    """Return one line: processor, cores, memory, Python, NumPy, OpenBLAS variables of the environment, date."""
    model = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    versions += f", numba {version('numba')}" if is_installed() else ""
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("OPENBLAS_")]
    size = f"{os.cpu_count()} cores, {memory:.0f} GiB"
    return ", ".join([model, size, versions, *told, time.strftime("%Y-%m-%d")])


def spread(values):
    """Format the median of the values, and the smallest and the largest."""
    return f"{median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def table(head, rows):
    """Print a Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    print("\n".join(lines), flush=True)
