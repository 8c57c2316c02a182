"""gpt2.py --explain: its numbers against transformers' hidden states and attention weights, its output, its errors."""

import base64
import json
import re
import types

import numpy as np
import pytest

import gpt2
from cli import explain
from encoder import get_encoder
from explain import page, trace
from tests import conftest
from tests.conftest import ROOT, TINY, need
from tests.programs import assert_mistake
from tests.random_model import DATA, random_tensors
from weights.names import nest

PROMPTS = [conftest.PROMPTS[i] for i in (0, 2, 7, 8)]  # a sentence, one letter, whitespace, other scripts


@pytest.fixture(scope="module")
def transformers_pass(tiny_models_dir):
    """A function from token ids to transformers' output, and the logits of each hidden state after its last steps."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    model = GPT2LMHeadModel.from_pretrained(tiny_models_dir / "tiny", attn_implementation="eager").eval()

    @torch.no_grad()
    def run(ids):
        output = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
        *hidden, last = output.hidden_states  # the last one is after the final layer norm
        states = torch.stack([*(model.transformer.ln_f(x) for x in hidden), last])
        return output, model.lm_head(states)[:, 0]

    return run


@pytest.fixture
def run(inside, tiny_flags):
    """Run gpt2.py with the tiny model in this process; returns its exit code, output and errors."""
    return lambda *arguments, typed=b"": inside(*tiny_flags, *arguments, typed=typed)


def data_in(text):
    """The data in the text of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# The numbers


@pytest.mark.parametrize("prompt", PROMPTS)
def test_trace_and_logit_lens_equal_transformers(tiny, transformers_pass, prompt):
    encoder, hparams, params = tiny
    ids = encoder.encode(prompt)
    ours, (output, logits) = trace.trace(ids, params, hparams["n_head"]), transformers_pass(ids)
    normalized = gpt2.layer_norm(ours.hidden[-1], **params["ln_f"])
    for a, b in zip([*ours.hidden[:-1], normalized], output.hidden_states, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.attention, output.attentions, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-6)
    lens = trace.logit_lens(ours.hidden, params["ln_f"], params["wte"])
    np.testing.assert_allclose(lens, logits, rtol=1e-4, atol=1e-4)
    assert ours.hidden.dtype == ours.attention.dtype == lens.dtype == np.float32


@pytest.mark.parametrize("last_only", [False, True])
def test_the_last_logits_of_the_lens_are_those_of_gpt2_bit_for_bit(tiny, last_only):
    encoder, hparams, params = tiny
    ids, functions = encoder.encode(PROMPTS[0]), dict(vars(gpt2))
    expected = gpt2.gpt2(ids, **params, n_head=hparams["n_head"], last_only=last_only)
    ours = trace.trace(ids, params, hparams["n_head"], last_only)
    np.testing.assert_array_equal(ours.logits, expected)
    np.testing.assert_array_equal(trace.logit_lens(ours.hidden[-1], params["ln_f"], params["wte"]), expected)
    assert ours.hidden.shape == (TINY["n_layer"] + 1, 1 if last_only else len(ids), TINY["n_embd"])
    assert (ours.attention is None) == last_only
    assert vars(gpt2) == functions, "trace() changed gpt2"


def test_of_equally_likely_tokens_the_lower_id_comes_first():
    ties = np.random.default_rng(0).integers(0, 9, 2000).astype(np.float32)
    assert trace.most_likely(ties, 500)[0].tolist() == sorted(range(2000), key=lambda i: (-ties[i], i))[:500]
    assert trace.most_likely(np.zeros(2, dtype=np.float32), 10)[0].tolist() == [0, 1]


