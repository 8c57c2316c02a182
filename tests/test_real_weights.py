"""OpenAI's 124M weights generate the published texts and ids. Skipped unless models/124M has been imported.

Sources: the blog "GPT in 60 Lines of NumPy" and picoGPT's README; fastGPT's README and tests; transformers'
tests/models/gpt2/test_modeling_gpt2.py; next_token_logits_124M.json, recorded from a float32 run of the same weights.
"""

import json
import pathlib

import numpy as np
import pytest

import gpt2_pico
from engines import batching
from engines.speculative import Speculation
from tests.conftest import ROOT
from tests.test_gpt2 import prompt_ids
from utils import load_encoder_hparams_and_params

MODEL_DIR = ROOT / "models" / "124M"
pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(
        not (MODEL_DIR / "model.safetensors").exists(),
        reason="models/124M does not exist: python gpt2.py downloads and imports it",
    ),
]
RECORDED = json.loads((pathlib.Path(__file__).parent / "next_token_logits_124M.json").read_text(encoding="utf-8"))
TURING = "Alan Turing theorized that computers would one day become"
CONTINUATIONS = [  # prompt, number of tokens, their text (blog, picoGPT)
    (TURING, 8, " the most powerful machines on the planet."),
    (
        TURING,
        40,
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex calculations,"
        " and it can perform these calculations in a way that is very similar to the human brain.",
    ),
    (
        "",
        40,
        "The first time I saw the new version of the game, I was so excited. I was so excited to see the new version"
        " of the game, I was so excited to see the new version",
    ),
    ("Hello, my dog is a little", 13, " bit of a mess. I'm not sure if he's going"),
    ("Today, I", 16, "'m going to be doing a lot of research on this. I"),
]
IDS = [  # prompt, ids of the continuation (fastGPT, transformers)
    (TURING, [262, 749, 3665, 8217, 319, 262, 5440, 13]),
    (
        TURING + " very powerful, but even he could not imagine",
        [703, 484, 561, 307, 1498, 284, 466, 523, 13, 198, 198, 1, 40, 892, 326, 262, 749, 1593, 1517, 318],
    ),
    ("Ondřej Čertík was born in", [1248, 5332, 287, 262, 7404, 286, 25370, 254, 368, 83, 6557, 81, 11]),
    ("San Francisco is", [257, 1748, 286, 517, 621, 352, 1510, 661]),
    ("Cars are", [407, 3142, 284, 307, 973, 287, 262, 7647, 1256, 286, 257, 7072, 13]),
    (
        "The dog",
        [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290],
    ),
]


@pytest.fixture(scope="module")
def loaded():
    return load_encoder_hparams_and_params("124M", str(MODEL_DIR.parent))


@pytest.fixture(scope="module")
def model(loaded, engine):
    """(encoder, n_head, model, params) of an engine."""
    encoder, hparams, params = loaded
    return encoder, hparams["n_head"], *engine(params)


@pytest.mark.parametrize(("prompt", "n_tokens", "expected"), CONTINUATIONS)
def test_published_text(model, prompt, n_tokens, expected):
    encoder, n_head, model, params = model
    ids = prompt_ids(encoder, prompt)
    text = encoder.decode(model.generate(ids, params, n_head, n_tokens))
    assert text[: len(expected)] == expected


@pytest.mark.parametrize(("prompt", "expected"), IDS)
def test_published_ids(model, prompt, expected):
    encoder, n_head, model, params = model
    assert model.generate(encoder.encode(prompt), params, n_head, len(expected)) == expected


def test_published_ids_with_pico(loaded):
    encoder, hparams, params = loaded
    prompt, expected = IDS[0]
    assert gpt2_pico.generate(encoder.encode(prompt), params, hparams["n_head"], len(expected)) == expected


def test_published_text_with_batching_and_speculative_decoding(model):
    encoder, n_head, model, params = model
    requests = [(i, prompt_ids(encoder, prompt), [np.argmax]) for i, (prompt, _, _) in enumerate(CONTINUATIONS)]
    results = batching.generate_batch(requests, params, n_head, 40, 4, model=model)
    texts = {key: encoder.decode(ids) for (key, _), ids, _ in results}
    for i, (prompt, n_tokens, expected) in enumerate(CONTINUATIONS):
        assert texts[i].startswith(expected)
        speculation = Speculation(params, n_head, model=model)
        speculative = speculation.generate_tokens(prompt_ids(encoder, prompt), n_tokens)
        assert encoder.decode(speculative).startswith(expected)


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_logits(model, case):
    encoder, n_head, model, params = model
    assert encoder.encode(case["prompt"]) == case["ids"]
    logits = model.gpt2(case["ids"], **params, n_head=n_head)[-1]
    ids, expected = zip(*case["top20"], strict=True)
    np.testing.assert_allclose(logits[list(ids)], expected, atol=0.05)
    np.testing.assert_allclose(logits.mean(), case["mean"], atol=0.05)
    logsumexp = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    np.testing.assert_allclose(logsumexp, case["logsumexp"], atol=0.05)
