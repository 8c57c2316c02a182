"""Write GPT-2s with random weights in OpenAI's and in Hugging Face's layout, so that tests need no download."""

import json
import os
import pathlib
import shutil

import numpy as np

from encoder import bytes_to_unicode
from weights.names import nest, tensor_shapes
from weights.safetensors_file import save_params

# OpenAI's vocabulary and some texts, which are too large for the repository; tests that need them are skipped if the
# folder does not exist
DATA = pathlib.Path(os.environ.get("GPT2_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
SIZE_124M = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}


def random_tensors(hparams, seed=0):
    """Return tensors by name, so distributed that a missing bias or a wrong order of layers changes the logits."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(**hparams).items():
        tensor = rng.standard_normal(shape, dtype=np.float32)
        leaf = name.rpartition("/")[2]
        tensor *= {"g": 0.3, "b": 0.2, "wte": 0.1, "wpe": 0.3}.get(leaf, 2 / shape[0] ** 0.5)
        tensors[name] = tensor + np.float32(1) if leaf == "g" else tensor
    tensors["ln_f/g"][::2] *= -1  # else each token would be followed by itself, since embeddings are tied
    return tensors


def write_vocabulary(model_dir, text, n_vocab):
    """Train a byte-level BPE of n_vocab tokens, <|endoftext|> the last, and write encoder.json and vocab.bpe."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=n_vocab - 1, min_frequency=1, show_progress=False)
    tokenizer.save_model(str(model_dir))
    os.replace(os.path.join(model_dir, "merges.txt"), os.path.join(model_dir, "vocab.bpe"))
    os.remove(os.path.join(model_dir, "vocab.json"))
    with open(os.path.join(model_dir, "encoder.json"), "w", encoding="utf-8") as f:
        json.dump(tokenizer.get_vocab() | {"<|endoftext|>": n_vocab - 1}, f, sort_keys=True)


def write_byte_vocabulary(model_dir, n_vocab):
    """Write a vocabulary of the 256 bytes, special tokens up to n_vocab and no merges, which can encode any text."""
    symbols = [*bytes_to_unicode().values(), *(f"<|{i}|>" for i in range(256, n_vocab - 1)), "<|endoftext|>"]
    with open(os.path.join(model_dir, "encoder.json"), "w", encoding="utf-8") as f:
        json.dump({symbol: i for i, symbol in enumerate(symbols)}, f)
    with open(os.path.join(model_dir, "vocab.bpe"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n")


def copy_vocabulary(model_dir, source_dir):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copyfile(os.path.join(source_dir, name), os.path.join(model_dir, name))


def write_hparams(model_dir, hparams):
    with open(os.path.join(model_dir, "hparams.json"), "w", encoding="utf-8") as f:
        json.dump(hparams, f)


def write_tf_checkpoint(model_dir, tensors, prefix="model.ckpt"):
    """Write checkpoint and prefix.{index,meta,data-00000-of-00001} with TensorFlow's Saver, as OpenAI did."""
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        values = {}
        for name, tensor in tensors.items():
            shape = (1, *tensor.shape) if name.endswith("/w") else tensor.shape
            variable = tf.get_variable(f"model/{name}", shape, tf.float32, initializer=tf.zeros_initializer())
            values[variable] = tensor.reshape(shape)
        for variable, value in values.items():
            variable.load(value, session)
        tf.train.Saver(save_relative_paths=True).save(session, os.path.join(model_dir, prefix))


def write_safetensors(model_dir, hparams, tensors):
    """Write the files that a folder has after the import: hparams.json, config.json and model.safetensors."""
    write_hparams(model_dir, hparams)
    save_params(model_dir, nest(tensors, hparams["n_layer"]), hparams, hparams["n_vocab"] - 1)