# The text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_shows_the_probabilities_of_transformers(run, tiny, transformers_pass, prompt):
    encoder = tiny[0]
    code, out, err = run(prompt, "--explain")
    assert (code, err) == (0, b"")
    tokens, last, lens = (part.splitlines()[1:] for part in out.decode("utf-8").split("\n\n"))
    ids = encoder.encode(prompt)
    assert tokens == [f"{i:4}  {token:6}  {explain.token_text(encoder, token)}" for i, token in enumerate(ids, 1)]
    expected = transformers_pass(ids)[1][:, -1].softmax(-1).topk(trace.K)
    texts = [[explain.token_text(encoder, int(i)) for i in layer] for layer in expected.indices]
    ranks, found, shown = zip(*(re.fullmatch(r" *(\d+) +([\d.]+)%  (.+)", line).groups() for line in last), strict=True)
    assert (list(map(int, ranks)), list(shown)) == (list(range(1, trace.K + 1)), texts[-1])
    np.testing.assert_allclose([float(p) for p in found], 100 * expected.values[-1], atol=0.0051)
    cells = re.findall(r" +(\d+\.\d) (.+?) *(?= \d+\.\d b?['\"]|$)", "\n".join(line[4:] for line in lens), re.M)
    np.testing.assert_allclose([float(p) for p, _ in cells], 100 * expected.values[:-1].flatten(), atol=0.051)
    assert [text for _, text in cells] == [explain.shorten(text) for layer in texts[:-1] for text in layer]
    assert [line[:4].strip() for line in lens if line[:4].strip()] == [str(i) for i in range(TINY["n_layer"])]


@pytest.mark.parametrize("vocabulary", ["shakespeare", "gpt2"])
def test_every_token_has_a_text_of_its_own(vocabulary):
    path = need(DATA / "gpt2" / "encoder.json").parent if vocabulary == "gpt2" else ROOT / "models" / "shakespeare"
    encoder = get_encoder(path.name, str(path.parent))
    texts = [explain.token_text(encoder, i) for i in encoder.decoder]
    assert len(set(texts)) == len(texts) == len(encoder.encoder)
    assert all(text.isprintable() for text in texts)


@pytest.mark.parametrize("text", [r"'\n\n'", r"b'\xe4\xbd'", "' 你'", "'\"'", r"'\u0301x'", r"'\u200d'"])
def test_a_token_is_shown_as_a_python_literal(text):
    """Among them a combining accent, which would combine with the quote, and a character of no width."""
    data = eval(text)
    encoder = types.SimpleNamespace(token_bytes=lambda _: data if isinstance(data, bytes) else data.encode("utf-8"))
    assert explain.token_text(encoder, 0) == text


@pytest.mark.parametrize(("columns", "lines_per_row"), [("16", 10), ("40", 4), ("80", 2), ("400", 1)])
def test_the_table_fits_the_terminal_and_is_aligned(monkeypatch, columns, lines_per_row):
    texts = ["' the'", "'你好'", "'🤗'", "'e\u0301'", "'é'", "'ｱ'", "'ア'"]
    assert [explain.width(text) - 2 for text in texts] == [4, 4, 2, 1, 1, 1, 2]
    monkeypatch.setenv("COLUMNS", columns)
    rows = [["1.0 '你好'", "1.0 'a'", "1.0 'e\u0301'", "1.0 '🤗'", "1.0 'four'"] * 2] * 3
    lines = list(explain.format_table(rows))
    assert len(lines) == 3 * lines_per_row
    assert max(map(explain.width, lines)) <= int(columns)
    starts = [{explain.width(line[: m.start()]) for m in re.finditer(r"1\.0", line)} for line in lines]
    assert set.union(*starts) == max(starts, key=len)


# The page (tests/test_explain_page.py opens it in a browser)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_page_has_the_values_of_transformers(run, tmp_path, tiny, transformers_pass, prompt):
    assert run(prompt, "--explain", tmp_path / "out.html")[:2] == (0, b"")
    data = data_in((tmp_path / "out.html").read_text(encoding="utf-8"))
    ids, n = tiny[0].encode(prompt), len(data["ids"])
    output, logits = transformers_pass(ids)
    assert (data["model"], data["ids"], data["shape"]) == ("tiny", ids, [TINY["n_layer"], TINY["n_head"]])
    weights = np.frombuffer(base64.b64decode(data["attention"]), dtype="<u2") / 65535
    maps = np.zeros((*data["shape"], n, n))
    maps[..., *np.tril_indices(n)] = weights.reshape(*data["shape"], -1)
    np.testing.assert_allclose(maps, [a[0] for a in output.attentions], atol=1.1e-5)
    expected = logits.softmax(-1).topk(trace.K)
    found = np.array(data["next"])  # [n_layer+1, n_seq, K, 2]
    np.testing.assert_array_equal(found[..., 0], expected.indices)
    np.testing.assert_allclose(found[..., 1], expected.values, rtol=1e-4, atol=1e-7)
    assert all(text == explain.token_text(tiny[0], int(i)) for i, text in data["text"].items())


