"""The compiled counterparts of functions in fused.py and adamw.py, with their backward passes, for float32 arrays.

Each kernel runs in the thread that calls it, without Python's global lock, so that the shards of a batch run at the
same time. The functions have the names and arguments of those they replace. docs/backward.md derives the backward
passes.
"""

import math

import numpy as np
from numba import njit

from engines.kernels import activate, mean_and_scale, narrow_columns, normalize, product_of_columns, softmax
from engines.vectors import LANES, exp, fma, kernel, largest, load, maximum, splat, store, total, zero
from training import fused
from training.autograd import fuse

BLOCK = 32  # queries whose attention weights are in the processor's cache at a time


def flat(x):  # [..., n] -> [rows, n]
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


# gelu


def gelu(x):  # [..., n] -> [..., n]
    y = np.empty(x.shape, np.float32)
    activate(np.ascontiguousarray(x).reshape(-1), y.reshape(-1))
    return y


@kernel()
def activate_backward(dy, x, dx):  # [n], [n] -> dx: [n]
    """With s = 1 / (1 + exp(-2 u)), 1 + tanh(u) is 2 s and 1 - tanh(u)**2 is 4 s (1 - s)."""
    c, one = math.sqrt(2 / math.pi), splat(1.0)
    for i in range(0, x.size, LANES):
        v = load(x, i)
        x2 = v * v
        s = one / (one + exp(v * fma(x2, splat(-2 * c * 0.044715), splat(-2 * c))))
        slope = fma(x2, splat(2 * c * 3 * 0.044715), splat(2 * c)) * (one - s)
        store(dx, i, load(dy, i) * s * fma(v, slope, one))


def gelu_backward(dy, x):  # [..., n], [..., n] -> [..., n]
    dx = np.empty(x.shape, np.float32)
    activate_backward(np.ascontiguousarray(dy).reshape(-1), np.ascontiguousarray(x).reshape(-1), dx.reshape(-1))
    return dx


# layer_norm


def layer_norm(x, g, b, eps=1e-5):  # [..., n], [n], [n] -> [..., n]
    y = np.empty(x.shape, np.float32)
    normalize(flat(x), g, b, eps, flat(y))
    return y


