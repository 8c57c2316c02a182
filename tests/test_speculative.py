"""engines/speculative.py: draft tokens change how fast a text is generated, never the text."""

import re
import time

import numpy as np
import pytest

import gpt2
from engines import parallel, speculative
from engines.speculative import MAX_DRAFT, AcceptanceRate, Draft, Lookup, Speculation
from sampling import make_sampler
from tests.conftest import INPUTS, N_HEAD, N_NEW, PROMPTS, TINY, their_greedy_ids
from tests.programs import assert_mistake
from tests.random_model import random_tensors, write_byte_vocabulary, write_safetensors
from weights.names import nest


@pytest.fixture(scope="module")
def sequences(expected):
    """Pairs of ids and those with which transformers continue them; the last ids repeat themselves."""
    return [(INPUTS[i], expected[i]) for i in (0, 1, 2, 3, -1)]


@pytest.fixture(scope="module")
def drafters():
    """Functions by name that make what drafts a text, given its ids."""
    other, rng = nest(random_tensors(TINY, seed=1), TINY["n_layer"]), np.random.default_rng(0)
    small, small_params = parallel.shared(other, N_HEAD, 1)
    return {
        "lookup": lambda text: Lookup(),
        "right": Scripted,
        "sometimes": lambda text: Scripted(text, lambda place: rng.random() < 0.3),
        "another model": lambda text: Draft(small_params, N_HEAD, 0.1, small),
    }


class Scripted:
    """Drafts a fixed text, with wrong tokens at some places."""

    def __init__(self, text, wrong=lambda place: False, cost=0.01):
        self.text, self.wrong, self.cost, self.asked = text, wrong, cost, []

    def draft(self, text, n):
        self.asked.append(n)
        places = range(len(text), min(len(text) + n, len(self.text)))
        return [(self.text[i] + self.wrong(i)) % TINY["n_vocab"] for i in places]


def speculate(model_and_params, make_drafter):
    model, params = model_and_params
    return Speculation(params, N_HEAD, make_drafter, model)


# Drafts


@pytest.mark.parametrize(
    ("text", "n", "draft"),
    [
        ([1, 2, 5, 8, 2, 6, 7, 1, 2], 1, [5]),  # the longer match counts, not the later one
        ([1, 2, 5, 1, 2, 6, 1, 2], 1, [6]),  # and of matches of the same length the later one
        *(([1, 2, 3], 5, []), ([], 5, []), ([1, 1], 0, [])),
        ([4, 7, 7], 3, [7, 7, 7]),  # a repetition is continued
        ([5, 1, 2, 3, 1, 2, 3], 8, [1, 2, 3, 1, 2, 3, 1, 2]),
    ],
)
def test_lookup_drafts_the_tokens_after_the_longest_match(text, n, draft):
    assert Lookup().draft(text, n) == draft


def test_lookup_reads_only_the_new_tokens_of_a_text():
    text, lookup = np.random.default_rng(0).integers(0, 5, 200).tolist(), Lookup()
    for n in range(1, len(text)):
        assert lookup.draft(text[:n], 3) == Lookup().draft(text[:n], 3)


def test_a_draft_model_drafts_its_greedy_tokens(params, theirs):
    """Its cache stays right when the text continues differently from the draft."""
    draft, text = Draft(params, N_HEAD, 0.1), INPUTS[0][:]
    for told in ([], [3], [5, 6, 7], [1]):
        text += told
        assert draft.draft(text, 5) == their_greedy_ids(theirs, text, 5)
        text += draft.draft(text, 5)[:2]
        assert draft.draft(text, 4) == their_greedy_ids(theirs, text, 4)
    for n_text, n_draft in ((TINY["n_ctx"] - 3, 3), (TINY["n_ctx"], 0), (TINY["n_ctx"] + 5, 0)):
        assert len(draft.draft([1] * n_text, 9)) == n_draft


