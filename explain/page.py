"""The HTML page of gpt2.py --explain OUT.html: the template page.html with its data inserted.

The page of serve.py has another template and receives the same data later. Both contain drawing.css, drawing.html and
drawing.js, which show the next tokens, the logit lens and the attention of a selected token.
"""

import base64
import functools
import hashlib
import json
import os
import re
import unicodedata

import numpy as np

from explain.trace import predict_by_layer, trace

FOLDER = os.path.dirname(os.path.abspath(__file__))
TEMPLATE = os.path.join(FOLDER, "page.html")
MAX_TOKENS = 128  # on a page: a map has MAX_TOKENS**2 weights; 124M has 144 maps, 1558M has 1200


def explain_ids(name, encoder, ids, params, n_head):
    """Return the data of the first MAX_TOKENS token ids, JSON as bytes (see page_data)."""
    ids = ids[:MAX_TOKENS]
    traced, token = trace(ids, params, n_head), functools.partial(token_text, encoder)
    data = page_data(name, ids, token, list(predict_by_layer(traced.hidden, params)), traced.attention)
    return as_json(data).encode("utf-8", "replace")


def make_page(*data):
    """Return the page as bytes. data: the arguments of page_data."""
    text = as_json(page_data(*data)).replace("<", "\\u003c")  # no tag can end it
    return read_template().replace("{{data}}", text).encode("utf-8", "replace")  # a model's name can be any file name


def as_json(data):
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def page_data(name, ids, token_text, predictions, attention):
    """Return the data that the script of the page draws.

    name: the name of the model.
    ids: the token ids of the prompt, [n_seq].
    token_text: function from a token id to the text that shows it.
    predictions: for the embeddings and each layer, for each position, the most likely next [(id, probability)].
    attention: the attention weights, [n_layer, n_head, n_seq, n_seq].
    """
    shown = {int(i) for positions in predictions for tokens in positions for i, _ in tokens} | set(ids)
    rows, columns = np.tril_indices(len(ids))  # the weights of later positions are 0
    return {
        "model": name,
        "ids": ids,
        "text": {i: token_text(i) for i in sorted(shown)},
        "next": [
            [[(int(i), float(f"{p:.5g}")) for i, p in tokens] for tokens in positions] for positions in predictions
        ],
        "shape": attention.shape[:2],
        "attention": encode_weights(attention[..., rows, columns]),
    }


def encode_weights(weights):
    """Encode numbers from 0 to 1 as 16-bit integers, little-endian, in base64; the rounding error is below 1e-5."""
    return base64.b64encode(np.rint(weights * 65535).astype("<u2").tobytes()).decode("ascii")


def token_text(encoder, token_id):
    r"""Return a token as a Python literal, unique to it: ' the', '\n', or b'\xe4' for bytes that are not UTF-8."""
    try:
        text = encoder.token_bytes(token_id).decode("utf-8")
    except UnicodeDecodeError:
        return repr(encoder.token_bytes(token_id))
    quoted = repr(text)
    if text and unicodedata.category(text[0]).startswith("M") and quoted[1] == text[0]:  # would combine with the quote
        return quoted[0] + ascii(text[0])[1:-1] + quoted[2:]
    return quoted


def read_template(path=TEMPLATE):
    """Return a template with what all pages share, and the hashes of its style and script in its policy.

    By this Content-Security-Policy the browser applies only these two: it runs no script that a prompt contains.
    """
    with open(path, encoding="utf-8") as f:
        page = f.read()
    for name in ("drawing.css", "drawing.html", "drawing.js"):
        with open(os.path.join(FOLDER, name), encoding="utf-8") as f:
            page = page.replace("{{" + name + "}}\n", f.read())
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
        page = page.replace(f"{tag}-src 'none'", f"{tag}-src 'sha256-{digest}'")
    return page
