"""End to end at 124M shape: a checkpoint written by TensorFlow is imported and compared with transformers.

The weights are random. Takes 2 GB on disk for a minute. Not run by default: pytest -m full_size
"""

import numpy as np
import pytest

from encoder import get_encoder
from engines import batching, speculative
from tests.conftest import DATA, PROMPTS, need
from tests.random_model import (
    SIZE_124M,
    copy_vocabulary,
    random_tensors,
    write_byte_vocabulary,
    write_hparams,
    write_tf_checkpoint,
)
from tests.test_gpt2 import assert_same_ids, prompt_ids, their_greedy_ids, their_logits
from training import fused
from training.adamw import AdamW
from training.dataset import encode_splits
from training.initialization import gpt2_deviation, initial_tensors
from training.loss import loss_and_gradients
from utils import load_encoder_hparams_and_params
from weights.names import tensor_shapes

pytestmark = pytest.mark.full_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "full"
    path.mkdir()
    if (DATA / "gpt2").exists():
        copy_vocabulary(path, DATA / "gpt2")
    else:
        write_byte_vocabulary(path, SIZE_124M["n_vocab"])
    write_hparams(path, SIZE_124M)
    write_tf_checkpoint(path, random_tensors(SIZE_124M))
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return load_encoder_hparams_and_params("full", str(folder.parent))


@pytest.fixture(scope="module")
def theirs(folder, ours):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder).eval()


def assert_same_continuation(found, theirs, ids, n_tokens=64):
    new = their_greedy_ids(theirs, ids, n_tokens)
    assert len(set(new)) > 8, "too few different tokens to show a difference"
    assert_same_ids(found, new, lambda i: their_logits(theirs, [ids + new[:i]])[0, -1])


@pytest.fixture(scope="module")
def laid_out(ours, engine):
    """The (model, params) of an engine."""
    return engine(ours[2])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_and_64_greedy_ids(ours, theirs, laid_out, prompt):
    encoder, hparams, _ = ours
    model, params = laid_out
    ids = prompt_ids(encoder, prompt)
    expected = their_logits(theirs, [ids])[0]
    logits = model.gpt2(ids, **params, n_head=hparams["n_head"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert_same_continuation(model.generate(ids, params, hparams["n_head"], 64), theirs, ids)


def test_twelve_prompts_in_batches_of_five(ours, theirs, laid_out):
    encoder, hparams, _ = ours
    model, params = laid_out
    prompts = [prompt_ids(encoder, prompt) for prompt in PROMPTS]
    requests = [(i, ids, [np.argmax]) for i, ids in enumerate(prompts)]
    for key, ids, _ in batching.generate_batch(requests, params, hparams["n_head"], 64, 5, model=model):
        assert_same_continuation(ids, theirs, prompts[key[0]])


def test_speculative_decoding_gives_the_same_tokens(ours, theirs, laid_out):
    encoder, hparams, params = ours
    n_head, (model, laid_out_params) = hparams["n_head"], laid_out
    for prompt in PROMPTS:
        ids = prompt_ids(encoder, prompt) * 4
        new = their_greedy_ids(theirs, ids, 64)
        draft = speculative.Draft(params, n_head, 0.01)  # the model itself: all its draft tokens are accepted
        for drafter in (speculative.Lookup(), draft):
            make_drafters = lambda cache, sample, drafter=drafter: [drafter]  # noqa: E731
            speculation = speculative.Speculation(laid_out_params, n_head, make_drafters, model)
            found = list(speculation.generate_tokens(ids, 64))
            assert_same_ids(found, new, lambda i, ids=ids, new=new: their_logits(theirs, [ids + new[:i]])[0, -1])
        assert speculation.n_passes < 40


def test_a_full_context(ours, theirs, laid_out):
    _, hparams, _ = ours
    model, params = laid_out
    ids = np.random.default_rng(0).integers(0, SIZE_124M["n_vocab"], 1000).tolist()
    assert_same_continuation(model.generate(ids, params, hparams["n_head"], 24), theirs, ids, 24)


def test_ten_training_steps_have_the_losses_of_llm_c():
    """From the same random weights, on the same batches of 4 x 64 tokens of tinyshakespeare.

    The losses are those that train_gpt2.c of karpathy/llm.c printed (gcc -Ofast, two threads; AdamW with learning rate
    1e-4, betas 0.9 and 0.999, no weight decay), with shuffling disabled in its data loader.
    """
    expected = "11.034027 9.634481 9.841953 9.542304 9.387852 9.329209 9.177855 9.067575 9.135426 8.717728"
    text = need(DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids, _, _ = encode_splits(text, get_encoder("gpt2", str(need(DATA / "gpt2").parent)), "sections")
    tensors = initial_tensors(tensor_shapes(**SIZE_124M), 0, gpt2_deviation(SIZE_124M["n_layer"]))
    model = fused.training_model()
    optimizer = AdamW(tensors, beta1=0.9, beta2=0.999, weight_decay=0.0)
    for i, loss in enumerate(map(float, expected.split())):
        window = np.array(ids[256 * i : 256 * i + 257])
        inputs, targets = window[:-1].reshape(4, 64), window[1:].reshape(4, 64)
        found, gradients = loss_and_gradients(tensors, SIZE_124M, inputs, targets, model)
        np.testing.assert_allclose(found, loss, atol=1e-4)
        optimizer.update(gradients, 1e-4)
