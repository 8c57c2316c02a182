"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") in plain NumPy.

After Jay Mody's picoGPT. Each function uses only what is above it. Parameters are nested dicts whose keys are the names
in OpenAI's checkpoint, passed on as keyword arguments: `f(x, **params)`. Comments give the shapes of operands and
results; `...` means any leading axes. All arrays are float32: constants are Python floats, as a NumPy float64 scalar
would promote the result.
"""

import math

import numpy as np


def gelu(x):  # [..., n] -> [..., n]
    """Gaussian error linear unit, tanh approximation (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):  # [..., n] -> [..., n]
    """Turn scores into probabilities along the last axis. Subtracting the maximum prevents overflow."""
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))  # [..., n] -> [..., n]
    exp_x /= np.sum(exp_x, axis=-1, keepdims=True)
    return exp_x


def layer_norm(x, g, b, eps=1e-5):  # [..., n], [n], [n] -> [..., n]
    """Normalize the last axis to mean 0 and variance 1, then apply gain g and bias b (Ba et al. 2016, section 3.1)."""
    x = x - np.mean(x, axis=-1, keepdims=True)  # [..., n] -> [..., n]
    variance = np.mean(x * x, axis=-1, keepdims=True)  # [..., n] -> [..., 1]
    return x / np.sqrt(variance + eps) * g + b


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """Affine map. The leading axes are merged into one, so that w is read once for a whole batch."""
    y = x.reshape(-1, x.shape[-1]) @ w + b  # [..., n_in] -> [rows, n_out]
    return y.reshape(*x.shape[:-1], w.shape[-1])


def ffn(x, c_fc, c_proj):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""
    a = gelu(linear(x, **c_fc))  # [..., n_seq, n_embd] -> [..., n_seq, 4*n_embd]
    return linear(a, **c_proj)


def attention(q, k, v):  # [..., n_q, d], [..., n_k, d], [..., n_k, d] -> [..., n_q, d]
    """Causal scaled dot-product attention (Vaswani et al. 2017, eq. 1) of the last n_q positions over all n_k."""
    n_q, n_k = q.shape[-2], k.shape[-2]
    scores = (q * q.shape[-1] ** -0.5) @ np.swapaxes(k, -1, -2)  # [..., n_q, d], [..., d, n_k] -> [..., n_q, n_k]
    if n_q > 1:  # a single query belongs to the last position, which may attend to every key
        scores += (1 - np.tri(n_q, n_k, n_k - n_q, dtype=q.dtype)) * -1e10
    return softmax(scores) @ v


def split_heads(x, n_head):  # [..., n_seq, n_embd] -> [..., n_head, n_seq, n_embd/n_head]
    """Split the last axis into heads."""
    return np.swapaxes(x.reshape(*x.shape[:-1], n_head, -1), -2, -3)


def mha(x, c_attn, c_proj, n_head, cache=None):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2). With a cache, x holds the new positions only."""
    x = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3*n_embd]
    q, k, v = np.split(x, 3, axis=-1)  # [..., n_seq, 3*n_embd] -> [..., n_seq, n_embd] each
    q, k, v = (split_heads(a, n_head) for a in (q, k, v))  # -> [..., n_head, n_seq, n_embd/n_head] each
    attend = attention if cache is None else cache.attend
    x = np.swapaxes(attend(q, k, v), -2, -3)  # [..., n_head, n_seq, d] -> [..., n_seq, n_head, d]
    x = x.reshape(*x.shape[:-2], -1)  # [..., n_seq, n_head, d] -> [..., n_seq, n_head*d]
    return linear(x, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache=None):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """Self-attention, then the feed-forward network, each on normalized input and added to x (pre-norm residuals)."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache)  # -> [..., n_seq, n_embd]
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # -> [..., n_seq, n_embd]


def check_context(n_past, n_new, n_ctx):
    """Raise ValueError unless n_new tokens fit into a context (or a cache) of n_ctx tokens, after n_past others."""
    if n_past + n_new > n_ctx:
        raise ValueError(f"{n_past} tokens + {n_new} more = {n_past + n_new}, more than the context of {n_ctx}")


