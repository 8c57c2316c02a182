"""--slide: the ids are those of a loop that calls gpt2() on the newest part of the text, without a cache."""

import functools

import numpy as np
import pytest

import gpt2
from engines.sliding import slide
from engines.speculative import Speculation
from sampling import make_sampler
from tests.conftest import INPUTS, N_HEAD, TINY
from tests.programs import assert_mistake, assert_prints
from tests.random_model import copy_vocabulary, random_tensors, write_safetensors
from utils import load_encoder_hparams_and_params

N_CTX = 32
HPARAMS = TINY | {"n_ctx": N_CTX}
LENGTHS = [3, N_CTX - 1, N_CTX, 75]  # of prompts
N_NEW = 50  # more than three halves of the context
LONG = np.random.default_rng(6).integers(0, TINY["n_vocab"], 75).tolist()
SAMPLED = {"temperature": 1.0, "seed": 7}
LETTER = "Sir or Madam, " * 20 + "a"  # more tokens than the context
FLAGS = ["--model_size", "short", "--n_tokens_to_generate", N_NEW]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory, vocabulary_dir):
    path = tmp_path_factory.mktemp("models")
    (path / "short").mkdir()
    copy_vocabulary(path / "short", vocabulary_dir)
    write_safetensors(path / "short", HPARAMS, random_tensors(HPARAMS))
    return path


@pytest.fixture(scope="module")
def params(models_dir):
    return load_encoder_hparams_and_params("short", str(models_dir))[2]


@pytest.fixture(scope="module")
def model_and_params(engine, params):
    return engine(params)


@pytest.fixture(scope="module")
def expected(params):
    """A function from a prompt to N_NEW ids: a window goes back to half the context whenever it has filled it."""

    def continued(ids, **sampling):
        text, start, sample = list(ids), 0, make_sampler(**sampling)
        for _ in range(N_NEW):
            if len(text) - start >= N_CTX:
                start = len(text) - N_CTX // 2
            text.append(int(sample(gpt2.gpt2(text[start:], **params, n_head=N_HEAD)[-1])))
        return text[len(ids) :]

    return continued


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_ids_are_those_of_a_loop_over_the_window(model_and_params, expected, length, sampling):
    ids, (model, params) = LONG[:length], model_and_params
    options = {"params": params, "n_head": N_HEAD, "sample": make_sampler(**sampling)}
    found = list(slide(functools.partial(model.generate_tokens, **options), ids, N_CTX, N_NEW))
    assert found == expected(ids, **sampling)
    assert ids == LONG[:length]


def test_drafts_do_not_change_the_ids(model_and_params, expected):
    model, params = model_and_params
    speculation = Speculation(params, N_HEAD, model=model)
    assert list(slide(speculation.generate_tokens, INPUTS[-1], N_CTX, N_NEW)) == expected(INPUTS[-1])
    assert speculation.n_tokens == N_NEW and speculation.n_passes < N_NEW


def test_the_end_of_the_text_ends_it_in_any_window(params, expected):
    ids = expected(LONG, **SAMPLED)
    for place in (10, N_CTX // 2 + 10):
        stop_id = ids[place]
        options = {"params": params, "n_head": N_HEAD, "sample": make_sampler(**SAMPLED), "stop_id": stop_id}
        found = list(slide(functools.partial(gpt2.generate_tokens, **options), LONG, N_CTX, N_NEW))
        assert found == ids[: ids.index(stop_id)]


def test_tokens_come_one_by_one_and_nothing_runs_ahead():
    asked = []
    tokens = slide(
        lambda ids, n_tokens_to_generate: (asked.append((ids, i)) or i for i in range(n_tokens_to_generate)),
        [7] * 5,
        4,
        10,
    )
    assert asked == []
    assert [next(tokens), next(tokens)] == [0, 1] and asked == [([7, 7], 0), ([7, 7], 1)]
    assert next(tokens) == 0 and asked[-1] == ([0, 1], 0)
    assert list(slide(None, [7], 4, 0)) == []


def test_a_context_of_one_token_is_an_error(params):
    generate_tokens = functools.partial(gpt2.generate_tokens, params=params, n_head=N_HEAD)
    with pytest.raises(ValueError, match="empty"):
        next(slide(generate_tokens, [1], 1, 1))


# The command line


@pytest.fixture(scope="module")
def text(tiny, expected):
    """A function from a prompt to the text that continues it."""
    return lambda prompt, **sampling: tiny[0].decode(expected(tiny[0].encode(prompt), **sampling))


@pytest.mark.parametrize("flags", ["--stream", "--no-stream", "--speculate lookup"])
def test_a_prompt_of_any_length_goes_on(inside, models_dir, text, flags):
    flags = ["--slide", "--models_dir", models_dir, *FLAGS, *flags.split()]
    for prompt in ("Dear", LETTER):
        assert inside(prompt, *flags)[:2] == (0, f"{text(prompt)}\n".encode())


def test_below_the_limit_the_text_is_unchanged(inside, models_dir):
    flags = ["a", "--models_dir", models_dir, *FLAGS[:-1], N_CTX - 1]
    assert inside(*flags, "--slide") == inside(*flags)


def test_several_samples_and_the_lines_of_a_session(inside, models_dir, text):
    flags = ["--slide", "--models_dir", models_dir, *FLAGS]
    answers = f"{text('Dear')}\n{text(LETTER)}"
    assert_prints(inside("--interactive", *flags, typed=f"Dear\n{LETTER}\n".encode()), answers)
    texts = [text(LETTER, temperature=1.0, seed=seed) for seed in (7, 8)]
    found = inside(LETTER, *flags, "--temperature", 1, "--seed", 7, "--n_samples", 2)
    assert_prints(found, f"=== sample 1 ===\n{texts[0]}\n=== sample 2 ===\n{texts[1]}")


def test_what_slide_does_not_work_with(inside, tiny_flags, vocabulary_dir, tmp_path):
    (tmp_path / "one").mkdir()
    copy_vocabulary(tmp_path / "one", vocabulary_dir)
    write_safetensors(tmp_path / "one", TINY | {"n_ctx": 1}, random_tensors(TINY | {"n_ctx": 1}))
    assert_mistake(inside("a", "--slide", "--models_dir", tmp_path, "--model_size", "one"), "more than the 1 of the")
    assert_mistake(inside("--prompts_file", "-", "--slide", *tiny_flags), "--slide", "leave out --prompts_file")
    assert_mistake(inside("x", "--engine", "jax", "--slide", *tiny_flags), "--slide", "--engine jax")
    assert_mistake(inside("x", "--explain", "--slide", *tiny_flags), "leave out --slide")
