"""The page of --explain in a headless Chromium: its values against the forward pass, keyboard, phone, contrast."""

import pathlib
import re

import numpy as np
import pytest

from cli.generate import run as run_gpt2
from explain.page import make_page, read_template, token_text
from explain.trace import K, logit_lens, trace
from gpt2 import softmax
from tests.conftest import TINY

PROMPT = "Dear <b>Sir</b>,\n你 🤗\\ and"
LONG = "Dear Sir or Madam, " * 3
HOSTILE = """</script><script>document.title = "mine"; alert(1)</script><img src=x onerror=alert(2)>"><!--'{{data}}"""
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
# All that the page shows for the selected token, layer and head.
CONTENTS = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const texts = (selector) => all(selector).map((e) => e.textContent);
  const items = (list) => [...list.querySelectorAll("li")].map(
    (e) => [e.querySelector("bdi").textContent, e.querySelector(".number, span:last-child").textContent, e.className]);
  return {
    about: texts("#about")[0], summary: texts("#summary")[0], actual: texts(".actual bdi"),
    next: all("#next li").map((e) => [e.querySelector("bdi").textContent, e.lastChild.textContent]),
    lens: all("#lens tbody tr").map(items), weights: items(document.querySelector("#weights")),
    heads: texts("#heads small"), head: texts("#head")[0], row: texts("#rows .selected"),
  };
}"""
# The focused label: whether its outline is visible, its top and bottom, those of the tokens, whether it is a token.
FOCUS = """() => {
  const input = document.activeElement, label = input.parentElement, tokens = document.querySelector("#tokens");
  const style = getComputedStyle(label), [a, b] = [label, tokens].map((e) => e.getBoundingClientRect());
  return [input.ariaLabel, style.outlineStyle + style.outlineWidth, a.top, a.bottom, b.top, b.bottom,
    tokens.contains(label)];
}"""
# The opacities of a canvas, read from a copy.
OPACITIES = """(canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  return Array.from(copy.getImageData(0, 0, canvas.width, canvas.height).data).filter((_, i) => i % 4 === 3);
}"""
# The elements that end to the right of the width.
BEYOND = """(width) => [...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > width + 0.5).map((e) => e.outerHTML)"""
# Attempts to load four resources; done when all have failed or succeeded.
REQUESTS = """async (url) => {
  const load = (tag, attributes) => new Promise((done) => document.head.append(
    Object.assign(document.createElement(tag), {...attributes, onload: done, onerror: done})));
  await Promise.all([load("img", {src: url + 1}), load("script", {src: url + 2}),
    load("link", {rel: "stylesheet", href: url + 3}), fetch(url + 4).catch(() => null)]);
}"""


@pytest.fixture
def page_of(tiny_flags, tmp_path):
    """A function from a prompt to the path of its page, written by gpt2.py."""

    def write(prompt):
        path = tmp_path / "out.html"
        assert run_gpt2(["--explain", str(path), *tiny_flags, "--", prompt]) == 0
        return path

    return write


@pytest.fixture
def opened(browser, page_of):
    """A function that opens the page of a prompt, or a path, in a tab that may not log, ask or request anything."""
    page, events = browser.new_page(), []
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: events.append(request.url) if not request.is_navigation_request() else None)

    def open_page(prompt=PROMPT, viewport=DESK):
        page.set_viewport_size(viewport)
        page.goto((prompt if isinstance(prompt, pathlib.Path) else page_of(prompt)).as_uri())
        return page

    yield open_page
    page.close()
    assert events == []


@pytest.fixture(scope="module")
def forward(tiny):
    """A function from a prompt or ids to the ids, the text of every id, the Trace, and each layer's probabilities."""
    encoder, hparams, params = tiny

    def run(prompt):
        ids = encoder.encode(prompt) if isinstance(prompt, str) else prompt
        traced = trace(ids, params, hparams["n_head"])
        logits = logit_lens(traced.hidden, params["ln_f"], params["wte"])
        texts = np.array([token_text(encoder, i) for i in range(TINY["n_vocab"])], dtype=object)
        return ids, texts, traced, softmax(logits.astype(np.float64))

    return run


