"""The JAX engine on a GPU, beside transformers: python bench/jax_gpu.py. It has not been run on a GPU yet.

Needs an NVIDIA GPU, and what bench/requirements.txt says. With --shapes tiny it also runs on the CPU, which shows that
the script works and nothing else.

The engines have the same random weights. The others are transformers' GPT2LMHeadModel in eager mode with a dynamic
cache, and with torch.compile and a static cache. All generate the same number of greedy tokens, and end with their ids
as lists on the host, which waits for the GPU. "ms per token" is the time of one token of every row: (a run over N
tokens - a run over one) / (N - 1), each the shortest of three. Engines take turns within each round; compiling comes
first. A speedup is the other's time divided by ours; above 1, ours is faster. "Same ids" is the share of rows whose ids
are those of this program; bfloat16 rounds, so that they may differ.

The floor is the time in which the weights, keys and values can be read at the bandwidth measured here. All engines
share one process and its memory; what does not fit is reported and left out.
"""

import argparse
import gc
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes three quarters of the GPU's memory
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import torch
import transformers
from common import SIZE_124M, in_turn, machine, median, random_tensors, seconds, spread, table

from engines.jax_engine import jax_engine, use_compilation_cache
from engines.jax_sampling import Sampler
from weights.names import count_params, hugging_face_name, nest

SHAPES = {
    "tiny": {"n_vocab": 1000, "n_ctx": 1024, "n_embd": 64, "n_head": 2, "n_layer": 2},
    "124M": SIZE_124M,
    "1558M": SIZE_124M | {"n_embd": 1600, "n_head": 25, "n_layer": 48},
}
GOALS = "Goals on an H200, 124M, bfloat16: one row >= 1,000 tokens/s and speedup >= 2 over eager; 256 rows >= 100,000"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT_OF_MEMORY = (torch.OutOfMemoryError, jax.errors.JaxRuntimeError)


def ours(tensors, hparams, dtype):
    """Return a function from prompts of equal length and a number of tokens to a list of ids for each."""
    n_head = hparams["n_head"]
    engine, params = jax_engine(nest(tensors, hparams["n_layer"]), n_head, dtype, (1, 1))

    def run(prompts, n_tokens):
        if len(prompts) == 1:
            return [engine.generate(prompts[0], params, n_head, n_tokens)]
        requests = ((i, ids, [Sampler()]) for i, ids in enumerate(prompts))
        results = engine.generate_batch(requests, params, n_head, n_tokens, len(prompts))
        return [ids for _, ids, _ in sorted(results)]

    return run


def theirs(tensors, hparams, dtype):
    """Return transformers' model with these tensors, on the GPU."""
    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"]}
    with torch.device("meta"):
        config = transformers.GPT2Config(**sizes, **{name: hparams[name] for name in ("n_embd", "n_head", "n_layer")})
        model = transformers.GPT2LMHeadModel(config)
    state = {f"transformer.{hugging_face_name(name)}": torch.from_numpy(tensor) for name, tensor in tensors.items()}
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, assign=True)
    model.tie_weights()
    return model.to(DEVICE, getattr(torch, dtype)).eval()


def generator(model, **options):
    """Return a run() of model.generate(), which reads no end token."""
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    @torch.inference_mode()
    def run(prompts, n_tokens):
        ids = torch.tensor(prompts, device=DEVICE)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, **options)
        return found[:, ids.shape[1] :].tolist()

    return run


def engines(tensors, hparams, dtype):
    """Return the run() of each engine by name, ours first."""
    model, compilation = theirs(tensors, hparams, dtype), transformers.CompileConfig()
    compilation._compile_all_devices = True  # transformers' way to compile on the CPU, too
    return {
        "this program": ours(tensors, hparams, dtype),
        "transformers (eager)": generator(model),
        "transformers (torch.compile)": generator(model, cache_implementation="static", compile_config=compilation),
    }


