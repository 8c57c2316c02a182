"""The engines that the benchmarks compare, all with the weights of models/random-124M and 2 threads.

Each engine has a name, a version, run(ids, n_tokens), which yields greedy ids one by one, and run_batch(rows, n_tokens)
for prompts of equal length, which returns a list of ids for each. None stops at an end token. An engine may compile
code for the shapes of a call, so the first call with new shapes is not to be timed. A converted model is kept in a
subfolder of the model's folder, created at the first use; delete it to convert the model again.
"""

import ctypes
import functools
import logging
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from common import MODELS_DIR, NAME, model_124m

import gpt2
from engines.batching import generate_batch, in_order
from engines.compiled import compiled_model
from weights.errors import UserError

N_THREADS = 2


class Numpy:
    name, packages, version = "this program, --engine numpy", "numpy", f"NumPy {np.__version__}"

    def __init__(self):
        _, hparams, params = model_124m()
        self.n_head = hparams["n_head"]
        self.model, self.params = self.prepare(params)

    def prepare(self, params):
        return gpt2, params

    def run(self, ids, n_tokens):
        yield from self.model.generate_tokens(ids, self.params, self.n_head, n_tokens)

    def run_batch(self, rows, n_tokens):
        """Generate one row as gpt2.py does, several as --prompts_file does."""
        if len(rows) == 1:
            return [list(self.run(rows[0], n_tokens))]
        requests = ((i, ids, [np.argmax]) for i, ids in enumerate(rows))
        results = generate_batch(requests, self.params, self.n_head, n_tokens, len(rows), model=self.model)
        return list(in_order(((i, ids) for (i, _), ids, _ in results), range(len(rows))))


class Compiled(Numpy):
    name, packages, dtype = "this program", "numba", "float32"

    def prepare(self, params):
        import numba

        self.version = f"numba {numba.__version__}"
        return compiled_model(params, self.dtype)


class Int8(Compiled):
    name, dtype = "this program, --dtype int8", "int8"


class Int4(Compiled):
    name, dtype = "this program, --dtype int4", "int4"


class Stepwise:
    """Base of engines with steps(rows, n_tokens), which yields one new id per row at a time."""

    def run(self, ids, n_tokens):
        for (new_id,) in self.steps([ids], n_tokens):
            yield new_id

    def run_batch(self, rows, n_tokens):
        return [list(ids) for ids in zip(*self.steps(rows, n_tokens), strict=True)]


