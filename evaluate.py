"""How well a model predicts a text: python evaluate.py wikitext2-test.txt --model_size 124M

A text longer than the context is read through a window of `context` tokens that moves on by `stride`. Each window but
the first scores the last `stride` of its tokens, so that all but the very first token of the text are scored once, and
those after the first window with at least context - stride tokens before them. A smaller stride costs more time and
gives a lower loss: only figures of the same context and stride compare. stride = context reads each token once.

Perplexity is per token of the model's vocabulary, and on the text as it is: the GPT-2 paper's (Radford et al. 2019,
table 3) are per word, of texts freed of artefacts, and are other numbers. Nats a character compare across vocabularies.

This is a program of its own, and no option of gpt2.py, because it shares none of that one's options but the model.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fused
from cli import Parser, exit_code, n_cores, positive_number
from data import read_dataset, split_text
from errors import UserError
from utils import load_encoder_hparams_and_params

LOGITS_AT_ONCE = 2**22  # windows go through the model together until their logits are about this many


def windows(n_inputs, context, stride):
    """(start, how many of its positions are scored already) of each window; the last ends with the text."""
    starts = [*range(0, n_inputs - context, stride), max(0, n_inputs - context)]
    return [(0, 0)] + [(start, before + context - start) for before, start in itertools.pairwise(starts)]


def total_loss(ids, params, n_head, context, stride, threads=1):
    """The summed -log probability, in nats, of ids[1:], each given the ids before it that its window holds.

    ids: [n] of at least two. Raises ValueError unless 1 <= stride <= context <= the model's context.
    """
    n_ctx, n_vocab = params["wpe"].shape[0], params["wte"].shape[0]
    if not 1 <= stride <= context <= n_ctx:
        raise ValueError(f"stride {stride}, context {context} and the model's context {n_ctx} must be in this order")
    ids, model, n_inputs = np.asarray(ids, dtype=int), fused.training_model(), len(ids) - 1
    context = min(context, n_inputs)
    todo, batch_size = windows(n_inputs, context, stride), max(1, LOGITS_AT_ONCE // (context * n_vocab))

    def batch_loss(batch):
        rows = np.stack([ids[start : start + context + 1] for start, _ in batch])  # -> [batch, context+1]
        losses = fused.token_losses(model.gpt2(rows[:, :-1], **params, n_head=n_head), rows[:, 1:])
        return sum(
            float(np.sum(row[scored:], dtype=np.float64)) for row, (_, scored) in zip(losses, batch, strict=True)
        )

    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1 if len(batches) > 1 else threads):
        try:
            return sum(tqdm(pool.map(batch_loss, batches), total=len(batches), unit="batch", disable=None, leave=False))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # leaving would wait for all of them
            raise


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
    add("--context", type=positive_number, metavar="N", help="tokens a window holds (default: the model's context)")
    add("--stride", type=positive_number, metavar="N", help="tokens from window to window (default: half the context)")
    parser.add_models_dir()
    add("--data_dir", default="data", metavar="DIR", help="where tinyshakespeare is downloaded to (default data)")
    add(
        "--threads", type=positive_number, default=n_cores(), metavar="N", help="windows at a time (default: the cores)"
    )
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


def main(argv=None):
    """Runs the command line argv (default sys.argv[1:]) and returns its exit code."""
    return exit_code("evaluate.py", lambda: evaluate(make_parser().parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
