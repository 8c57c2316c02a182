"""The tokenizer against published ids, OpenAI's tiktoken and Hugging Face's tokenizers."""

import functools
import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import encoder as encoder_module
from encoder import CACHED_LENGTH, CACHED_WORDS, END_OF_TEXT, PATTERN, Encoder, bytes_to_unicode, get_encoder
from tests.conftest import DATA, PROMPTS, TINY, need
from weights.errors import CorruptFile, UserError

# Where the ids were published; those without a name were computed with OpenAI's encoder.py over its own files.
PUBLISHED = [
    ("Not all heroes wear capes.", "3673 477 10281 5806 1451 274 13"),  # the blog "GPT in 60 Lines of NumPy"
    ("zjqfl", "89 73 80 2704"),  # the blog
    ("hello world", "31373 995"),  # tiktoken's README and tests
    ("<|endoftext|>", "27 91 437 1659 5239 91 29"),
    ("This is some text", "1212 318 617 2420"),
    (  # minGPT's bpe.py
        "Hello!! I'm Andrej Karpathy. It's 2022. w00t :D 🤗",
        "15496 3228 314 1101 10948 73 509 5117 10036 13 632 338 33160 13 266 405 83 1058 35 12520 97 245",
    ),
    ("Hello, I'm a language model,", "15496 11 314 1101 257 3303 2746 11"),
    (
        "Hello!!!!!!!!!? 🤗, my dog is a little",
        "15496 13896 50184 30 12520 97 245 11 616 3290 318 257 1310",
    ),
    (  # minbpe's README
        "hello world!!!? (안녕하세요!) lol123 😉",
        "31373 995 10185 30 357 168 243 230 167 227 243 47991 246 168 226 116 168 248 242 8133 19462 10163 30325 231",
    ),
    ("   a\n\n  b", "220 220 257 628 220 275"),
    ("don't DON'T I'LL we've", "9099 470 23917 6 51 314 6 3069 356 1053"),
    (" ", "220"),
    ("  ", "220 220"),
    ("\t\n", "197 198"),
    ("", ""),
    ("naïve café ½ Ⅷ ٣", "2616 38776 40304 25208 2343 227 100 18923 96"),
    ("0", "15"),  # from here on tiktoken's tests
    ("00", "405"),
    ("000", "830"),
    ("0000", "2388"),
    ("00000", "20483"),
    ("000000", "10535"),
    ("0000000", "24598"),
    ("00000000", "8269"),
    ("0000000000000000", "25645"),
    ("00000000000000000", "8269 10535 830"),
]
TEXTS = ["wikitext2-test.txt", "tinyshakespeare.txt"]
LONG_RUNS = ["^", "0", "a", "'s", " ", "\n"]  # tiktoken's tests
WIDE = [*PROMPTS, "👩‍👩‍👧‍👦🏳️‍🌈", "日本語のテキスト", "안녕하세요", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ½ Ⅷ", "e\u0301 \u202e عربي"]

# Surrogates are no characters. Unassigned ones may become letters in some Unicode version that not every side knows.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
AWKWARD = st.sampled_from(
    ["'s", "'LL", "'", " ", "  ", "\n", "\t\r\n", "\x00", "\x85", "\xa0", "0", "½", "é", "你", "🤗"]
)
ANY_TEXT = st.lists(st.text(CHARACTERS, max_size=8) | AWKWARD, max_size=12).map("".join)
fuzz = functools.partial(settings, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def real():
    """The Encoder over OpenAI's vocabulary."""
    need(DATA / "gpt2" / "vocab.bpe")
    return get_encoder("gpt2", str(need(DATA / "gpt2" / "encoder.json").parent.parent))


@pytest.fixture(scope="module")
def tiktoken_gpt2(real):
    """tiktoken over the same two files, with its own pattern; it keeps nothing outside the process."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        files = [str(DATA / "gpt2" / name) for name in ("vocab.bpe", "encoder.json")]
        ranks = data_gym_to_mergeable_bpe_ranks(*files)
    special = {END_OF_TEXT: 50256}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def real_hugging_face(real):
    return hugging_face(DATA / "gpt2")


@pytest.fixture(scope="module")
def small(vocabulary_dir):
    """The Encoder over the 400 tokens that the tests learn themselves."""
    return get_encoder(vocabulary_dir.name, str(vocabulary_dir.parent))


@pytest.fixture(scope="module")
def small_hugging_face(vocabulary_dir):
    return hugging_face(vocabulary_dir)


def hugging_face(path):
    """Hugging Face's tokenizer over a folder's encoder.json and vocab.bpe."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer.from_file(str(path / "encoder.json"), str(path / "vocab.bpe"))
    return tokenizer


def read_text(name):
    return need(DATA / name).read_bytes().decode("utf-8")


def write_files(path, vocabulary='{"a": 0, "b": 1, "ab": 2}', merges="#version: 0.2\na b\n"):
    """A model folder at path with these two files; a text is written as UTF-8, None leaves the file out."""
    for name, content in (("encoder.json", vocabulary), ("vocab.bpe", merges)):
        if content is not None:
            (path / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return get_encoder(path.name, str(path.parent))


def one_line(error):
    return "\n" not in str(error.value)


# Published ids


@pytest.mark.parametrize(("text", "ids"), PUBLISHED)
def test_ids_are_the_published_ones(real, text, ids):
    expected = [int(i) for i in ids.split()]
    assert real.encode(text) == expected
    assert real.decode(expected) == text


def test_end_of_text_is_one_token_only_where_it_is_allowed(real):
    assert real.encode("hello <|endoftext|>", allowed_special={END_OF_TEXT}) == [31373, 220, 50256]  # tiktoken's tests
    assert 50256 not in real.encode("hello <|endoftext|>")
    assert real.decode([31373, 220, 50256]) == "hello <|endoftext|>"


def test_end_of_text_cuts_words_as_in_tiktoken(real, tiktoken_gpt2):
    text = "<|endoftext|>a b<|endoftext|><|endoftext|> \n <|endoftext|>s <|endoftext|"
    assert real.encode(text, allowed_special=[END_OF_TEXT]) == tiktoken_gpt2.encode(text, allowed_special="all")


def test_the_longest_allowed_special_token_wins():
    vocabulary = {**{symbol: i for i, symbol in enumerate(bytes_to_unicode().values())}, "<x>": 256, "<x><y>": 257}
    encoder = Encoder(vocabulary, [])
    assert encoder.encode("<x><y><x>", allowed_special=("<x>", "<x><y>")) == [257, 256]
    assert encoder.encode("<x><y><x>", allowed_special=("<x>",)) == [256, *encoder.encode("<y>"), 256]


# The same ids as other tokenizers


@pytest.mark.parametrize("name", TEXTS)
def test_a_whole_text_has_the_ids_of_other_tokenizers(real, tiktoken_gpt2, real_hugging_face, name):
    text = read_text(name)
    ids = real.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert ids == real_hugging_face.encode(text).ids
    assert real.decode(ids) == text


def test_every_kind_of_character_has_the_ids_of_other_tokenizers(real, tiktoken_gpt2, real_hugging_face):
    """Every assigned character next to a letter, a digit, a space and a sign; of those without case every 16th."""
    kinds = {c: unicodedata.category(c) for c in map(chr, range(0x110000))}
    chosen = [c for c, kind in kinds.items() if kind not in ("Cs", "Cn", "Co") and (kind != "Lo" or ord(c) % 16 == 0)]
    text = "".join(f"a{c}1 {c}!{c} " for c in chosen)
    ids = real.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert ids == real_hugging_face.encode(text).ids


@fuzz(max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_has_the_ids_of_other_tokenizers(real, tiktoken_gpt2, real_hugging_face, text):
    ids = real.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert ids == real_hugging_face.encode(text).ids
    assert real.decode(ids) == text


@fuzz(max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_in_the_small_vocabulary(small, small_hugging_face, text):
    ids = small.encode(text)
    assert ids == small_hugging_face.encode(text).ids
    assert small.decode(ids) == text


@fuzz(max_examples=100)
@given(text=st.lists(st.sampled_from("self. \n"), max_size=200).map("".join))
def test_many_competing_merges_in_the_small_vocabulary(small, small_hugging_face, text):
    """Letters that the vocabulary merges often and in several ways."""
    assert small.encode(text) == small_hugging_face.encode(text).ids


@pytest.mark.parametrize("unit", LONG_RUNS)
def test_long_runs(real, tiktoken_gpt2, unit):
    text = unit * 10_000
    ids = real.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert real.decode(ids) == text


def test_one_long_word_in_the_small_vocabulary(small, small_hugging_face):
    text = "definitelyselfreturns" * 3_000
    assert small.encode(text) == small_hugging_face.encode(text).ids


# Parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I'll say: don't!", ["I", "'ll", " say", ":", " don", "'t", "!"]),
        ("I'LL 's's", ["I", "'", "LL", " '", "s", "'s"]),
        ("a  b   c\n\n d \n", ["a", " ", " b", "  ", " c", "\n\n", " d", " \n"]),
        ("abc123 45½Ⅷ½", ["abc", "123", " 45½Ⅷ½"]),
        ("naïve 你好，世界!?", ["naïve", " 你好", "，", "世界", "!?"]),
        ("e\u0301 \t\ta_b", ["e", "\u0301", " \t", "\t", "a", "_", "b"]),
    ],
)
def test_how_text_is_cut_into_words(text, words):
    """A space goes with the word behind it, of several the last; lower-case endings stand alone; signs are words."""
    assert PATTERN.findall(text) == words


def test_every_byte_has_a_visible_character_of_its_own(real):
    table = bytes_to_unicode()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
    assert not any(c.isspace() or unicodedata.category(c).startswith("C") for c in table.values())
    assert {table[b] for b in b"Az!~"} == set("Az!~")
    assert (table[0], table[ord("\n")], table[ord(" ")], table[0xA0], table[0xAD]) == ("Ā", "Ċ", "Ġ", "ł", "Ń")
    assert set(table.values()) == {symbol for symbol in real.encoder if len(symbol) == 1}


def test_merges_apply_in_their_order_not_from_left_to_right():
    encoder = Encoder({"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}, ["b c", "a b"])
    assert encoder.bpe("abc") == ["a", "bc"]
    assert encoder.bpe("abcab") == ["a", "bc", "ab"]
    assert Encoder(encoder.encoder, ["a b", "b c", "ab c"]).bpe("abcab") == ["abc", "ab"]


@pytest.mark.parametrize(
    ("word", "symbols"), [("", ""), ("a", "a"), ("aa", "aa"), ("aaa", "aa a"), ("aaaaa", "aaaa a")]
)
def test_a_repeated_letter_merges_from_the_left(word, symbols):
    encoder = Encoder({"a": 0, "aa": 1, "aaaa": 2}, ["a a", "aa aa"])
    assert encoder.bpe(word) == symbols.split()


def test_the_word_cache_is_bounded(small):
    assert small.cached_word.cache_info().maxsize == CACHED_WORDS < 10**6


def test_a_full_word_cache_forgets(monkeypatch, small):
    monkeypatch.setattr(encoder_module, "CACHED_WORDS", 3)
    encoder = Encoder(small.encoder, list(small.ranks))
    text = "one two three four five one two"
    assert encoder.encode(text) == small.encode(text)
    assert encoder.cached_word.cache_info().currsize == 3


def test_long_words_are_not_cached(small):
    encoder = Encoder(small.encoder, list(small.ranks))
    encoder.encode("x" * (CACHED_LENGTH + 1))
    assert encoder.cached_word.cache_info().currsize == 0
    encoder.encode("x" * CACHED_LENGTH)
    assert encoder.cached_word.cache_info().currsize == 1


def test_a_cached_word_is_not_changed_by_its_use(small):
    first = small.encode("return x")
    expected = list(first)
    first.append(0)
    assert small.encode("return x") == expected


# Ids to text


@pytest.mark.parametrize("text", WIDE)
def test_the_stream_never_shows_half_a_character(small, text):
    ids = small.encode(text)
    pieces = list(small.decode_stream(iter(ids)))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) >= len(ids)  # a piece for each id as it comes, be it empty


def test_the_stream_shows_a_character_with_its_last_byte(small):
    stream = small.decode_stream(iter(small.encode("a🤗b")))
    assert [next(stream) for _ in range(6)] == ["a", "", "", "", "🤗", "b"]


def test_bytes_that_are_not_utf_8_become_replacement_characters(small):
    emoji = small.encode("🤗")
    assert len(emoji) == 4
    assert small.decode(emoji[:-1]) == "\N{REPLACEMENT CHARACTER}"
    assert small.decode([*emoji[:2], *small.encode("a")]) == "\N{REPLACEMENT CHARACTER}a"
    assert small.decode(emoji[1:]) == "\N{REPLACEMENT CHARACTER}" * 3
    assert list(small.decode_stream(emoji[:-1])) == ["", "", "", "\N{REPLACEMENT CHARACTER}"]


@fuzz(max_examples=200)
@given(ids=st.lists(st.integers(0, TINY["n_vocab"] - 2), max_size=30))
def test_any_ids_decode_as_in_hugging_face(small, small_hugging_face, ids):
    assert small.decode(ids) == small_hugging_face.decode(ids)


@fuzz(max_examples=200)
@given(ids=st.lists(st.integers(0, 50256), max_size=30))
def test_any_ids_decode_as_in_tiktoken(real, tiktoken_gpt2, ids):
    assert real.decode(ids) == tiktoken_gpt2.decode(ids)


@pytest.mark.parametrize("unknown", [TINY["n_vocab"], 10**6, -1])
def test_an_unknown_id_is_a_replacement_character(small, unknown):
    assert small.decode([*small.encode("a"), unknown, *small.encode("b")]) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_special_token_beyond_the_visible_bytes_decodes_as_it_is():
    encoder = Encoder({"a": 0, "<| 終 |>": 1}, [])
    assert encoder.decode([0, 1, 0]) == "a<| 終 |>a"


# Mistakes


@pytest.mark.parametrize(
    ("text", "what"), [("ab\ud800", "U+D800 at character 3"), ("🤗\udfffx", "U+DFFF at character 2")]
)
def test_a_lone_surrogate_is_refused_with_its_position(small, text, what):
    with pytest.raises(UserError, match="surrogate") as error:
        small.encode(text)
    assert what in str(error.value)
    assert one_line(error)


def test_a_vocabulary_that_lacks_a_symbol_is_named(tmp_path):
    encoder = write_files(tmp_path)
    assert encoder.encode("abab") == [2, 2]
    with pytest.raises(UserError, match="no token for 'c'") as error:
        encoder.encode("abc\nb")
    assert one_line(error)


def test_a_vocabulary_that_lacks_a_merged_symbol_is_named(tmp_path):
    encoder = write_files(tmp_path, vocabulary='{"a": 0, "b": 1}')
    with pytest.raises(UserError, match="no token for 'ab'"):
        encoder.encode("ab")


@pytest.mark.parametrize(("vocabulary", "merges"), [(None, None), ("{}", None), (None, "a b")])
def test_a_missing_vocabulary(tmp_path, vocabulary, merges):
    with pytest.raises(UserError, match="no vocabulary") as error:
        write_files(tmp_path, vocabulary, merges)
    assert not isinstance(error.value, CorruptFile)
    assert one_line(error)


BAD_VOCABULARIES = {
    "empty": "",
    "cut": '{"a": 0, "b"',
    "a list": '["a", "b"]',
    "ids that are texts": '{"a": "0"}',
    "ids that are fractions": '{"a": 0.5}',
    "an error page": '<?xml version="1.0"?>\n<Error>\n<Code>BlobNotFound</Code></Error>\n',
    "not UTF-8": b'{"a\xff": 0}',
    "a negative id": '{"a": 0, "b": -1}',
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_VOCABULARIES.values(), ids=BAD_VOCABULARIES)
def test_a_corrupt_vocabulary(tmp_path, content):
    with pytest.raises(CorruptFile) as error:
        write_files(tmp_path, vocabulary=content)
    assert error.value.path == str(tmp_path / "encoder.json")
    assert one_line(error)


BAD_MERGES = {
    "one part": "#version: 0.2\na b\nab\n",
    "three parts": "#version: 0.2\na b c\n",
    "an error page": '<?xml version="1.0"?>\n<Error>\n<Code>BlobNotFound</Code></Error>\n',
    "not UTF-8": b"#version: 0.2\na \xff\n",
    "empty": "",
    "an empty line amid others": "#version: 0.2\na b\n\nab c\n",
}


@pytest.mark.parametrize("content", BAD_MERGES.values(), ids=BAD_MERGES)
def test_corrupt_merges(tmp_path, content):
    with pytest.raises(CorruptFile) as error:
        write_files(tmp_path, merges=content)
    assert error.value.path == str(tmp_path / "vocab.bpe")
    assert one_line(error)


def test_merges_may_be_none_at_all(tmp_path):
    assert write_files(tmp_path, merges="#version: 0.2\n").encode("ab") == [0, 1]


# Files


def test_hugging_face_names_read_the_same(tmp_path, vocabulary_dir, small):
    (tmp_path / "vocab.json").write_bytes((vocabulary_dir / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((vocabulary_dir / "vocab.bpe").read_bytes())
    found = get_encoder(tmp_path.name, str(tmp_path.parent))
    assert (found.encoder, found.ranks) == (small.encoder, small.ranks)


def test_merges_read_the_same_without_the_version_line_or_the_last_line_end(tmp_path, vocabulary_dir, small):
    vocabulary = (vocabulary_dir / "encoder.json").read_bytes()
    merges = (vocabulary_dir / "vocab.bpe").read_text(encoding="utf-8").partition("\n")[2].rstrip("\n")
    assert write_files(tmp_path, vocabulary, merges).ranks == small.ranks


def test_line_ends_of_windows_read_the_same(tmp_path, vocabulary_dir, small):
    """As after a checkout by Git for Windows; no symbol can hold a carriage return, byte 13 is written "č"."""
    vocabulary = (vocabulary_dir / "encoder.json").read_bytes().replace(b"\n", b"\r\n")
    merges = (vocabulary_dir / "vocab.bpe").read_bytes().replace(b"\n", b"\r\n")
    found = write_files(tmp_path, vocabulary, merges)
    assert (found.encoder, found.ranks) == (small.encoder, small.ranks)


def test_openai_files_have_every_merge_and_token(real):
    assert (len(real.encoder), len(real.ranks), len(real.decoder)) == (50257, 50000, 50257)
    assert real.encoder[END_OF_TEXT] == 50256
    assert json.loads(read_text("gpt2/encoder.json"))["Ġthe"] == real.encoder["Ġthe"] == 262


def test_one_special_token_may_be_given_as_it_is(small):
    end = small.encoder[END_OF_TEXT]
    assert small.encode(f"a{END_OF_TEXT}", allowed_special=END_OF_TEXT) == [*small.encode("a"), end]


def test_a_special_token_that_the_vocabulary_lacks(small):
    with pytest.raises(UserError, match=r"no special token '<.pad.>'"):
        small.encode("a", allowed_special={END_OF_TEXT, "<|pad|>"})
