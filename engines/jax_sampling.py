"""sampling.py on the device: the same options, for the logits of a batch. Imports jax.

Sums of probabilities are float32 here, so that top-p may keep a token more or less where they are within 1e-6 of p.
"""

import secrets

import jax
import jax.numpy as jnp
import numpy as np


class Sampler:
    """The arguments of sampling.make_sampler as choose() takes them.

    key: the data of jax.random.key(seed), of the lowest 64 bits of the seed; random if there is no seed.
    """

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=None):
        seed = secrets.randbits(64) if seed is None else seed
        self.key = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
        self.options = {"temperature": None, "top_k": 0, "top_p": None}
        if temperature > 0:
            limits = np.finfo(np.float32)
            temperature = np.float32(np.clip(temperature, limits.tiny, limits.max))
            self.options = {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": np.float32(top_p) if top_p < 1 else None,
            }


def choose(logits, keys, positions, temperature, top_k, top_p):  # [b, n_vocab], [b, 2], [b] -> [b]
    """Choose a token per row: the first most likely one if temperature is None, else a sample.

    The randomness of a row depends only on its key and on the position of the token.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # [b, n_vocab] -> [b, n_vocab]
    scores = keep_top_p(keep_top_k(scores, top_k), top_p)  # -> [b, n_vocab]
    sample = lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row)  # noqa: E731
    return jax.vmap(sample)(jax.random.wrap_key_data(keys, impl="threefry2x32"), positions, scores)


def keep_top_k(scores, k):  # [b, n_vocab] -> [b, n_vocab]
    """Set all but the k largest scores, and those that equal the last of them, to -inf; k = 0 keeps all."""
    if not 0 < k < scores.shape[-1]:
        return scores
    return jnp.where(scores >= jax.lax.top_k(scores, k)[0][:, -1:], scores, -jnp.inf)


def keep_top_p(scores, p):  # [b, n_vocab] -> [b, n_vocab]
    """Set all but the fewest most likely tokens whose probabilities reach p, ties included, to -inf; None keeps all."""
    if p is None:
        return scores
    descending = jnp.sort(scores, descending=True)  # [b, n_vocab] -> [b, n_vocab]
    n_before = jnp.sum(jnp.cumsum(jax.nn.softmax(descending), axis=-1) < p, axis=-1, keepdims=True)  # -> [b, 1]
    last = jnp.take_along_axis(descending, jnp.minimum(n_before, scores.shape[-1] - 1), axis=-1)  # -> [b, 1]
    return jnp.where(scores >= last, scores, -jnp.inf)