def tokens_in(page, selector):
    return page.locator(f"{selector} bdi").all_text_contents()


def percent(text):
    """The number in 12.30%, 0.5 or <0.01%."""
    return float(text.strip().lstrip("<").rstrip("%"))


def check_predictions(contents, forward_pass, position):
    """The most likely next tokens at this position, after each layer, are those of the forward pass."""
    ids, texts, _, probabilities = forward_pass
    top = np.argsort(-probabilities[:, position], axis=-1, kind="stable")[:, :K]
    values = np.take_along_axis(probabilities[:, position], top, -1) * 100
    assert [token for token, _ in contents["next"]] == list(texts[top[-1]])
    np.testing.assert_allclose([percent(p) for _, p in contents["next"]], values[-1], atol=0.0101)
    assert [[token for token, _, _ in row] for row in contents["lens"]] == texts[top].tolist()
    found = [[percent(p) for _, p, _ in row] for row in contents["lens"]]
    np.testing.assert_allclose(found, values, atol=0.051)
    highlighted = [[mark == "final" for _, _, mark in row] for row in contents["lens"]]
    assert highlighted == (top == top[-1, 0]).tolist()
    following = ids[position + 1 : position + 2]
    assert contents["actual"] == [texts[i] for i in following if i in top[-1]]
    first = f"Token {position + 1} of {len(ids)}; most likely next: {texts[top[-1, 0]]}, "
    assert contents["summary"].startswith(first)


def check_attention(contents, forward_pass, position, layer, head):
    ids, texts, traced, _ = forward_pass
    weights = traced.attention[layer, :, position]  # [n_head, n_seq]
    assert [token for token, _, _ in contents["weights"]] == list(texts[ids[: position + 1]])
    found = [percent(weight) for _, weight, _ in contents["weights"]]
    np.testing.assert_allclose(found, 100 * weights[head, : position + 1], atol=0.0101)
    for i, (caption, expected) in enumerate(zip(contents["heads"], weights, strict=True), 1):
        assert caption.startswith(f"{i}: {texts[ids[np.argmax(expected)]]} ")
        assert abs(percent(caption.split()[-1]) - 100 * expected.max()) < 0.0101
    assert contents["head"].startswith(f"Layer {layer + 1}, head {head + 1}:")
    assert contents["row"] == [texts[ids[position]]]


# Contents


@pytest.mark.parametrize("prompt", [PROMPT, "a"])
def test_every_position_shows_the_values_of_the_forward_pass(opened, forward, prompt):
    page, forward_pass = opened(prompt), forward(prompt)
    ids, texts, *_ = forward_pass
    assert tokens_in(page, "#tokens") == list(texts[ids])
    assert page.locator("#tokens small").all_text_contents() == [str(i) for i in ids]
    for position in reversed(range(len(ids))):
        page.locator("#tokens input").nth(position).check(force=True)
        contents = page.evaluate(CONTENTS)
        check_predictions(contents, forward_pass, position)
        check_attention(contents, forward_pass, position, 0, 0)
    assert contents["about"].startswith(f"Model tiny: {len(ids)} token{'s' if len(ids) > 1 else ''}, 2 layers, 3 heads")


def test_every_map_has_the_attention_weights_of_the_forward_pass(opened, forward):
    """The opacity of each pixel, in steps of 1/255, is the square root of the weight; later tokens have none."""
    page, traced = opened(), forward(PROMPT)[2]
    for layer, maps in enumerate(traced.attention):
        page.locator("#layers label").nth(layer).click()
        assert page.locator("#heads canvas").count() == len(maps) == TINY["n_head"]
        for head, expected in enumerate(maps):
            page.locator("#heads label").nth(head).click()
            for canvas in (page.locator("#heads canvas").nth(head), page.locator("#map canvas")):
                found = np.array(canvas.evaluate(OPACITIES)).reshape(expected.shape) / 255
                np.testing.assert_allclose(found, np.sqrt(expected), atol=0.004)