@kernel()
def normalize_backward(dy, x, g, eps, dx, dg, db):  # [rows, n], [rows, n], [n] -> dx: [rows, n], dg: [n], db: [n]
    """Write the gradient of x, and add those of g and b to dg and db."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        mean, scale = mean_and_scale(x, i, eps)
        shift = stretch = zero()
        for k in range(0, n, LANES):
            z, y = (load(x, (i, k)) - mean) * scale, load(dy, (i, k))
            store(dg, k, fma(y, z, load(dg, k)))
            store(db, k, load(db, k) + y)
            dz = y * load(g, k)
            shift, stretch = shift + dz, fma(dz, z, stretch)
        shift, stretch = splat(total(shift) / n), splat(total(stretch) / n)
        for k in range(0, n, LANES):
            z = (load(x, (i, k)) - mean) * scale
            store(dx, (i, k), (load(dy, (i, k)) * load(g, k) - shift - z * stretch) * scale)


def layer_norm_backward(dy, x, g, eps=1e-5):  # [..., n], [..., n], [n] -> [..., n], [n], [n]
    dx, dg, db = np.empty(x.shape, np.float32), np.zeros_like(g), np.zeros_like(g)
    normalize_backward(flat(dy), flat(x), g, eps, flat(dx), dg, db)
    return dx, dg, db


# Attention


pair_of_columns = product_of_columns(2)
ONES = np.ones(2 * LANES, np.float32)


@njit
def add_product(a, b, c):  # [m, k], [k, n] -> c: [m, n]
    """Add a @ b to c; n is a multiple of LANES."""
    n = b.shape[1]
    for j in range(0, n - LANES, 2 * LANES):
        pair_of_columns(a, b[:, j:], ONES, c[:, j:])
    if n % (2 * LANES):
        narrow_columns(a, b[:, n - LANES :], ONES, c[:, n - LANES :])


@njit
def padded(n):
    """Return n, rounded up to a multiple of LANES."""
    return -(-n // LANES) * LANES


@njit
def transposed(a):  # [n, d] -> [d, n rounded up]
    t = np.zeros((a.shape[1], padded(a.shape[0])), np.float32)
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            t[j, i] = a[i, j]
    return t


@njit
def attention_weights(q, keys, first, p):  # [block, d], [d, n_keys] -> p: [block, n_keys]
    """Write the attention weights of queries at the positions from `first` on; keys has one key per column."""
    p[:] = 0
    add_product(q, keys[:, : p.shape[1]], p)
    for t in range(p.shape[0]):
        softmax(p[t], first + t + 1, q.shape[1] ** -0.5)


@njit
def drop(p, mask, first, scale):
    """Apply dropout to the weights of queries from position `first` on; a mask without rows keeps all."""
    if len(mask):
        for t in range(p.shape[0]):
            for j in range(0, p.shape[1], LANES):
                store(p, (t, j), load(p, (t, j)) * load(mask, (first + t, j)) * splat(scale))


@njit
def head_forward(q, k, v, mask, scale, y):  # [n, d], [n, d], [n, d], [n, n'] -> y: [n, d]
    n, keys = q.shape[0], transposed(k)
    blocks = np.empty((BLOCK, keys.shape[1]), np.float32)
    for i in range(0, n, BLOCK):
        stop = min(i + BLOCK, n)
        p = blocks[: stop - i, : padded(stop)]  # keys after `stop` have no weight
        attention_weights(q[i:stop], keys, i, p)
        drop(p, mask, i, scale)
        add_product(p[:, :stop], v[:stop], y[i:stop])


@njit
def head_backward(dy, q, k, v, mask, scale, dq, dk, dv):  # [n, d] * 4, [n, n] -> dq, dk, dv: [n, d] each
    n, d = q.shape
    keys, values = transposed(k), transposed(v)
    blocks = np.empty((3, BLOCK, keys.shape[1]), np.float32)
    for i in range(0, n, BLOCK):
        stop = min(i + BLOCK, n)
        block = blocks[:, : stop - i, : padded(stop)]
        p, dropped, ds = block[0], block[1], block[2]
        attention_weights(q[i:stop], keys, i, p)
        dropped[:] = p
        drop(dropped, mask, i, scale)
        add_product(dropped[:, :stop].T, dy[i:stop], dv[:stop])
        ds[:] = 0
        add_product(dy[i:stop], values[:, : padded(stop)], ds)
        drop(ds, mask, i, scale)
        for t in range(stop - i):
            s = zero()
            for j in range(0, p.shape[1], LANES):
                s = fma(load(p, (t, j)), load(ds, (t, j)), s)
            s = splat(total(s))
            for j in range(0, p.shape[1], LANES):
                store(ds, (t, j), load(p, (t, j)) * (load(ds, (t, j)) - s) * splat(d**-0.5))
        add_product(ds[:, :stop], k[:stop], dq[i:stop])
        add_product(ds[:, :stop].T, q[i:stop], dk[:stop])


@kernel()
def attend(q, k, v, mask, scale, y):  # [batch, n_head, n, d] * 3, [batch, n_head, n, n] -> y: [batch, n_head, n, d]
    """Add the attention of all heads to y. The mask of dropout is [batch, n_head, 0, 0] without dropout."""
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            head_forward(q[i, h], k[i, h], v[i, h], mask[i, h], scale, y[i, h])


@kernel()
def attend_backward(dy, q, k, v, mask, scale, dq, dk, dv):
    """Add the gradients of q, k and v to dq, dk and dv."""
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            head_backward(
                dy[i, h], q[i, h], k[i, h], v[i, h], mask[i, h], scale, dq[i, h], dk[i, h], dv[i, h]
            )  # fmt: skip


def batches(*arrays):  # [..., n_head, n, d] -> [batch, n_head, n, d] each
    with_last = (a if a.strides[-1] == a.itemsize else np.ascontiguousarray(a) for a in arrays)  # contiguous
    return [a.reshape(math.prod(a.shape[:-3]), *a.shape[-3:]) for a in with_last]


def attention(q, k, v, mask, scale):  # [..., n_head, n, d] * 3, [..., n_head, n, n] -> [..., n_head, n, d]
    """gpt2.attention of n positions over themselves, with dropout of the attention weights."""
    *lead, n_head, n, d = q.shape
    y = np.zeros((*lead, n, n_head, d), np.float32).swapaxes(-2, -3)
    attend(*batches(q, k, v, mask), scale, *batches(y))
    return y


def attention_backward(dy, q, k, v, mask, scale):
    """Return the gradients of q, k and v, which have the shape of dy.

    The weights are computed again, so that they need not be kept.
    """
    *lead, n_head, n, d = q.shape
    dx = np.zeros((3, *lead, n, n_head, d), np.float32).swapaxes(-2, -3)
    attend_backward(*batches(dy, q, k, v, mask), scale, *batches(*dx))
    return tuple(dx)


# Loss


@njit
def exp_sum(x, i):
    """Return the largest element m of row i and the sum of exp(x - m)."""
    n = x.shape[1]
    whole = n - n % LANES
    highest, s = splat(-math.inf), zero()
    for j in range(0, whole, LANES):
        highest = maximum(load(x, (i, j)), highest)
    m = largest(highest)
    for j in range(whole, n):
        m = max(m, x[i, j])
    for j in range(0, whole, LANES):
        s = s + exp(load(x, (i, j)) - splat(m))
    rest = total(s)
    for j in range(whole, n):
        rest += math.exp(x[i, j] - m)
    return m, rest


@kernel()
def row_losses(x, targets, losses):  # [rows, n], [rows] -> losses: [rows]
    for i in range(x.shape[0]):
        m, s = exp_sum(x, i)
        losses[i] = math.log(s) - (x[i, targets[i]] - m)


def token_losses(logits, targets):  # [..., n_seq, n_vocab], [..., n_seq] -> [..., n_seq]
    if targets.size and not 0 <= targets.min() <= targets.max() < logits.shape[-1]:
        raise IndexError(f"a target is not one of the {logits.shape[-1]} tokens of the vocabulary")
    losses = np.empty(targets.shape, np.float32)
    row_losses(flat(logits), np.ascontiguousarray(targets).reshape(-1), losses.reshape(-1))
    return losses


@kernel()
def row_losses_backward(x, targets, dy, dx):  # [rows, n], [rows] -> dx: [rows, n]
    n = x.shape[1]
    whole = n - n % LANES
    for i in range(x.shape[0]):
        m, s = exp_sum(x, i)
        scale = dy / s
        for j in range(0, whole, LANES):
            store(dx, (i, j), exp(load(x, (i, j)) - splat(m)) * splat(scale))
        for j in range(whole, n):
            dx[i, j] = math.exp(x[i, j] - m) * scale
        dx[i, targets[i]] -= dy


def mean_loss_backward(logits, targets, dy):  # [..., n_seq, n_vocab], [..., n_seq] -> [..., n_seq, n_vocab]
    dx = np.empty(logits.shape, np.float32)
    row_losses_backward(flat(logits), np.ascontiguousarray(targets).reshape(-1), dy / targets.size, flat(dx))
    return dx


# AdamW


@kernel()
def adamw_pass(w, g, m, v, beta1, rest1, beta2, rest2, scale, root, eps, decay, step_size):  # [n] * 4
    for i in range(w.size):
        m[i] = m[i] * beta1 + g[i] * rest1
        x = g[i] * scale
        v[i] = v[i] * beta2 + x * x * rest2
        w[i] = w[i] * decay - np.divide(m[i], np.sqrt(v[i]) * root + eps) * step_size


def adamw(w, g, m, v, beta1, beta2, eps, scale, decay, step_size, root):  # [n], [n], [n], [n]
    """The function of the same name in adamw.py in one pass over memory, with the same bits."""
    constants = beta1, scale * (1 - beta1), beta2, 1 - beta2, scale, 1 / root, eps, decay, step_size
    adamw_pass(w, g, m, v, *map(w.dtype.type, constants))


# The model


def training_model(dropout=0.0):
    """Return fused.training_model(dropout) with compiled functions.

    They run where the arrays are float32 and the last axis is a multiple of LANES, else those of fused.py.
    """
    model = fused.training_model(dropout)
    drop = model.drop
    scale = np.float32(drop.scale)
    model.gelu = select(fuse(gelu, lambda dy, y, x: [gelu_backward(dy, x)]), model.gelu)
    model.layer_norm = select(fuse(layer_norm, lambda dy, y, x, g, b: layer_norm_backward(dy, x, g)), model.layer_norm)
    fused_attention = fuse(
        lambda q, k, v, mask: attention(q, k, v, mask, scale),
        lambda dy, y, q, k, v, mask: [*attention_backward(dy, q, k, v, mask, scale), None],
    )

    def with_mask(q, k, v):
        n = q.shape[-2] if dropout else 0
        mask = drop.mask((*q.shape[:-2], n, n)).view(np.int8)
        if n % LANES:  # the kernel reads whole vectors
            mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -n % LANES)])
        return fused_attention(q, k, v, mask)

    model.attention = select(with_mask, model.attention)
    model.cross_entropy = select(fused.mean_of(token_losses, mean_loss_backward), model.cross_entropy, multiple=1)
    return model


def select(compiled, otherwise, multiple=LANES):
    """Return a function that calls `compiled` if its first argument is float32 and its last axis such a multiple."""

    def function(x, *args, **kwargs):
        fits = x.dtype == np.float32 and x.shape[-1] % multiple == 0
        return (compiled if fits else otherwise)(x, *args, **kwargs)

    return function
