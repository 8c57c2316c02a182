"""The engines that the benchmarks compare, all with the weights of models/random-124M, float32 and 2 threads.

Each engine has a name, a version, run(ids, n_tokens), which yields greedy ids one by one, and run_batch(rows, n_tokens)
for prompts of equal length, which returns a list of ids for each. None stops at an end token. A converted model is kept
in a subfolder of the model's folder, created at the first use; delete it to convert the model again.
"""

import functools
import multiprocessing
import os
import pathlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from common import MODELS_DIR, NAME, model_124m

from engines.batching import generate_batch, in_order
from engines.parallel import small_batch_model
from gpt2 import generate, generate_tokens

N_THREADS = 2


class Ours:
    name, version = "ours", f"NumPy {np.__version__}"

    def __init__(self):
        _, hparams, self.params = model_124m()
        self.n_head = hparams["n_head"]

    def run(self, ids, n_tokens):
        yield from generate_tokens(ids, self.params, self.n_head, n_tokens)

    @functools.cached_property
    def small_batch(self):
        return small_batch_model(self.params, self.n_head)

    def run_batch(self, rows, n_tokens):
        """Generate one row as gpt2.py does, several as --prompts_file does."""
        if len(rows) == 1:
            return [generate(rows[0], self.params, self.n_head, n_tokens)]
        model, params = self.small_batch
        requests = ((i, ids, [np.argmax]) for i, ids in enumerate(rows))
        results = generate_batch(requests, params, self.n_head, n_tokens, len(rows), model=model)
        return list(in_order(((i, ids) for (i, _), ids, _ in results), range(len(rows))))


class Stepwise:
    """Base of engines with steps(rows, n_tokens), which yields one new id per row at a time."""

    def run(self, ids, n_tokens):
        for (new_id,) in self.steps([ids], n_tokens):
            yield new_id

    def run_batch(self, rows, n_tokens):
        return [list(ids) for ids in zip(*self.steps(rows, n_tokens), strict=True)]


class Transformers(Stepwise):
    name, packages = "transformers", "torch transformers"

    def __init__(self):
        import torch
        import transformers

        torch.set_num_threads(N_THREADS)
        self.torch, self.version = torch, f"{transformers.__version__} on torch {torch.__version__}"
        model_124m()
        self.model = transformers.GPT2LMHeadModel.from_pretrained(MODELS_DIR / NAME).eval()

    def steps(self, rows, n_tokens):
        """Use its key/value cache and only the last position's logits, as its generate() does."""
        torch = self.torch
        with torch.inference_mode():
            new, past = torch.tensor(rows), None
            for _ in range(n_tokens):
                out = self.model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = out.past_key_values
                new = out.logits[:, -1:].argmax(-1)
                yield new[:, 0].tolist()


