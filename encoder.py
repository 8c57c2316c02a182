"""GPT-2's byte-level byte pair encoding (Radford et al. 2019, section 2.2; Sennrich et al. 2016): text <-> token ids.

PATTERN splits the text into words. Each word becomes its UTF-8 bytes, each byte a visible character (so that a
vocabulary can be a text file), and adjacent symbols are merged in the order of merges.txt. Every valid Unicode string
has an encoding, and decode(encode(text)) == text. PATTERN and the characters for bytes are OpenAI's: the ids depend on
them.
"""

import codecs
import functools
import heapq
import json
import os
from collections import Counter, defaultdict
from itertools import pairwise

import regex

from weights.errors import CorruptFile, Mismatch, UserError, quote
from weights.files import atomic_write, read_json, read_text

PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
SPECIAL = regex.compile(r"<[^<>]+>|\[[^\[\]]+\]")  # names of special tokens: <|endoftext|>, <s>, <pad>, [PAD]
CACHED_WORDS, CACHED_LENGTH = 2**16, 32  # up to CACHED_WORDS words of at most CACHED_LENGTH characters are cached
# the files of a vocabulary: OpenAI's, Hugging Face's, and Hugging Face's since transformers 5
LAYOUTS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",))


def bytes_to_unicode():
    """Return a dict from each byte to a visible character: printable Latin-1 stays, the rest moves to 256 and up."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Encoder:
    """A byte-level BPE tokenizer.

    encoder: dict from symbol to id. merges: list of lines "left right", in the order in which they are applied.
    """

    def __init__(self, encoder, merges):
        self.encoder = encoder
        self.decoder = {i: symbol for symbol, i in encoder.items()}
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {c: b for b, c in self.byte_encoder.items()}
        self.cached_word = functools.lru_cache(CACHED_WORDS)(self.encode_word)

    def bpe(self, word):
        """Return the list of symbols into which the characters of a word merge.

        A linked list holds the symbols and a heap the pairs that can be merged: O(n log n) for n characters.
        """
        symbols, after, before = list(word), list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))
        heap = []

        def push(i):  # the pair that starts at position i, if it can be merged
            j = after[i]
            if j < len(symbols) and (rank := self.ranks.get(f"{symbols[i]} {symbols[j]}")) is not None:
                heapq.heappush(heap, (rank, i, symbols[i], symbols[j]))

        for i in range(len(symbols)):
            push(i)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if symbols[i] != left or j == len(symbols) or symbols[j] != right:
                continue  # an earlier merge took one of the two symbols
            symbols[i], symbols[j] = left + right, None
            after[i] = after[j]
            if after[i] < len(symbols):
                before[after[i]] = i
            push(i)
            if before[i] >= 0:
                push(before[i])
        return [symbol for symbol in symbols if symbol is not None]

    def encode_word(self, word):
        """Return the ids of one word. Raises UserError if the vocabulary lacks one of its symbols."""
        symbols = self.bpe("".join(self.byte_encoder[b] for b in word.encode("utf-8")))
        try:
            return [self.encoder[symbol] for symbol in symbols]
        except KeyError as error:
            raise UserError(f"the vocabulary has no token for {error.args[0]!r}, which {word!r} needs") from None

    def encode(self, text, allowed_special=()):
        """Return the token ids of a text.

        allowed_special: a special token such as "<|endoftext|>", or several, to be encoded as one id each. By default
        they are ordinary text, so that a prompt cannot inject an end of text.
        Raises UserError if the text contains a lone surrogate, which UTF-8 cannot represent.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
            raise UserError(f"the text is not valid Unicode: lone surrogate {what}; remove it") from None
        allowed_special = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
        if unknown := [token for token in allowed_special if token not in self.encoder]:
            raise UserError(f"the vocabulary has no special token {min(unknown)!r}; remove it from allowed_special")
        pieces = [text]
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
        """Return the ids that unconditional generation starts from: <|endoftext|> if there is one, or a line feed."""
        return [self.encoder[END_OF_TEXT]] if END_OF_TEXT in self.encoder else self.encode("\n")

    def token_bytes(self, token_id):
        """Return the bytes of one token; an id outside the vocabulary gives the replacement character U+FFFD."""
        symbol = self.decoder.get(int(token_id), "\N{REPLACEMENT CHARACTER}")
        try:
            return bytes(self.byte_decoder[c] for c in symbol)
        except KeyError:  # a special token whose name has other characters, perhaps lone surrogates
            return symbol.encode("utf-8", "surrogatepass")

    def decode_stream(self, ids):
        """Yield the text of each id in turn; a character appears with the token that completes its bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            yield decoder.decode(self.token_bytes(token_id))
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD, as in OpenAI's encoder.py."""
        return "".join(self.decode_stream(ids))


