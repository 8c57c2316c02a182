"""The weights of GPT-2 as files: TensorFlow's checkpoint is read, model.safetensors is written and memory-mapped."""

import contextlib
import functools
import json
import math
import mmap
import operator
import os
import re

import numpy as np

from errors import CorruptFile, UserError
from files import read_json, replacing

HUGE_PAGE = 2**21  # bytes


def load_hparams(model_dir):
    """n_vocab, n_ctx, n_embd, n_head and n_layer from hparams.json, or from a config.json that describes GPT-2."""
    path = os.path.join(model_dir, "hparams.json")
    if os.path.exists(path):
        found = read_json(path)
    else:
        path = os.path.join(model_dir, "config.json")
        found = hparams_from_config(path, read_json(path))
    hparams = {name: found.get(name) for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    for name, value in hparams.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name} is {value!r}, not a positive whole number; correct it")
    if hparams["n_embd"] % hparams["n_head"]:
        n_embd, n_head = hparams["n_embd"], hparams["n_head"]
        raise UserError(f"{path}: n_embd {n_embd} is not a multiple of n_head {n_head}; correct it")
    return hparams


def hparams_from_config(path, config):
    """Hugging Face's names; raises UserError when the config asks for something that is not GPT-2 as released."""
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
            raise UserError(f"{path}: {name} is {config[name]!r}; only GPT-2 is run here, which has {accepted[0]!r}")
    n_inner, n_embd = config.get("n_inner"), config.get("n_embd")
    if n_inner is not None and isinstance(n_embd, int) and n_inner != 4 * n_embd:
        raise UserError(f"{path}: n_inner is {n_inner!r}; only GPT-2 is run here, which has 4*n_embd = {4 * n_embd}")
    return config | {"n_vocab": config.get("vocab_size"), "n_ctx": config.get("n_positions", config.get("n_ctx"))}


def tensor_shapes(n_vocab, n_ctx, n_embd, n_head, n_layer):
    """The shape of every tensor of a GPT-2, by its name in OpenAI's checkpoint (less the "model/" before each)."""
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


def hugging_face_name(name):
    """h0/attn/c_attn/w -> h.0.attn.c_attn.weight"""
    *scopes, leaf = re.sub(r"^h(\d+)/", r"h/\1/", name).split("/")
    return ".".join([*scopes, {"b": "bias", "g": "weight", "w": "weight"}.get(leaf, leaf + ".weight")])


def key_path(name):
    """h0/ln_1/g -> ["blocks", 0, "ln_1", "g"]"""
    return [int(key) if key.isdigit() else key for key in re.sub(r"^h(\d+)/", r"blocks/\1/", name).split("/")]


def nest(tensors, n_layer):
    """Tensors by checkpoint name to the nested dict that gpt2() takes: h0/ln_1/g is blocks[0]["ln_1"]["g"]."""
    params = {"blocks": [{} for _ in range(n_layer)]}
    for name, tensor in tensors.items():
        *scopes, leaf = key_path(name)
        inner = params
        for key in scopes:
            inner = inner[key] if isinstance(inner, list) else inner.setdefault(key, {})
        inner[leaf] = tensor
    return params


def flatten(params, hparams):
    """The reverse of nest: tensors by checkpoint name."""
    return {name: functools.reduce(operator.getitem, key_path(name), params) for name in tensor_shapes(**hparams)}


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The nested params of a TensorFlow checkpoint, in memory, every tensor's CRC verified by TensorFlow.

    Raises CorruptFile for a damaged file, UserError (with its name) for a tensor that is not as hparams say.
    """
    try:
        with silenced_stderr():
            import tensorflow as tf
    except ImportError as error:
        raise UserError(f"importing {tf_ckpt_path} takes TensorFlow ({error}); pip install tensorflow") from None

    damage = (tf.errors.OpError, ValueError, RuntimeError, IndexError)  # the last for a file cut short
    try:
        reader = tf.train.load_checkpoint(tf_ckpt_path)
        dtypes, shapes = reader.get_variable_to_dtype_map(), reader.get_variable_to_shape_map()
    except damage as error:
        raise CorruptFile(tf_ckpt_path + ".index", first_line(error)) from None
    expected = {f"model/{name}": shape for name, shape in tensor_shapes(**hparams).items()}
    check_names(tf_ckpt_path, expected, shapes)
    tensors = {}
    for name, shape in expected.items():
        found = shapes[name][1:] if name.endswith("/w") else shapes[name]  # [1, n_in, n_out]: they were convolutions
        check_tensor(tf_ckpt_path, name, found, dtypes[name].name, shape, "float32")
        try:
            tensors[name.removeprefix("model/")] = reader.get_tensor(name).reshape(shape)
        except damage as error:
            raise CorruptFile(tf_ckpt_path + ".data-00000-of-00001", f"{name}: {first_line(error)}") from None
    return nest(tensors, hparams["n_layer"])


@contextlib.contextmanager
def silenced_stderr():
    """Drops what TensorFlow's libraries write about GPUs and the like while they load; no setting stops it."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def first_line(error):
    return str(error).partition("\n")[0]


def check_names(path, expected, found):
    for name in sorted(set(expected) ^ set(found)):
        has, wants = ("lacks", "needs") if name in expected else ("has", "does not know")
        raise UserError(f"{path} {has} the tensor {name}, which a model of its hparams {wants}; correct the hparams")


def check_tensor(path, name, shape, dtype, expected_shape, expected_dtype):
    if list(shape) != list(expected_shape):
        raise UserError(
            f"{path}: {name} has shape {list(shape)}, its hparams say {list(expected_shape)}; correct the hparams"
        )
    if dtype != expected_dtype:
        raise UserError(f"{path}: {name} is {dtype}; only {expected_dtype} is run here: convert the file")