def test_a_vocabulary_and_a_model_name_stay_text(opened, tmp_path):
    words = [HOSTILE, "<!--", "<script>", "</script>", "]]>", "&lt;", '"', "\\u003c", "\u2028\ufeff", "\u0301 \u202e"]
    ids = list(range(len(words)))
    predictions = [[[(i, 1 / len(ids)) for i in ids]] * len(ids)] * 2
    attention = np.full((1, 1, len(ids), len(ids)), 0.5, dtype=np.float32)
    path = tmp_path / "out.html"
    path.write_bytes(make_page("<img src=x onerror=alert(3)>", ids, words.__getitem__, predictions, attention))
    page = opened(path)
    assert page.title() == "What GPT-2 computes for a prompt"
    assert tokens_in(page, "#tokens") == tokens_in(page, "#next") == words
    page.locator("#tokens input").first.check(force=True)
    assert tokens_in(page, ".actual") == [words[1]]  # the token that follows in the prompt
    assert "Model <img src=x onerror=alert(3)>:" in page.locator("#about").text_content()
    assert page.locator("img, iframe").count() == 0


def test_the_content_security_policy_blocks_all_requests(browser, page_of):
    def reached(url):
        page, urls = browser.new_page(), set()
        page.route(re.compile("^http:"), lambda route: (urls.add(route.request.url), route.abort()))
        page.goto(url)
        page.evaluate(REQUESTS, "http://127.0.0.1:9/")
        page.close()
        return urls

    assert reached(page_of("a").as_uri()) == set()
    assert len(reached("about:blank")) == 4  # without a policy


# Keyboard


def test_everything_can_be_selected_by_keyboard_and_the_focus_is_visible(opened, forward):
    page, forward_pass = opened(LONG, PHONE), forward(LONG)
    ids, texts, *_ = forward_pass
    n = len(ids)
    assert page.locator("#tokens").evaluate("(e) => e.scrollHeight > e.clientHeight"), "the test needs more tokens"
    tokens, last = page.locator("#tokens").bounding_box(), page.locator("#tokens :checked").bounding_box()
    assert last["y"] + last["height"] <= tokens["y"] + tokens["height"], "the selected token is not visible"

    def press(*keys):
        """Press the keys, check that the focused element is visible, and return its name."""
        for key in keys:
            page.keyboard.press(key)
        name, outline, top, bottom, list_top, list_bottom, is_token = page.evaluate(FOCUS)
        assert outline == "solid3px"
        assert list_top <= top < bottom <= list_bottom if is_token else list_bottom <= top, "hidden by the tokens"
        assert bottom <= PHONE["height"]
        return name

    names = [f"token {i + 1} of {n}: {texts[ids[i]]}, id {ids[i]}" for i in range(n)]
    assert [press("Tab"), *(press("ArrowRight") for _ in range(n - 1))] == [names[-1], *names[:-1]]
    check_predictions(page.evaluate(CONTENTS), forward_pass, n - 2)
    assert press("ArrowUp") == names[n - 3]
    assert press("Tab", "ArrowLeft") == "layer 2 of 2"
    assert re.fullmatch(r"head 3 of 3, largest weight: .+ \d+\.\d\d%", press("Tab", "ArrowLeft"))
    check_attention(page.evaluate(CONTENTS), forward_pass, n - 3, 1, 2)


# Widths and colors


@pytest.mark.parametrize("prompt", [LONG, HOSTILE, "a"])
def test_no_width_needs_horizontal_scrolling(opened, prompt):
    page = opened(prompt)
    for width in (320, 400, 1024, 1600):
        page.set_viewport_size({"width": width, "height": 740})
        beyond = page.evaluate(BEYOND, width)
        assert beyond == [] and page.evaluate("document.documentElement.scrollWidth") <= width, width


def test_colors_have_enough_contrast():
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3), in the light and in the dark scheme."""

    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    light, dark = (
        {name: luminance(color) for name, color in re.findall(r"--(\w+): (#\w{6})", palette)}
        for palette in re.findall(r":root {(.*?)}", read_template(), re.DOTALL)
    )
    assert light["back"] > light["text"] and dark["back"] < dark["text"]
    pairs = ["text back", "text raised", "text tint", "quiet back", "quiet raised", "back accent"]
    for colors in (light, dark):
        for low, high in (sorted(colors[name] for name in pair.split()) for pair in pairs):
            assert (high + 0.05) / (low + 0.05) >= 4.5
