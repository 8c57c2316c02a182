"""gpt2.py on JAX: an instance of the module whose np is jax.numpy, and its weights on a mesh of devices.

The mesh has two axes (Shoeybi et al. 2019, "Megatron-LM", section 3). Along `model` the layers are sharded by heads and
hidden units: c_attn and c_fc by columns, c_proj by rows, so that a block needs two all-reduces. Along `data` a batch is
sharded by rows. Embeddings and layer norms are on every device: 50257 tokens are a multiple of 29 and 1733 only.
Imports jax, so nothing but --engine jax may import it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engines.instance import new_instance
from weights.errors import UserError
from weights.resources import check_memory

BY_COLUMNS = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
SHARDED = {"c_attn": BY_COLUMNS, "c_fc": BY_COLUMNS, "c_proj": {"w": PartitionSpec("model")}}


def jax_model(n_head, dtype="float32"):
    """Return an instance of gpt2 for arrays of JAX, whose c_attn has its columns in the order of by_head.

    dtype: that of the weights. With "bfloat16" the operands of products are bfloat16, and everything else is float32.
    The caller checks sizes, because a traced number cannot be compared.
    """
    model = new_instance()
    model.np, model.check_context = Numpy(n_head), lambda *_, **__: None
    if dtype != "float32":
        model.linear, model.attention = linear, lambda q, k, v: causal_attention(*(a.astype(dtype) for a in (q, k, v)))
    return model


class Numpy:
    """jax.numpy, except that split() takes the columns of by_head apart."""

    def __init__(self, n_head):
        self.n_head = n_head

    def __getattr__(self, name):
        return getattr(jnp, name)

    def split(self, x, n_parts, axis):  # [..., n] -> [..., n/n_parts] each
        """Return q, k and v of all heads. A shard of x that has whole heads gives shards that have the same heads."""
        heads = x.reshape(*x.shape[:-1], self.n_head, n_parts, -1)  # [..., n] -> [..., h, n_parts, d]
        return tuple(heads[..., i, :].reshape(*x.shape[:-1], -1) for i in range(n_parts))


def by_head(w, n_head):  # [..., n] -> [..., n]
    """Order the columns of c_attn, which are q of all heads, then k, then v, by head: q, k and v of each in turn."""
    return w.reshape(*w.shape[:-1], 3, n_head, -1).swapaxes(-3, -2).reshape(w.shape)


def by_part(w, n_head):  # [..., n] -> [..., n]
    """The inverse of by_head."""
    return w.reshape(*w.shape[:-1], n_head, 3, -1).swapaxes(-3, -2).reshape(w.shape)


# The functions that differ from gpt2.py's


def product(x, w):  # [..., n, m], [..., m, p] -> [..., n, p]
    """Multiply in the type of w; the sums are float32."""
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """gpt2.linear."""
    return product(x, w) + b


def masked_attention(q, k, v, is_visible):  # [b, h, n_q, d], [b, h, n_k, d], [b, h, n_k, d] -> [b, h, n_q, d]
    """gpt2.attention of queries to the keys that are visible to them, which broadcasts to [b, h, n_q, n_k]."""
    scores = product(q * q.shape[-1] ** -0.5, jnp.swapaxes(k, -1, -2))  # -> [b, h, n_q, n_k]
    return product(jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf)), v)


def causal_attention(q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
    """gpt2.attention within sequences."""
    return masked_attention(q, k, v, jnp.tri(q.shape[-2], dtype=bool))


class KVCache:
    """gpt2.KVCache of fixed shape: k and v are [b, h, n_max, d]; row i uses n_past[i] of their positions.

    n_past: [b, 1]. A call of gpt2() replaces k and v, and leaves n_past to the caller.
    """

    def __init__(self, k, v, n_past):
        self.k, self.v, self.n_past = k, v, n_past

    def attend(self, q, k, v):  # [b, h, n_seq, d], [b, h, n_seq, d], [b, h, n_seq, d] -> [b, h, n_seq, d]
        """Write k and v after the n_past positions of each row, then attend from q to the positions up to its own."""
        self.k, self.v = (write(old, new, self.n_past) for old, new in ((self.k, k), (self.v, v)))
        positions = self.n_past + jnp.arange(q.shape[-2])  # -> [b, n_seq]
        is_visible = jnp.arange(self.k.shape[-2]) <= positions[:, None, :, None]  # -> [b, 1, n_seq, n_max]
        return masked_attention(q, self.k, self.v, is_visible)


def write(cached, new, n_past):  # [b, h, n_max, d], [b, h, n_seq, d], [b, 1] -> [b, h, n_max, d]
    """Return cached with new in place of the n_seq positions after the first n_past of each row."""
    new = new.astype(cached.dtype)
    if new.shape == cached.shape:  # n_past can only be 0
        return new
    write_row = lambda row, x, i: jax.lax.dynamic_update_slice_in_dim(row, x, i, axis=1)  # noqa: E731
    return jax.vmap(write_row)(cached, new, n_past[:, 0])


def token_losses(logits, targets):  # [b, n_seq, n_vocab], [b, n_seq] -> [b, n_seq]
    """Return -log softmax(logits)[target] of every position, in nats.

    The targets' logits are a sum, whose gradient is elementwise; that of an index would be a scatter, slow on GPUs.
    """
    logits = logits.astype(jnp.float32)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # -> [b, n_seq, n_vocab]
    of_targets = jnp.sum(logits, axis=-1, where=is_target)  # -> [b, n_seq]
    return jax.nn.logsumexp(logits, axis=-1) - of_targets


# The devices


def make_mesh(params, n_head, shape=None):
    """Return a mesh of shape (data, model); None: of all devices, as many as possible along `model`.

    Raises UserError if there are too few devices, or if the heads or the hidden units do not divide by `model`.
    """
    devices, n_hidden = jax.devices(), params["blocks"][0]["mlp"]["c_fc"]["w"].shape[1]
    divisible = math.gcd(n_head, n_hidden)  # the numbers that divide both divide this one
    if shape is None:
        n_model = math.gcd(len(devices), divisible)
        shape = len(devices) // n_model, n_model
    n_devices, n_model = math.prod(shape), shape[1]
    if n_devices > len(devices) or (jax.process_count() > 1 and n_devices < len(devices)):
        problem = "too few" if n_devices > len(devices) else "all of which several processes use"
        raise UserError(
            f"--devices {shape[0]}x{n_model} takes {n_devices} devices; JAX finds {len(devices)} "
            f"({devices[0].platform}), {problem}; set --devices to {len(devices)} or leave it out"
        )
    if divisible % n_model:
        usable = ", ".join(f"1x{n}" for n in range(1, divisible + 1) if divisible % n == 0)
        raise UserError(
            f"{n_head} heads and {n_hidden} hidden units do not divide by {n_model} devices; set --devices to one of "
            f"{usable}, or to {n_devices}x1, which shards batches only"
        )
    return Mesh(np.array(devices[:n_devices]).reshape(shape), ("data", "model"))


def layer_and_name(path):
    """Return the last two names of a tensor's path in the nested params: ("c_attn", "w"), or ("", "wte")."""
    return ["", *(key.key for key in path if isinstance(key, jax.tree_util.DictKey))][-2:]


