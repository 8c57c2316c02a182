"""encoder.py against published ids, OpenAI's tiktoken and Hugging Face's tokenizers."""

import functools
import json
import re
import unicodedata

import pytest
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import ByteLevelBPETokenizer

import encoder as encoder_module
from encoder import END_OF_TEXT, Encoder, bytes_to_unicode, get_encoder, learn_merges, save_encoder
from tests.conftest import DATA, PROMPTS, need
from weights.errors import CorruptFile, UserError

# Ids and where they were published; those without a source were computed with OpenAI's encoder.py from its own files.
PUBLISHED = {
    "Not all heroes wear capes.": "3673 477 10281 5806 1451 274 13",  # the blog "GPT in 60 Lines of NumPy"
    "zjqfl": "89 73 80 2704",  # the blog
    "hello world": "31373 995",  # tiktoken's README and tests
    "<|endoftext|>": "27 91 437 1659 5239 91 29",
    "Hello!! I'm Andrej Karpathy. It's 2022. w00t :D 🤗": "15496 3228 314 1101 10948 73 509 5117 10036 13 632 338 "
    "33160 13 266 405 83 1058 35 12520 97 245",  # minGPT's bpe.py
    "hello world!!!? (안녕하세요!) lol123 😉": "31373 995 10185 30 357 168 243 230 167 227 243 47991 246 168 226 116 "
    "168 248 242 8133 19462 10163 30325 231",  # minbpe's README
    "0" * 5: "20483",  # tiktoken's tests
    "0" * 17: "8269 10535 830",  # tiktoken's tests
}
FFFD = "\N{REPLACEMENT CHARACTER}"
WIDE = [*PROMPTS, "👩‍👩‍👧‍👦🏳️‍🌈", "日本語のテキスト", "안녕하세요", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ½ Ⅷ", "e\u0301 \u202e عربي"]

# Surrogates are no characters. Unassigned ones may become letters in some Unicode version that not every side knows.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
AWKWARD = st.sampled_from(["'s", "'LL", "'", " ", "  ", "\n", "\t\r\n", "\0", "\x85", "\xa0", "0", "½", "你", "🤗"])
OFTEN_MERGED = st.text("self. \n", max_size=200)
ANY_TEXT = st.lists(st.text(CHARACTERS, max_size=8) | AWKWARD, max_size=12).map("".join) | OFTEN_MERGED
fuzz = functools.partial(settings, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def hugging_face(path):
    """The encode and decode functions of Hugging Face's tokenizer for a folder's encoder.json and vocab.bpe."""
    tokenizer = ByteLevelBPETokenizer.from_file(str(path / "encoder.json"), str(path / "vocab.bpe"))
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode


@pytest.fixture(scope="module")
def real():
    """The Encoder of OpenAI's vocabulary."""
    need(DATA / "gpt2" / "vocab.bpe")
    return get_encoder("gpt2", str(need(DATA / "gpt2" / "encoder.json").parents[1]))


@pytest.fixture(scope="module")
def small(vocabulary_dir):
    """The Encoder of the tests' own 400 tokens."""
    return get_encoder(vocabulary_dir.name, str(vocabulary_dir.parent))


@pytest.fixture(scope="module")
def tiktoken_gpt2(real):
    """tiktoken with OpenAI's two files and its own pattern, without a cache on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = data_gym_to_mergeable_bpe_ranks(*(str(DATA / "gpt2" / name) for name in ("vocab.bpe", "encoder.json")))
    special = {END_OF_TEXT: 50256}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module", params=["gpt2", "400 tokens"])
def encoder_and_others(request, vocabulary_dir, small):
    """An Encoder, and other tokenizers' encode and decode functions for the same vocabulary."""
    if request.param == "400 tokens":
        return small, [hugging_face(vocabulary_dir)]
    theirs = request.getfixturevalue("tiktoken_gpt2")
    others = [(theirs.encode_ordinary, theirs.decode), hugging_face(DATA / "gpt2")]
    return request.getfixturevalue("real"), others


def assert_same_ids(encoder_and_others, text):
    encoder, others = encoder_and_others
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text
    for encode, _ in others:
        assert ids == encode(text)


BYTES = {symbol: i for i, symbol in enumerate(bytes_to_unicode().values())}
NO_MERGES = json.dumps(BYTES)


def write_files(path, vocabulary=NO_MERGES, merges="#version: 0.2\n"):
    """Write a model folder with these two files and return its Encoder."""
    for name, content in (("encoder.json", vocabulary), ("vocab.bpe", merges)):
        (path / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return get_encoder(path.name, str(path.parent))


def one_line_error(match, kind=UserError):
    return pytest.raises(kind, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.mark.parametrize(("text", "ids"), PUBLISHED.items())
def test_ids_equal_published_ids(real, text, ids):
    expected = [int(i) for i in ids.split()]
    assert real.encode(text) == expected
    assert real.decode(expected) == text


@pytest.mark.parametrize("name", ["wikitext2-test.txt", "tinyshakespeare.txt"])
def test_long_texts_have_the_ids_of_other_tokenizers(encoder_and_others, name):
    assert_same_ids(encoder_and_others, need(DATA / name).read_bytes().decode("utf-8")[:200_000])


def test_every_kind_of_character_has_the_ids_of_other_tokenizers(encoder_and_others):
    """Every assigned character next to a letter, a digit, a space and a sign; of those without case every 64th."""
    kinds = {chr(i): unicodedata.category(chr(i)) for i in (*range(0x32400), *range(0xE0000, 0xE0200))}
    chosen = [c for c, kind in kinds.items() if kind not in ("Cs", "Cn", "Co") and (kind != "Lo" or ord(c) % 64 == 0)]
    assert_same_ids(encoder_and_others, "".join(f"a{c}1 {c}! " for c in chosen))


@fuzz(max_examples=200)
@given(text=ANY_TEXT)
@example("I'll don't we've I'm you're he'd it's I'LL 's's a12 45½Ⅷ½ a  b\n\n d \n naïve 你好，世界!? e\u0301 \t\ta_b")
def test_any_text_has_the_ids_of_other_tokenizers(encoder_and_others, text):
    assert_same_ids(encoder_and_others, text)


@pytest.mark.parametrize("text", ["^", "0", " ", "\n", "definitelyselfreturns"])  # all but one: tiktoken's
def test_long_runs_have_the_ids_of_other_tokenizers(encoder_and_others, text):
    assert_same_ids(encoder_and_others, text * (10_000 // len(text)))


def test_end_of_text_is_one_token_only_where_it_is_allowed(real, tiktoken_gpt2):
    assert real.encode("hello <|endoftext|>", allowed_special={END_OF_TEXT}) == [31373, 220, 50256]  # tiktoken's tests
    assert 50256 not in real.encode("hello <|endoftext|>")
    assert real.decode([31373, 220, 50256]) == "hello <|endoftext|>"
    text = "<|endoftext|>a b<|endoftext|><|endoftext|> \n <|endoftext|>s <|endoftext|"
    expected = tiktoken_gpt2.encode(text, allowed_special="all")
    for allowed in (END_OF_TEXT, [END_OF_TEXT]):
        assert real.encode(text, allowed_special=allowed) == expected


def test_the_cache_is_bounded(monkeypatch, small):
    monkeypatch.setattr(encoder_module, "CACHED_WORDS", 3)
    encoder, longest = Encoder(small.encoder, list(small.ranks)), "x" * encoder_module.CACHED_LENGTH
    for text, n_cached in ((longest + "x", 0), (longest, 1), ("one two three four five one two", 3)):
        assert encoder.encode(text) == small.encode(text)
        assert encoder.cached_word.cache_info().currsize == n_cached


def test_the_stream_yields_a_character_with_its_last_byte(small):
    """One piece of text per id, empty within a character; and one for the end."""
    assert list(small.decode_stream(iter(small.encode("a🤗b")))) == ["a", "", "", "", "🤗", "b", ""]


@fuzz(max_examples=200)
@given(data=st.data())
def test_any_ids_decode_as_in_other_tokenizers(encoder_and_others, data):
    """Bytes that are not UTF-8, also at the end, become replacement characters."""
    encoder, others = encoder_and_others
    ids = data.draw(st.lists(st.integers(0, len(encoder.encoder) - 2), max_size=30))
    for _, decode in others:
        assert encoder.decode(ids) == decode(ids)


def test_ids_that_are_not_bytes(small):
    """An id outside the vocabulary is a replacement character, a special token its name, without lone surrogates."""
    for unknown in (len(small.encoder), 10**6, -1):
        assert small.decode([*small.encode("a"), unknown, *small.encode("b")]) == f"a{FFFD}b"
    assert Encoder({"a": 0, "<| 終 |>": 1}, []).decode([0, 1, 0]) == "a<| 終 |>a"
    assert Encoder({"a": 0, "<终\ud800>": 1}, []).decode([0, 1, 0]) == f"a<终{3 * FFFD}>a"


def assert_same_merges(text, vocab_size):
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(text.splitlines(True), vocab_size, min_frequency=1, show_progress=False)
    merges = learn_merges(text, vocab_size)
    assert merges == [" ".join(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]]
    symbols = [*sorted(bytes_to_unicode().values()), *(merge.replace(" ", "") for merge in merges)]
    assert {symbol: i for i, symbol in enumerate(symbols)} == theirs.get_vocab()


def test_merges_of_tinyshakespeare_equal_those_of_hugging_face():
    assert_same_merges(need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8"), 1000)


RUNS = st.builds(str.__mul__, st.sampled_from("aaab你🤗1'! \n\r\t\x85\u2028"), st.integers(1, 40))


@fuzz(max_examples=150)
@given(text=st.lists(RUNS | OFTEN_MERGED, max_size=40).map("".join), vocab_size=st.integers(256, 400))
def test_merges_of_any_text_equal_those_of_hugging_face(text, vocab_size):
    assert_same_merges(text, vocab_size)


def test_text_without_an_encoding_is_refused(small, tmp_path):
    with one_line_error(r"lone surrogate U\+D800 at character 3"):
        small.encode("a🤗\ud800b")
    encoder = Encoder({"a": 0, "b": 1, "ab": 2}, ["a b"])
    assert encoder.encode("abab") == [2, 2]
    with one_line_error("no token for 'c'"):
        encoder.encode("abc\nb")
    with one_line_error(r"no special token '<.pad.>'"):
        small.encode("a", allowed_special={END_OF_TEXT, "<|pad|>"})
    with one_line_error("no vocabulary; put encoder.json and vocab.bpe, or vocab.json and merges.txt, or tok"):
        get_encoder(tmp_path.name, tmp_path.parent)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("encoder.json", '["a", "b"]'),
        *(("encoder.json", json.dumps(BYTES | {"ab": wrong})) for wrong in (True, 256.0, -1, 2**31)),
        ("encoder.json", '{"a\n\x1b[2J": NaN}'),
        ("encoder.json", b'{"a\xff": 0}'),
        ("vocab.bpe", "#version: 0.2\na b c\n"),
        ("vocab.bpe", "#version: 0.2\na b\n\nab c\n"),
        ("vocab.bpe", ""),
        ("vocab.bpe", b"#version: 0.2\na \xff\n"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_corrupt_file_is_named(tmp_path, name, content):
    with one_line_error(re.escape(str(tmp_path / name)), CorruptFile):
        write_files(tmp_path, **{"vocabulary" if name == "encoder.json" else "merges": content})


def test_merges_read_the_same_in_any_form(tmp_path, vocabulary_dir, small):
    """Without the version line, without the last line feed, and with Windows's line ends (no symbol has a "\\r")."""
    vocabulary = (vocabulary_dir / "encoder.json").read_bytes()
    merges = (vocabulary_dir / "vocab.bpe").read_bytes()
    for content in (merges.partition(b"\n")[2].rstrip(b"\n"), merges.replace(b"\n", b"\r\n")):
        assert write_files(tmp_path, vocabulary.replace(b"\n", b"\r\n"), content).ranks == small.ranks
    assert write_files(tmp_path).encode("ab") == [BYTES["a"], BYTES["b"]]


def write_vocabulary(folder, layout, vocabulary, merges):
    """Write a vocabulary in one of LAYOUTS; return its path and that of its merges."""
    paths = [folder / name for name in layout]
    if len(layout) == 1:
        added = [{"content": symbol, "id": i} for symbol, i in vocabulary.items() if symbol == END_OF_TEXT]
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
        content = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}
    else:
        content = vocabulary
        paths[1].write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    paths[0].write_text(json.dumps(content), encoding="utf-8")
    return paths[0], paths[-1]


INCONSISTENT = {  # a change of a vocabulary v and its list of merges m; words of the message; the file that it names
    "last merge lost": (
        lambda v, m: (v, m[:-1]),
        "1 of 400 tokens of .* neither results of its merges nor special, .* '",
        1,
    ),
    "a merge garbled": (lambda v, m: (v, [*m[:9], m[9] + "x", *m[10:]]), "1 of 400 tokens", 1),
    "a merge twice": (lambda v, m: (v, [*m, m[5]]), "1 of 144 merges occur a second time", 1),
    "no merges": (lambda v, m: (v, []), "143 of 400 tokens", 1),
    "no tokens": (lambda v, m: ({}, m), "256 of the 256 byte symbols are not tokens, the first is '!'", 0),
    "no byte symbol": (lambda v, m: ({s: i for s, i in v.items() if s != "b"}, m), "1 of the 256 .* is 'b'", 0),
    "a merged token lost": (lambda v, m: ({s: i for s, i in v.items() if i != 398}, m), "lacks the results of 1 of", 0),
    "two tokens of one id": (lambda v, m: (v | {"a": 300}, m), "two tokens have the id 300", 0),
    "an unknown token": (lambda v, m: (v | {"\n\x1b[2J" + "x" * 999: 400}, m), r"is '\\n\\x1b\[2Jx{18}\.\.\.", 1),
}


@pytest.mark.parametrize("layout", encoder_module.LAYOUTS, ids=lambda layout: layout[0])
@pytest.mark.parametrize("how", INCONSISTENT)
def test_the_tokens_are_the_bytes_the_results_of_merges_and_special_tokens(tmp_path, small, layout, how):
    change, words, blamed = INCONSISTENT[how]
    write_vocabulary(tmp_path, layout, small.encoder | {"<pad>": 401, "[CLS]": 402}, list(small.ranks))
    assert len(get_encoder(tmp_path.name, str(tmp_path.parent)).encoder) == 402
    paths = write_vocabulary(tmp_path, layout, *change(small.encoder, list(small.ranks)))
    with one_line_error(f"{re.escape(str(paths[blamed]))}[: ].*{words}", CorruptFile):
        get_encoder(tmp_path.name, str(tmp_path.parent))


def test_merges_cut_at_any_byte_are_noticed(tmp_path, vocabulary_dir):
    """But for the last line feed."""
    vocabulary, merges = ((vocabulary_dir / name).read_bytes() for name in ("encoder.json", "vocab.bpe"))
    for n_bytes in [*range(0, len(merges) - 20, 7), *range(len(merges) - 20, len(merges) - 1)]:
        with one_line_error(re.escape(str(tmp_path / "vocab.bpe")), CorruptFile):
            write_files(tmp_path, vocabulary, merges[:n_bytes])


WRONG = [None, 3, "x", "", [], ["x"], [[]], [3], {}, {"x": "y"}, [{"content": "x"}], [["a", "b", "c"]]]
WRONG += [[{"content": 3, "id": 3}], [{"content": ["x"], "id": 400}], [{"content": "x", "id": "3"}], [{"id": 3}]]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_tokenizer_of_wrong_types_is_an_error_in_one_line(tmp_path, small, value):
    """But for no added tokens."""
    write_vocabulary(tmp_path, ("tokenizer.json",), small.encoder, list(small.ranks))
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_bytes())
    changed = [content | {key: value} for key in content]
    changed += [content | {"model": content["model"] | {key: value}} for key in content["model"]]
    for tokenizer in changed:
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
        if tokenizer["added_tokens"] not in ([], {}, ""):
            with one_line_error(re.escape(str(path))):
                get_encoder(tmp_path.name, str(tmp_path.parent))


@pytest.mark.parametrize("end_of_text", [True, False])
def test_a_saved_vocabulary_is_the_same_here_and_in_transformers(tmp_path, small, end_of_text):
    from transformers import AutoTokenizer

    vocabulary = {symbol: i for symbol, i in small.encoder.items() if end_of_text or symbol != END_OF_TEXT}
    save_encoder(Encoder(vocabulary, list(small.ranks)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    saved = get_encoder(tmp_path.name, str(tmp_path.parent))
    assert (saved.encoder, saved.ranks) == (vocabulary, small.ranks)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(text for text in WIDE if end_of_text or END_OF_TEXT not in text)
    assert theirs.encode(text) == saved.encode(text, allowed_special=[END_OF_TEXT] * end_of_text)
