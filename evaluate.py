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
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from training import fused

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


if __name__ == "__main__":
    from cli.evaluate import run

    raise SystemExit(run())
