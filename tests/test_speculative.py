"""engines/speculative.py: draft tokens change how fast a text is generated, never the text."""

import copy
import re

import numpy as np
import pytest

import gpt2
from engines import compiled, speculative
from engines.instance import recording
from engines.speculative import (
    MAX_DRAFT,
    MAX_MATCH,
    AcceptanceRate,
    Draft,
    Lookup,
    SelfDraft,
    Speculation,
    self_drafter,
)
from sampling import make_sampler
from tests.conftest import INPUTS, N_HEAD, N_NEW, PROMPTS, ROOT, TINY, their_greedy_ids
from tests.programs import assert_mistake
from tests.random_model import random_tensors, write_byte_vocabulary, write_safetensors
from utils import load_encoder_hparams_and_params
from weights.names import nest


@pytest.fixture(scope="module")
def sequences(expected):
    """Pairs of ids and those with which transformers continue them; the last ids repeat themselves."""
    return [(INPUTS[i], expected[i]) for i in (0, 1, 2, 3, -1)]


@pytest.fixture(scope="module")
def drafters(engine):
    """Functions by name that make the drafters of a text, given its ids."""
    other, rng = nest(random_tensors(TINY, seed=1), TINY["n_layer"]), np.random.default_rng(0)
    model, other = engine(other)

    def sometimes(text):
        return Scripted(text, lambda place: rng.random() < 0.3)

    return {
        "lookup": lambda text: [Lookup()],
        "right": lambda text: [Scripted(text)],
        "sometimes": lambda text: [sometimes(text)],
        "several": lambda text: [Lookup(2), sometimes(text), Scripted(text, cost=0.5)],
        "another model": lambda text: [Draft(other, N_HEAD, 0.1, model)],
    }


@pytest.fixture(scope="module")
def shakespeare():
    """(hparams, model, params in its layout) of models/shakespeare in the compiled engine."""
    pytest.importorskip("numba")
    _, hparams, params = load_encoder_hparams_and_params("shakespeare", str(ROOT / "models"))
    return hparams, *compiled.compiled_model(params)


class Scripted:
    """Drafts a fixed text, with wrong tokens at some places."""

    def __init__(self, text, wrong=lambda place: False, cost=0.01):
        self.text, self.wrong, self.cost, self.asked = text, wrong, cost, []

    def draft(self, text, n):
        self.asked.append(n)
        places = range(len(text), min(len(text) + n, len(self.text)))
        return [(self.text[i] + self.wrong(i)) % TINY["n_vocab"] for i in places]


def speculate(model_and_params, make_drafters):
    model, params = model_and_params
    return Speculation(params, N_HEAD, lambda cache, sample: make_drafters(), model)


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


@pytest.mark.parametrize("name", ["lookup", "right", "sometimes", "several", "another model"])
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
    speculation = speculate(model_and_params, lambda: [Scripted(ids + new)])
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


# The model as its own draft


@pytest.mark.parametrize("temperature", [0, 0.8, 1])
def test_a_model_that_drafts_for_itself_generates_its_own_text(shakespeare, temperature):
    hparams, model, params = shakespeare
    n_head, n = hparams["n_head"], hparams["n_ctx"] - 9
    speculation = Speculation(params, n_head, self_drafter(model, params, n_head), model)
    for seed, ids in enumerate(([5, 9, 20], [7], list(range(9)))):
        plain, drafted = (make_sampler(temperature, seed=seed) for _ in range(2))
        new = model.generate(ids, params, n_head, n, sample=plain)
        assert list(speculation.generate_tokens(ids, n, drafted)) == new
        if temperature:
            assert drafted.keywords["rng"].random() == plain.keywords["rng"].random()
    assert speculation.n_accepted > 0.6 * speculation.n_draft > 100


