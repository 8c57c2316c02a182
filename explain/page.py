"""The HTML page of gpt2.py --explain OUT.html: the template page.html with its data inserted."""

import base64
import hashlib
import json
import os
import re

import numpy as np

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")


def make_page(name, ids, token_text, predictions, attention):
    """Return the page as bytes.

    name: the name of the model.
    ids: the token ids of the prompt, [n_seq].
    token_text: function from a token id to the text that shows it.
    predictions: for the embeddings and each layer, for each position, the most likely next [(id, probability)].
    attention: the attention weights, [n_layer, n_head, n_seq, n_seq].
    """
    shown = {int(i) for positions in predictions for tokens in positions for i, _ in tokens} | set(ids)
    rows, columns = np.tril_indices(len(ids))  # the weights of later positions are 0
    data = {
        "model": name,
        "ids": ids,
        "text": {i: token_text(i) for i in sorted(shown)},
        "next": [
            [[(int(i), float(f"{p:.5g}")) for i, p in tokens] for tokens in positions] for positions in predictions
        ],
        "shape": attention.shape[:2],
        "attention": encode_weights(attention[..., rows, columns]),
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag can end it
    return read_template().replace("{{data}}", text).encode("utf-8", "replace")  # a model's name can be any file name


def encode_weights(weights):
    """Encode numbers from 0 to 1 as 16-bit integers, little-endian, in base64; the rounding error is below 1e-5."""
    return base64.b64encode(np.rint(weights * 65535).astype("<u2").tobytes()).decode("ascii")


def read_template():
    """Return page.html with the hashes of its style and its script in its Content-Security-Policy.

    The browser then applies only these two: it fetches nothing and runs no script that a prompt contains.
    """
    with open(TEMPLATE, encoding="utf-8") as f:
        page = f.read()
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
        page = page.replace(f"{tag}-src 'none'", f"{tag}-src 'sha256-{digest}'")
    return page