class Transformers(Stepwise):
    """GPT2LMHeadModel in eager mode, as transformers loads it."""

    name, packages = "transformers (eager)", "torch transformers"

    def __init__(self):
        import torch
        import transformers

        torch.set_num_threads(N_THREADS)
        self.torch, self.version = torch, f"{transformers.__version__} on torch {torch.__version__}"
        model_124m()
        self.model = transformers.GPT2LMHeadModel.from_pretrained(MODELS_DIR / NAME).eval()

    def steps(self, rows, n_tokens):
        """Use its key/value cache and only the last position's logits, as its generate() does."""
        with self.torch.inference_mode():
            new, past = self.torch.tensor(rows), self.new_cache(len(rows), len(rows[0]) + n_tokens)
            for i in range(n_tokens):
                model = self.decode if i else self.model
                new = model(new, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
                yield new[:, 0].tolist()

    @property
    def decode(self):
        """What computes the tokens after the first."""
        return self.model

    def new_cache(self, _n_rows, _n_max):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


class CompiledTransformers(Transformers):
    """The same with torch.compile and a static cache, which transformers recommends for it.

    As in its generate(), the prompt is computed in eager mode and the steps after it are compiled, here once per shape
    of the cache.
    """

    name, packages = "transformers (torch.compile)", "torch transformers"

    def __init__(self):
        super().__init__()
        if not shutil.which(os.environ.get("CXX", "g++")):
            raise ImportError("torch.compile needs a C++ compiler")
        self.torch._dynamo.config.recompile_limit = 64  # one for each shape of the cache
        self.caches = {}  # by shape: the compiled code is for the addresses of their tensors

    @functools.cached_property
    def decode(self):
        return self.torch.compile(self.model, dynamic=False, fullgraph=True)

    def new_cache(self, n_rows, n_max):
        from transformers import StaticCache

        if (n_rows, n_max) not in self.caches:
            self.caches[n_rows, n_max] = StaticCache(config=self.model.config, max_cache_len=n_max)
        self.caches[n_rows, n_max].reset()
        return self.caches[n_rows, n_max]


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

    name, packages, compute_type = "CTranslate2", "ctranslate2 torch transformers", "float32"

    def __init__(self):
        import ctranslate2

        self.version = ctranslate2.__version__
        options = {"compute_type": self.compute_type, "inter_threads": 1, "intra_threads": N_THREADS}
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


class CTranslate2Int8(CTranslate2):
    """It quantizes the float32 weights when it loads them."""

    name, compute_type = "CTranslate2, int8", "int8"


class LlamaCpp(Stepwise):
    """Keys and values are float16, its default and fastest choice, and its GELU is a table of float16."""

    name, packages = "llama.cpp", "llama-cpp-python gguf"
    file_type = None  # llama.cpp's name of the format of quantized weights

    def __init__(self):
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        self.api, self.version = llama_cpp, f"from llama-cpp-python {llama_cpp.__version__}"
        path = converted("llama.cpp", self.convert) / "model.gguf"
        if self.file_type:
            quantize = functools.partial(self.quantize, path)
            path = converted(f"llama.cpp-{self.file_type}", quantize) / "model.gguf"
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        self.n_vocab, self.contexts = model_124m()[1]["n_vocab"], {}

    @staticmethod
    def convert(folder, add_vocabulary=lambda writer: writer.add_tokenizer_model("no_vocab")):
        """Write the weights as a GGUF file, as llama.cpp's convert_hf_to_gguf.py does."""
        import gguf

        _, hparams, params = model_124m()
        folder.mkdir()
        writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
        writer.add_context_length(hparams["n_ctx"])
        writer.add_embedding_length(hparams["n_embd"])
        writer.add_feed_forward_length(4 * hparams["n_embd"])
        writer.add_block_count(hparams["n_layer"])
        writer.add_head_count(hparams["n_head"])
        writer.add_layer_norm_eps(1e-5)
        writer.add_vocab_size(hparams["n_vocab"])
        add_vocabulary(writer)
        for name, tensor in gguf_tensors(**params):
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def quantize(self, source, folder):
        """Write the file `source` with quantized weights, as its llama-quantize does."""
        folder.mkdir()
        options = self.api.llama_model_quantize_default_params()
        options.ftype = getattr(self.api, f"LLAMA_FTYPE_MOSTLY_{self.file_type}")
        paths = (os.fsencode(source), os.fsencode(folder / "model.gguf"))
        if self.api.llama_model_quantize(*paths, ctypes.byref(options)):
            raise RuntimeError("llama_model_quantize failed")

    def context(self, n_rows, n_max):
        """Return a context with an empty key/value cache of n_max positions per row."""
        if (n_rows, n_max) not in self.contexts:
            self.contexts[n_rows, n_max] = self.new_context(n_rows, n_max)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.contexts[n_rows, n_max]), True)
        return self.contexts[n_rows, n_max]

    def new_context(self, n_rows, n_max):
        options = self.api.llama_context_default_params()
        options.n_threads = options.n_threads_batch = N_THREADS
        options.n_ctx, options.n_seq_max = n_rows * n_max, n_rows
        options.n_batch = n_rows * n_max
        return self.api.llama_init_from_model(self.model, options)

    def steps(self, rows, n_tokens):
        context, n_past = self.context(len(rows), len(rows[0]) + n_tokens), 0
        for _ in range(n_tokens):
            new = self.next_ids(context, rows, n_past)
            n_past, rows = n_past + len(rows[0]), [[i] for i in new]
            yield new

    def next_ids(self, context, rows, n_past):
        """Compute the new ids of each row, at positions from n_past on, and return the most likely next ids."""
        places = [(row, place) for row, ids in enumerate(rows) for place in range(len(ids))]
        batch = self.api.llama_batch_init(len(places), 0, 1)
        batch.n_tokens = len(places)
        for i, (row, place) in enumerate(places):
            batch.token[i], batch.pos[i] = rows[row][place], n_past + place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = place == len(rows[row]) - 1
        if self.api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = [self.api.llama_get_logits_ith(context, i) for i in range(len(places)) if batch.logits[i]]
        self.api.llama_batch_free(batch)
        return [int(np.ctypeslib.as_array(row, (self.n_vocab,)).argmax()) for row in logits]


class LlamaCppQ8(LlamaCpp):
    name, file_type = "llama.cpp, Q8_0", "Q8_0"


class LlamaCppQ4(LlamaCpp):
    """The embedding, which is also the output layer, has 6 bits, as llama-quantize chooses."""

    name, file_type = "llama.cpp, Q4_0", "Q4_0"


def gguf_tensors(wte, wpe, blocks, ln_f):
    """Yield (name, tensor) as llama.cpp names and lays them out: weights are [n_out, n_in] there."""
    yield from (("token_embd.weight", wte), ("position_embd.weight", wpe))
    yield from (("output_norm.weight", ln_f["g"]), ("output_norm.bias", ln_f["b"]))
    for i, block in enumerate(blocks):
        attn, mlp = block["attn"], block["mlp"]
        for name, norm in (("attn_norm", block["ln_1"]), ("ffn_norm", block["ln_2"])):
            yield from ((f"blk.{i}.{name}.weight", norm["g"]), (f"blk.{i}.{name}.bias", norm["b"]))
        layers = {"attn_qkv": attn["c_attn"], "attn_output": attn["c_proj"]}
        for name, layer in (layers | {"ffn_up": mlp["c_fc"], "ffn_down": mlp["c_proj"]}).items():
            yield from ((f"blk.{i}.{name}.weight", layer["w"].T), (f"blk.{i}.{name}.bias", layer["b"]))


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


FLOAT32 = (Compiled, Numpy, Transformers, CompiledTransformers, OnnxRuntime, CTranslate2, LlamaCpp)
QUANTIZED = (Int8, Int4, LlamaCppQ8, LlamaCppQ4, CTranslate2Int8, Compiled)


def engines(group=FLOAT32):
    """Return those that can be imported; a line on standard error says how to install the others."""
    found = []
    for engine in group:
        try:
            found.append(Apart(engine))
        except (ImportError, UserError) as error:
            print(f"without {engine.name} ({error}): pip install {engine.packages}", file=sys.stderr)
    return found