@pytest.mark.parametrize("name", ["lookup", "self"])
def test_logits_have_the_bits_of_those_without_drafting(shakespeare, name):
    hparams, model, params = shakespeare
    n_head, n, ids = hparams["n_head"], 80, [11, 12, 13] * 4
    drafter = {"self": [self_drafter(model, params, n_head)], "lookup": []}[name]
    speculation = Speculation(params, n_head, *drafter, model=model)
    plain, drafted = [], []

    def keep(kept):
        return lambda logits: (kept.append(logits.copy()), np.argmax(logits))[1]

    assert list(speculation.generate_tokens(ids, n, keep(drafted))) == model.generate(
        ids, params, n_head, n, sample=keep(plain)
    )
    assert speculation.n_passes < n
    np.testing.assert_array_equal(drafted, plain)


def test_a_self_draft_continues_the_cache_and_leaves_it_as_it_is(shakespeare):
    """Its tokens are those of the quantized model after the float32 model's keys and values."""
    hparams, model, params = shakespeare
    text, n_head, lossy = list(range(20)), hparams["n_head"], compiled.compiled_model(params, "int8")[1]
    cache = [model.KVCache(64) for _ in params["blocks"]]
    model.prefill(text[:-1], params, n_head, cache)
    sample, noise = make_sampler(1.0, seed=3), make_sampler(1.0, seed=3)
    drafter, expected = SelfDraft(lossy, n_head, model, cache, sample), text[:]
    other = copy.deepcopy(cache)
    for _ in range(5):
        expected.append(model.choose(model.prefill(expected[-1:], lossy, n_head, other), noise))
    for _ in range(2):
        assert drafter.draft(text, 5) == expected[20:]
        assert [layer.n_past for layer in cache] == [19] * len(cache)
    assert drafter.draft(text, 0) == []
    drafter.sample = recording(np.argmax, [])  # a function whose state a copy might share
    drafter.draft(text, 5)
    assert drafter.sample.__closure__[1].cell_contents == []


# The number of draft tokens


def replay(params, text, start, *drafters, pass_cost=speculative.compiled_cost):
    """The Speculation after it generated a text, whatever the logits."""
    left, speculation = list(text[start:]), Speculation(params, N_HEAD, lambda cache, sample: drafters)
    speculation.pass_cost = pass_cost
    list(speculation.generate_tokens(text[:start], len(text) - start, lambda logits: left.pop(0)))
    return speculation


def test_accepted_drafts_become_long_and_rejected_ones_short(params):
    text = np.random.default_rng(0).integers(0, TINY["n_vocab"], 120).tolist()
    right, wrong, costly = Scripted(text), Scripted(text, lambda i: True, 0), Scripted(text, lambda i: True, 0.1)
    speculation = replay(params, text, 4, right)
    assert speculation.n_passes < 16 and speculation.n_draft == speculation.n_accepted
    assert MAX_DRAFT in right.asked
    assert replay(params, text, 4, wrong).n_passes == 116
    assert set(wrong.asked[5:100]) <= {0, 5}  # a pass over six tokens takes little longer than one over a single token
    assert replay(params, text, 4, costly).n_draft < 100
    replay(params, text, 4, plain := Scripted(text, lambda i: True, 0), pass_cost=speculative.plain_cost)
    assert plain.asked.count(0) > 90  # the plain model is slow with drafts


@pytest.mark.parametrize("pass_cost", [speculative.compiled_cost, speculative.plain_cost])
def test_lookup_drafts_nothing_until_the_text_repeats(pass_cost):
    params = nest(random_tensors(TINY | {"n_ctx": 300}), TINY["n_layer"])
    distinct = np.random.default_rng(0).permutation(TINY["n_vocab"])[:50].tolist()
    assert replay(params, distinct, 4, Lookup(), pass_cost=pass_cost).n_draft == 0
    speculation = replay(params, distinct + [5, 9, 2, 6] * 55, 4, Lookup(), pass_cost=pass_cost)
    assert speculation.n_tokens == 266 and speculation.n_passes < 85


