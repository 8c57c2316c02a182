"""gpt2.py --explain: the tokens of a prompt and the most likely next tokens after each layer, as text or as a page."""

import shutil
import sys
import unicodedata

import numpy as np

from cli.session import check_prompt_fits, read_prompt, with_bar
from explain.page import MAX_TOKENS, TEMPLATE, make_page, token_text
from explain.trace import predict_by_layer, trace
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import atomic_write, check_writable, same_file

REMEDY = "choose another file for --explain"


def run_explain(options):
    """Print the explanation, or write it to the page that --explain names."""
    prompt, path = read_prompt(options), None if options.explain is True else options.explain
    if not prompt:
        raise UserError('--explain needs a prompt, before it: python gpt2.py "A prompt" --explain')
    if path is not None:
        check_output(path)
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, options.models_dir)
    ids = encoder.encode(prompt)
    check_prompt_fits(len(ids), 0, hparams["n_ctx"])
    if path is not None:
        check_page_length(len(ids))
    traced = trace(ids, params, hparams["n_head"], last_only=path is None)
    if not np.all(np.isfinite(traced.logits)):
        raise FloatingPointError("the logits are not finite")
    predictions = list(with_bar(predict_by_layer(traced.hidden, params), len(traced.hidden), "layer", printed=False))
    if path is None:
        print(format_text(encoder, ids, [positions[-1] for positions in predictions]))
    else:
        write_page(path, options.model_size, encoder, ids, predictions, traced.attention)


def check_output(path):
    """Raise UserError if the page cannot be written. Called before the model is loaded."""
    if same_file(path, TEMPLATE):
        raise UserError(f"{path} is the template of every page; {REMEDY}")
    check_writable(path, REMEDY)


def check_page_length(n_tokens):
    if n_tokens > MAX_TOKENS:
        raise UserError(
            f"{n_tokens} prompt tokens, more than the {MAX_TOKENS} whose attention a page can show; shorten the "
            "prompt, or print the text, which shows no attention: --explain without a file"
        )


def write_page(path, name, encoder, ids, predictions, attention):
    data = make_page(name, ids, lambda i: token_text(encoder, i), predictions, attention)
    with atomic_write(path, REMEDY) as f:
        f.write(data)
    n_layer, n_head = attention.shape[:2]
    contents = f"{len(ids)} tokens, {n_layer} x {n_head} attention maps, {len(data) / 1e3:.0f} kB"
    print(f"note: {path}: {contents}", file=sys.stderr)


# Text


def format_text(encoder, ids, predictions):
    """Return the text for a prompt's token ids and [(id, probability)] after the embeddings and after each layer."""
    *earlier, last = [[(token_text(encoder, i), p) for i, p in layer] for layer in predictions]
    lines = ["the tokens of the prompt: position, id, text"]
    lines += [f"{i:4}  {token_id:6}  {token_text(encoder, token_id)}" for i, token_id in enumerate(ids, 1)]
    lines += ["", f"the most likely next tokens after layer {len(earlier)}, the last:"]
    lines += [f"{i:4}  {p:7.2%}  {token}" for i, (token, p) in enumerate(last, 1)]
    title = "the logit lens: the most likely next tokens after each earlier layer (0: the embeddings), in percent:"
    lines += ["", title]
    lines += format_table([[f"{100 * p:5.1f} {shorten(token)}" for token, p in layer] for layer in earlier])
    return "\n".join(lines)


def format_table(rows):
    """Yield the lines of a table with numbered rows; a row that is wider than the terminal takes several lines."""
    widest = max(width(cell) for row in rows for cell in row)
    fitting = (shutil.get_terminal_size((120, 24)).columns - 5) // (widest + 1)
    per_line = next((n for n in (10, 5) if n <= fitting), max(1, fitting))
    for i, row in enumerate(rows):
        for j in range(0, len(row), per_line):
            cells = "".join(f" {cell}{' ' * (widest - width(cell))}" for cell in row[j : j + per_line])
            yield f"{'' if j else i:4}{cells}".rstrip()


def width(text):
    """Return the terminal columns of a text: two per wide character (Unicode Annex 11), none per combining mark."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def shorten(text, n=12):
    return text if len(text) <= n else text[: n - 1] + "…"