class OnnxRuntime(Stepwise):
    """The graph of onnx_graph.py. The cache is bound to one buffer, so that a step writes to it in place."""

    name, packages = "ONNX Runtime", "onnxruntime onnx"

    def __init__(self):
        import onnxruntime

        self.runtime, self.version = onnxruntime, onnxruntime.__version__
        _, self.hparams, _ = model_124m()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = N_THREADS, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        path = converted("onnx", self.convert) / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @staticmethod
    def convert(folder):
        import onnx_graph

        _, hparams, params = model_124m()
        onnx_graph.write(folder, params, hparams["n_head"])

    def binding(self, n_rows, n_max):
        """Bind the outputs, and a cache of n_max positions."""
        n_head = self.hparams["n_head"]
        shape = [n_rows, n_head, n_max, self.hparams["n_embd"] // n_head]
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for i in range(self.hparams["n_layer"]):
            for what in ("key", "value"):
                cache = self.runtime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
                binding.bind_ortvalue_input(f"past_{what}.{i}", cache)
                binding.bind_ortvalue_output(f"present_{what}.{i}", cache)
        return binding

    def steps(self, rows, n_tokens):
        new, n_past = np.array(rows), 0
        binding = self.binding(len(rows), new.shape[1] + n_tokens)
        for _ in range(n_tokens):
            n_keys = n_past + new.shape[1]
            binding.bind_cpu_input("ids", new)
            binding.bind_cpu_input("positions", np.arange(n_past, n_keys))
            binding.bind_cpu_input("last_key", np.full(len(rows), n_keys - 1, np.int32))
            binding.bind_cpu_input("n_keys", np.array(n_keys, np.int32))
            self.session.run_with_iobinding(binding)
            new, n_past = binding.get_outputs()[0].numpy().argmax(-1, keepdims=True), n_keys
            yield new[:, 0].tolist()


class CTranslate2:
    """Its tokens are strings: here the ids as decimals. Without end_token=[] it stops at the model's end token."""

    name, packages = "CTranslate2", "ctranslate2 torch transformers"

    def __init__(self):
        import ctranslate2

        self.version = ctranslate2.__version__
        options = {"compute_type": "float32", "inter_threads": 1, "intra_threads": N_THREADS}
        self.generator = ctranslate2.Generator(str(converted("ctranslate2", self.convert)), device="cpu", **options)

    @staticmethod
    def convert(folder):
        """Run its own converter from transformers, with the ids as the vocabulary."""
        import torch  # noqa: F401  the converter needs both; importing them here gives a clearer error
        import transformers  # noqa: F401
        from ctranslate2.converters import TransformersConverter

        class Converter(TransformersConverter):
            def load_tokenizer(self, *_args, **_kwargs):
                return Decimals(model_124m()[1]["n_vocab"])

        Converter(str(MODELS_DIR / NAME)).convert(str(folder))

    def run(self, ids, n_tokens):
        """Yield the id of each step."""
        for step in self.generator.generate_tokens([str(i) for i in ids], max_length=n_tokens, end_token=[]):
            yield step.token_id

    def run_batch(self, rows, n_tokens):
        prompts = [[str(i) for i in ids] for ids in rows]
        options = {"max_length": n_tokens, "end_token": [], "include_prompt_in_result": False}
        return [result.sequences_ids[0] for result in self.generator.generate_batch(prompts, **options)]


class Decimals:
    """The attributes of a tokenizer that CTranslate2's converter reads."""

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab
        self.bos_token = self.eos_token = self.unk_token = str(n_vocab - 1)

    def get_vocab(self):
        return {str(i): i for i in range(self.n_vocab)}


def converted(name, convert):
    """Return a subfolder of the model's folder, which convert(folder) creates completely at the first call."""
    folder = MODELS_DIR / NAME / name
    if not folder.exists():
        model_124m()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            made = pathlib.Path(temporary) / name
            convert(made)
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.exists():  # another process may have created it first
                    raise
    return folder


class Apart:
    """An engine in a process of its own.

    In one process, engines slow each other down: CTranslate2's tokens take 1.4 times as long once torch is loaded.
    """

    def __init__(self, engine):
        self.engine, self.name = engine, engine.name
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.version = self.call(getattr, "version")

    def call(self, function, *arguments):
        """Call function(engine, *arguments) in the other process; return its result or raise its exception."""
        return self.process.submit(call, function, self.engine, *arguments).result()


def call(function, engine, *arguments):
    return function(started(engine), *arguments)


@functools.cache
def started(engine):
    """Create the engine of this process, once."""
    return engine()


def in_turn(found, turn):
    """Return the engines in the order of a round, a different one first in each."""
    first = turn % len(found)
    return found[first:] + found[:first]


def engines():
    """Return ours and every peer that can be imported; a line on standard error says how to install the others."""
    found = [Apart(Ours)]
    for peer in (Transformers, OnnxRuntime, CTranslate2):
        try:
            found.append(Apart(peer))
        except ImportError as error:
            print(f"without {peer.name} ({error}): pip install {peer.packages}", file=sys.stderr)
    return found