def shardings(params, mesh, over_data=False):
    """Return the NamedSharding of each of the params, nested like them.

    over_data: shard along `data`, too, as ZeRO does with the optimizer's state (Rajbhandari et al. 2020, section 5.1).
    """

    def of_tensor(path, tensor):
        layer, name = layer_and_name(path)
        spec = SHARDED.get(layer, {}).get(name, PartitionSpec())
        return NamedSharding(mesh, with_data(spec, tensor.shape, mesh.shape["data"]) if over_data else spec)

    return jax.tree_util.tree_map_with_path(of_tensor, params)


def with_data(spec, shape, n_data):
    """Return a PartitionSpec with `data` for the largest axis that is not sharded and divides by n_data, if any."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % n_data == 0]
    if free:
        axes[max(free, key=lambda i: shape[i])] = "data"
    return PartitionSpec(*axes)


def sharded(params, n_head, mesh, dtype="float32", over_data=False):
    """Return the params in the layout of jax_model(n_head, dtype), on the devices of the mesh (see shardings)."""
    if mesh.devices.flat[0].platform == "cpu":
        n_bytes = sum(x.size for x in jax.tree.leaves(params)) * jnp.dtype(dtype).itemsize
        n_copies = mesh.local_mesh.shape["data"]  # of most of the weights
        check_memory(f"a copy of the weights in {dtype}", n_copies * n_bytes, "leave out --engine jax")

    def put(path, tensor, sharding):
        layer, name = layer_and_name(path)
        tensor = by_head(tensor, n_head) if layer == "c_attn" else tensor
        tensor = tensor.astype(dtype) if name in ("w", "wte") else tensor
        return jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])

    return jax.tree_util.tree_map_with_path(put, params, shardings(params, mesh, over_data))
