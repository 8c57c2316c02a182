"""--explain: its numbers against transformers' hidden states and attentions, what it prints, draws and refuses."""

import base64
import errno
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import explain_picture
import numpy as np
import pytest

import gpt2
from cli import explain as explain_cli
from cli import generate as cli
from encoder import get_encoder
from explain import trace as explain
from tests.conftest import PROMPTS, ROOT, TINY, need
from tests.random_model import DATA, random_tensors, write_byte_vocabulary, write_safetensors
from tests.test_cli import assert_mistake
from tests.test_shapes import Checker, traced

PROMPTS = [prompt for prompt in PROMPTS if prompt]


@pytest.fixture(scope="module")
def theirs(tiny_models_dir):
    """transformers' GPT-2 with the tiny model's weights; "eager" is its attention that can return its weights."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)  # threads cost such a model more than they save it
    return GPT2LMHeadModel.from_pretrained(tiny_models_dir / "tiny", attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def their_pass(theirs):
    import torch

    def run_them(ids):
        """transformers' output for one sequence, and the logits of each hidden state through its own last steps."""
        with torch.no_grad():
            output = theirs(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
            *hidden, last = output.hidden_states  # its last one is after the final layer norm
            logits = [theirs.lm_head(theirs.transformer.ln_f(x))[0] for x in hidden] + [theirs.lm_head(last)[0]]
        return output, torch.stack(logits)

    return run_them


@pytest.fixture(scope="session")
def explain_models_dir(tiny_models_dir, tmp_path_factory):
    """A models_dir with the tiny model, "long", with room for 200 tokens, one a byte, and "broken", of no numbers."""
    path = tmp_path_factory.mktemp("explain")
    (path / "tiny").symlink_to(tiny_models_dir / "tiny")
    hparams = TINY | {"n_vocab": 258, "n_ctx": 200}
    for name in ("long", "broken"):
        tensors = random_tensors(hparams)
        tensors["ln_f/b"][0] = np.nan if name == "broken" else 0
        (path / name).mkdir()
        write_byte_vocabulary(path / name, hparams["n_vocab"])
        write_safetensors(path / name, hparams, tensors)
    return path


@pytest.fixture
def inside(explain_models_dir, capsysbinary, monkeypatch):
    """gpt2.py run in this process, by default with the tiny model: (exit code, standard output, standard error)."""

    def run_inside(*arguments, typed=b"", model="tiny"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        capsysbinary.readouterr()
        arguments = ["--model_size", model, "--models_dir", explain_models_dir, *arguments]
        return cli.run([str(a) for a in arguments]), *capsysbinary.readouterr()

    return run_inside


@pytest.fixture
def page_data(inside, tmp_path):
    """A function from a prompt to what its page holds, and to the page."""

    def of_prompt(prompt):
        path = tmp_path / "out.html"
        code, out, err = inside(prompt, "--explain", path)
        assert (code, out) == (0, b""), err
        page = path.read_text(encoding="utf-8")
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]), page

    return of_prompt


# The numbers


@pytest.mark.parametrize("prompt", PROMPTS)
def test_hidden_states_and_attentions_are_those_of_transformers(tiny, their_pass, prompt):
    encoder, hparams, params = tiny
    ids = encoder.encode(prompt)
    ours, (output, _) = explain.trace(ids, params, hparams["n_head"]), their_pass(ids)
    hidden = [*ours.hidden[:-1], gpt2.layer_norm(ours.hidden[-1], **params["ln_f"])]
    for a, b in zip(hidden, output.hidden_states, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.attention, output.attentions, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-6)
    assert ours.hidden.dtype == ours.attention.dtype == np.float32


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_logits_and_the_last_of_the_lens_are_gpt2s_own(tiny, prompt, last_only):
    encoder, hparams, params = tiny
    ids = encoder.encode(prompt)
    expected = gpt2.gpt2(ids, **params, n_head=hparams["n_head"], last_only=last_only)
    ours = explain.trace(ids, params, hparams["n_head"], last_only)
    np.testing.assert_array_equal(ours.logits, expected)
    np.testing.assert_array_equal(explain.lens(ours.hidden[-1], params["ln_f"], params["wte"]), expected)
    assert ours.hidden.shape == (TINY["n_layer"] + 1, 1 if last_only else len(ids), TINY["n_embd"])
    assert (ours.attention is None) == last_only


def test_the_lens_is_transformers_last_steps_after_each_layer(tiny, their_pass):
    encoder, hparams, params = tiny
    ids = encoder.encode(PROMPTS[0])
    lens = explain.lens(explain.trace(ids, params, hparams["n_head"]).hidden, params["ln_f"], params["wte"])
    np.testing.assert_allclose(lens, their_pass(ids)[1], rtol=1e-4, atol=1e-4)


