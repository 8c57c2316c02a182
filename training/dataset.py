"""Data sets: read a text, learn a vocabulary from it, encode it, and take batches of its token ids.

train.bin and val.bin hold token ids as little-endian uint16 without a header, the format of nanoGPT; llm.c's files have
a header. They are memory-mapped.
"""

import codecs
import glob
import itertools
import os
import sys

import numpy as np

from encoder import END_OF_TEXT, Encoder, bytes_to_unicode, learn_merges
from weights.download import download_file, sha256_of
from weights.errors import CorruptFile, UserError
from weights.files import atomic_write, decode_utf8, map_file
from weights.lock import new_folder

TINYSHAKESPEARE = (  # Karpathy's file of Shakespeare's plays: URL, bytes, sha256
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
N_BYTES, N_IDS = 256, 2**16
LLM_C_VALIDATION = 32_768  # tokens
LLM_C_MAGIC, LLM_C_HEADER = (20240520, 1), 256  # its first int32 numbers, and their number
LLM_C_OTHERS = (20240801, 20240522)  # the first number of files for Llama 3, and of questions


def read_dataset(dataset, data_dir):
    """Return the text of a file. dataset: its path, or "tinyshakespeare", which is downloaded to data_dir if missing.

    Raises UserError if there is no such file, or if it is empty, not UTF-8, or an altered copy of tinyshakespeare.
    """
    path, data_dir = os.path.expanduser(dataset), os.path.expanduser(data_dir)
    if dataset == "tinyshakespeare" and not os.path.exists(dataset):
        path = os.path.join(data_dir, "tinyshakespeare.txt")
        if not os.path.exists(path):
            url, *original = TINYSHAKESPEARE
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            with new_folder(data_dir):
                download_file(url, path, *original, remedy="give the path of a copy instead")
        elif sha256_of(path) != TINYSHAKESPEARE[2]:
            what = f"{os.path.getsize(path)} bytes and another sha256, the original has {TINYSHAKESPEARE[1]} bytes"
            raise UserError(f"{path} was altered ({what}); remove it to download it again")
    if not os.path.isfile(path):
        raise UserError(f"no data file {path!r}; give the path of a text file, or tinyshakespeare")
    with open(path, "rb") as f:
        data = f.read().removeprefix(codecs.BOM_UTF8)
    text = decode_utf8(data, path)
    if not text:
        raise UserError(f"{path} is empty; give the path of another text file")
    return text


def split_text(text):
    """Return a dict of the first 90% of the characters, "train", and the last 10%, "val": nanoGPT's split."""
    n_train = int(len(text) * 0.9)
    return {"train": text[:n_train], "val": text[n_train:]}


def training_text(text, layout):
    """Return the part of a text that encode_splits never takes for validation: a vocabulary is learned from it."""
    if layout == "plain":
        return split_text(text)["train"]
    parts = sections(text)
    return "".join(parts[n_held_out(parts) :])


def n_held_out(parts):
    """Return how many of the first sections, but not the last, have a tenth of the characters."""
    ends = np.cumsum([len(part) for part in parts])
    return min(1 + int(np.searchsorted(ends, ends[-1] / 10)), len(parts) - 1)


def sections(text):
    r"""Split a text at blank lines, as llm.c does; each part keeps the "\n\n" that follows it."""
    parts = text.split("\n\n")
    return [part + "\n\n" for part in parts[:-1]] + parts[-1:]


def encode_splits(text, encoder, layout):
    """Return the token ids for training, those for validation, and the number of characters of the latter.

    layout: "plain" encodes the two parts of split_text. "sections" puts <|endoftext|> before each section and takes the
    first 32,768 ids for validation, as llm.c does, but at most a tenth of the ids, and only those of sections that are
    not in training_text.
    """
    if layout == "plain":
        splits = split_text(text)
        return encoder.encode(splits["train"]), encoder.encode(splits["val"]), len(splits["val"])
    parts = sections(text)
    if len(parts) == 1:
        raise UserError("the text has no blank line (two line feeds) between sections; use --layout plain")
    encoded = [[encoder.encoder[END_OF_TEXT], *encoder.encode(part)] for part in parts]
    ids = list(itertools.chain(*encoded))
    n_val = min(LLM_C_VALIDATION, len(ids) // 10, sum(map(len, encoded[: n_held_out(parts)])))
    return ids[n_val:], ids[:n_val], len(encoder.decode(i for i in ids[:n_val] if i != encoder.encoder[END_OF_TEXT]))


def train_encoder(text, vocab_size, end_of_text):
    """Return a byte-level BPE Encoder of up to vocab_size tokens; fewer if the text runs out of pairs to merge.

    vocab_size: 256 is the bytes alone. end_of_text: whether the last token is <|endoftext|>.
    Raises UserError if vocab_size is too small for the bytes or too large for uint16 ids.
    """
    smallest, special = N_BYTES + end_of_text, f" and {END_OF_TEXT}" * end_of_text
    if not smallest <= vocab_size <= N_IDS:
        raise UserError(f"--vocab_size {vocab_size} must be from {smallest}, the bytes{special}, to {N_IDS}")
    merges = learn_merges(text, vocab_size - end_of_text)
    symbols = sorted(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in merges]
    symbols += [END_OF_TEXT] * end_of_text
    return Encoder({symbol: i for i, symbol in enumerate(symbols)}, merges)


def save_tokens(path, ids):
    with atomic_write(path) as f:
        f.write(np.asarray(ids, "<u2").tobytes())


def open_tokens(path, n_vocab, n_tokens):
    """Return the ids of a file as a memory-mapped array.

    Raises CorruptFile unless there are n_tokens of them, all below n_vocab.
    """
    mapped = map_file(path) if os.path.exists(path) else b""
    if len(mapped) != 2 * n_tokens:
        raise CorruptFile(path, f"{len(mapped)} bytes, expected {2 * n_tokens} for {n_tokens} ids")
    ids = np.frombuffer(mapped, "<u2")
    if (largest := int(ids.max())) >= n_vocab:
        raise CorruptFile(path, f"token id {largest} in a vocabulary of {n_vocab}")
    return ids


class TokenFiles:
    """The tokens of one or several files of nanoGPT or llm.c, one after another; a slice of it is an array.

    pattern: a path with wildcards, such as fineweb_train_*.bin; the files are in the order of their names.
    n_vocab: the ids are checked against it when they are read, because checking a file reads all of it.
    Raises UserError if there is no file, CorruptFile for one that is damaged.
    """

    def __init__(self, pattern, n_vocab):
        self.pattern, self.n_vocab = pattern, n_vocab
        self.paths = sorted(glob.glob(os.path.expanduser(pattern)))
        if not self.paths:
            raise UserError(f"no token file {pattern!r}; give the path of a file, or of several as a pattern with *")
        self.files = [map_tokens(path) for path in self.paths]
        self.ends = np.cumsum([len(ids) for ids in self.files])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, chosen):
        start, stop, _ = chosen.indices(len(self))
        parts = []
        while start < stop:
            i = int(np.searchsorted(self.ends, start, side="right"))
            before = int(self.ends[i]) - len(self.files[i])
            parts.append(self.files[i][start - before : stop - before])
            start += len(parts[-1])
            if (largest := int(parts[-1].max())) >= self.n_vocab:
                raise CorruptFile(self.paths[i], f"token id {largest} in a vocabulary of {self.n_vocab}")
        return np.concatenate(parts)


def map_tokens(path):
    """Return the ids of a file of nanoGPT, or of llm.c with its header, as a memory-mapped array."""
    mapped = map_file(path)
    header = np.frombuffer(mapped, "<i4", min(LLM_C_HEADER, len(mapped) // 4))
    if len(mapped) % 2:
        raise CorruptFile(path, f"{len(mapped)} bytes, an odd number; ids have 2 bytes each")
    if len(header) and header[0] in LLM_C_OTHERS:
        raise CorruptFile(path, f"llm.c's format {header[0]} is not for GPT-2's tokens; it must be {LLM_C_MAGIC[0]}")
    if tuple(header[:2]) != LLM_C_MAGIC:
        return np.frombuffer(mapped, "<u2")
    if len(header) < LLM_C_HEADER:
        raise CorruptFile(path, f"{len(mapped)} bytes, the header alone has {4 * LLM_C_HEADER}")
    n_tokens, n_bytes = int(header[2]), len(mapped) - header.nbytes
    if n_bytes != 2 * n_tokens:
        raise CorruptFile(path, f"{n_bytes} bytes after the header, expected {2 * n_tokens} for {n_tokens} ids")
    return np.frombuffer(mapped, "<u2", offset=header.nbytes)


def check_length(n_train, n_val, block_size, unit="tokens"):
    """Raise UserError unless both splits have at least one window of block_size inputs and the target of the last."""
    shorter = min(n_train, n_val)
    if shorter <= block_size:
        remedy = "use a longer text" + (f", or --block_size {shorter - 1}" if shorter > 1 else "")
        raise UserError(
            f"the text has {n_train} {unit} for training and {n_val} for validation; each must be more than "
            f"--block_size {block_size}: {remedy}"
        )


def random_starts(tokens, rng, batch_size, block_size):  # [n] -> [batch]
    """Return random positions where windows of block_size inputs, and one more target, can start."""
    return rng.integers(0, len(tokens) - block_size, batch_size)


def even_starts(tokens, n_windows, block_size):  # [n] -> [n_windows]
    """Return evenly spaced starts of windows that do not overlap; fewer than n_windows if the text is too short."""
    last = len(tokens) - 1 - block_size
    return np.linspace(0, last, min(n_windows, 1 + last // block_size)).astype(int)


def windows(tokens, starts, block_size):  # [n], [n_windows] -> [n_windows, block_size+1]
    """Return the block_size tokens from each start on, and the token after them."""
    return np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(int)


def inputs_and_targets(windows):  # [..., n] -> [..., n-1], [..., n-1]
    """Return the inputs, all tokens but the last, and the token that follows each of them."""
    return windows[..., :-1], windows[..., 1:]


def random_windows(tokens, rng, batch_size, block_size):  # [n] -> [batch, n_seq], [batch, n_seq]
    """Return the inputs and targets of random windows."""
    return inputs_and_targets(windows(tokens, random_starts(tokens, rng, batch_size, block_size), block_size))


def even_windows(tokens, n_windows, block_size):  # [n] -> [n_windows, n_seq], [n_windows, n_seq]
    """Return the inputs and targets of evenly spaced windows."""
    return inputs_and_targets(windows(tokens, even_starts(tokens, n_windows, block_size), block_size))