def test_the_browser_runs_only_the_script_of_the_page_whatever_the_tokens_are():
    words = ["</script><script>alert('a')</script>", "<!--", "{{data}}", "\u2028", "' \" & <b>"]
    ids, attention = list(range(5)), np.ones((1, 1, 5, 5))
    text = page.make_page("<b>", ids, words.__getitem__, [[[(0, 1)]] * 5] * 2, attention).decode("utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<!--" not in text
    assert list(data_in(text)["text"].values()) == words
    own = "'sha256-[\\w+/]{43}='"
    assert re.search(rf"default-src 'none'; style-src {own}; script-src {own}; base-uri 'none'; form", text)


def test_limits_of_the_prompt(run, tiny, tmp_path, monkeypatch):
    """The text takes a prompt as long as the context, here 200 tokens; a page takes 128."""
    path, hparams = tmp_path / "out.html", TINY | {"n_ctx": 200}
    loaded = tiny[0], hparams, nest(random_tensors(hparams), TINY["n_layer"])
    monkeypatch.setattr(explain, "load_encoder_hparams_and_params", lambda *_: loaded)
    code, out, _ = run("~" * 200, "--explain")
    assert code == 0 and re.search(rb"\n 200 +\d+  '~'\n", out)
    assert_mistake(run("~" * 201, "--explain"), "201 prompt tokens", "200 of the model's context")
    assert_mistake(run("~" * 129, "--explain", path), "129 prompt tokens", "128", "without a file")
    assert list(tmp_path.iterdir()) == []
    code, out, err = run("~" * 128, "--explain", path)
    size = f"{path.stat().st_size / 1e3:.0f} kB"
    assert (code, out) == (0, b"")
    assert err.decode("utf-8") == f"note: {path}: 128 tokens, 2 x 3 attention maps, {size}\n"


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--explain"], ["needs a prompt", "before it"]),
        (["-", "--explain"], ["needs a prompt"]),
        (["--explain", "Hello there"], ["'Hello there'", ".html", "--explain goes last"]),
        (["Hello", "--explain", "out.png"], ["'out.png'", ".html"]),
        (["Hello", "--explain", "--temperature", "1", "--seed", "0"], ["leave out", "--temperature", "--seed"]),
        (["--explain", "--prompts_file", "prompts.txt"], ["leave out --prompts_file"]),
        (["Hello", "--explain", "no/such/folder/out.html"], ["no/such/folder/out.html", "No such file", "another"]),
        (["Hello", "--explain", "folder.html"], ["folder.html"]),
        (["Hello", "--explain", page.TEMPLATE], [page.TEMPLATE, "the template", "another file"]),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(explain, "load_encoder_hparams_and_params", lambda *_: pytest.fail("loaded"))
    assert_mistake(run(*arguments), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_logits_that_are_not_finite(run, tiny, monkeypatch):
    encoder, hparams, params = tiny
    broken = params | {"ln_f": params["ln_f"] | {"b": np.float32(np.nan)}}
    monkeypatch.setattr(explain, "load_encoder_hparams_and_params", lambda *_: (encoder, hparams, broken))
    assert_mistake(run("Hello", "--explain"), "the logits are not finite")


def test_an_error_while_the_page_is_written(run):
    assert_mistake(run("Hello", "--explain", "x" * 300 + ".html"), "name too long", "another file")


def test_the_shape_comments_are_true(tiny):
    from tests.test_shapes import assert_comments_are_true

    encoder, hparams, params = tiny

    def show():
        ours = trace.trace(encoder.encode("a b"), params, hparams["n_head"])
        trace.most_likely(trace.logit_lens(ours.hidden, params["ln_f"], params["wte"])[0, 0], 5)

    assert_comments_are_true(trace, show)