def learn_merges(text, vocab_size):
    """Learn byte-level BPE merges from a text (Sennrich et al. 2016, algorithm 1).

    Start from the 256 byte symbols. Repeatedly merge the most frequent pair of adjacent symbols into a new symbol,
    until there are vocab_size symbols or no pair is left. Of equally frequent pairs, merge the one with the smallest
    ids. Pairs are counted within words, and no word crosses a line break. Each distinct word is stored once, with its
    count, and a merge visits only the words that contain its pair.

    Returns the merges in the order learned, as lines "left right", the same as those of Hugging Face's tokenizers
    (except for letters of the newest version of Unicode).
    Merge i creates the symbol with id 256 + i; ids 0 to 255 are the byte symbols in sorted order.
    """
    byte_symbols = bytes_to_unicode()
    symbols = sorted(byte_symbols.values())
    ids = {b: symbols.index(symbol) for b, symbol in byte_symbols.items()}
    word_counts = Counter(word for line in text.splitlines(keepends=True) for word in PATTERN.findall(line))
    words = [([ids[b] for b in word.encode("utf-8")], count) for word, count in word_counts.items()]
    pair_counts, words_with, changed = Counter(), defaultdict(set), set()

    def count_pairs(w, start, stop, sign):  # add or subtract the pairs in positions start to stop of word w
        word, count = words[w]
        for pair in pairwise(word[max(start, 0) : stop]):
            pair_counts[pair] += sign * count
            words_with[pair].add(w)
            changed.add(pair)

    for w, (word, _) in enumerate(words):
        count_pairs(w, 0, len(word), +1)
    heap, merges = [], []
    while len(symbols) < vocab_size:
        for pair in changed:
            heapq.heappush(heap, (-pair_counts[pair], pair))
        changed.clear()
        count, pair = heapq.heappop(heap) if heap else (0, None)
        if count == 0:
            break  # no pair is left
        if -count != pair_counts[pair]:
            continue  # an outdated entry: the pair was pushed again when its count changed
        left, right = (symbols[i] for i in pair)
        merges.append(f"{left} {right}")
        symbols.append(left + right)
        for w in words_with.pop(pair):
            word, i = words[w][0], 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == pair:
                    count_pairs(w, i - 1, i + 3, -1)  # the pair, and the pairs with its two neighbours
                    word[i : i + 2] = [len(symbols) - 1]
                    count_pairs(w, i - 1, i + 2, +1)
                i += 1
    return merges


def get_encoder(model_name, models_dir):
    """Return the Encoder of a model folder, read from the first complete entry of LAYOUTS.

    Raises UserError if there is none, CorruptFile if a file cannot be parsed or lacks tokens or merges.
    """
    model_dir = os.path.join(models_dir, model_name)
    for names in LAYOUTS:
        paths = [os.path.join(model_dir, name) for name in names]
        if all(map(os.path.exists, paths)):
            return read_tokenizer(*paths) if len(paths) == 1 else read_vocabulary_and_merges(*paths)
    choices = ", or ".join(" and ".join(names) for names in LAYOUTS)
    raise UserError(f"{model_dir} has no vocabulary; put {choices} there")


def read_tokenizer(path):
    """Return the Encoder of a tokenizer.json. Raises UserError unless it is a byte-level BPE like GPT-2's."""
    tokenizer = read_json(path)
    try:
        model, pre = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
        kind = (model.get("type"), pre.get("type"), pre.get("add_prefix_space", False), pre.get("use_regex", True))
        if (*kind, tokenizer.get("normalizer")) != ("BPE", "ByteLevel", False, True, None):
            raise UserError(f"{path} is not a byte-level BPE like GPT-2's; only that can be read: choose a GPT-2 model")
        # older versions of tokenizers write a merge as a line, newer ones as a pair
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        vocabulary = check_tokens(path, model["vocab"] | added)
        "".join(vocabulary)  # symbols are strings
    except (LookupError, TypeError, AttributeError):
        raise CorruptFile(path, "its model, pre_tokenizer or added_tokens is not one of a byte-level BPE") from None
    return new_encoder(path, vocabulary, path, check_merges(path, merges), added)


