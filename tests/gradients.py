"""Print a table of the gradients of every tensor of a GPT-2, compared with PyTorch's and with finite differences.

    python -m tests.gradients

The model has 4 layers and random weights; a batch is 4 x 64 tokens. PyTorch runs transformers' GPT2LMHeadModel
in float32; the finite differences are central, in float64, along one random direction per tensor.
"""

import numpy as np
import torch

import gpt2
from tests.random_model import random_tensors
from training import fused
from training.loss import lm_loss, loss_and_gradients
from weights.names import hugging_face_name, nest, tensor_shapes

HPARAMS = {"n_vocab": 300, "n_ctx": 64, "n_embd": 48, "n_head": 4, "n_layer": 4}
BATCH = (4, 64)


def batch(hparams=HPARAMS, shape=BATCH):
    return np.random.default_rng(1).integers(0, hparams["n_vocab"], (2, *shape))


def torch_model(hparams, tensors):
    """Return transformers' model with these tensors and without dropout, and its parameters by checkpoint name."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)  # for a model this small, more threads take longer
    shape = {name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"], **shape, **rates)
    model = GPT2LMHeadModel(config)
    theirs = dict(model.transformer.named_parameters())
    by_name = {name: theirs[hugging_face_name(name)] for name in tensors}
    with torch.no_grad():
        for name, parameter in by_name.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
    return model.train(), by_name


def torch_loss(model, inputs, targets):
    logits = model(torch.from_numpy(inputs)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())


def torch_gradients(hparams, tensors, inputs, targets):
    model, by_name = torch_model(hparams, tensors)
    loss = torch_loss(model, inputs, targets)
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in by_name.items()}


def difference_error(tensors, gradients, name, loss, step=1e-5):
    """Return |central difference - gradient . direction| / |central difference| for a random unit direction."""
    direction = np.random.default_rng(len(name)).standard_normal(tensors[name].shape)
    direction *= np.sign(gradients[name]) * np.sign(direction)  # so that no two terms cancel
    direction /= np.linalg.norm(direction)
    above, below = (loss(tensors | {name: tensors[name] + sign * step * direction}) for sign in (1, -1))
    expected = (above - below) / (2 * step)
    return abs(np.sum(gradients[name] * direction) - expected) / abs(expected)


def relative_error(ours, theirs):
    """Return the largest difference relative to the largest gradient of the tensor."""
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))


def table(hparams=HPARAMS, model=gpt2, shape=BATCH):
    """Yield (name, largest difference from PyTorch, the same relative to its largest, error of finite differences)."""
    tensors, (inputs, targets) = random_tensors(hparams), batch(hparams, shape)
    _, ours = loss_and_gradients(tensors, hparams, inputs, targets, model)
    _, theirs = torch_gradients(hparams, tensors, inputs, targets)
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    _, exact_gradients = loss_and_gradients(exact, hparams, inputs, targets, model)

    def loss(changed):
        return lm_loss(nest(changed, hparams["n_layer"]), inputs, targets, hparams["n_head"], model)

    for name in tensor_shapes(**hparams):
        difference = np.max(np.abs(ours[name] - theirs[name]))
        error = difference_error(exact, exact_gradients, name, loss)
        yield name, difference, relative_error(ours[name], theirs[name]), error


def main():
    for title, model in (("gpt2.py", gpt2), ("fused.py", fused.training_model())):
        print(f"{title:16}  largest difference to PyTorch  relative to its largest  finite differences, relative")
        for name, difference, relative, error in table(model=model):
            print(f"{name:16}  {difference:29.1e}  {relative:23.1e}  {error:28.1e}")


if __name__ == "__main__":
    main()
