"""The page of --explain in a headless Chromium: what it shows against the forward pass, keyboard, phone, contrast."""

import functools
import http.server
import pathlib
import re
import shutil
import threading

import numpy as np
import pytest

from cli import explain as explain_cli
from cli import generate as cli
from explain import trace as explain
from explain.page import as_page
from tests.conftest import TINY

PROMPT = "Dear <b>Sir</b>,\n你 🤗\\ and"
LONG = "Dear Sir or Madam, " * 5
HOSTILE = """</script><script>document.title = "mine"; alert(1)</script><img src=x onerror=alert(2)>"><!--'{{data}}"""
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
# every element with a text of its own, and the contrast of it with what is behind it (WCAG 2.2, 1.4.3)
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c <= 0.04045 * 255 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    const colour = element ? numbers(getComputedStyle(element).backgroundColor) : [255, 255, 255];
    return colour[3] === 0 ? behind(element.parentElement) : colour;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.checkVisibility() && [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((e) => {
      const [a, b] = [luminance(numbers(getComputedStyle(e).color)), luminance(behind(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML];
    });
}"""
# the opacities of a canvas, read from a copy
OPACITIES = """(canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  return Array.from(copy.getImageData(0, 0, canvas.width, canvas.height).data).filter((_, i) => i % 4 === 3);
}"""


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or Chrome, under playwright's control."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright (requirements-dev.txt) is not here")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_of(tiny_models_dir, tmp_path_factory):
    """A function from a prompt to the path of its page, made by gpt2.py."""

    @functools.cache
    def make(prompt):
        path = tmp_path_factory.mktemp("page") / "out.html"
        flags = ["--model_size", "tiny", "--models_dir", str(tiny_models_dir)]
        assert cli.run(["--explain", str(path), *flags, "--", prompt]) == 0
        return path

    return make


@pytest.fixture
def opened(browser, page_of):
    """A function from a prompt (or a page's path), a viewport and a colour scheme to the page, open.

    At the end none of them may have said anything, asked anything, or requested anything but itself.
    """
    said, pages = [], []

    def open_page(prompt=PROMPT, viewport=DESK, color_scheme="light"):
        page = browser.new_page(viewport=viewport, color_scheme=color_scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: said.append(request.url) if request.url != url else None)
        url = (prompt if isinstance(prompt, pathlib.Path) else page_of(prompt)).as_uri()
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture(scope="module")
def forward(tiny):
    """A function from a prompt to its ids, trace, and [n_layer+1, n_seq, n_vocab] probabilities."""
    encoder, hparams, params = tiny

    def run(prompt):
        ids = encoder.encode(prompt)
        trace = explain.trace(ids, params, hparams["n_head"])
        logits = explain.lens(trace.hidden, params["ln_f"], params["wte"]).astype(np.float64)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        return ids, trace, chances / chances.sum(-1, keepdims=True)

    return run


def shown_tokens(element):
    return element.locator("bdi").all_text_contents()


def percents(texts):
    """Numbers from texts such as 12.30%, 0.5 and <0.01%."""
    return [float(text.strip().lstrip("<").rstrip("%")) for text in texts]


def written(tiny, ids):
    return [explain_cli.visible(tiny[0], int(i)) for i in ids]


def check_position(page, tiny, forward_pass, position):
    """The likeliest next tokens at this position, after each layer, are those of the forward pass."""
    ids, _, chances = forward_pass
    top = np.argsort(-chances[:, position], axis=-1, kind="stable")[:, :10]
    values = np.take_along_axis(chances[:, position], top, -1) * 100
    following = page.locator("#next li")
    assert shown_tokens(following) == written(tiny, top[-1])
    np.testing.assert_allclose(percents(following.locator(".number").all_text_contents()), values[-1], atol=0.0101)
    rows = page.locator("#lens tbody tr").all()
    assert len(rows) == TINY["n_layer"] + 1
    for row, tokens, expected in zip(rows, top, values, strict=True):
        cells = row.locator("li")
        assert shown_tokens(cells) == written(tiny, tokens)
        np.testing.assert_allclose([float(t.split()[-1]) for t in cells.all_text_contents()], expected, atol=0.051)
        final = row.locator(".final bdi").all_text_contents()
        assert final == (written(tiny, [top[-1, 0]]) if top[-1, 0] in tokens else [])
    came = ids[position + 1] if position + 1 < len(ids) else None
    assert page.locator(".came bdi").all_text_contents() == (written(tiny, [came]) if came in top[-1] else [])
    assert f"token {position + 1} of {len(ids)};" in page.locator("#said").text_content()


def check_attention(page, tiny, forward_pass, position, layer, head):
    ids, trace, _ = forward_pass
    shares = trace.attention[layer, :, position]  # [n_head, n_seq]
    looks = page.locator("#looks li")
    assert shown_tokens(looks) == written(tiny, ids[: position + 1])
    found = percents(looks.locator(".number").all_text_contents())
    np.testing.assert_allclose(found, 100 * shares[head, : position + 1], atol=0.0101)
    captions = page.locator("#heads small").all_text_contents()
    for caption, expected in zip(captions, shares, strict=True):
        most = written(tiny, [ids[int(np.argmax(expected))]])[0]
        assert most in caption
        assert abs(percents([caption.split()[-1]])[0] - 100 * expected.max()) < 0.0101
    assert page.locator("#looking").text_content().startswith(f"Layer {layer + 1}, head {head + 1}:")
    assert page.locator("#rows .chosen").all_text_contents() == written(tiny, [ids[position]])


# What it shows


def test_every_position_shows_the_numbers_of_the_forward_pass(opened, tiny, forward):
    page, forward_pass = opened(), forward(PROMPT)
    ids = forward_pass[0]
    tokens = page.locator("#tokens label")
    assert shown_tokens(tokens) == written(tiny, ids)
    assert tokens.locator("small").all_text_contents() == [str(i) for i in ids]
    for position in range(len(ids)):
        tokens.nth(position).click()
        check_position(page, tiny, forward_pass, position)
        check_attention(page, tiny, forward_pass, position, 0, 0)


def test_every_map_has_the_shares_of_the_forward_pass(opened, forward):
    """The opacity of each pixel, in steps of 1/255, is the square root of the share; ahead there is nothing."""
    page, (_, trace, _) = opened(), forward(PROMPT)
    for layer, maps in enumerate(trace.attention):
        page.locator("#layers label").nth(layer).click()
        assert page.locator("#heads canvas").count() == len(maps) == TINY["n_head"]
        for head, expected in enumerate(maps):
            page.locator("#heads label").nth(head).click()
            for canvas in (page.locator("#heads canvas").nth(head), page.locator("#map canvas")):
                found = np.array(canvas.evaluate(OPACITIES)).reshape(expected.shape) / 255
                np.testing.assert_allclose(found, np.sqrt(expected), atol=0.004)


def test_one_token_alone(opened, tiny, forward):
    page = opened("a")
    check_position(page, tiny, forward("a"), 0)
    check_attention(page, tiny, forward("a"), 0, 0, 0)
    assert "1 token," in page.locator("#about").text_content()


@pytest.mark.parametrize("prompt", [HOSTILE, "{{data}}", "\u2028\u2029\ufeff", "\u0301 \u202e abc"])
def test_a_prompt_stays_text(opened, tiny, forward, prompt):
    page = opened(prompt)
    assert page.title() == "What GPT-2 makes of a prompt"
    assert shown_tokens(page.locator("#tokens")) == written(tiny, forward(prompt)[0])
    assert page.locator("img, iframe").count() == 0


def test_a_vocabulary_stays_text(opened, tmp_path):
    """Tokens and a model that are themselves what would end the data or run."""
    words = [HOSTILE, "<!--", "<script>", "</script>", "]]>", "&lt;", '"', "\\u003c", "\u2028"]
    ids = list(range(len(words)))
    layers = [[[(i, 1 / len(ids)) for i in ids]] * len(ids)] * 2
    attention = np.full((1, 1, len(ids), len(ids)), 0.5, dtype=np.float32)
    path = tmp_path / "out.html"
    path.write_bytes(as_page("<img src=x onerror=alert(3)>", ids, words.__getitem__, layers, attention))
    page = opened(path)
    assert page.title() == "What GPT-2 makes of a prompt"
    assert shown_tokens(page.locator("#tokens")) == shown_tokens(page.locator("#next")) == words
    assert "The model <img src=x onerror=alert(3)>:" in page.locator("#about").text_content()
    assert page.locator("img, iframe").count() == 0


def test_the_page_can_fetch_nothing(opened, browser, page_of):
    """What its Content-Security-Policy is for: of a script that tries, nothing reaches a server."""
    reached = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    attempts = f"""async () => {{
        new Image().src = "{url}/image";
        document.head.append(Object.assign(document.createElement("script"), {{src: "{url}/script"}}));
        document.head.append(Object.assign(document.createElement("link"), {{rel: "stylesheet", href: "{url}/style"}}));
        await fetch("{url}/fetch", {{mode: "no-cors"}}).catch(() => null);
        await new Promise((done) => setTimeout(done, 300));
    }}"""
    try:
        for path, expected in ((page_of("a"), set()), (None, {"/image", "/script", "/style", "/fetch"})):
            page = browser.new_page()
            if path:
                page.goto(path.as_uri())
            page.evaluate(attempts)
            page.close()
            assert set(reached) == expected  # and without the page's policy they do
    finally:
        server.shutdown()
        server.server_close()


# By keyboard


def test_all_of_it_by_keyboard(opened, tiny, forward):
    page, forward_pass = opened(), forward(PROMPT)
    n, press = len(forward_pass[0]), page.keyboard.press
    press("Tab")  # to the chosen token: the last
    check_position(page, tiny, forward_pass, n - 1)
    for key, position in (("ArrowLeft", n - 2), ("ArrowUp", n - 3), ("ArrowRight", n - 2), ("ArrowRight", n - 1)):
        press(key)
        check_position(page, tiny, forward_pass, position)
    press("ArrowRight")  # behind the last comes the first
    check_position(page, tiny, forward_pass, 0)
    press("ArrowLeft")
    press("ArrowLeft")
    press("Tab")  # to the layers
    press("ArrowRight")
    check_attention(page, tiny, forward_pass, n - 2, 1, 0)
    press("Tab")  # to the heads
    press("ArrowRight")
    press("ArrowRight")
    check_attention(page, tiny, forward_pass, n - 2, 1, 2)
    press("Tab")  # and there is nothing more to stop at
    assert page.evaluate("document.activeElement === document.body || !document.hasFocus()")


def test_what_has_the_focus_is_seen_and_named(opened, tiny, forward):
    page, ids = opened(LONG, PHONE), forward(LONG)[0]
    n, tokens = len(ids), page.locator("#tokens")
    assert tokens.evaluate("(e) => e.scrollHeight > e.clientHeight"), "all tokens fit: there is nothing to test"

    chosen, box = page.locator("#tokens label:has(:checked)").bounding_box(), tokens.bounding_box()
    assert box["y"] <= chosen["y"] <= chosen["y"] + chosen["height"] <= box["y"] + box["height"]

    def press(*keys):
        """Presses them, sees that the focus is where one sees it, and returns the name it has."""
        for key in keys:
            page.keyboard.press(key)
        label = page.locator("label:has(:focus)")
        style = label.evaluate("(e) => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth]")
        assert style == ["solid", "3px"]
        box, list_box = label.bounding_box(), tokens.bounding_box()
        bottom, list_bottom = box["y"] + box["height"], list_box["y"] + list_box["height"]
        if tokens.locator(":focus").count():
            assert list_box["y"] <= box["y"] < bottom <= list_bottom
        else:
            assert list_bottom <= box["y"], "hidden under the tokens"
        assert bottom <= PHONE["height"]
        return label.locator("input").get_attribute("aria-label")

    def name(i):
        return f"token {i + 1} of {n}: {explain_cli.visible(tiny[0], ids[i])}, id {ids[i]}"

    assert [press("Tab"), press("ArrowRight")] == [name(n - 1), name(0)]
    assert [press("ArrowRight") for _ in range(n - 1)] == [name(i) for i in range(1, n)]
    assert press("Tab", "ArrowLeft") == f"layer {TINY['n_layer']} of {TINY['n_layer']}"
    assert re.match(rf"head {TINY['n_head']} of {TINY['n_head']}, most: ", press("Tab", "ArrowLeft"))
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert press("Shift+Tab").startswith("layer ")


def test_groups_and_maps_have_names(opened):
    page = opened()
    for name in ("The prompt's tokens and their ids", "Layer", "Head, and where the chosen token looks most"):
        assert page.get_by_role("radiogroup", name=name, exact=True).count() == 1
    assert page.get_by_role("img", name="map of layer 1, head 1; the numbers are above").count() == 1
    assert [h.split()[0] for h in page.get_by_role("heading").all_text_contents()] == [
        *("What", "Next", "Layer", "Attention", "Layer")
    ]


# On a phone, by day and by night


@pytest.mark.parametrize("prompt", [PROMPT, LONG, HOSTILE, "a"])
def test_no_width_needs_scrolling_sideways(opened, prompt):
    page = opened(prompt)
    beyond = "(w) => [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > w + 0.5)"
    for width in (320, 360, 400, 768, 1600):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(f"(w) => ({beyond})(w).map((e) => e.outerHTML)", width) == [], width


def test_fingers_find_what_can_be_chosen(opened):
    """At least 24 pixels each way (WCAG 2.2, 2.5.8)."""
    page = opened(viewport=PHONE)
    boxes = [label.bounding_box() for label in page.locator("label").all()]
    assert min(min(box["width"], box["height"]) for box in boxes) >= 24


@pytest.mark.parametrize("viewport", [PHONE, DESK])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_contrast(opened, viewport, color_scheme):
    """At least 4.5 to 1, by day on white, by night on black."""
    page = opened(viewport=viewport, color_scheme=color_scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", back))) < 64) == (color_scheme == "dark")


def test_the_maps_follow_when_night_falls(opened):
    page = opened()
    accent = "document.querySelector('#map canvas').getContext('2d').fillStyle"
    assert page.evaluate(accent) == "#174ea6"
    page.emulate_media(color_scheme="dark")
    for _ in range(100):
        page.wait_for_timeout(50)
        if page.evaluate(accent) == "#8ab4f8":
            return
    pytest.fail("the maps are still in the colour of the day")