def read_vocabulary_and_merges(vocabulary_path, merges_path):
    return new_encoder(vocabulary_path, read_vocabulary(vocabulary_path), merges_path, read_merges(merges_path))


def read_vocabulary(path):
    """Return the dict from symbol to id in encoder.json or vocab.json. Raises CorruptFile for any other file."""
    return check_tokens(path, read_json(path))


def check_tokens(path, vocabulary):
    """Return the vocabulary read from path. Raises CorruptFile unless it has valid ids and the 256 byte symbols."""
    wrong = next((symbol for symbol, i in vocabulary.items() if type(i) is not int or not 0 <= i < 2**31), None)
    if wrong is not None:
        raise CorruptFile(path, f"the id of {quote(wrong)} is {quote(vocabulary[wrong])}")
    if lacking := [symbol for symbol in bytes_to_unicode().values() if symbol not in vocabulary]:
        raise CorruptFile(path, f"{len(lacking)} of the 256 byte symbols are not tokens, the first is {lacking[0]!r}")
    return vocabulary


def read_merges(path, with_version=False):
    """Return the lines of vocab.bpe or merges.txt, without the version. Raises CorruptFile unless each is a pair.

    with_version: whether the first line must be the version, as in OpenAI's vocab.bpe.
    """
    lines = read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    has_version = lines[0].startswith("#version")
    if with_version and not has_version:
        raise CorruptFile(path, "it does not begin with #version")
    return check_merges(path, lines[has_version:])


def check_merges(path, merges):
    """Return the merges read from path. Raises CorruptFile unless each is a pair of symbols."""
    wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
    if wrong is not None:
        raise CorruptFile(path, f"not two symbols: {quote(wrong)}")
    return merges


def new_encoder(vocabulary_path, vocabulary, merges_path, merges, special=()):
    """Return the Encoder of a vocabulary and its merges.

    Raises CorruptFile unless the tokens are the byte symbols, the results of the merges and special tokens, which are
    those in `special` and those whose names match SPECIAL, and unless ids and merges are unique.
    """
    encoder, names = Encoder(vocabulary, merges), (os.path.basename(vocabulary_path), os.path.basename(merges_path))
    if len(encoder.decoder) < len(vocabulary):
        twice = next(i for symbol, i in vocabulary.items() if encoder.decoder[i] != symbol)
        raise CorruptFile(vocabulary_path, f"two tokens have the id {twice}, one is {quote(encoder.decoder[twice])}")
    regular = {vocabulary.get(merge.replace(" ", "")) for merge in merges}  # ids
    regular.update(vocabulary[symbol] for symbol in encoder.byte_decoder)
    others = [symbol for symbol, i in vocabulary.items() if i not in regular]
    if unknown := [symbol for symbol in others if symbol not in special and not SPECIAL.fullmatch(symbol)]:
        what = f"{len(unknown)} of {len(vocabulary)} tokens of {names[0]} are neither results of its merges nor special"
        remedy = "put a complete copy there; a special token is named like <this> or [THIS]"
        raise Mismatch(merges_path, f"{merges_path}: {what}, the first is {quote(unknown[0])}", remedy)
    if None in regular:
        lacking = [merge for merge in merges if merge.replace(" ", "") not in vocabulary]
        what = f"it lacks the results of {len(lacking)} of {len(merges)} merges of {names[1]}"
        raise CorruptFile(vocabulary_path, f"{what}, the first is {quote(lacking[0])}")
    if n_twice := len(merges) - len(encoder.ranks):
        raise CorruptFile(merges_path, f"{n_twice} of {len(merges)} merges occur a second time")
    return encoder


def save_encoder(encoder, model_dir):
    """Write vocab.json and merges.txt, which get_encoder and transformers' AutoTokenizer load."""
    with atomic_write(os.path.join(model_dir, "vocab.json")) as f:
        f.write(json.dumps(encoder.encoder).encode("utf-8"))
    with atomic_write(os.path.join(model_dir, "merges.txt")) as f:
        f.write("\n".join(["#version: 0.2", *encoder.ranks, ""]).encode("utf-8"))
