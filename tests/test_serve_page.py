"""The server's page in a headless Chromium: its values against the forward pass, keyboard, phone, hostile texts."""

import json
import re

import numpy as np
import pytest

from gpt2 import gpt2, softmax
from tests.conftest import TINY
from tests.random_model import copy_vocabulary, random_tensors, write_safetensors
from tests.server import Gate, complete, serving, wait_until
from tests.test_explain_page import (
    BEYOND,
    CONTENTS,
    DESK,
    HOSTILE,
    PHONE,
    REQUESTS,
    check_attention,
    check_predictions,
    forward,  # noqa: F401
)
from utils import load_encoder_hparams_and_params

PROMPT = "Dear <b>Sir</b>,\n你 and"
N_NEW = 12
# The tokens: text, whether it belongs to the prompt, probability
TOKENS = """() => [...document.querySelectorAll("#tokens label")].map((label) => [label.textContent,
  label.classList.contains("of-prompt"), label.style.getPropertyValue("--value")])"""


@pytest.fixture(scope="module")
def server(tiny_models_dir):
    pytest.importorskip("starlette", reason="starlette (requirements-serve.txt) is not installed")
    with serving(tiny_models_dir) as found:
        yield found


@pytest.fixture
def opened(browser, server):
    """A function that opens the page of a server in a tab that may not log, ask, or request from elsewhere."""
    page, noted = browser.new_page(), []
    page.on("console", lambda message: noted.append(message.text))
    page.on("pageerror", lambda error: noted.append(str(error)))
    page.on("dialog", lambda dialog: (noted.append(dialog.message), dialog.dismiss()))

    def open_page(viewport=DESK, port=server.port):
        address = f"http://127.0.0.1:{port}/"
        page.on("request", lambda request: None if request.url.startswith(address) else noted.append(request.url))
        page.set_viewport_size(viewport)
        page.goto(address)
        page.locator("#about").filter(has_text="Model").wait_for()
        return page

    open_page.noted = noted
    yield open_page
    page.close()
    assert noted == []


def generate(page, prompt=PROMPT, n_new=N_NEW):
    """Generate greedily by mouse, and wait until the first new token is explained."""
    page.locator("#prompt").fill(prompt)
    for name, value in (("temperature", 0), ("max_tokens", n_new)):
        page.locator(f"[name={name}]").fill(str(value))
    page.locator("#generate").click()
    page.locator("#status").filter(has_text="tokens with the prompt").wait_for()


def wait_for_explanation(page, position):
    page.locator("#summary").filter(has_text=f"Token {position + 1} of ").filter(has_text="most likely").wait_for()


def click_token(page, i):
    """Click the first line of a token, which a line break may divide."""
    rectangle = """(label) => {
      label.scrollIntoView({block: "center"});
      const {x, y, width, height} = label.getClientRects()[0];
      return [x + width / 2, y + height / 2];
    }"""
    page.mouse.click(*page.locator("#tokens label").nth(i).evaluate(rectangle))


def test_each_token_has_its_probability_and_what_explain_shows(opened, server, tiny, forward):  # noqa: F811
    page = opened()
    generate(page)
    (choice,) = complete(server, PROMPT, temperature=0, max_tokens=N_NEW, logprobs=1, echo=True)
    names, ids, n_prompt = choice["logprobs"]["tokens"], choice["logprobs"]["token_ids"], len(tiny[0].encode(PROMPT))
    tokens, forward_pass = page.evaluate(TOKENS), forward(ids)
    assert [is_prompt for _, is_prompt, _ in tokens] == [i < n_prompt for i in range(len(ids))]
    assert [text for text, *_ in tokens] == [name.removeprefix("bytes:").replace("\n", "↵\n") for name in names]
    probabilities = forward_pass[3][-1]  # [n_seq, n_vocab]
    shown = [float(value) for _, _, value in tokens[1:]]
    np.testing.assert_allclose(shown, probabilities[np.arange(len(ids) - 1), ids[1:]], rtol=1e-3, atol=1e-6)
    wait_for_explanation(page, n_prompt - 1)  # the first new token is selected
    for position in (0, n_prompt, len(ids) - 2):
        click_token(page, position + 1)
        wait_for_explanation(page, position)
        contents = page.evaluate(CONTENTS)
        check_predictions(contents, forward_pass, position)
        check_attention(contents, forward_pass, position, 0, 0)
        assert json.dumps(names[position + 1]) in page.locator("#chosen").text_content()


