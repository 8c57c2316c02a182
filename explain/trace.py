"""What gpt2() computes between the token ids and the logits: hidden states, attention weights, and the logit lens.

Nothing is computed a second way: trace() runs a second instance of gpt2.py in which three functions also put down what
they return, and the lens is the two steps that gpt2() itself ends with. gpt2.py knows nothing of this.
"""

from typing import NamedTuple

import numpy as np

from engines.instance import new_instance, recording
from gpt2 import layer_norm, linear, softmax
from sampling import top_k_keep


class Trace(NamedTuple):
    hidden: np.ndarray  # [n_layer+1, n_seq, n_embd]: the embeddings, and what each block leaves
    attention: np.ndarray | None  # [n_layer, n_head, n_seq, n_seq]: how much each position (row) takes of each
    logits: np.ndarray  # [n_seq, n_vocab]: gpt2()'s result


def trace(ids, params, n_head, last_only=False):
    """Runs gpt2() on token ids, [n_seq], and returns the Trace of it.

    last_only: hidden states and logits of the last position alone, and no attention (None), of which a long text has
    too much. Raises ValueError when there are more ids than the model's context holds.
    """
    model, hidden, attention = new_instance(), [], []
    model.embed, model.transformer_block = recording(model.embed, hidden), recording(model.transformer_block, hidden)
    if not last_only:
        model.softmax = recording(model.softmax, attention)
    logits = model.gpt2(ids, **params, n_head=n_head, last_only=last_only)
    hidden = np.stack([x[-1:] if last_only else x for x in hidden])
    return Trace(hidden, np.stack(attention) if attention else None, logits)


def lens(hidden, ln_f, wte):  # [..., n_embd] -> [..., n_vocab]
    """The logits of a hidden state if no block came after it; of the last one, gpt2()'s own, bit for bit.

    It is the logit lens of nostalgebraist 2020 ("interpreting GPT: the logit lens").
    """
    return linear(layer_norm(hidden, **ln_f), wte.T, 0)


def most_likely(logits, k):  # [n_vocab] -> [k], [k]
    """The ids of the k likeliest tokens, the likeliest first, and their probabilities; of equal ones the lower id."""
    ids = np.flatnonzero(top_k_keep(logits, k))  # more than k where some tie with the last
    ids = ids[np.argsort(-logits[ids], kind="stable")][:k]
    return ids, softmax(logits)[ids]
