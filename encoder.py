"""GPT-2's byte-level byte pair encoding (Radford et al. 2019, section 2.2; Sennrich et al. 2016): text <-> token ids.

Text is cut into words by PATTERN, each word becomes its UTF-8 bytes, each byte a printable character (so that the
vocabulary can be a text file), and neighbouring symbols are merged in the order vocab.bpe lists, best first. Every
string has an encoding, and decode(encode(text)) == text. PATTERN and the characters for bytes are OpenAI's: ids depend
on them.
"""

import codecs
import functools
import heapq
import json
import os

import regex

from weights.errors import CorruptFile, UserError
from weights.files import atomic_write, read_json

PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
CACHED_WORDS, CACHED_LENGTH = 2**16, 32  # words up to this length are remembered, this many of them


def bytes_to_unicode():
    """A dict from each byte to a visible character: printable Latin-1 stays, the other 68 bytes move to 256 and up."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Encoder:
    """encoder: dict from symbol to id; merges: the lines "left right" of vocab.bpe, the first to be applied first."""

    def __init__(self, encoder, merges):
        self.encoder = encoder
        self.decoder = {i: symbol for symbol, i in encoder.items()}
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {c: b for b, c in self.byte_encoder.items()}
        self.cached_word = functools.lru_cache(CACHED_WORDS)(self.encode_word)

    def bpe(self, word):
        """The list of symbols that a word, given in visible characters, is merged into.

        The symbols form a linked list, the mergeable neighbours a heap: n characters take n log n steps.
        """
        symbols, after, before = list(word), list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))
        heap = []

        def offer(i):  # the pair that starts at i, if it can be merged
            j = after[i]
            if j < len(symbols) and (rank := self.ranks.get(f"{symbols[i]} {symbols[j]}")) is not None:
                heapq.heappush(heap, (rank, i, symbols[i], symbols[j]))

        for i in range(len(symbols)):
            offer(i)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if symbols[i] != left or j == len(symbols) or symbols[j] != right:
                continue  # an earlier merge took one of the two
            symbols[i], symbols[j] = left + right, None
            after[i] = after[j]
            if after[i] < len(symbols):
                before[after[i]] = i
            offer(i)
            if before[i] >= 0:
                offer(before[i])
        return [symbol for symbol in symbols if symbol is not None]

    def encode_word(self, word):
        symbols = self.bpe("".join(self.byte_encoder[b] for b in word.encode("utf-8")))
        try:
            return [self.encoder[symbol] for symbol in symbols]
        except KeyError as error:
            raise UserError(f"the vocabulary has no token for {error.args[0]!r}, which {word!r} needs") from None

    def encode(self, text, allowed_special=()):
        """Text to a list of ids.

        allowed_special: tokens such as "<|endoftext|>" that stand for themselves; by default they are ordinary text,
        so that nobody's input can end it.
        Raises UserError for a lone surrogate, which no UTF-8 can hold.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
            raise UserError(f"the text is not valid Unicode: lone surrogate {what}; remove it") from None
        pieces = [text]
        allowed_special = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
        if unknown := allowed_special - self.encoder.keys():
            raise UserError(f"the vocabulary has no special token {min(unknown)!r}; allow only those it has")
        if allowed_special:
            longest_first = sorted(allowed_special, key=len, reverse=True)
            pieces = regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)
        ids = []
        for piece in pieces:
            if piece in allowed_special:
                ids.append(self.encoder[piece])
                continue
            for word in PATTERN.findall(piece):
                ids += self.cached_word(word) if len(word) <= CACHED_LENGTH else self.encode_word(word)
        return ids

    def start_ids(self):
        """What a text from nothing begins after: the end of another, or for a vocabulary without that, of a line."""
        return [self.encoder[END_OF_TEXT]] if END_OF_TEXT in self.encoder else self.encode("\n")

    def token_bytes(self, token_id):
        """The bytes of one token; an id that the vocabulary does not name is the replacement character U+FFFD."""
        symbol = self.decoder.get(int(token_id), "\N{REPLACEMENT CHARACTER}")
        try:
            return bytes(self.byte_decoder[c] for c in symbol)
        except KeyError:  # not made of visible bytes: a special token, written as it is
            return symbol.encode("utf-8")

    def decode_stream(self, ids):
        """Yields the text of each id as it comes, holding back a character's bytes until all of them are there."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            yield decoder.decode(self.token_bytes(token_id))
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """Ids to text; bytes that are not UTF-8 become U+FFFD, as in OpenAI's encoder.py."""
        return "".join(self.decode_stream(ids))


# the files a vocabulary may be in: OpenAI's, Hugging Face's, and Hugging Face's since transformers 5
LAYOUTS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",))


def get_encoder(model_name, models_dir):
    """The Encoder of a model folder, from the first of LAYOUTS that is there.

    Raises UserError when none is, CorruptFile when one cannot be read.
    """
    model_dir = os.path.join(models_dir, model_name)
    for names in LAYOUTS:
        paths = [os.path.join(model_dir, name) for name in names]
        if all(map(os.path.exists, paths)):
            return (read_tokenizer if names == ("tokenizer.json",) else read_vocabulary_and_merges)(*paths)
    choices = ", or ".join(" and ".join(names) for names in LAYOUTS)
    raise UserError(f"{model_dir} has no vocabulary; put {choices} there")


def read_tokenizer(path):
    """The Encoder of a tokenizer.json, if it is one of byte-level BPE."""
    tokenizer = read_json(path)
    model, pre = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    if (model.get("type"), pre.get("type"), pre.get("add_prefix_space", False)) != ("BPE", "ByteLevel", False):
        raise UserError(f"{path} is not of GPT-2's byte-level BPE; only that is read here: take a GPT-2 model")
    try:
        merges = merge_lines(model["merges"])
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        return Encoder(check_ids(path, model["vocab"] | added), merges)
    except (LookupError, TypeError) as error:
        raise CorruptFile(path, f"no vocabulary in it: {error}") from None


def merge_lines(merges):
    """The merges of a tokenizer.json as lines of vocab.bpe; newer versions of tokenizers write them as pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def read_vocabulary_and_merges(vocabulary_path, merges_path):
    return Encoder(check_ids(vocabulary_path, read_json(vocabulary_path)), read_merges(merges_path))


def check_ids(path, vocabulary):
    """The vocabulary, if each of its symbols has an id from 0 up; raises CorruptFile otherwise."""
    wrong = next((symbol for symbol, i in vocabulary.items() if type(i) is not int or i < 0), None)
    if wrong is not None:
        raise CorruptFile(path, f"{wrong[:40]!r} has no id but {vocabulary[wrong]!r}")
    return vocabulary


def read_merges(path):
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().rstrip("\n").split("\n")
    except ValueError as error:
        raise CorruptFile(path, error) from None
    merges = lines[1:] if lines[0].startswith("#version") else lines
    wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
    if wrong is not None:
        raise CorruptFile(path, f"not two symbols: {wrong[:40]!r}")
    return merges


def save_encoder(encoder, model_dir):
    """Writes the vocabulary and the merges under OpenAI's names, for get_encoder, and under Hugging Face's."""
    for vocabulary, merges in LAYOUTS[:2]:
        with atomic_write(os.path.join(model_dir, vocabulary)) as f:
            f.write(json.dumps(encoder.encoder).encode("utf-8"))
        with atomic_write(os.path.join(model_dir, merges)) as f:
            f.write("\n".join(["#version: 0.2", *encoder.ranks, ""]).encode("utf-8"))