def test_beyond_128_tokens_only_the_most_likely_tokens_are_shown(opened, tiny_models_dir, tmp_path):
    """A model with a longer context."""
    sizes = TINY | {"n_ctx": 160}
    (tmp_path / "long").mkdir()
    copy_vocabulary(tmp_path / "long", tiny_models_dir / "tiny")
    write_safetensors(tmp_path / "long", sizes, random_tensors(sizes))
    _, hparams, params = load_encoder_hparams_and_params("long", str(tmp_path))
    with serving(tmp_path, "long") as server:
        page = opened(port=server.port)
        generate(page, "a", 140)
        ids = complete(server, "a", temperature=0, max_tokens=140, logprobs=0, echo=True)[0]["logprobs"]["token_ids"]
        click_token(page, 135)
        page.locator("#beyond").wait_for()
        assert not page.locator("#lens").is_visible() and not page.locator("#map").is_visible()
        expected = softmax(gpt2(ids[:135], **params, n_head=hparams["n_head"])[-1])
        shown = page.evaluate("[...document.querySelectorAll('#next .number')].map((e) => parseFloat(e.textContent))")
        np.testing.assert_allclose(shown, -np.sort(-100 * expected)[:10], atol=0.0101)
        click_token(page, 127)
        wait_for_explanation(page, 126)
        assert page.locator("#lens").is_visible() and not page.locator("#beyond").is_visible()


def test_everything_works_by_keyboard(opened, tiny):
    page = opened()
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Dear Sir")
    page.keyboard.press("Control+Enter")
    page.locator("#status").filter(has_text="tokens with the prompt").wait_for()
    first = len(tiny[0].encode("Dear Sir"))
    wait_for_explanation(page, first - 1)
    names = []
    for key in ["Tab"] * 5 + ["Tab", "Enter"]:  # the sliders and the seed, then the button
        page.keyboard.press(key)
        names.append(page.evaluate("document.activeElement.name || document.activeElement.id"))
    assert names == ["temperature", "top_k", "top_p", "max_tokens", "seed", "generate", "generate"]
    page.locator("#status").filter(has_text="tokens with the prompt").wait_for()
    wait_for_explanation(page, first - 1)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    wait_for_explanation(page, first)
    outline = page.evaluate("getComputedStyle(document.activeElement.parentElement).outlineWidth")
    assert outline == "3px" and page.evaluate("document.activeElement.name") == "position"


@pytest.mark.parametrize("prompt", [HOSTILE, "Dear Sir or Madam, " * 3])
def test_no_width_needs_horizontal_scrolling_and_a_text_stays_text(opened, prompt):
    page = opened(PHONE)
    generate(page, prompt)
    click_token(page, 3)
    wait_for_explanation(page, 2)
    for width in (320, 400, 1024, 1600):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate(BEYOND, width) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() == "GPT-2, token by token" and page.locator("img, iframe").count() == 0


def test_the_policy_allows_requests_to_the_server_only(browser, server):
    page, urls, address = browser.new_page(), set(), f"http://127.0.0.1:{server.port}/"
    page.route(re.compile("^http:"), lambda route: (urls.add(route.request.url), route.continue_()))
    answer = page.goto(address)
    page.locator("#about").filter(has_text="Model").wait_for()
    page.evaluate(REQUESTS, "http://127.0.0.1:9/")
    page.close()
    assert urls == {address, f"{address}v1/models"}
    assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"


def test_an_error_is_shown(opened):
    page = opened()
    page.locator("#prompt").fill("word " * 200)
    page.locator("#generate").click()
    page.locator("#status").filter(has_text="more than the context of 128").wait_for()
    assert [text for text in opened.noted if "400" not in text] == []  # Chromium logs the status
    opened.noted.clear()


def test_a_running_text_can_be_stopped(opened, tiny_models_dir):
    gate = Gate()
    with serving(tiny_models_dir, model=gate) as server:
        page = opened(port=server.port)
        page.locator("#prompt").fill("a")
        page.locator("[name=temperature]").fill("0")
        gate.passes.release(20)  # more than 4 tokens: those of an incomplete character wait
        page.locator("#generate").click()
        page.locator("#tokens label").nth(4).wait_for()
        page.locator("#stop").click()
        page.locator("#status").filter(has_text="stopped").wait_for()
        assert page.locator("#stop").is_disabled()
        gate.passes.release(1000)
        wait_until(lambda: not server.batch.batch.rows)
        assert page.locator("#tokens label").count() < 30


def test_the_page_asks_for_the_key(browser, tiny_models_dir):
    with serving(tiny_models_dir, api_key="right") as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.locator("#key").wait_for()
        page.locator("#key").fill("right")
        generate(page)
        page.close()
