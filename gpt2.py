"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") in plain NumPy.

Read it from top to bottom: each function uses only what is above it. Every weight is named as in OpenAI's checkpoint,
so a part of the model is a nested dict and `f(x, **params)` hands it over. The comments give shapes, `...` standing for
any leading axes (none for one sequence, [batch] for many). All arithmetic is float32: since NumPy 2 a float64 scalar
would silently turn the whole model into float64, hence the Python floats.
"""

import math

import numpy as np


def gelu(x):  # [..., n] -> [..., n]
    """Gaussian error linear unit in its tanh form (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):  # [..., n] -> [..., n]
    """Exponentials that sum to 1 over the last axis; the maximum is subtracted first so that none overflows."""
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))  # [..., n] -> [..., n]
    exp_x /= np.sum(exp_x, axis=-1, keepdims=True)
    return exp_x


def layer_norm(x, g, b, eps=1e-5):  # [..., n], [n], [n] -> [..., n]
    """Mean 0 and variance 1 over the last axis, then scale g and offset b (Ba et al. 2016, section 3.1)."""
    x = x - np.mean(x, axis=-1, keepdims=True)  # [..., n] -> [..., n]
    variance = np.mean(x * x, axis=-1, keepdims=True)  # [..., n] -> [..., 1]
    return x / np.sqrt(variance + eps) * g + b


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """Matrix product plus offset. The leading axes are folded into one, so that w is read once for a whole batch."""
    y = x.reshape(-1, x.shape[-1]) @ w + b  # [..., n_in] -> [rows, n_out]
    return y.reshape(*x.shape[:-1], w.shape[-1])


def ffn(x, c_fc, c_proj):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""
    a = gelu(linear(x, **c_fc))  # [..., n_seq, n_embd] -> [..., n_seq, 4*n_embd]
    return linear(a, **c_proj)


def attention(q, k, v):  # [..., n_q, d], [..., n_k, d], [..., n_k, d] -> [..., n_q, d]
    """Causal scaled dot-product attention (Vaswani et al. 2017, equation 1).

    The queries are the last n_q of the n_k positions; each sees itself and what came before it.
    """
    n_q, n_k = q.shape[-2], k.shape[-2]
    scores = (q * q.shape[-1] ** -0.5) @ np.swapaxes(k, -1, -2)  # [..., n_q, d], [..., d, n_k] -> [..., n_q, n_k]
    if n_q > 1:  # the newest position sees every other: one query needs no mask
        scores += (1 - np.tri(n_q, n_k, n_k - n_q, dtype=q.dtype)) * -1e10
    return softmax(scores) @ v


def split_heads(x, n_head):  # [..., n_seq, n_embd] -> [..., n_head, n_seq, n_embd/n_head]
    """Cuts each row into n_head pieces and brings the heads to the front."""
    return np.swapaxes(x.reshape(*x.shape[:-1], n_head, -1), -2, -3)


def merge_heads(x):  # [..., n_head, n_seq, d] -> [..., n_seq, n_head*d]
    """The reverse of split_heads."""
    x = np.swapaxes(x, -2, -3)  # [..., n_head, n_seq, d] -> [..., n_seq, n_head, d]
    return x.reshape(*x.shape[:-2], -1)


def check_context(n_past, n_seq, n_ctx):
    """Raises ValueError unless n_seq more positions fit into the context; filling it exactly is allowed."""
    if n_past + n_seq > n_ctx:
        raise ValueError(f"{n_past} tokens and {n_seq} more are {n_past + n_seq}; the context is {n_ctx}")


def check_request(inputs, n_new, n_ctx):
    """Raises ValueError unless there is something to start from, and room for it and n_new tokens."""
    if len(inputs) == 0:
        raise ValueError("at least one token is needed to start from")
    check_context(len(inputs), n_new, n_ctx)


class KVCache:
    """The keys and values one block has computed so far, with room for n_max positions."""

    def __init__(self, n_max):
        self.n_max, self.n_past, self.k, self.v = n_max, 0, None, None

    def append(self, k, v):  # [..., n_seq, d], [..., n_seq, d] -> [..., n_past+n_seq, d] each
        """Stores k and v behind what is there; returns all of both, as views (nothing is copied but k and v).

        To forget the newest positions, lower n_past. Raises ValueError when there is no room.
        """
        *lead, n_seq, d = k.shape
        check_context(self.n_past, n_seq, self.n_max)
        if self.k is None:
            self.k = np.swapaxes(np.empty((*lead, d, self.n_max), k.dtype), -1, -2)  # so q @ k.T reads along rows
            self.v = np.empty((*lead, self.n_max, d), v.dtype)
        n_past, n_k = self.n_past, self.n_past + n_seq
        self.k[..., n_past:n_k, :], self.v[..., n_past:n_k, :] = k, v
        self.n_past = n_k
        return self.k[..., :n_k, :], self.v[..., :n_k, :]

    def attend(self, q, k, v):  # [..., n_seq, d], [..., n_seq, d], [..., n_seq, d] -> [..., n_seq, d]
        """Attention of new positions to those before them and to themselves."""
        return attention(q, *self.append(k, v))


