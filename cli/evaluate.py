"""The command line of evaluate.py."""

import math

import numpy as np

from cli.options import Parser, exit_code, n_cores, parse_positive
from evaluate import total_loss
from training.dataset import read_dataset, split_text
from utils import load_encoder_hparams_and_params
from weights.errors import UserError


def make_parser():
    parser = Parser(
        prog="evaluate.py",
        description="Loss and perplexity of a text under a model.",
        hint=" (the model goes after --model_size)",
    )
    add = parser.add_argument
    add("dataset", metavar="FILE", help="a UTF-8 text file, or tinyshakespeare, which is downloaded")
    add(
        "--split",
        choices=["all", "train", "val"],
        default="all",
        help="val: the last tenth, held out by train.py (--layout plain)",
    )
    add("--model_size", default="124M", help="the model, as for gpt2.py (default 124M)")
    add("--context", type=parse_positive, metavar="N", help="tokens a window holds (default: the model's context)")
    add("--stride", type=parse_positive, metavar="N", help="tokens from window to window (default: half the context)")
    parser.add_models_dir()
    add("--data_dir", default="data", metavar="DIR", help="where tinyshakespeare is downloaded to (default data)")
    add("--threads", type=parse_positive, default=n_cores(), metavar="N", help="windows at a time (default: the cores)")
    return parser


def evaluate(options):
    """Prints the figures."""
    text = read_dataset(options.dataset, options.data_dir)
    if options.split != "all":
        text = dict(zip(("train", "val"), split_text(text), strict=True))[options.split]
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, options.models_dir)
    context = options.context or hparams["n_ctx"]
    stride = options.stride or max(1, context // 2)
    if not stride <= context <= hparams["n_ctx"]:
        raise UserError(
            f"--stride {stride}, --context {context}, and the {hparams['n_ctx']} of {options.model_size}'s context: "
            "each may be at most the next; choose smaller ones"
        )
    ids = encoder.encode(text)
    if len(ids) < 2:
        raise UserError(f"{options.dataset} gives {len(ids)} tokens; the first is not scored, so at least 2 are needed")
    loss = total_loss(ids, params, hparams["n_head"], context, stride, options.threads) / (len(ids) - 1)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss}: {options.model_size}'s weights are not sound; get or train the model anew"
        )
    scored = encoder.decode(ids[1:])
    per_char, per_byte = ((len(ids) - 1) * loss / len(whole) for whole in (scored, scored.encode("utf-8")))
    with np.errstate(over="ignore"):
        perplexity = np.exp(loss)
    print(
        f"{options.model_size} on {options.dataset} ({options.split}): {len(ids)} tokens, {len(text)} characters\n"
        f"context {context}, stride {stride}\n"
        f"loss        {loss:.4f} nats a token\n"
        f"perplexity  {perplexity:.4f} a token\n"
        f"            {per_char:.4f} nats a character\n"
        f"            {per_byte / math.log(2):.4f} bits a byte"
    )


def run(argv=None):
    """Runs the command line argv (default sys.argv[1:]) and returns its exit code."""
    return exit_code("evaluate.py", lambda: evaluate(make_parser().parse_args(argv)))