def measure(run, prompts, n_tokens):
    """Return the ids, the milliseconds of a run over one token, and those per token after it."""
    results = []
    whole = min(seconds(lambda: results.append(run(prompts, n_tokens))) for _ in range(3))
    first = min(seconds(lambda: run(prompts, 1)) for _ in range(3))
    return results[0], 1000 * first, 1000 * (whole - first) / (n_tokens - 1)


def free_memory():
    """Return what PyTorch and torch.compile keep of a finished run."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def compare(found, prompts, n_tokens, rounds):
    """Return the results of measure() of each round, by engine, of those whose memory suffices."""
    results = {}
    for name, run in found.items():
        try:
            run(prompts, n_tokens), run(prompts, 1)  # untimed: compiles
            results[name] = []
        except OUT_OF_MEMORY as error:
            print(f"{name}, {len(prompts)} rows: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    for turn in range(rounds):
        for name in in_turn(list(results), turn):
            results[name].append(measure(found[name], prompts, n_tokens))
    return results


def read_bandwidth():
    """Return the bytes per second at which the GPU sums an array much larger than its caches: the best of 9 times."""
    x = torch.ones(2**28 if DEVICE == "cuda" else 2**26, device=DEVICE)

    def read():
        for _ in range(10):
            total = x.sum()
        total.item()  # waits

    return 10 * x.nbytes / min(seconds(read) for _ in range(9))


def bytes_per_token(hparams, dtype, n_rows, n_past):
    """Return the bytes that a token of each row has to read: all weights but wpe, and the keys and values."""
    n_embd, item_size = hparams["n_embd"], {"bfloat16": 2, "float32": 4}[dtype]
    n_weights = count_params(**hparams) - hparams["n_ctx"] * n_embd
    return item_size * (n_weights + 2 * n_rows * n_past * hparams["n_layer"] * n_embd)


def rows(shape, dtype, options):
    """Yield the rows of the table, for each batch and context."""
    hparams, bandwidth = SHAPES[shape], read_bandwidth()
    found, rng = engines(random_tensors(hparams), hparams, dtype), np.random.default_rng(0)
    for n_rows in options.batches:
        for context in options.contexts:
            free_memory()
            prompts = rng.integers(0, hparams["n_vocab"], (n_rows, context)).tolist()
            results = compare(found, prompts, options.tokens, options.rounds)
            n_bytes = bytes_per_token(hparams, dtype, n_rows, context + options.tokens / 2)
            for name, its in results.items():
                first, token = (median(result[i] for result in its) for i in (1, 2))
                cells = [f"{first:.1f}", f"{token:.3f}", f"{1000 * n_rows / token:.0f}", *against(results, name)]
                floor = 1000 * n_bytes / bandwidth  # milliseconds
                yield [shape, dtype, n_rows, context, name, *cells, f"{bandwidth / 1e9:.0f}", f"{floor / token:.2f}"]


def against(results, name):
    """Return the speedup and the share of rows with the same ids, from the turns of each round; nothing for ours."""
    mine, its = results.get("this program"), results[name]
    if mine is None or mine is its:
        return ["", ""]
    pairs = list(zip(mine, its, strict=True))
    same = np.mean([row == other for a, b in pairs for row, other in zip(a[0], b[0], strict=True)])
    return [spread([b[2] / a[2] for a, b in pairs]), f"{same:.0%}"]


def machine_line(rounds):
    versions = f"JAX {jax.__version__}, transformers {transformers.__version__} on torch {torch.__version__}"
    return f"{jax.devices()[0].device_kind}; {machine()}; {versions}; medians of {rounds} rounds in turns"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["124M", "1558M"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256], help="rows")
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 900], help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=120, help="new tokens of each row")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine_line(options.rounds))
    use_compilation_cache()
    head = ["shape", "dtype", "rows", "context", "engine", "ms to first token", "ms per token", "tokens/s"]
    head += ["speedup", "same ids", "read GB/s", "floor / time"]
    for shape in options.shapes:
        for dtype in options.dtypes:
            table(head, list(rows(shape, dtype, options)))
            free_memory()
    print(GOALS)


if __name__ == "__main__":
    main()
