"""The hyperparameters of a GPT-2, and the names, shapes and nesting of its tensors."""

import functools
import math
import operator
import os
import re

from weights.errors import CorruptFile, Mismatch, UserError, quote
from weights.files import read_json
from weights.resources import format_bytes

LARGEST = 2**31 - 1  # of the hyperparameters
CORRECT_HPARAMS = "correct the hparams"


def load_hparams(model_dir):
    """Return the hyperparameters of a model folder, from hparams.json, or else from config.json."""
    path = os.path.join(model_dir, "hparams.json")
    return read_hparams(path if os.path.exists(path) else os.path.join(model_dir, "config.json"))


def read_hparams(path):
    """Return a dict of n_vocab, n_ctx, n_embd, n_head and n_layer from a hparams.json or Hugging Face's config.json.

    Raises CorruptFile for missing or invalid values and UserError for the config of another architecture.
    """
    found = read_json(path)
    if os.path.basename(path) == "config.json":
        found = hparams_from_config(path, found)
    hparams = {name: found.get(name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    for name, value in hparams.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise CorruptFile(path, f"{name} is {quote(value)}, not a whole number from 1 to {LARGEST}")
    if hparams["n_embd"] % hparams["n_head"]:
        n_embd, n_head = hparams["n_embd"], hparams["n_head"]
        raise CorruptFile(path, f"n_embd {n_embd} is not a multiple of n_head {n_head}")
    return hparams


def hparams_from_config(path, config):
    """Return the hyperparameters in Hugging Face's config; raise UserError if it describes another architecture."""
    required = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, accepted in required.items():
        if config.get(name, accepted[0]) not in accepted:
            found = quote(config[name])
            raise UserError(f"{path}: {name} is {found}; only GPT-2 is supported, which has {accepted[0]!r}")
    n_inner, n_embd = config.get("n_inner"), config.get("n_embd")
    if n_inner is not None and isinstance(n_embd, int) and n_inner != 4 * n_embd:
        raise UserError(f"{path}: n_inner is {quote(n_inner)}; only GPT-2 is supported, which has 4 * {quote(n_embd)}")
    return config | {"n_vocab": config.get("vocab_size"), "n_ctx": config.get("n_positions", config.get("n_ctx"))}


def tensor_shapes(n_vocab, n_ctx, n_embd, n_head, n_layer):
    """Return the shape of each tensor by its name in OpenAI's checkpoint, without the prefix "model/"."""
    block = {
        "ln_1/g": (n_embd,),
        "ln_1/b": (n_embd,),
        "attn/c_attn/w": (n_embd, 3 * n_embd),
        "attn/c_attn/b": (3 * n_embd,),
        "attn/c_proj/w": (n_embd, n_embd),
        "attn/c_proj/b": (n_embd,),
        "ln_2/g": (n_embd,),
        "ln_2/b": (n_embd,),
        "mlp/c_fc/w": (n_embd, 4 * n_embd),
        "mlp/c_fc/b": (4 * n_embd,),
        "mlp/c_proj/w": (4 * n_embd, n_embd),
        "mlp/c_proj/b": (n_embd,),
    }
    shapes = {"wte": (n_vocab, n_embd), "wpe": (n_ctx, n_embd)}
    for i in range(n_layer):
        shapes |= {f"h{i}/{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f/g": (n_embd,), "ln_f/b": (n_embd,)}


def n_params(shapes):
    """Return the number of parameters in tensors of these shapes, a dict by name."""
    return sum(math.prod(shape) for shape in shapes.values())


def count_params(n_vocab, n_ctx, n_embd, n_head, n_layer):
    """Return n_params(tensor_shapes(...)), without a list of the tensors, which may be too long."""
    return (n_vocab + n_ctx + 2) * n_embd + n_layer * (12 * n_embd + 13) * n_embd


def hugging_face_name(name):
    """Return Hugging Face's name for a tensor: h0/attn/c_attn/w -> h.0.attn.c_attn.weight."""
    *scopes, leaf = re.sub(r"^h(\d+)/", r"h/\1/", name).split("/")
    return ".".join([*scopes, {"b": "bias", "g": "weight", "w": "weight"}.get(leaf, leaf + ".weight")])


def key_path(name):
    """Return the keys that lead to a tensor in the nested params: h0/ln_1/g -> ["blocks", 0, "ln_1", "g"]."""
    return [int(key) if key.isdigit() else key for key in re.sub(r"^h(\d+)/", r"blocks/\1/", name).split("/")]


def nest(tensors, n_layer):
    """Return the nested dict that gpt2() takes, given the tensors by name: h0/ln_1/g is blocks[0]["ln_1"]["g"]."""
    params = {"blocks": [{} for _ in range(n_layer)]}
    for name, tensor in tensors.items():
        *scopes, leaf = key_path(name)
        inner = params
        for key in scopes:
            inner = inner[key] if isinstance(inner, list) else inner.setdefault(key, {})
        inner[leaf] = tensor
    return params


def flatten(params, hparams):
    """Return the tensors by name, given the nested dict: the inverse of nest()."""
    return {name: functools.reduce(operator.getitem, key_path(name), params) for name in tensor_shapes(**hparams)}


def check_size(path, hparams, n_tensors, n_bytes):
    """Raise Mismatch if the hparams have more layers than a file with n_tensors of n_bytes in total can have.

    Call it before tensor_shapes(), whose result may otherwise be too long for the memory.
    """
    if hparams["n_layer"] > n_tensors:
        needs = f"n_layer = {hparams['n_layer']} in its hparams needs {format_bytes(4 * count_params(**hparams))}"
        raise Mismatch(path, f"{path} has {n_tensors} tensors of {format_bytes(n_bytes)}, {needs}", CORRECT_HPARAMS)


def check_names(path, expected, found):
    """Raise Mismatch unless the file has exactly the expected tensors."""
    if different := set(expected) ^ set(found):
        name = min(different)
        has, wants = ("lacks", "needs") if name in expected else ("has", "does not know")
        fault = f"{path} {has} the tensor {quote(name)}, which a model of its hparams {wants}"
        raise Mismatch(path, fault, CORRECT_HPARAMS)


def check_tensor(path, name, shape, dtype, expected_shape, expected_dtype):
    """Raise Mismatch unless a tensor of the file has the expected shape and dtype."""
    if list(shape) != list(expected_shape):
        has, wants = quote(list(shape)), list(expected_shape)
        raise Mismatch(path, f"{path}: {name} has shape {has}, its hparams say {wants}", CORRECT_HPARAMS)
    if dtype != expected_dtype:
        fault = f"{path}: {name} is {quote(dtype)}; only {expected_dtype!r} is supported"
        raise Mismatch(path, fault, "convert the file")
