"""AdamW (Loshchilov & Hutter 2019, algorithm 2), the global norm of gradients, and the learning rate schedule."""

import math

import numpy as np

from training.chunks import chunks


def is_matrix(p):
    return p.ndim > 1


def adamw(w, g, m, v, beta1, beta2, eps, scale, decay, step_size, root):  # [n], [n], [n], [n]
    """Update w, m and v, chunk by chunk and with one scratch array; see AdamW.update_tensor."""
    for chunk in chunks(w.size, scale=2):  # there is only one temporary array
        update_chunk(w[chunk], g[chunk], m[chunk], v[chunk], beta1, beta2, eps, scale, decay, step_size, root)


def update_chunk(w, g, m, v, beta1, beta2, eps, scale, decay, step_size, root):  # [n], [n], [n], [n]
    scratch = g * (scale * (1 - beta1))
    m *= beta1
    m += scratch
    np.multiply(g, scale, out=scratch)
    scratch *= scratch
    scratch *= 1 - beta2
    v *= beta2
    v += scratch
    np.sqrt(v, out=scratch)
    scratch *= 1 / root
    scratch += eps
    np.divide(m, scratch, out=scratch)
    scratch *= step_size
    w *= decay
    w -= scratch


class AdamW:
    """Adam with decoupled weight decay. It updates float32 arrays in place.

    tensors: dict of arrays by name. decays: predicate, whether weight decay applies to an array; by default it
    applies to matrices, not to biases and layer norms (Radford et al. 2018, section 4.1). m, v: dicts of the first and
    second moments. step: number of updates made, for bias correction.
    Raises ValueError for a tensor that is not contiguous, because reshape(-1) would return a copy instead of a view.
    """

    def __init__(self, tensors, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decays=is_matrix):
        if scattered := [name for name, p in tensors.items() if not p.flags.c_contiguous]:
            raise ValueError(f"not contiguous in memory: {', '.join(scattered)}; pass np.ascontiguousarray of it")
        self.tensors, self.beta1, self.beta2, self.eps = tensors, beta1, beta2, eps
        self.weight_decay = {name: weight_decay * decays(p) for name, p in tensors.items()}
        self.m = {name: np.zeros_like(p) for name, p in tensors.items()}
        self.v = {name: np.zeros_like(p) for name, p in tensors.items()}
        self.step, self.adamw = 0, adamw

    def load_moments(self, m, v, step):
        """Continue from copies of the moments, dicts by tensor name, after this number of updates."""
        for name in self.tensors:
            self.m[name][...], self.v[name][...] = m[name], v[name]
        self.step = step

    def update(self, gradients, learning_rate, scale=1.0, parallel_map=map):
        """Make one step with gradients, a dict of arrays by name, each multiplied by scale.

        parallel_map: the map of a thread pool updates several tensors at a time.
        """
        self.step += 1
        largest_first = sorted(self.tensors, key=lambda name: -self.tensors[name].size)
        list(parallel_map(lambda name: self.update_tensor(name, gradients[name], learning_rate, scale), largest_first))

    def update_tensor(self, name, gradient, learning_rate, scale):
        """Compute, where t is the step and g = scale * gradient:

        m = beta1*m + (1-beta1)*g,  m_hat = m / (1 - beta1**t)
        v = beta2*v + (1-beta2)*g*g,  v_hat = v / (1 - beta2**t)
        w = w - learning_rate * (weight_decay*w + m_hat / (sqrt(v_hat) + eps))
        """
        p, t = self.tensors[name], self.step
        flat = [a.reshape(-1) for a in (p, gradient, self.m[name], self.v[name])]
        decay = 1 - learning_rate * self.weight_decay[name]
        step_size, root = learning_rate / (1 - self.beta1**t), math.sqrt(1 - self.beta2**t)
        self.adamw(*flat, self.beta1, self.beta2, self.eps, scale, decay, step_size, root)


def global_norm(gradients, parallel_map=map):
    """Return the Euclidean norm of all gradients together, a dict of arrays (Pascanu et al. 2013, section 3.2)."""
    return math.sqrt(sum(parallel_map(lambda g: float(np.dot(g.reshape(-1), g.reshape(-1))), gradients.values())))


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """Return the learning rate of a step: linear warm-up to learning_rate, then cosine decay to min_lr.

    The decay ends at step lr_decay_iters (Loshchilov & Hutter 2017, equation 5).
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
