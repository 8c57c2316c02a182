"""From a text to what a model is trained on: a vocabulary, token ids in two files, batches of them.

The ids of a file are uint16, little-endian, nothing else, as nanoGPT and llm.c write them, and are memory-mapped.
"""

import codecs
import json
import os
import sys

import numpy as np

from encoder import END_OF_TEXT, Encoder, bytes_to_unicode, merge_lines
from weights.download import download_file, sha256_of
from weights.errors import CorruptFile, UserError
from weights.files import atomic_write, decode_utf8

TINYSHAKESPEARE = (  # Karpathy's file of Shakespeare's plays: where it is, bytes, sha256
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
N_BYTES, N_IDS = 256, 2**16
LLM_C_VALIDATION = 32_768  # tokens


def read_dataset(dataset, data_dir):
    """The text of the file that dataset names; "tinyshakespeare" is downloaded to data_dir unless it is there.

    Raises UserError when there is no such file, or it is empty, not UTF-8, or not tinyshakespeare as published.
    """
    path, data_dir = os.path.expanduser(dataset), os.path.expanduser(data_dir)
    if dataset == "tinyshakespeare" and not os.path.exists(dataset):
        path = os.path.join(data_dir, "tinyshakespeare.txt")
        if not os.path.exists(path):
            os.makedirs(data_dir, exist_ok=True)
            print(f"downloading {TINYSHAKESPEARE[0]} to {path}", file=sys.stderr, flush=True)
            download_file(*TINYSHAKESPEARE[:1], path, *TINYSHAKESPEARE[1:], "give the path of a copy instead")
        elif sha256_of(path) != TINYSHAKESPEARE[2]:
            what = f"{os.path.getsize(path)} bytes and another sha256, the original has {TINYSHAKESPEARE[1]} bytes"
            raise UserError(f"{path} was altered ({what}); remove it, and it is downloaded anew")
    if not os.path.isfile(path):
        raise UserError(f"no data file {path!r}; give the path of a text file, or tinyshakespeare")
    with open(path, "rb") as f:
        data = f.read().removeprefix(codecs.BOM_UTF8)
    text = decode_utf8(data, path)
    if not text:
        raise UserError(f"{path} is empty; give the path of another text file")
    return text


def split_text(text):
    """The first 90% of the characters, to train on, and the last 10%, to validate: nanoGPT's split."""
    n_train = int(len(text) * 0.9)
    return text[:n_train], text[n_train:]


def sections(text):
    """The parts between blank lines, each with the "\n\n" that follows it: llm.c's documents."""
    parts = text.split("\n\n")
    return [part + "\n\n" for part in parts[:-1]] + parts[-1:]


def encode_splits(text, encoder, layout):
    """The ids to train on and those to validate on, and the characters in the latter.

    layout: "plain" encodes the text as one piece (split_text); "sections" puts <|endoftext|> before each of its
    sections and validates on the first 32,768 ids, as llm.c does, or the first tenth if that is less.
    """
    if layout == "plain":
        train, val = split_text(text)
        return encoder.encode(train), encoder.encode(val), len(val)
    parts = sections(text)
    if len(parts) == 1:
        raise UserError("the text has no blank line (two line feeds) to cut it into sections at; take --layout plain")
    ids = [i for part in parts for i in (encoder.encoder[END_OF_TEXT], *encoder.encode(part))]
    n_val = min(LLM_C_VALIDATION, len(ids) // 10)
    return ids[n_val:], ids[:n_val], len(encoder.decode(i for i in ids[:n_val] if i != encoder.encoder[END_OF_TEXT]))


def train_encoder(text, vocab_size, end_of_text):
    """A byte-level BPE of up to vocab_size tokens (the text may have fewer pairs to merge), learned from the text.

    vocab_size: 256 is the bytes alone. end_of_text: whether one token, the last, is <|endoftext|>.
    Raises UserError when vocab_size has no room for the bytes, or for uint16 ids.
    """
    smallest = N_BYTES + end_of_text
    if not smallest <= vocab_size <= N_IDS:
        raise UserError(f"--vocab_size {vocab_size} is not from {smallest}, the bytes alone, to {N_IDS}")
    symbols, merges = sorted(bytes_to_unicode().values()), []
    if vocab_size > smallest:
        symbols, merges = learn_merges(text, vocab_size - end_of_text)
    symbols += [END_OF_TEXT] * end_of_text
    return Encoder({symbol: i for i, symbol in enumerate(symbols)}, merges)


def learn_merges(text, vocab_size):
    """The symbols, in the order of their ids, and the merges that Hugging Face's tokenizers learn from the text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(True), vocab_size, min_frequency=1, show_progress=False)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), merge_lines(model["merges"])


def save_tokens(path, ids):
    with atomic_write(path) as f:
        f.write(np.asarray(ids, "<u2").tobytes())


def open_tokens(path, n_vocab, n_tokens):
    """The n_tokens ids of a file, below n_vocab, as a memory-mapped array; raises CorruptFile where they are not."""
    found = os.path.getsize(path) if os.path.exists(path) else 0
    if found != 2 * n_tokens:
        raise CorruptFile(path, f"{found} bytes, not the {2 * n_tokens} of {n_tokens} ids")
    ids = np.memmap(path, "<u2", mode="r")
    if (largest := int(ids.max())) >= n_vocab:
        raise CorruptFile(path, f"id {largest}, in a vocabulary of {n_vocab}")
    return ids


def random_windows(tokens, rng, batch_size, block_size):  # [n] -> [batch, n_seq], [batch, n_seq]
    """Inputs and the targets that follow each of them, from places drawn at random."""
    starts = rng.integers(0, len(tokens) - block_size, batch_size)
    return windows(tokens, starts, block_size)


def even_windows(tokens, n_windows, block_size):  # [n] -> [n_windows, n_seq], [n_windows, n_seq]
    """The same from evenly spaced places, of which as many are taken as fit side by side: all of a short text."""
    last = len(tokens) - 1 - block_size
    n_windows = min(n_windows, 1 + last // block_size)
    return windows(tokens, np.linspace(0, last, n_windows).astype(int), block_size)


def windows(tokens, starts, block_size):
    ids = np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(int)
    return ids[:, :-1], ids[:, 1:]