def test_gpt2_stays_as_it_is(tiny):
    encoder, hparams, params = tiny
    before = dict(vars(gpt2))
    explain.trace(encoder.encode("a"), params, hparams["n_head"])
    assert vars(gpt2) == before


def test_nothing_of_it_is_imported_for_other_runs(explain_models_dir):
    program = "import sys, cli; cli.run(sys.argv[1:]); print(*sys.modules)"
    arguments = ["Hello", "--model_size", "tiny", "--models_dir", explain_models_dir]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, check=True)
    modules = {name.split(".")[0] for name in done.stdout.decode("utf-8").splitlines()[-1].split()}
    assert not modules & {"explain", "explain_cli", "explain_page", "explain_picture", "instance", "matplotlib"}
    assert "gpt2" in modules


def test_likeliest_is_torchs_topk_and_takes_the_lower_of_equal_ids():
    import torch

    logits = np.random.default_rng(0).standard_normal(300, dtype=np.float32)
    ids, chances = explain.likeliest(logits, 10)
    expected = torch.softmax(torch.tensor(logits), -1).topk(10)
    np.testing.assert_array_equal(ids, expected.indices)
    np.testing.assert_allclose(chances, expected.values, rtol=1e-5)
    coins = np.random.default_rng(0).integers(0, 2, 2000).astype(np.float32)
    np.testing.assert_array_equal(explain.likeliest(coins, 500)[0], np.flatnonzero(coins)[:500])
    assert explain.likeliest(np.array([0, 1, 1, 5, 1], dtype=np.float32), 3)[0].tolist() == [3, 1, 2]
    assert explain.likeliest(np.zeros(2, dtype=np.float32), 10)[0].tolist() == [0, 1]


def test_the_shape_comments_are_true(tiny):
    encoder, hparams, params = tiny
    attention = explain.trace(encoder.encode("def softmax"), params, hparams["n_head"]).attention

    def show():
        ours = explain.trace(encoder.encode("a b"), params, hparams["n_head"])
        explain.likeliest(explain.lens(ours.hidden, params["ln_f"], params["wte"])[0, 0], 5)
        explain_picture.tiled(attention, 3)

    for module in (explain, explain_picture):
        checker = Checker(module)
        traced(checker, show)
        assert checker.checked == set(checker.comments), module
        assert checker.checked


# As text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_what_transformers_find(inside, tiny, their_pass, prompt):
    encoder = tiny[0]
    code, out, err = inside(prompt, "--explain")
    assert (code, err) == (0, b"")
    tokens, last, earlier = out.decode("utf-8").split("\n\n")
    ids = encoder.encode(prompt)
    rows = [re.fullmatch(r" *(\d+) +(\d+)  (.+)", line).groups() for line in tokens.splitlines()[1:]]
    assert rows == [(str(i), str(token), explain_cli.visible(encoder, token)) for i, token in enumerate(ids, 1)]
    expected = their_pass(ids)[1][:, -1].softmax(-1).topk(10)
    last = [re.fullmatch(r" *(\d+) +([\d.]+)%  (.+)", line).groups() for line in last.splitlines()[1:]]
    assert [int(i) for i, _, _ in last] == list(range(1, 11))
    assert [token for _, _, token in last] == [explain_cli.visible(encoder, int(i)) for i in expected.indices[-1]]
    np.testing.assert_allclose([float(p) for _, p, _ in last], 100 * expected.values[-1], atol=0.0051)
    chances = [float(p) for p in re.findall(r" (\d+\.\d) b?['\"]", earlier)]
    np.testing.assert_allclose(chances, 100 * expected.values[:-1].flatten(), atol=0.051)
    cells = [line[4:] for line in earlier.splitlines()[1:]]
    shown = iter("".join(cells))
    for token in map(int, expected.indices[:-1].flatten()):  # all of them, in this order
        word = explain_cli.shortened(explain_cli.visible(encoder, token))
        assert all(c in shown for c in word), word
    assert len(cells) % TINY["n_layer"] == 0  # a line or more for the embeddings and each layer but the last


def test_the_first_of_them_is_the_greedy_token(inside):
    _, continued, _ = inside(PROMPTS[0], "--n_tokens_to_generate", "1")
    _, explained, _ = inside(PROMPTS[0], "--explain")
    first = explained.decode("utf-8").split("\n\n")[1].splitlines()[1].split("%  ")[1]
    assert eval(first) == continued.decode("utf-8").removesuffix("\n")