def embed(inputs, wte, wpe, n_past=0):  # [..., n_seq] -> [..., n_seq, n_embd]
    """Token embeddings plus position embeddings. n_past: tokens before inputs, or before each row or token."""
    n_seq = inputs.shape[-1]
    positions = n_past + np.arange(n_seq)  # -> [n_seq] or [batch, n_seq]
    check_context(np.max(positions) + 1 - n_seq if np.ndim(n_past) else n_past, n_seq, n_ctx=wpe.shape[0])
    return wte[inputs] + wpe[positions]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, last_only=False):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """Token ids to logits: row i scores every token of the vocabulary as the successor of inputs[..., : i+1].

    cache: a list of one KVCache per block, to which these positions are appended; the next call continues after them.
    last_only: compute the logits of the last position only, [..., n_seq] -> [..., 1, n_vocab].
    Raises ValueError if the positions exceed the context, n_ctx = len(wpe).
    """
    inputs = np.asarray(inputs, dtype=int)  # -> [..., n_seq]
    x = embed(inputs, wte, wpe, n_past=cache[0].n_past if cache else 0)  # [..., n_seq] -> [..., n_seq, n_embd]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, cache=cache[i] if cache else None)
    x = layer_norm(x[..., -1:, :] if last_only else x, **ln_f)
    return linear(x, wte.T, 0)  # tied weights: the token embedding again, [..., n_seq, n_embd] -> [..., n_seq, n_vocab]


class KVCache:
    """The keys and values of one block: n_past positions so far, at most n_max. Lowering n_past discards the newest."""

    def __init__(self, n_max):
        self.n_max, self.n_past, self.k, self.v = n_max, 0, None, None

    def append(self, k, v):  # [..., n_seq, d], [..., n_seq, d] -> [..., n_past+n_seq, d] each
        """Append k and v; return views of all keys and values."""
        *lead, n_seq, d = k.shape
        check_context(self.n_past, n_seq, self.n_max)
        if self.k is None:
            self.k = np.swapaxes(np.empty((*lead, d, self.n_max), k.dtype), -1, -2)  # q @ k.T reads contiguous rows
            self.v = np.empty((*lead, self.n_max, d), v.dtype)
        n_past, n_k = self.n_past, self.n_past + n_seq
        self.k[..., n_past:n_k, :], self.v[..., n_past:n_k, :] = k, v
        self.n_past = n_k
        return self.k[..., :n_k, :], self.v[..., :n_k, :]

    def attend(self, q, k, v):  # [..., n_seq, d], [..., n_seq, d], [..., n_seq, d] -> [..., n_seq, d]
        """Append k and v, then attend from the new positions q to all positions."""
        return attention(q, *self.append(k, v))


PREFILL_CHUNK = 256  # prompt tokens per pass: limits memory, and skips most of the scores that the mask discards


def prefill(ids, params, n_head, cache):  # [n_seq] -> [n_vocab]
    """Append ids, a prompt or a new token, to the cache in chunks; return the logits of the last position."""
    if len(ids) == 0:
        raise ValueError("the prompt is empty; generation starts from at least one token")
    for i in range(0, len(ids), PREFILL_CHUNK):
        logits = gpt2(ids[i : i + PREFILL_CHUNK], **params, n_head=n_head, cache=cache, last_only=True)
    return logits[-1]  # [1, n_vocab] -> [n_vocab]


def choose(logits, sample):  # [n_vocab] -> one id
    """Return the token id that sample chooses; raise FloatingPointError if a logit is NaN or infinite."""
    if not np.all(np.isfinite(logits)):
        raise FloatingPointError("the logits are not finite")
    return int(sample(logits))


def generate_tokens(inputs, params, n_head, n_tokens_to_generate, sample=np.argmax, stop_id=None):
    """Yield new token ids one by one.

    inputs: the prompt, [n_seq] token ids, at least one; not modified.
    sample: function from the logits of the last position, [n_vocab], to a token id; argmax is greedy (see sampling.py).
    stop_id: generation ends when this id is sampled; it is not yielded.
    Raises ValueError if inputs and the new tokens exceed the context, or if inputs is empty and a token is to be
    generated; FloatingPointError if the weights are damaged, so that logits are NaN or infinite.
    """
    check_context(len(inputs), n_tokens_to_generate, n_ctx=params["wpe"].shape[0])
    cache = [KVCache(len(inputs) + n_tokens_to_generate) for _ in params["blocks"]]
    new_ids = inputs  # the tokens that are not in the cache yet
    for _ in range(n_tokens_to_generate):
        next_id = choose(prefill(new_ids, params, n_head, cache), sample)  # [n_vocab] -> one id
        if next_id == stop_id:
            return
        yield next_id
        new_ids = [next_id]


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """Return the new token ids as a list; the options are those of generate_tokens."""
    return list(generate_tokens(inputs, params, n_head, n_tokens_to_generate, **options))


if __name__ == "__main__":
    from cli.generate import run

    raise SystemExit(run())
