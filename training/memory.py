"""How much memory training takes at least, so that a run that cannot fit is refused before it starts.

Measured peaks are 1.1 to 2.5 times as high, because the estimate leaves out dropout, the temporary arrays of the
backward pass, and the kernels. tests/test_train.py compares both.
"""

from engines.compiled import is_installed
from weights.names import count_params
from weights.resources import check_memory

FLOAT = 4  # bytes
LAYER_OBJECTS = 50_000  # bytes per layer: the arrays, and the operations recorded for a backward pass


def training_bytes(n_params, n_layer, n_tokens, n_outputs, n_scores, n_shards=1, accumulates=False):
    """Return a lower bound of the peak memory of training with AdamW.

    n_tokens: tokens per batch. n_outputs: elements per token of the outputs of the layers' functions, of the logits and
    of their gradient. n_scores: elements per token of the attention scores of all layers, as far as they are kept
    for the backward pass. n_shards: parts of the batch with gradients of their own. accumulates: whether the gradients
    of an earlier batch are kept during the forward pass.
    """
    activations = n_tokens * (n_outputs + 3 * n_scores)  # q @ k.T, + mask and softmax
    most = max(activations, n_shards * n_params)  # gradients replace activations as the backward pass proceeds
    return FLOAT * ((3 + accumulates) * n_params + most) + n_layer * LAYER_OBJECTS  # 3: parameters and two moments


def keeps_scores(options, hparams):
    """Return whether attention is gpt2.py's: the compiled one, for heads of 16, 32, ..., computes the scores twice."""
    return options.engine == "numpy" or not is_installed() or hparams["n_embd"] // hparams["n_head"] % 16 != 0


def check_training_memory(options, hparams):
    """Raise UserError if a step needs more memory than is available; the message names the options to lower."""
    n_layer, n_params = hparams["n_layer"], count_params(**hparams)
    if options.engine == "jax":  # the activations are on the devices
        return check_memory(
            f"a copy of {n_params} parameters and their moments", 3 * FLOAT * n_params, "choose a smaller model"
        )
    n_bytes = training_bytes(
        n_params,
        n_layer,
        n_tokens=options.batch_size * options.block_size,
        n_outputs=n_layer * 18 * hparams["n_embd"] + 2 * hparams["n_vocab"],  # 9 per layer are linear's, 4 are gelu's
        n_scores=n_layer * hparams["n_head"] * options.block_size * keeps_scores(options, hparams),
        n_shards=options.n_shards,
        accumulates=options.gradient_accumulation_steps > 1,
    )
    sizes = f"batch_size {options.batch_size}, block_size {options.block_size}, n_layer {n_layer}"
    remedy = "lower --batch_size (and raise --gradient_accumulation_steps) or --block_size, or choose a smaller model"
    check_memory(f"a training step with {sizes}, n_embd {hparams['n_embd']}", n_bytes, remedy)


def check_evaluation_memory(n_tokens, context, n_vocab, n_embd, n_head):
    """Raise UserError if forward passes of n_tokens at a time need more memory than is available."""
    largest = max(n_vocab, n_head * context, 4 * n_embd)  # elements per token of the largest step, input or output
    what = f"evaluating {n_tokens} tokens at a time"
    check_memory(what, FLOAT * n_tokens * 2 * largest, "lower --threads or --context")