def test_a_prompt_as_long_as_the_context_is_explained_as_text(inside):
    code, out, _ = inside("a" * 200, "--explain", model="long")
    assert code == 0
    assert b"\n 200      64  'a'\n" in out
    assert_mistake(inside("a" * 201, "--explain", model="long"), "201 prompt tokens", "200 of the model's context")


@pytest.mark.parametrize("vocabulary", ["tiny", "shakespeare", "gpt2"])
def test_no_two_tokens_look_the_same(tiny, vocabulary):
    if vocabulary == "gpt2":
        encoder = get_encoder("gpt2", str(need(DATA / "gpt2" / "encoder.json").parents[1]))
    else:
        encoder = tiny[0] if vocabulary == "tiny" else get_encoder("shakespeare", str(ROOT / "models"))
    shown = [explain_cli.visible(encoder, i) for i in encoder.decoder]
    assert len(set(shown)) == len(shown) == len(encoder.encoder)
    assert all(text.isprintable() for text in shown)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the", "' the'"),
        (b"\n\n", r"'\n\n'"),
        (b"\xe4\xbd", r"b'\xe4\xbd'"),
        ("你".encode(), "'你'"),
        (b"'", '"\'"'),
        (b"\\n", r"'\\n'"),
        ("\u0301x".encode(), r"'\u0301x'"),  # a combining accent, which would sit on the quote
        ("\u200d".encode(), r"'\u200d'"),  # of no width
        ("\xa0".encode(), r"'\xa0'"),  # a space that is not one
    ],
)
def test_how_a_token_is_written(data, shown):
    class OneToken:
        def token_bytes(self, _):
            return data

    assert explain_cli.visible(OneToken(), 0) == shown
    assert eval(shown) in (data, data.decode("utf-8", "replace"))


def test_the_columns_a_text_takes():
    texts = ["' the'", "'你好'", "'🤗'", "'e\u0301'", "'é'", "'ｱ'", "'ア'"]
    assert [explain_cli.width(text) - 2 for text in texts] == [4, 4, 2, 1, 1, 1, 2]


@pytest.mark.parametrize(("columns", "lines_a_row"), [("16", 10), ("40", 4), ("80", 2), ("400", 1)])
def test_the_table_fits_the_terminal_and_stays_aligned(monkeypatch, columns, lines_a_row):
    monkeypatch.setenv("COLUMNS", columns)
    rows = [["1.0 '你好'", "1.0 'a'", "1.0 'e\u0301'", "1.0 '🤗'", "1.0 'four'"] * 2] * 3
    lines = list(explain_cli.table(rows))
    assert len(lines) == 3 * lines_a_row
    assert max(map(explain_cli.width, lines)) <= int(columns)
    places = [{explain_cli.width(line[: m.start()]) for m in re.finditer(r"1\.0", line)} for line in lines]
    assert set.union(*places) == max(places, key=len)


# As a page (tests/test_explain_page.py opens it in a browser)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_page_holds_the_numbers_of_transformers(page_data, tiny, their_pass, prompt):
    data, _ = page_data(prompt)
    ids, n = tiny[0].encode(prompt), len(data["ids"])
    output, logits = their_pass(ids)
    assert (data["model"], data["ids"], data["shape"]) == ("tiny", ids, [TINY["n_layer"], TINY["n_head"]])
    shares = np.frombuffer(base64.b64decode(data["attention"]), dtype="<u2") / 65535
    maps = np.zeros((*data["shape"], n, n))
    maps[..., *np.tril_indices(n)] = shares.reshape(*data["shape"], -1)
    np.testing.assert_allclose(maps, [a[0] for a in output.attentions], atol=1.1e-5)
    expected = logits.softmax(-1).topk(10)
    found = np.array(data["next"])  # [n_layer+1, n_seq, 10, 2]
    np.testing.assert_array_equal(found[..., 0], expected.indices)
    np.testing.assert_allclose(found[..., 1], expected.values, rtol=1e-4, atol=1e-7)
    for token, text in data["text"].items():
        assert text == explain_cli.visible(tiny[0], int(token))


def test_a_prompt_cannot_end_the_script_it_is_in(page_data):
    prompt = "</script><script>alert('a')</script><!-- {{data}} \u2028 ' \" & <b>"
    data, page = page_data(prompt)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    written = [eval(data["text"][str(i)]) for i in data["ids"]]
    assert b"".join(t if isinstance(t, bytes) else t.encode("utf-8") for t in written) == prompt.encode("utf-8")


