"""The page of gpt2.py --explain out.html: page.html with the numbers in it."""

import base64
import hashlib
import json
import os
import re

import numpy as np

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")


def as_page(name, ids, visible, layers, attention):
    """The page as bytes.

    name: the model's. visible: from an id to its text. layers: for the embeddings and each layer, by position, the
    likeliest next [(id, probability)]. attention: [n_layer, n_head, n_seq, n_seq].
    """
    shown = {int(i) for positions in layers for likeliest in positions for i, _ in likeliest} | set(ids)
    rows, columns = np.tril_indices(len(ids))  # the rest is 0: no position sees what comes after it
    data = {
        "model": name,
        "ids": ids,
        "text": {i: visible(i) for i in sorted(shown)},
        "next": [
            [[(int(i), float(f"{p:.5g}")) for i, p in likeliest] for likeliest in positions] for positions in layers
        ],
        "shape": attention.shape[:2],
        "attention": encoded(attention[..., rows, columns]),
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag ends it
    return template().replace("{{data}}", text).encode("utf-8", "replace")  # a folder's name may be anything


def encoded(shares):
    """Numbers from 0 to 1 as 16-bit integers, little-endian, in base64: off by less than 1e-5."""
    return base64.b64encode(np.rint(shares * 65535).astype("<u2").tobytes()).decode("ascii")


def template():
    """page.html with the hashes of its style and its script in its Content-Security-Policy.

    So these two are all that counts: nothing is fetched, and no prompt is run, whatever is in it.
    """
    with open(TEMPLATE, encoding="utf-8") as f:
        page = f.read()
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
        page = page.replace(f"{tag}-src 'none'", f"{tag}-src 'sha256-{digest}'")
    return page
