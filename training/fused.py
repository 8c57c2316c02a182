"""gpt2.py for training: the same functions, with dropout between them and hand-written backward passes for some.

autograd.py differentiates gelu operation by operation, each with an array to keep and a pass over memory. Here the
forward pass is still gpt2.gelu, and its backward pass is one function; softmax, layer_norm and the loss likewise. All
process a few rows at a time, so that temporary arrays stay in the processor's cache. docs/backward.md derives the
backward passes.
"""

import math

import numpy as np

import gpt2
from engines.instance import new_instance
from training.autograd import fuse
from training.chunks import chunks


def by_rows(function, *inputs):  # [..., n] -> [..., n]
    """Return function(*inputs), computed a few rows at a time. Each input is [..., n] or [n].

    The function must treat every row independently of the others.
    """
    if inputs[0].ndim == 1:
        return function(*inputs)
    flat = [x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x for x in inputs]
    y = np.empty_like(flat[0])
    for rows in chunks(*y.shape):
        y[rows] = function(*(x[rows] if x.ndim > 1 else x for x in flat))
    return y.reshape(inputs[0].shape)


def gelu_backward(dy, x):  # [..., n], [..., n] -> [..., n]
    c, x2 = math.sqrt(2 / math.pi), x * x
    t = np.tanh(c * x * (1 + 0.044715 * x2))
    return dy * (0.5 * (1 + t) + 0.5 * c * x * (1 - t * t) * (1 + 3 * 0.044715 * x2))


def softmax_backward(dy, y):  # [..., n], [..., n] -> [..., n]
    return y * (dy - np.sum(dy * y, axis=-1, keepdims=True))


def layer_norm_backward(dy, x, g, eps=1e-5):  # [..., n], [..., n], [n] -> [..., n], [n], [n]
    """Return the gradients of x, g and b."""
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx, dg = np.empty_like(flat_x), np.zeros_like(g)
    for rows in chunks(*flat_x.shape):
        x_hat = flat_x[rows] - np.mean(flat_x[rows], axis=-1, keepdims=True)
        scale = 1 / np.sqrt(np.mean(x_hat * x_hat, axis=-1, keepdims=True) + eps)
        x_hat *= scale
        dg += np.sum(flat_dy[rows] * x_hat, axis=0)
        dx_hat = flat_dy[rows] * g
        dx_hat -= np.mean(dx_hat, axis=-1, keepdims=True)
        dx_hat -= x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True)
        dx[rows] = dx_hat * scale
    return dx.reshape(x.shape), dg, np.sum(flat_dy, axis=0)


def token_losses(logits, targets):  # [..., n_seq, n_vocab], [..., n_seq] -> [..., n_seq]
    """Return -log softmax(logits)[target] of every position, in nats."""
    flat, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    losses = np.empty(len(flat), logits.dtype)
    for rows in chunks(*flat.shape):
        z = flat[rows] - np.max(flat[rows], axis=-1, keepdims=True)  # so that exp cannot overflow
        losses[rows] = np.log(np.sum(np.exp(z), axis=-1)) - z[np.arange(len(z)), flat_targets[rows]]
    return losses.reshape(targets.shape)


def mean_loss_backward(logits, targets, dy):  # [..., n_seq, n_vocab], [..., n_seq] -> [..., n_seq, n_vocab]
    """Return the gradient of the logits; dy, a float, is that of the mean of token_losses."""
    flat, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    dx = np.empty_like(flat)
    for rows in chunks(*flat.shape):
        y = gpt2.softmax(flat[rows])
        y[np.arange(len(y)), flat_targets[rows]] -= 1
        dx[rows] = y * (dy / len(flat))
    return dx.reshape(logits.shape)


def mean_of(losses, backward):
    """Return the mean of a function like token_losses as a single operation with a backward pass."""
    return fuse(
        lambda logits, targets: np.mean(losses(logits, targets)),
        lambda dy, y, logits, targets: [backward(logits, targets, float(dy)), None],
    )


cross_entropy = mean_of(token_losses, mean_loss_backward)  # [..., n_seq, n_vocab], [..., n_seq] -> scalar


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """gpt2.linear, with the bias added in place."""
    y = x.reshape(-1, x.shape[-1]) @ w
    y += b
    return y.reshape(*x.shape[:-1], w.shape[-1])


def linear_backward(dy, x, w, b):  # [..., n_out], [..., n_in], [n_in, n_out], [n_out] -> gradients of x, w and b
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = (flat_dy @ w.T).reshape(x.shape)
    in_c_order = w.strides[1] <= w.strides[0]  # so is its gradient, to be added up fast
    dw = flat_x.T @ flat_dy if in_c_order else (flat_dy.T @ flat_x).T
    return dx, dw, np.sum(flat_dy, axis=0) if np.ndim(b) else None


class Dropout:
    """Set each element to 0 with probability p and divide the others by 1 - p (Srivastava et al. 2014, section 10)."""

    def __init__(self, p):
        self.threshold = min(round(p * 2**16), 2**16 - 1)  # 16 random bits per element: p is rounded to 1/65536
        self.scale = 2**16 / (2**16 - self.threshold)
        self.seed(0)

    def seed(self, *seeds):
        """Restart the random generator; the masks from now on depend on these integers alone."""
        self.bits = np.random.SFC64(seeds)

    def mask(self, shape):
        n = math.prod(shape)
        random_bits = self.bits.random_raw(-(-n // 4)).view(np.uint16)[:n]
        return (random_bits >= self.threshold).reshape(shape)

    def after(self, function):
        """Return a function that applies dropout to the result of this one."""
        keep = fuse(lambda x, mask: x * mask * self.scale, lambda dy, y, x, mask: [dy * mask * self.scale, None])

        def with_dropout(*args, **kwargs):
            x = function(*args, **kwargs)
            return keep(x, self.mask(x.shape))

        return with_dropout


def training_model(dropout=0.0):
    """Return a new instance of the module gpt2 whose gelu, softmax and layer_norm have the backward passes above.

    dropout: probability of zeroing an element of the embeddings, of the attention weights, and of what attention and
    ffn add to the residual stream (Radford et al. 2018, section 4.1). `.drop.seed()` restarts its random generator.
    """
    model = new_instance()
    gelu, softmax, layer_norm = model.gelu, model.softmax, model.layer_norm
    model.gelu = fuse(lambda x: by_rows(gelu, x), lambda dy, y, x: [by_rows(gelu_backward, dy, x)])
    model.softmax = fuse(lambda x: by_rows(softmax, x), lambda dy, y, x: [by_rows(softmax_backward, dy, y)])
    model.layer_norm = fuse(
        lambda x, g, b: by_rows(layer_norm, x, g, b), lambda dy, y, x, g, b: layer_norm_backward(dy, x, g)
    )
    model.linear = fuse(linear, lambda dy, y, x, w, b: linear_backward(dy, x, w, b))
    model.cross_entropy = cross_entropy
    model.drop = Dropout(dropout)
    if dropout:
        for name in ("embed", "softmax", "mha", "ffn"):
            setattr(model, name, model.drop.after(getattr(model, name)))
    return model