def test_the_page_may_fetch_nothing_and_run_only_its_own_script(page_data):
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', page_data("a")[1])[1]
    directives = dict(directive.split(" ", 1) for directive in policy.split("; "))
    assert directives.pop("default-src") == directives.pop("base-uri") == directives.pop("form-action") == "'none'"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", directives.pop(name)) for name in ("style-src", "script-src"))
    assert directives == {}


def test_128_tokens_go_into_a_file_and_129_do_not(inside, tmp_path):
    path = tmp_path / "out.html"
    code, _, err = inside("a" * 128, "--explain", path, model="long")
    assert code == 0
    assert "128 tokens, 2 x 3 attention maps" in err.decode("utf-8")
    assert f", {path.stat().st_size / 1e3:.0f} kB\n" in err.decode("utf-8")
    path.unlink()
    for name in ("out.html", "out.png"):
        result = inside("a" * 129, "--explain", tmp_path / name, model="long")
        assert_mistake(result, "129 prompt tokens", "128", "--explain alone")
    assert list(tmp_path.iterdir()) == []
    assert inside("a" * 129, "--explain", model="long")[0] == 0
    assert re.search(rf"at most\s+{explain_cli.MAX_TOKENS}\s+tokens", cli.make_parser().format_help())


# As a picture


def test_the_picture_has_the_colours_of_the_attentions(inside, tiny, their_pass, tmp_path):
    """Every pixel of every map; a share's colour is that of its square root on matplotlib's YlGnBu."""
    from matplotlib import colormaps
    from matplotlib.image import imread

    prompt, path = PROMPTS[0], tmp_path / "out.png"
    code, out, err = inside(prompt, "--explain", path)
    assert (code, out) == (0, b"")
    assert f"note: {path}: ".encode() in err
    maps = np.stack([a[0] for a in their_pass(tiny[0].encode(prompt))[0].attentions])
    picture, side, n_seq = imread(path)[..., :3], 16, maps.shape[-1]
    expected = colormaps["YlGnBu"](np.sqrt(maps))[..., :3]
    expected[..., np.triu_indices(n_seq, 1)[0], np.triu_indices(n_seq, 1)[1], :] = 1  # white: nothing is seen ahead
    first = np.argwhere(np.all(np.abs(picture - expected[0, 0, 0, 0]) < 0.01, axis=-1))[0]  # the top left one: 100%
    pitch = np.array(n_seq + 1) * side  # a gap of one share
    for layer, head in np.ndindex(maps.shape[:2]):
        top, left = first + pitch * np.array([layer, head])
        found = picture[top : top + n_seq * side, left : left + n_seq * side]
        found = found.reshape(n_seq, side, n_seq, side, 3).swapaxes(1, 2)
        np.testing.assert_allclose(
            found, np.broadcast_to(expected[layer, head, :, :, None, None], found.shape), atol=0.02
        )


@pytest.mark.parametrize("label", ["$x_$", r"$\frac$", "'你好'", "🤗", "'\u05d3'"])
def test_any_token_can_be_drawn(label, recwarn):
    picture = explain_picture.as_picture([label], np.ones((1, 1, 1, 1), dtype=np.float32))
    assert picture != explain_picture.as_picture([""], np.ones((1, 1, 1, 1), dtype=np.float32))
    assert [str(w.message) for w in recwarn] == []  # such as: a glyph is missing from the font