def test_a_damaged_draft_model_is_noticed():
    tensors = random_tensors(TINY)
    tensors["ln_f/b"][0] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        Draft(nest(tensors, TINY["n_layer"]), N_HEAD, 0.1).draft(INPUTS[0], 1)


# The text


@pytest.mark.parametrize("name", ["lookup", "right", "sometimes", "another model"])
def test_ids_are_those_without_drafting(model_and_params, params, drafters, sequences, name):
    """The greedy ids of transformers; with a seed, the samples of gpt2.generate."""
    for seed, (ids, greedy) in enumerate(sequences):
        samplers = [make_sampler(0.9, top_k=20, seed=seed) for _ in range(2)]
        seeded = gpt2.generate(ids, params, N_HEAD, N_NEW, sample=samplers[0])
        for new, sample in ((greedy, np.argmax), (seeded, samplers[1])):
            speculation = speculate(model_and_params, lambda text=ids + new: drafters[name](text))
            assert list(speculation.generate_tokens(ids, N_NEW, sample)) == new
            assert speculation.n_tokens == N_NEW >= speculation.n_passes >= 1 + (N_NEW - 1) // (1 + MAX_DRAFT)
            assert speculation.n_draft >= speculation.n_accepted == N_NEW - speculation.n_passes


@pytest.mark.parametrize("place", [0, 1, N_NEW - 1])
def test_the_stop_id_ends_the_text_within_a_pass(model_and_params, expected, place):
    ids, new = INPUTS[0], expected[0]
    speculation = speculate(model_and_params, lambda: Scripted(ids + new))
    assert list(speculation.generate_tokens(ids, N_NEW, stop_id=new[place])) == new[: new.index(new[place])]
    if place == 0:
        assert speculation.report(1.0).startswith("tokens: 0, passes: 1 (0.00 tokens per pass), draft tokens: 0, acc")


@pytest.mark.parametrize("name", ["right", "another model"])
def test_a_full_context_works_and_one_more_token_is_refused(model_and_params, drafters, theirs, name):
    ids, n = INPUTS[4], TINY["n_ctx"] - len(INPUTS[4])
    new = their_greedy_ids(theirs, ids, n)
    speculation = speculate(model_and_params, lambda: drafters[name](ids + new))
    assert list(speculation.generate_tokens(ids, n)) == new
    assert list(speculation.generate_tokens(ids, 0)) == []
    assert ids == INPUTS[4]
    for inputs, n_new, message in ((ids, n + 1, "context of 128"), ([], 1, "at least one token")):
        with pytest.raises(ValueError, match=message):
            next(speculation.generate_tokens(inputs, n_new))


# The number of draft tokens


def replay(params, text, start, drafter, small=True):
    """The Speculation after it generated a text, whatever the logits."""
    left, speculation = list(text[start:]), Speculation(params, N_HEAD, lambda: drafter)
    speculation.pass_cost = speculative.small_batch_cost if small else speculative.plain_cost
    list(speculation.generate_tokens(text[:start], len(text) - start, lambda logits: left.pop(0)))
    return speculation


def test_accepted_drafts_become_long_and_rejected_ones_short(params):
    text = np.random.default_rng(0).integers(0, TINY["n_vocab"], 120).tolist()
    right, wrong, costly = Scripted(text), Scripted(text, lambda i: True, 0), Scripted(text, lambda i: True, 0.1)
    speculation = replay(params, text, 4, right)
    assert speculation.n_passes < 16 and speculation.n_draft == speculation.n_accepted
    assert MAX_DRAFT in right.asked
    assert replay(params, text, 4, wrong).n_passes == 116
    assert set(wrong.asked[5:100]) == {3}  # a pass over four tokens takes no longer than one over a single token
    assert replay(params, text, 4, costly).n_draft < 100
    replay(params, text, 4, plain := Scripted(text, lambda i: True, 0), small=False)
    assert plain.asked.count(0) > 90  # the plain model is slow with drafts


