"""gpt2.py for training with JAX: dropout, products in bfloat16, rematerialization. Imports jax.

JAX differentiates gpt2.py's own functions, so that no backward pass is written here.
"""

import jax
import jax.numpy as jnp

from engines import jax_model


def training_model(n_head, dropout=0.0, dtype="float32", remat=False, flash=False):
    """Return an instance of gpt2 like engines.jax_model's, with dropout as in fused.training_model.

    dtype: "bfloat16" for mixed precision (Micikevicius et al. 2018): the parameters are float32, the operands and
    results of products are bfloat16; the residual stream, layer norms, softmax and the loss are float32.
    remat: keep only the input of each block, and compute the block again in the backward pass (Chen et al. 2016).
    flash: use cuDNN's flash attention, in bfloat16 without dropout (see takes_flash_attention).
    """
    model = jax_model.jax_model(n_head)
    model.drop, model.cross_entropy = Dropout(dropout), cross_entropy
    # like fused.py's, their backward passes need no more than the result of softmax, and the inputs of the others
    softmax = model.softmax = jax.nn.softmax
    model.gelu, model.layer_norm = jax.checkpoint(model.gelu), jax.checkpoint(model.layer_norm)
    if dtype == "bfloat16":
        model.linear = linear
        model.softmax = lambda x: softmax(x.astype(jnp.float32)).astype(x.dtype)
        if flash and not dropout:
            model.attention = flash_attention
    if dropout:
        for name in ("embed", "softmax", "mha", "ffn"):
            setattr(model, name, model.drop.after(getattr(model, name)))
    if remat:
        model.transformer_block = rematerialized(model.transformer_block)
    return model


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """gpt2.linear in bfloat16; the parameters and their gradients are float32."""
    x, w, b = (jnp.asarray(a, jnp.bfloat16) for a in (x, w, b))
    return x @ w + b


def takes_flash_attention(device, d):
    """Return whether cuDNN has flash attention for this device and heads of size d: NVIDIA's GPUs from Ampere on."""
    if "cuda" not in device.client.platform_version or float(device.compute_capability) < 8:
        return False
    return d % 8 == 0 and d <= 128  # 256 on later ones


def flash_attention(q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
    """gpt2.attention without the scores in memory (Dao 2023, "FlashAttention-2")."""
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # -> [b, n_seq, h, d] each
    x = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return jnp.swapaxes(x, 1, 2)  # [b, n_seq, h, d] -> [b, h, n_seq, d]


class Dropout:
    """Set each element to 0 with probability p and divide the others by 1 - p (Srivastava et al. 2014, section 10)."""

    def __init__(self, p):
        self.p = p

    def seed(self, key):
        """Start with this key of JAX's generator; the masks from now on depend on it alone."""
        self.key, self.n_used = key, 0

    def next_key(self):
        self.n_used += 1
        return jax.random.fold_in(self.key, self.n_used)

    def after(self, function):
        """Return a function that applies dropout to the result of this one."""

        def with_dropout(*args, **kwargs):
            x = function(*args, **kwargs)
            is_kept = jax.random.bernoulli(self.next_key(), 1 - self.p, x.shape)
            return jnp.where(is_kept, x / (1 - self.p), 0)

        return with_dropout


def rematerialized(transformer_block):
    """Return a transformer_block whose inner results are computed again in the backward pass."""

    def block_again(x, n_head, cache=None, **params):
        block = jax.checkpoint(lambda x, params: transformer_block(x, **params, n_head=n_head))
        return block(x, params)

    return block_again


def cross_entropy(logits, targets):  # [..., n_seq, n_vocab], [..., n_seq] -> scalar
    """Return the mean of -log softmax(logits)[target], in nats.

    The targets' logits are taken by a sum, whose gradient is elementwise; that of an index is a scatter.
    """
    logits = logits.astype(jnp.float32)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # -> [..., n_seq, n_vocab]
    of_targets = jnp.sum(logits, axis=-1, where=is_target)  # -> [..., n_seq]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_targets)