@pytest.mark.parametrize("prompt", ["a", "$x_$ \\frac $", "你好 🤗 דוד \n\u0301"])
def test_any_text_can_be_drawn(inside, tmp_path, recwarn, prompt):
    code, _, err = inside(prompt, "--explain", tmp_path / "out.PNG")
    assert (code, err.count(b"\n"), [str(w.message) for w in recwarn]) == (0, 1, [])
    assert (tmp_path / "out.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 128), (48, 25, 2), (2, 25, 40)])
def test_nothing_overlaps_in_a_picture_of_any_size(shape):
    """Names of layers, heads and tokens, the title and the scale, by the boxes matplotlib gives them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    n_layer, n_head, n_seq = shape
    attention = np.full((n_layer, n_head, n_seq, n_seq), 1 / n_seq, dtype=np.float32)
    figure = explain_picture.draw(["' longtoken…"] * n_seq, attention)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes, scale = figure.axes
    texts = [*figure.texts, *axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), *scale.get_yticklabels()]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(boxes) > n_layer + n_head
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    names = [text.get_window_extent(renderer) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations([*names, boxes[0]], 2))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--explain"], ["needs a prompt", "before it"]),
        (["", "--explain"], ["needs a prompt"]),
        (["", "--explain", "out.html"], ["needs a prompt"]),
        (["-", "--explain"], ["needs a prompt"]),
        (["--explain", "out.html"], ["needs a prompt"]),
        (["--explain", "Hello there"], ["'Hello there'", ".html", ".png", "--explain goes last"]),
        (["--explain", "Hello", "out.html"], ["'Hello'", ".html", ".png"]),
        (["Hello", "--explain", "out.pdf"], ["'out.pdf'", ".html", ".png"]),
        (["Hello", "--explain", "out"], ["'out'", ".html", ".png"]),
        (["Hello", "--explain="], ["''", ".html", ".png"]),
        (["Hello", "--explain", "--n_samples", "2"], ["continues nothing", "leave out --n_samples"]),
        (["Hello", "--explain", "--temperature", "1", "--seed", "0"], ["leave out --temperature, --seed"]),
        (["Hello", "--explain", "--speculate", "auto"], ["leave out --speculate"]),
        (["Hello", "--explain", "--draft_model", "tiny"], ["leave out --draft_model"]),
        (["Hello", "--explain", "--n_tokens_to_generate", "3"], ["leave out --n_tokens_to_generate"]),
        (["Hello", "--explain", "--stop_at_end_of_text"], ["leave out --stop_at_end_of_text"]),
        (["Hello", "--explain", "--stream"], ["leave out --stream"]),
        (["--explain", "--interactive"], ["leave out --interactive"]),
        (["--explain", "--prompts_file", "prompts.txt"], ["leave out --prompts_file"]),
        (["Hello", "--explain", "--output", "out.jsonl"], ["leave out --output"]),
        (["Hello", "--prompt_file", "prompt.txt", "--explain"], ["not both"]),
        (["--prompt_file", "missing.txt", "--explain"], ["missing.txt"]),
        (["Hello", "--explain", "no/such/folder/out.html"], ["no/such/folder/out.html", "No such file", "another"]),
        (["Hello", "--explain", "no/such/folder/out.png"], ["no/such/folder/out.png", "No such file", "another"]),
        (["Hello", "--explain", "folder.html"], ["folder.html", "is no file"]),
        (["--prompt_file", "own.html", "--explain", "own.html"], ["own.html", "the prompt's own file"]),
        (["Hello", "--explain", "x" * 300 + ".html"], ["name too long"]),
        (["你" * 43, "--explain"], ["129 prompt tokens", "128 of the model's context", "shorten"]),
    ],
)
def test_mistakes(inside, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "own.html").write_text("Hello", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    assert_mistake(inside(*arguments), *words)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "own.html").read_text(encoding="utf-8") == "Hello"


def test_the_page_that_pages_are_made_from_stays(inside, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = pathlib.Path("explain_page.html").read_bytes()
    assert_mistake(inside("Hello", "--explain", "explain_page.html"), "explain_page.html", "another")
    assert pathlib.Path("explain_page.html").read_bytes() == before


@pytest.mark.parametrize("output", [[], ["out.html"], ["out.png"]])
def test_weights_that_are_no_numbers(inside, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    assert_mistake(inside("Hello", "--explain", *output, model="broken"), "broken's weights are not sound")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(explain_cli, "load_encoder_hparams_and_params", lambda *_: pytest.fail("loaded"))
    assert_mistake(inside("Hello", "--explain", tmp_path / "none" / "out.html"), "No such file")


def test_a_full_disk_leaves_the_old_file(inside, tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("old", encoding="utf-8")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert_mistake(inside("Hello", "--explain", path), str(path), "No space left", "make room", "after --explain")
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]
    assert path.read_text(encoding="utf-8") == "old"


def test_without_matplotlib_a_line_says_what_is_missing(inside, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_mistake(inside("Hello", "--explain", tmp_path / "out.png"), "matplotlib", "pip install matplotlib")
    assert inside("Hello", "--explain", tmp_path / "out.html")[0] == 0


# Where the prompt comes from


def test_the_prompt_may_come_from_a_file_or_a_pipe_or_after_dashes(inside, tmp_path):
    (tmp_path / "prompt.txt").write_text("Hello\n", encoding="utf-8")
    expected = inside("Hello", "--explain")
    assert expected[0] == 0
    assert inside("--prompt_file", tmp_path / "prompt.txt", "--explain") == expected
    assert inside("-", "--explain", typed=b"Hello\n") == expected
    assert inside("--explain", "--", "Hello") == expected
    assert inside("--explain", "--temperature", "0", "Hello") == expected  # an option at its default changes nothing
