"""Measure how well a model predicts a text: python evaluate.py tinyshakespeare --model_size 124M

With --tasks it runs tasks of EleutherAI's lm-evaluation-harness instead (cli/tasks.py).

A text longer than the context is read through a sliding window of `context` tokens that advances by `stride` tokens,
as in Hugging Face's guide "Perplexity of fixed-length models".
The first window scores all its tokens, each later one its last `stride` tokens; the last window ends with the text and
may score fewer. So every token but the first of the text is scored once and, after the first window, with at least
context - stride + 1 tokens before it. A smaller stride takes more time and gives a lower loss: compare results only if
context and stride are the same. With stride equal to context, only the last window overlaps the one before it.

Perplexity is per token of the model's vocabulary, on the text as it is. The GPT-2 paper's perplexities (Radford et al.
2019, table 3) are per word of detokenized texts and cannot be compared with these. Nats per character can be compared
between vocabularies.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from training import fused
from training.memory import check_evaluation_memory
from training.progress import Lines

LOGITS_PER_BATCH = 2**22  # target size of a batch; it has at least one window


def sliding_windows(n_inputs, context, stride):
    """Return (start, n_skip) of each window: earlier windows have scored its first n_skip targets."""
    starts = [*range(0, n_inputs - context, stride), max(0, n_inputs - context)]
    return [(0, 0)] + [(start, before + context - start) for before, start in itertools.pairwise(starts)]


def total_loss(ids, params, n_head, context, stride, threads=1, model=None):
    """Return the sum of -log p(token), in nats, over ids[1:], each given the ids before it in its window.

    ids: at least two token ids. threads: number of batches of windows evaluated at a time.
    model: the one of compiled_model() or jax_engine() with these params; it has threads of its own and takes one batch
    at a time.
    Raises ValueError unless 1 <= stride <= context <= the model's context.
    """
    n_ctx, n_vocab = params["wpe"].shape[0], params["wte"].shape[0]
    if not 1 <= stride <= context <= n_ctx:
        raise ValueError(f"need 1 <= stride {stride} <= context {context} <= the model's context {n_ctx}")
    ids, n_inputs = np.asarray(ids, dtype=int), len(ids) - 1
    compiled, threads = model is not None, threads if model is None else 1
    model = model or fused.training_model()
    token_losses = getattr(model, "token_losses", fused.token_losses)  # JAX has its own, on the devices of the logits
    context = min(context, n_inputs)

    def batch_loss(windows):
        rows = np.stack([ids[start : start + context + 1] for start, _ in windows])  # -> [batch, context+1]
        losses = np.asarray(token_losses(model.gpt2(rows[:, :-1], **params, n_head=n_head), rows[:, 1:]))
        sums = (np.sum(row[n_skip:], dtype=np.float64) for row, (_, n_skip) in zip(losses, windows, strict=True))
        return sum(map(float, sums))

    windows, batch_size = sliding_windows(n_inputs, context, stride), max(1, LOGITS_PER_BATCH // (context * n_vocab))
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    n_tokens = context * min(batch_size, len(windows)) * min(threads, len(batches))
    check_evaluation_memory(n_tokens, context, *params["wte"].shape, n_head)
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1 if len(batches) > 1 else threads):
        try:
            losses, total, lines = (map if compiled else pool.map)(batch_loss, batches), 0.0, Lines()
            for i, loss in enumerate(tqdm(losses, total=len(batches), unit="batch", disable=None, leave=False)):
                total += loss
                lines.show(f"evaluated {i + 1} of {len(batches)} batches")
            return total
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # without this, leaving the with block waits for all batches
            raise


if __name__ == "__main__":
    from cli.evaluate import run

    raise SystemExit(run())
