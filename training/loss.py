"""The loss of a language model: mean cross-entropy, in nats per token."""

import numpy as np

import gpt2
from training import fused
from training.autograd import value_and_gradients
from weights.names import nest


def lm_loss(params, inputs, targets, n_head, model=gpt2):  # dict, [batch, n_seq], [batch, n_seq] -> scalar
    """Return the mean cross-entropy of the model's predictions, in nats per token; a Tensor if params has Tensors.

    model: the module gpt2, gpt2_pico (one sequence only), or an instance of gpt2 for training, which has dropout:
    training_model() of fused.py, kernels.py or jax_model.py.
    """
    cross_entropy = getattr(model, "cross_entropy", fused.cross_entropy)
    return cross_entropy(model.gpt2(inputs, **params, n_head=n_head), model.np.asarray(targets))


def loss_and_gradients(tensors, hparams, inputs, targets, model=gpt2, weight=1.0):
    """Return weight * lm_loss and its gradients by tensor name. tensors: dict of arrays by checkpoint name."""

    def loss(leaves):
        return lm_loss(nest(leaves, hparams["n_layer"]), inputs, targets, hparams["n_head"], model) * weight

    return value_and_gradients(loss, tensors)


def estimate_loss(predict, batches, parallel_map=map):
    """Return the mean loss over batches of (inputs, targets), in nats per token, summed in float64.

    predict: function from inputs, [batch, n_seq], to logits, [batch, n_seq, n_vocab].
    parallel_map: the map of a thread pool evaluates several batches at a time.
    """

    def total_and_count(batch):
        inputs, targets = batch
        losses = fused.token_losses(predict(inputs), targets)  # -> [batch, n_seq]
        return float(np.sum(losses, dtype=np.float64)), losses.size

    totals, counts = zip(*parallel_map(total_and_count, batches), strict=True)
    return sum(totals) / sum(counts)