def mha(x, c_attn, c_proj, n_head, cache=None):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2.2), all heads at once.

    With a cache, x holds only the new positions; the keys and values of the earlier ones come out of it.
    """
    x = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    q, k, v = np.split(x, 3, axis=-1)  # [..., n_seq, 3*n_embd] -> [..., n_seq, n_embd] each
    q, k, v = (split_heads(a, n_head) for a in (q, k, v))  # -> [..., n_head, n_seq, n_embd/n_head] each
    attend = attention if cache is None else cache.attend
    x = merge_heads(attend(q, k, v))  # [..., n_head, n_seq, n_embd/n_head] -> [..., n_seq, n_embd]
    return linear(x, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache=None):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Attention between positions, then the network at each; both add to x what they find (pre-norm residuals)."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache)  # -> [..., n_seq, n_embd]
    x = x + ffn(layer_norm(x, **ln_2), **mlp)  # -> [..., n_seq, n_embd]
    return x


def embed(inputs, wte, wpe, n_past=0):  # [..., n_seq] -> [..., n_seq, n_embd]
    """What each token is plus where it stands: behind n_past others, a number or, one for each sequence, [batch, 1].

    Raises ValueError when wpe has too few rows (n_ctx) for that.
    """
    n_seq = inputs.shape[-1]
    check_context(np.max(n_past) if np.ndim(n_past) else n_past, n_seq, wpe.shape[0])
    return wte[inputs] + wpe[n_past + np.arange(n_seq)]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, last_only=False):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Token ids to logits: row i scores every token of the vocabulary as the one to follow inputs[..., : i+1].

    cache: a list with one KVCache a block. It takes in these positions; the next call continues after them.
    last_only: project only the last position to the vocabulary, [..., n_seq] -> [..., 1, n_vocab].
    Raises ValueError when there are more positions than wpe has rows (n_ctx).
    """
    inputs = np.asarray(inputs, dtype=int)  # -> [..., n_seq]
    x = embed(inputs, wte, wpe, n_past=cache[0].n_past if cache else 0)  # [..., n_seq] -> [..., n_seq, n_embd]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, cache=cache[i] if cache else None)
    x = layer_norm(x[..., -1:, :] if last_only else x, **ln_f)
    return linear(x, wte.T, 0)  # the token embedding again: [..., n_seq, n_embd] -> [..., n_seq, n_vocab]


PREFILL_CHUNK = 256  # prompt tokens a pass: bounds memory, and spares most of the work on keys that the mask would hide
# A large array made and freed: from then on glibc keeps freed memory of up to this size. Otherwise it goes back to the
# system after each operation and is faulted in anew for the next, a third of the time that 512 prompt tokens take.
np.empty(31 * 2**20, dtype=np.uint8)


def prefill(ids, params, n_head, cache):  # [n_seq] -> [n_vocab]
    """Takes ids into the cache, in as few passes as PREFILL_CHUNK allows; returns the logits of what follows the last."""
    for i in range(0, len(ids), PREFILL_CHUNK):
        logits = gpt2(ids[i : i + PREFILL_CHUNK], **params, n_head=n_head, cache=cache, last_only=True)
    return logits[-1]  # [1, n_vocab] -> [n_vocab]


def generate_tokens(inputs, params, n_head, n_tokens_to_generate, sample=np.argmax, stop_id=None):
    """Yields new token ids one by one, as they are made: the prompt in a few passes, then one position a token.

    inputs: [n_seq] ids, at least one; they are not changed.
    sample: from the logits of the last position, [n_vocab], to the next id; argmax is greedy (sampling.py has more).
    stop_id: ends the sequence when it is drawn; it is not yielded.
    Raises ValueError when inputs is empty or the tokens do not fit into the model's context.
    """
    check_request(inputs, n_tokens_to_generate, params["wpe"].shape[0])
    cache = [KVCache(len(inputs) + n_tokens_to_generate) for _ in params["blocks"]]
    new_ids = inputs  # what the cache has not seen yet: at first the prompt, then the token just made
    for _ in range(n_tokens_to_generate):
        next_id = int(sample(prefill(new_ids, params, n_head, cache)))  # [n_vocab] -> one id
        if next_id == stop_id:
            return
        yield next_id
        new_ids = [next_id]


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """The new ids as a list; the options are those of generate_tokens."""
    return list(generate_tokens(inputs, params, n_head, n_tokens_to_generate, **options))


if __name__ == "__main__":
    from cli.generate import run

    raise SystemExit(run())
