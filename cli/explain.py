"""gpt2.py --explain: what the model makes of a prompt, as text, or to a page or a picture."""

import shutil
import sys
import unicodedata

import numpy as np
from tqdm import tqdm

from cli.generate import make_parser, read_prompt
from explain.page import TEMPLATE, as_page
from explain.trace import lens, most_likely, trace
from training.figure import check_picture
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import atomic_write, check_writable, same_file

K = 10  # next tokens shown
MAX_TOKENS = 128  # in a file: a map has the square of it, 124M has 144 maps, 1558M has 1200
TAKEN = ("explain", "prompt", "prompt_file", "model_size", "models_dir")  # the options that mean something here
REMEDY = "name another file after --explain"


def run_explain(options):
    check_options(options)
    prompt, path = read_prompt(options), None if options.explain is True else options.explain
    if not prompt:
        raise UserError('--explain needs a prompt, before it: python gpt2.py "A prompt" --explain')
    if path is not None:
        check_output(path, options.prompt_file)
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, options.models_dir)
    ids = encoder.encode(prompt)
    check_length(len(ids), hparams["n_ctx"], path)
    traced = trace(ids, params, hparams["n_head"], last_only=path is None)
    if not np.all(np.isfinite(traced.logits)):
        raise UserError(f"{options.model_size}'s weights are not sound, its logits not numbers; get the model anew")
    if path is None:
        print(as_text(encoder, ids, list(after_each_layer(traced, params))))
    else:
        write_file(path, options.model_size, encoder, ids, traced, params)


def after_each_layer(traced, params):
    """Yields, for the embeddings and each layer, by position the K likeliest next [(id, probability)]."""
    for hidden in tqdm(traced.hidden, unit="layer", disable=None, leave=False):
        yield [
            list(zip(*most_likely(logits, K), strict=True)) for logits in lens(hidden, params["ln_f"], params["wte"])
        ]


def write_file(path, name, encoder, ids, traced, params):
    if is_picture(path):
        from explain_picture import as_picture

        data = as_picture([shortened(visible(encoder, i)) for i in ids], traced.attention)
    else:
        layers = list(after_each_layer(traced, params))
        data = as_page(name, ids, lambda i: visible(encoder, i), layers, traced.attention)
    with atomic_write(path, REMEDY) as f:
        f.write(data)
    n_layer, n_head = traced.attention.shape[:2]
    what = f"{len(ids)} tokens, {n_layer} x {n_head} attention maps, {len(data) / 1e3:.0f} kB"
    print(f"note: {path}: {what}", file=sys.stderr)


# What may be asked


def is_picture(path):
    return path.lower().endswith(".png")


def check_options(options):
    """Raises UserError where an option says how to continue the text: nothing is continued here."""
    usual = vars(make_parser().parse_args([]))
    useless = [f"--{name}" for name, value in vars(options).items() if name not in TAKEN and value != usual[name]]
    if useless:
        raise UserError(f"--explain looks at one prompt and continues nothing; leave out {', '.join(useless)}")
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("give one of a prompt and --prompt_file, not both")


def check_output(path, prompt_file):
    """Raises UserError where atomic_write() would fail, before there is work to lose."""
    for kept, what in ((prompt_file, "the prompt's own file"), (TEMPLATE, "what every page is made from")):
        if kept is not None and same_file(path, kept):
            raise UserError(f"{path} is {what}; {REMEDY}")
    (check_picture if is_picture(path) else check_writable)(path, REMEDY)


def check_length(n_tokens, n_ctx, path):
    if n_tokens > n_ctx:
        raise UserError(f"{n_tokens} prompt tokens, more than the {n_ctx} of the model's context; shorten the prompt")
    if path is not None and n_tokens > MAX_TOKENS:
        raise UserError(
            f"{n_tokens} prompt tokens, more than the {MAX_TOKENS} whose attention can be shown; shorten the prompt, "
            "or take the text, which shows none: --explain alone"
        )


# How a token is written


def visible(encoder, token_id):
    r"""A token as Python writes it, so that no two look the same: ' the', '\n', and b'\xe4' where it is no text."""
    try:
        text = encoder.token_bytes(token_id).decode("utf-8")
    except UnicodeDecodeError:
        return repr(encoder.token_bytes(token_id))
    quoted = repr(text)
    if text and unicodedata.category(text[0]).startswith("M") and quoted[1] == text[0]:  # a mark would join the quote
        return quoted[0] + ascii(text[0])[1:-1] + quoted[2:]
    return quoted


def width(text):
    """The columns a text takes on a terminal (Unicode Standard Annex 11): wide characters two, marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def shortened(text, n=12):
    return text if len(text) <= n else text[: n - 1] + "…"


# As text


def as_text(encoder, ids, layers):
    """The tokens, the K likeliest next ones, and those after each earlier layer."""
    layers = [[(p, visible(encoder, i)) for i, p in positions[-1]] for positions in layers]
    lines = ["the tokens of the prompt: position, id, text"]
    lines += [f"{i:4}  {token_id:6}  {visible(encoder, token_id)}" for i, token_id in enumerate(ids, 1)]
    lines += ["", f"the likeliest next tokens, after layer {len(layers) - 1}, the last:"]
    lines += [f"{i:4}  {p:7.2%}  {token}" for i, (p, token) in enumerate(layers[-1], 1)]
    lines += ["", "the same if the model ended after an earlier layer (0: the embeddings), in percent:"]
    lines += table([[f"{100 * p:5.1f} {shortened(token)}" for p, token in row] for row in layers[:-1]])
    return "\n".join(lines)


def table(rows):
    """Lines of cells in columns, each row with its number; a row takes several lines where it is too wide for one."""
    widest = max(width(cell) for row in rows for cell in row)
    fitting = (shutil.get_terminal_size((120, 24)).columns - 5) // (widest + 1)
    per_line = next((n for n in (10, 5) if n <= fitting), max(1, fitting))
    for i, row in enumerate(rows):
        for j in range(0, len(row), per_line):
            cells = "".join(f" {cell}{' ' * (widest - width(cell))}" for cell in row[j : j + per_line])
            yield f"{'' if j else i:4}{cells}".rstrip()
