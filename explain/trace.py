"""The intermediate results of gpt2(): hidden states, attention weights, and the logit lens.

trace() runs gpt2() itself, in a second instance of the module in which embed, transformer_block and softmax also record
what they return; gpt2.py has no code for it. The logit lens applies the last two steps of gpt2() to any hidden state.
"""

from typing import NamedTuple

import numpy as np

from engines.instance import new_instance, recording
from gpt2 import layer_norm, linear, softmax
from sampling import top_k_keep

K = 10  # next tokens shown


class Trace(NamedTuple):
    """The intermediate results for one sequence of token ids. An attention map has queries as rows, keys as columns."""

    hidden: np.ndarray  # [n_layer+1, n_seq, n_embd]: the embeddings, then the output of each block
    attention: np.ndarray | None  # [n_layer, n_head, n_seq, n_seq]: attention weights; each row sums to 1
    logits: np.ndarray  # [n_seq, n_vocab]: the result of gpt2()


def trace(ids, params, n_head, last_only=False):
    """Run gpt2() on token ids, [n_seq], and return its Trace.

    last_only: keep the hidden states and logits of the last position only, and no attention weights (None), whose
    number grows with the square of n_seq.
    Raises ValueError if the ids exceed the model's context.
    """
    model, hidden, attention = new_instance(), [], []
    model.embed, model.transformer_block = recording(model.embed, hidden), recording(model.transformer_block, hidden)
    if not last_only:
        model.softmax = recording(model.softmax, attention)
    logits = model.gpt2(ids, **params, n_head=n_head, last_only=last_only)
    hidden = np.stack([x[-1:] if last_only else x for x in hidden])
    return Trace(hidden, np.stack(attention) if attention else None, logits)


def logit_lens(hidden, ln_f, wte):  # [..., n_embd] -> [..., n_vocab]
    """Return the logits of a hidden state as if no further block followed (nostalgebraist 2020, "logit lens").

    For the last hidden state these are the logits of gpt2(), bit for bit.
    """
    return linear(layer_norm(hidden, **ln_f), wte.T, 0)


def predict_by_layer(hidden, params):
    """Yield for the embeddings and each layer, for each position, the K most likely next (id, probability)."""
    for states in hidden:
        logits = logit_lens(states, params["ln_f"], params["wte"])
        yield [list(zip(*most_likely(row, K), strict=True)) for row in logits]


def most_likely(logits, k):  # [n_vocab] -> [k], [k]
    """Return the ids of the k most likely tokens, in descending order, and their probabilities.

    Of equally likely tokens, the lower id comes first.
    """
    ids = np.flatnonzero(top_k_keep(logits, k))  # more than k if several tie with the last
    ids = ids[np.argsort(-logits[ids], kind="stable")][:k]
    return ids, softmax(logits)[ids]


def log_probabilities(logits, token_id, k):  # [n_vocab] -> (float, k pairs)
    """Return the log-probability of a token, and (id, log-probability) of each of the k most likely tokens.

    Raises FloatingPointError if a logit is NaN or infinite.
    """
    if not np.all(np.isfinite(logits)):
        raise FloatingPointError("the logits are not finite")
    log_sum = np.max(logits) + np.log(np.sum(np.exp(logits - np.max(logits))))
    top = most_likely(logits, k)[0] if k else ()
    return float(logits[token_id] - log_sum), [(int(i), float(logits[i] - log_sum)) for i in top]