def test_the_faster_drafter_drafts(params):
    """Lookup where it finds a long match and its tokens are accepted, else the drafter that costs more."""
    rng = np.random.default_rng(0)
    distinct, passage = rng.permutation(TINY["n_vocab"])[:40].tolist(), rng.permutation(TINY["n_vocab"])[:10].tolist()
    for text, n_asked in ((distinct + passage[:5] * 14, 20), (distinct * 2, 15), (distinct + [7, 8, 9] * 25, 15)):
        drafter = Scripted(text, cost=0.4)
        speculation = replay(params, text, 4, Lookup(MAX_MATCH), drafter)
        assert speculation.n_draft == speculation.n_accepted
        assert 4 < len(drafter.asked) < n_asked  # while nothing repeats
    wrong = Scripted(text, lambda place: True, cost=0)
    drafter = Scripted(text, cost=0.4)
    assert replay(params, text, 4, wrong, drafter).n_passes < 50
    assert len(drafter.asked) > 10


def test_drafts_that_are_rejected_cost_little_time(params):
    """The time of the passes over that without drafting."""
    text = np.random.default_rng(0).integers(0, TINY["n_vocab"], 124).tolist()
    drafter = Scripted(text, lambda place: True, cost=SelfDraft.cost)
    speculation = replay(params, text, 4, drafter)
    assert speculation.n_passes == 120
    asked = [n for n in drafter.asked if n]
    assert sum(speculative.compiled_cost(n + 1) - 1 + SelfDraft.cost * n for n in asked) < 0.03 * 120


def test_the_best_length_follows_from_rate_and_costs():
    def acceptance(draft_cost, pass_cost, accepted, checked):
        result = AcceptanceRate(draft_cost, pass_cost)
        result.accepted, result.checked = accepted, checked
        return result

    small, plain = speculative.compiled_cost, speculative.plain_cost
    assert acceptance(0, small, 30, 30).best_n_draft() == MAX_DRAFT
    assert 1 < acceptance(0.25, small, 7, 10).best_n_draft() < acceptance(0, small, 7, 10).best_n_draft()
    assert acceptance(0, plain, 1, 10).best_n_draft() == 0
    # the paper's equation 1: rate 0.75 and two draft tokens give 1 + 0.75 + 0.75 ** 2 tokens per pass
    assert acceptance(0, lambda n: 1, 0, 0).speed(2) == 2.3125


# The command line


def numbers(err):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", err.decode())]


@pytest.mark.parametrize("drafts", [["--speculate", "lookup"], ["--speculate", "self"], ["--draft_model", "tiny"]])
@pytest.mark.parametrize("flags", [[], ["--temperature", 1, "--seed", 3, "--n_samples", 2]])
def test_the_text_is_the_same_and_a_report_follows(inside, tiny_flags, drafts, flags):
    for prompt in PROMPTS[1:4]:
        arguments = [*flags, *tiny_flags, "--n_tokens_to_generate", 30]
        code, out, err = inside(*arguments, *drafts, "--", prompt)
        assert (code, out) == (0, inside(*arguments, "--", prompt)[1])
        report = r"note: tokens: .*, passes: .*, draft tokens: .*, accepted: .* tokens/s\n"
        assert re.fullmatch(report, err.decode())
        n_tokens, n_passes, per_pass, n_draft, n_accepted, *_ = numbers(err)
        assert n_draft >= n_accepted == n_tokens - n_passes and n_tokens == 30 * (2 if flags else 1)
        assert per_pass == pytest.approx(n_tokens / n_passes, abs=0.01)


def test_a_draft_model_needs_the_same_vocabulary_and_excludes_lookup(inside, tmp_path, tiny_models_dir):
    (tmp_path / "tiny").symlink_to(tiny_models_dir / "tiny")
    (tmp_path / "other").mkdir()
    write_byte_vocabulary(tmp_path / "other", 300)
    write_safetensors(tmp_path / "other", TINY | {"n_vocab": 300}, random_tensors(TINY | {"n_vocab": 300}))
    arguments = ["x", "--model_size", "tiny", "--models_dir", tmp_path, "--draft_model", "other"]
    assert_mistake(inside(*arguments), "other (300 tokens)", "tiny (400 tokens)", "vocabulary")
    assert_mistake(inside(*arguments, "--speculate", "lookup"), "--draft_model", "--speculate lookup")
