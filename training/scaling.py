"""What a training step takes per device of a mesh: memory, floating-point operations, bytes sent, seconds.

The sharding is that of engines/jax_model.py: along `model` the matrices of the blocks are sharded, and embeddings,
layer norms and logits are on every device; along `data` a batch is sharded. tests/test_scaling.py compares with the
programs that JAX compiles. docs/scaling.md has tables.
"""

import dataclasses
import math

from weights.names import count_params
from weights.releases import HPARAMS

ITEMSIZE = {"float32": 4, "bfloat16": 2}
FLOAT = 4  # bytes of what is float32 with either dtype


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and its network: by default the figures of NVIDIA's data sheets of the H200 and the DGX H200."""

    memory: float = 141  # GB
    tflops: float = 989  # 10^12 operations per second, of dense products in bfloat16
    utilization: float = 0.4  # the part of tflops that a step reaches while it computes
    node_bandwidth: float = 450  # GB/s that a device sends within its node: NVLink 4
    network_bandwidth: float = 50  # GB/s that a device sends to other nodes: 400 Gb/s
    node_size: int = 8  # devices per node


@dataclasses.dataclass(frozen=True)
class Step:
    """One update: n_batches batches on n_data ranks of n_model devices.

    windows: of n_ctx tokens each, per batch and rank.
    """

    hparams: dict
    n_data: int
    n_model: int
    windows: int
    n_batches: int = 1
    dtype: str = "float32"
    remat: bool = False
    shard_optimizer: bool = False

    @property
    def n_local_tokens(self):
        """Tokens per batch and device."""
        return self.windows * self.hparams["n_ctx"]

    @property
    def n_local_params(self):
        """Parameters per device: a shard of c_attn, c_fc and the matrices of c_proj, and all others."""
        n_embd, n_layer = self.hparams["n_embd"], self.hparams["n_layer"]
        n_sharded = n_layer * (12 * n_embd + 7) * n_embd
        return n_sharded // self.n_model + count_params(**self.hparams) - n_sharded


def hparams_near(n_params, n_ctx):
    """Return the shape with about n_params parameters, of GPT-2's sizes and those with GPT-3's proportions.

    From 6.7 billion parameters on, GPT-3 has n_embd = 128 * n_layer, and heads of 128 (Brown et al. 2020, table 2.1).
    """
    gpt3 = [{"n_vocab": 50_257, "n_embd": 128 * n, "n_head": n, "n_layer": n} for n in range(16, 513, 8)]
    shapes = [shape | {"n_ctx": n_ctx} for shape in (*HPARAMS.values(), *gpt3)]
    return min(shapes, key=lambda shape: abs(math.log(count_params(**shape) / n_params)))


def memory(step):
    """Return the bytes per device by purpose. Their sum is what a step takes if all are needed at the same time.

    weights: float32, and with bfloat16 a copy, which remat makes for one block at a time. activations: what the model
    of training/jax_model.py keeps for the backward pass, with remat of one block and the inputs of the others. logits:
    they and their gradient.
    """
    hparams, n_params, itemsize = step.hparams, step.n_local_params, ITEMSIZE[step.dtype]
    n_whole = 1 if step.remat else hparams["n_layer"]  # blocks of which all activations are kept
    per_token = n_whole * block_bytes(step) + (hparams["n_layer"] - n_whole) * FLOAT * hparams["n_embd"]
    return {
        "weights": n_params * (FLOAT if step.remat or itemsize == FLOAT else FLOAT + itemsize),
        "gradients": n_params * FLOAT,
        "moments": n_params * 2 * FLOAT // (step.n_data if step.shard_optimizer else 1),
        "activations": step.n_local_tokens * per_token,
        "logits": step.n_local_tokens * 2 * FLOAT * hparams["n_vocab"],
    }


def block_bytes(step):
    """Return the bytes per token and device that the backward pass of a block needs.

    On every device: the inputs of both layer norms, in float32, and those of c_attn and c_fc. Sharded: q, k, v, the
    inputs of both c_proj and of gelu; in float32 the softmax and its exponentials, too, in whose place bfloat16 has
    flash attention.
    """
    n_embd, itemsize = step.hparams["n_embd"], ITEMSIZE[step.dtype]
    n_scores = 2 * step.hparams["n_head"] * step.hparams["n_ctx"] if step.dtype == "float32" else 0
    sharded = (4 + 2 * 4) * n_embd * itemsize + n_scores * FLOAT
    return 2 * n_embd * FLOAT + 2 * n_embd * itemsize + sharded / step.n_model


def flops(step):
    """Return the floating-point operations of the products of a step, per device.

    As in "PaLM" (Chowdhery et al. 2022, appendix B), 6 per token and parameter of a matrix, a third of them in the
    forward pass, and 12 * n_layer * n_ctx * n_embd for attention, with the scores that the mask discards. Every device
    computes all logits. remat computes the forward pass of a block again, without its last product.
    """
    n_embd, n_ctx = step.hparams["n_embd"], step.hparams["n_ctx"]
    per_layer = (72 + 16 * step.remat) * n_embd**2 + (12 + 4 * step.remat) * n_ctx * n_embd
    per_token = step.hparams["n_layer"] * per_layer / step.n_model + 6 * step.hparams["n_vocab"] * n_embd
    return step.n_batches * step.n_local_tokens * per_token


def reduced(step):
    """Return the bytes per device that all-reduces add up along each axis of the mesh.

    Along model: the results of both c_proj, and the gradients of the inputs of c_attn and c_fc (Shoeybi et al. 2019,
    section 3); with remat, attention's c_proj twice. Along data: the gradients, once per step.
    """
    per_layer = (4 + step.remat) * step.n_batches * step.n_local_tokens * step.hparams["n_embd"] * ITEMSIZE[step.dtype]
    return {
        "model": step.hparams["n_layer"] * per_layer if step.n_model > 1 else 0,
        "data": step.n_local_params * FLOAT if step.n_data > 1 else 0,
    }


def sent(step):
    """Return the bytes that a device sends along each axis: in a ring, 2 (n - 1) / n times what is added up.

    With shard_optimizer, a reduce-scatter of the gradients and an all-gather of the weights send the same.
    """
    n_bytes, sizes = reduced(step), {"model": step.n_model, "data": step.n_data}
    return {axis: 2 * (n - 1) / n * n_bytes[axis] for axis, n in sizes.items()}


def seconds(step, device):
    """Return the seconds that computing and sending take, without overlap and latencies."""
    n_bytes = sent(step)
    return {
        "compute": flops(step) / (1e12 * device.tflops * device.utilization),
        "model": n_bytes["model"] / bandwidth(device, step.n_model, 1),
        "data": n_bytes["data"] / bandwidth(device, step.n_data, step.n_model),
    }


def bandwidth(device, n, stride):
    """Return the bytes per second that a device of a ring sends: n devices, every stride-th of the mesh.

    If the ring leaves the node, those of its devices that are in the same node share their links to other nodes.
    """
    if n * stride <= device.node_size:
        return 1e9 * device.node_bandwidth
    return 1e9 * min(device.node_bandwidth, device.network_bandwidth * max(1, device.node_size // stride))


def limit(step, device):
    """Return what limits the step: memory, compute, or the network along one of the axes."""
    times = seconds(step, device)
    if sum(memory(step).values()) > 1e9 * device.memory:
        return "memory"
    if times["compute"] >= times["model"] + times["data"]:
        return "compute"
    return "network: " + max("model", "data", key=times.get)


if __name__ == "__main__":
    from cli.scaling import run

    raise SystemExit(run())