def save_params(model_dir, params, hparams, end_of_text=None):
    """Writes params as model.safetensors and config.json, from which transformers load the same model.

    end_of_text: the id of <|endoftext|>, if the vocabulary has it. Raises UserError when the disk is full.
    """
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": hparams["n_vocab"],
        "n_positions": hparams["n_ctx"],
        **{name: hparams[name] for name in ("n_ctx", "n_embd", "n_head", "n_layer")},
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    with replacing(os.path.join(model_dir, "config.json")) as f:
        f.write((json.dumps(config, indent=2) + "\n").encode("utf-8"))
    tensors = {hugging_face_name(name): tensor for name, tensor in flatten(params, hparams).items()}
    save_safetensors(os.path.join(model_dir, "model.safetensors"), tensors)


def save_safetensors(path, tensors, metadata=None):
    """Writes float32 tensors: 8 bytes of header length, a JSON header of names, shapes and offsets, then their bytes.

    metadata: strings by name, for the header.

    The safetensors package aligns the bytes to 8; here they start at multiples of 64, a cache line: the header is
    padded with spaces, and a tensor whose size is no multiple of 64 comes after those whose is.
    """
    ordered = sorted(tensors.items(), key=lambda item: item[1].nbytes % 64 != 0)
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)
    with replacing(path) as f:
        write_blocks(f, [len(text).to_bytes(8, "little") + text, *(as_bytes(tensor) for _, tensor in ordered)])


def as_bytes(tensor):
    return np.ascontiguousarray(tensor, "<f4").reshape(-1).view(np.uint8).data


def write_blocks(f, pieces):
    """Writes pieces of bytes in blocks that start at multiples of HUGE_PAGE in the file.

    Linux then keeps the file in memory in pages of that size: mapping it takes 2 ms instead of 60, and reading it is
    a twelfth faster than from pages of 4 KiB.
    """
    block = bytearray()
    for piece in pieces:
        for i in range(0, len(piece), HUGE_PAGE):
            block += piece[i : i + HUGE_PAGE]
            if len(block) >= HUGE_PAGE:
                f.write(block[:HUGE_PAGE])
                del block[:HUGE_PAGE]
    f.write(block)


def open_safetensors(path):
    """The header's entries by tensor name, the bytes behind it as one memory-mapped array, and the header's metadata.

    Raises CorruptFile unless every entry has a dtype, a shape and its own span of bytes, and the spans fill the file.
    """
    try:
        with open(path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        n_header = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + n_header])
        metadata = header.pop("__metadata__", None)
        spans = sorted(tuple(map(operator.index, entry["data_offsets"])) for entry in header.values())
        well_formed = all(type(entry["dtype"]) is str and type(entry["shape"]) is list for entry in header.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CorruptFile(path, "no safetensors header") from None
    n_data = 0
    for span in spans:
        if len(span) != 2 or span[0] != n_data or span[1] < n_data:
            raise CorruptFile(
                path, f"bytes {list(span)} of a tensor do not begin at {n_data}, where the one before ends"
            )
        n_data = span[1]
    if not (well_formed and n_data and len(mapped) == 8 + n_header + n_data):
        raise CorruptFile(path, f"{len(mapped)} bytes, where the header says {8 + n_header + n_data}")
    with contextlib.suppress(AttributeError, OSError):  # where the system knows it
        mapped.madvise(mmap.MADV_HUGEPAGE)  # what is not in memory yet comes in large pages
    return header, np.frombuffer(mapped, np.uint8, offset=8 + n_header), metadata


def load_params(path, hparams):
    """The nested params of a model.safetensors under Hugging Face's names, as read-only views: nothing is copied.

    Raises UserError (with its name) for a tensor that is not as hparams say, CorruptFile for a damaged file.
    """
    header, data, _ = open_safetensors(path)
    mask = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # some files carry causal masks; attention() needs none
    header = {name.removeprefix("transformer."): entry for name, entry in header.items()}
    header = {name: entry for name, entry in header.items() if not mask.fullmatch(name)}
    lm_head = header.pop("lm_head.weight", None)
    expected = {hugging_face_name(name): (name, shape) for name, shape in tensor_shapes(**hparams).items()}
    check_names(path, expected, header)
    tensors = {}
    for full_name, (name, shape) in expected.items():
        check_tensor(path, full_name, header[full_name]["shape"], header[full_name]["dtype"], shape, "F32")
        tensor = tensor_bytes(data, header[full_name])
        if tensor.size != 4 * math.prod(shape):
            raise CorruptFile(path, f"{tensor.size} bytes for {full_name}, {4 * math.prod(shape)} needed")
        tensors[name] = tensor.view("<f4").reshape(shape)
    if lm_head and not np.array_equal(tensor_bytes(data, lm_head), tensor_bytes(data, header["wte.weight"])):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight; GPT-2 has one tensor for both: tie them")
    return nest(tensors, hparams["n_layer"])


def tensor_bytes(data, entry):
    begin, end = entry["data_offsets"]
    return data[begin:end]


def load_safetensors(path):
    """What save_safetensors wrote: (tensors as read-only views, metadata). Raises CorruptFile for anything else."""
    header, data, metadata = open_safetensors(path)
    try:
        tensors = {
            name: tensor_bytes(data, entry).view("<f4").reshape(entry["shape"]) for name, entry in header.items()
        }
    except (ValueError, TypeError):
        raise CorruptFile(path, "its header does not fit its bytes") from None
    return tensors, metadata or {}