@pytest.mark.parametrize("small", [True, False])
def test_lookup_drafts_nothing_until_the_text_repeats(small):
    params = nest(random_tensors(TINY | {"n_ctx": 300}), TINY["n_layer"])
    distinct = np.random.default_rng(0).permutation(TINY["n_vocab"])[:50].tolist()
    assert replay(params, distinct, 4, Lookup(), small).n_draft == 0
    speculation = replay(params, distinct + [5, 9, 2, 6] * 55, 4, Lookup(), small)
    assert speculation.n_tokens == 266 and speculation.n_passes < 85


def test_the_best_length_follows_from_rate_and_costs():
    def acceptance(draft_cost, pass_cost, accepted, checked):
        result = AcceptanceRate(draft_cost, pass_cost)
        result.accepted, result.checked = accepted, checked
        return result

    small, plain = speculative.small_batch_cost, speculative.plain_cost
    assert acceptance(0, small, 30, 30).best_n_draft() == MAX_DRAFT
    assert 1 < acceptance(0.25, small, 7, 10).best_n_draft() < acceptance(0, small, 7, 10).best_n_draft()
    assert acceptance(0, plain, 1, 10).best_n_draft() == 0
    # the paper's equation 1: rate 0.75 and two draft tokens give 1 + 0.75 + 0.75 ** 2 tokens per pass
    assert acceptance(0, lambda n: 1, 0, 0).speed(2) == 2.3125


# The command line


def numbers(err):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", err.decode())]


@pytest.mark.parametrize("drafts", [["--speculate", "lookup"], ["--draft_model", "tiny"]])
@pytest.mark.parametrize("flags", [[], ["--temperature", 1, "--seed", 3, "--n_samples", 2]])
def test_the_text_is_the_same_and_a_report_follows(inside, tiny_flags, drafts, flags):
    for prompt in PROMPTS[1:4]:
        arguments = [*flags, *tiny_flags, "--n_tokens_to_generate", 30]
        code, out, err = inside(*arguments, *drafts, "--", prompt)
        assert (code, out) == (0, inside(*arguments, "--", prompt)[1])
        report = r"note: tokens: .*, passes: .*, draft tokens: .*, accepted: .* tokens/s, including .* s to copy .*\n"
        assert re.fullmatch(report, err.decode())
        n_tokens, n_passes, per_pass, n_draft, n_accepted, *_ = numbers(err)
        assert n_draft >= n_accepted == n_tokens - n_passes and n_tokens == 30 * (2 if flags else 1)
        assert per_pass == pytest.approx(n_tokens / n_passes, abs=0.01)


def test_only_the_first_answer_counts_the_copy_of_the_weights(inside, tiny_flags, monkeypatch):
    copied = parallel.small_batch_model
    monkeypatch.setattr(parallel, "small_batch_model", lambda *model: time.sleep(0.5) or copied(*model))
    arguments = [*tiny_flags, "--n_tokens_to_generate", 8, "--speculate", "lookup", "--interactive"]
    first, second = inside(*arguments, typed=b"one\ntwo\n")[2].splitlines()
    *_, speed, copying = numbers(first)
    assert copying >= 0.5
    assert speed <= 16  # 8 tokens in at least half a second
    assert b"to copy" in first and b"to copy" not in second


def test_a_draft_model_needs_the_same_vocabulary_and_excludes_lookup(inside, tmp_path, tiny_models_dir):
    (tmp_path / "tiny").symlink_to(tiny_models_dir / "tiny")
    (tmp_path / "other").mkdir()
    write_byte_vocabulary(tmp_path / "other", 300)
    write_safetensors(tmp_path / "other", TINY | {"n_vocab": 300}, random_tensors(TINY | {"n_vocab": 300}))
    arguments = ["x", "--model_size", "tiny", "--models_dir", tmp_path, "--draft_model", "other"]
    assert_mistake(inside(*arguments), "other (300 tokens)", "tiny (400 tokens)", "vocabulary")
    assert_mistake(inside(*arguments, "--speculate", "lookup"), "--draft_model", "--speculate lookup")
