"""speculate.py: guesses change how fast a text comes, never the text."""

import collections
import re
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

import gpt2
from cli import generate as cli
from engines import parallel
from engines import speculative as speculate
from engines.speculative import Draft, Lookup, Odds, Speculation
from sampling import make_sampler
from tests.conftest import PROMPTS, TINY
from tests.random_model import random_tensors, write_byte_vocabulary, write_safetensors
from tests.test_batch import INPUTS
from tests.test_gpt2 import their_greedy_ids
from tests.test_parallel import hugging_face_model
from weights.names import nest

N = 24
N_HEAD = TINY["n_head"]
SEQUENCES = [ids for ids in INPUTS if len(ids) + N <= TINY["n_ctx"]] + [[3, 1, 4, 1, 5, 9] * 6, [7] * 20]


@pytest.fixture(scope="module")
def params():
    return nest(random_tensors(TINY), TINY["n_layer"])


@pytest.fixture(scope="module")
def theirs():
    return hugging_face_model(TINY, random_tensors(TINY))


@pytest.fixture(scope="module")
def expected(theirs):
    """What transformers continue each sequence with."""
    return [their_greedy_ids(theirs, ids, N) for ids in SEQUENCES]


@pytest.fixture(params=["gpt2", "shared"])
def layout(request, monkeypatch):
    """Without and with small_batch_model, whatever this processor would have."""

    def small_batch_model(params, n_head):
        return (gpt2, params) if request.param == "gpt2" else parallel.shared(params, n_head, 2)

    monkeypatch.setattr(speculate, "small_batch_model", small_batch_model)
    monkeypatch.setattr(speculate, "has_small_kernels", lambda: request.param == "shared")
    return request.param


class Scripted:
    """Guesses a fixed text, spoilt at some places."""

    def __init__(self, text, wrong=lambda place: False, cost=0.01):
        self.text, self.wrong, self.cost, self.asked = text, wrong, cost, []

    def guess(self, text, n):
        self.asked.append(n)
        places = range(len(text), min(len(text) + n, len(self.text)))
        return [(self.text[i] + self.wrong(i)) % TINY["n_vocab"] for i in places]


# Guessers


def test_lookup_guesses_what_followed_before():
    assert Lookup().guess([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert Lookup().guess([1, 2, 5, 8, 2, 6, 7, 1, 2], 1) == [5]  # the longer match counts, not the later one
    assert Lookup().guess([1, 2, 5, 1, 2, 6, 1, 2], 1) == [6]  # and of equally long ones the later
    assert Lookup().guess([1, 2, 3], 5) == []
    assert Lookup().guess([], 5) == []
    assert Lookup().guess([1, 1], 0) == []


def test_lookup_goes_on_with_a_repetition():
    assert Lookup().guess([4, 7, 7], 3) == [7, 7, 7]
    assert Lookup().guess([5, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_lookup_reads_on_where_it_stopped():
    text, guesser = [int(i) for i in np.random.default_rng(0).integers(0, 5, 200)], Lookup()
    for n in range(1, len(text)):
        assert guesser.guess(text[:n], 3) == Lookup().guess(text[:n], 3)


def test_a_draft_guesses_what_its_model_would_say(params, theirs):
    """Though the text goes on otherwise than guessed: what it keeps in its cache is what it was told."""
    draft = Draft(params, N_HEAD, 0.1)
    text = INPUTS[0][:]
    for told in ([], [3], [5, 6, 7], [1]):
        text += told
        assert draft.guess(text, 5) == their_greedy_ids(theirs, text, 5)
        text += draft.guess(text, 5)[:2]
        assert draft.guess(text, 4) == their_greedy_ids(theirs, text, 4)


def test_a_draft_stops_at_its_context(params):
    draft = Draft(params, N_HEAD, 0.1)
    assert len(draft.guess([1] * (TINY["n_ctx"] - 3), 9)) == 3
    assert draft.guess([1] * TINY["n_ctx"], 9) == []
    assert draft.guess([1] * (TINY["n_ctx"] + 5), 9) == []


# The text


def guessers(params, text):
    other = nest(random_tensors(TINY, seed=1), TINY["n_layer"])
    model, shared_out = parallel.shared(other, N_HEAD, 2)
    rng = np.random.default_rng(0)
    return {
        "lookup": Lookup,
        "right": lambda: Scripted(text),
        "wrong": lambda: Scripted(text, lambda place: True),
        "sometimes": lambda: Scripted(text, lambda place: rng.random() < 0.3),
        "itself": lambda: Draft(params, N_HEAD, 0.1),
        "another": lambda: Draft(other, N_HEAD, 0.1),
        "another, shared out": lambda: Draft(shared_out, N_HEAD, 0.1, model),
    }


@pytest.mark.parametrize("name", ["lookup", "right", "wrong", "sometimes", "itself", "another", "another, shared out"])
@pytest.mark.parametrize("eager", [True, False])
def test_greedy_ids_are_those_of_transformers(params, expected, layout, name, eager):
    for ids, new in zip(SEQUENCES, expected, strict=True):
        speculation = Speculation(params, N_HEAD, guessers(params, ids + new)[name], eager)
        assert list(speculation.generate_tokens(ids, N)) == new
        assert speculation.tokens == N >= speculation.passes >= 1 + (N - 1) // (1 + speculate.MOST_GUESSES)


@pytest.mark.parametrize("name", ["lookup", "right", "wrong", "sometimes", "itself"])
def test_a_seed_draws_what_it_draws_without(params, layout, name):
    for seed, ids in enumerate(SEQUENCES):
        alone = gpt2.generate(ids, params, N_HEAD, N, sample=make_sampler(0.9, top_k=20, seed=seed))
        speculation = Speculation(params, N_HEAD, guessers(params, ids + alone)[name])
        assert list(speculation.generate_tokens(ids, N, make_sampler(0.9, top_k=20, seed=seed))) == alone


@pytest.mark.parametrize("wrong", [lambda place: False, lambda place: place % 2])
def test_draws_are_distributed_as_the_model_says(params, theirs, wrong):
    """Chi-square over 2000 seeds: tokens 2 and 3 of 3, each one of the 3 likeliest, against transformers' logits."""

    def likeliest(ids):
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids])).logits[0, -1]
        values, tokens = torch.topk(logits.double(), 3)
        return list(zip(tokens.tolist(), torch.softmax(values, 0).tolist(), strict=True))

    start = INPUTS[0]
    chances = {
        (a, b, c): p_a * p_b * p_c
        for a, p_a in likeliest(start)
        for b, p_b in likeliest([*start, a])
        for c, p_c in likeliest([*start, a, b])
    }
    text = start + list(max(chances, key=chances.get))
    speculation = Speculation(params, N_HEAD, lambda: Scripted(text, wrong))
    n = 2000
    seen = collections.Counter(
        tuple(speculation.generate_tokens(start, 3, make_sampler(1.0, top_k=3, seed=seed))) for seed in range(n)
    )
    assert set(seen) <= set(chances)
    found, sure = zip(*((seen[key], n * p) for key, p in chances.items() if n * p >= 5), strict=True)
    rest = n - sum(sure)
    if rest >= 5:
        found, sure = [*found, n - sum(found)], [*sure, rest]
    assert stats.chisquare(found, np.array(sure) * sum(found) / sum(sure)).pvalue > 1e-4


@pytest.mark.parametrize("place", [0, 1, 5, N - 1])
def test_the_stop_id_ends_it_within_a_pass(params, expected, layout, place):
    ids, new = SEQUENCES[0], expected[0]
    stop_id = new[place]
    speculation = Speculation(params, N_HEAD, lambda: Scripted(ids + new))
    assert list(speculation.generate_tokens(ids, N, stop_id=stop_id)) == new[: new.index(stop_id)]


def test_it_may_fill_the_context_and_no_more(params, theirs, layout):
    ids = INPUTS[4]
    n = TINY["n_ctx"] - len(ids)
    new = their_greedy_ids(theirs, ids, n)
    for make_guesser in guessers(params, ids + new).values():
        speculation = Speculation(params, N_HEAD, make_guesser)
        assert list(speculation.generate_tokens(ids, n)) == new
        assert list(speculation.generate_tokens(ids, 0)) == []
        with pytest.raises(ValueError, match="the context is 128"):
            next(speculation.generate_tokens(ids, n + 1))
        with pytest.raises(ValueError, match="at least one token"):
            next(speculation.generate_tokens([], 1))


def test_the_caller_keeps_its_list(params):
    ids = [3, 1, 4]
    list(Speculation(params, N_HEAD).generate_tokens(ids, 5))
    assert ids == [3, 1, 4]


# How many guesses


def play(params, text, start, make_guesser, eager):
    """The Speculation after it was made to say a text, whatever the logits."""
    left = list(text[start:])
    speculation = Speculation(params, N_HEAD, make_guesser, eager)
    states = []
    for _ in speculation.generate_tokens(text[:start], len(text) - start, lambda logits: left.pop(0)):
        states.append(speculation.guessing)
    return speculation, states


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(speculate, "small_batch_model", lambda params, n_head: parallel.shared(params, n_head, 1))
    monkeypatch.setattr(speculate, "has_small_kernels", lambda: True)


def test_right_guesses_become_many(params, cheap):
    text = [int(i) for i in np.random.default_rng(0).integers(0, TINY["n_vocab"], 120)]
    guesser = Scripted(text)
    speculation, _ = play(params, text, 4, lambda: guesser, True)
    assert speculation.passes < 16 and speculation.guessed == speculation.tokens - speculation.passes
    assert guesser.asked[0] <= 4 < speculate.MOST_GUESSES == max(guesser.asked)


@pytest.mark.parametrize(("cost", "few", "then"), [(0, 3, 1), (0.1, 1, 0)])
def test_wrong_guesses_become_few_and_end(params, cheap, cost, few, then):
    """What costs nothing is watched from then on, a draft is not asked any more. The next text begins anew.

    A pass over four tokens costs no more than one over two, so three free guesses are few.
    """
    text = [int(i) for i in np.random.default_rng(0).integers(0, TINY["n_vocab"], 120)]
    guesser = Scripted(text, lambda place: True, cost)
    speculation, states = play(params, text, 4, lambda: guesser, True)
    n = sum(states)
    assert 5 < n < 35 and not any(states[n:])
    assert guesser.asked[n - 2] == few and set(guesser.asked[n:110]) == {then}
    assert speculation.passes == speculation.tokens == 116 and speculation.right == 0
    next(speculation.generate_tokens(text[:4], 100))
    assert speculation.guessing


def test_lookup_is_left_where_nothing_repeats(params, cheap):
    text = [int(i) for i in np.random.default_rng(0).permutation(TINY["n_vocab"])[:120]]
    speculation, states = play(params, text, 4, Lookup, True)
    assert states[0] and not states[-1]
    assert sum(states) < 35  # it costs that many passes 0.12 more each
    assert speculation.params is params and speculation.model is gpt2


@pytest.mark.parametrize("eager", [True, False])
def test_lookup_is_taken_up_where_the_text_repeats_itself(cheap, eager):
    params = nest(random_tensors(TINY | {"n_ctx": 300}), TINY["n_layer"])
    text = [int(i) for i in np.random.default_rng(0).permutation(TINY["n_vocab"])[:50]] + [5, 9, 2, 6] * 55
    speculation, states = play(params, text, 4, Lookup, eager)
    assert not states[40] and states[-1]
    assert speculation.passes < 110 and speculation.tokens == 266
    short = text[:100]  # too little is left to pay for the layout
    assert not any(play(params, short, 4, Lookup, False)[1])


def test_costs_decide():
    odds = Odds(0)
    odds.pass_cost = speculate.cheap_pass
    for _ in range(30):
        odds.saw(3, 3)
    assert odds.best() == speculate.MOST_GUESSES and odds.pay()
    dear = Odds(0.25)
    dear.pass_cost, dear.right, dear.tried = odds.pass_cost, 7, 10
    free = Odds(0)
    free.pass_cost, free.right, free.tried = odds.pass_cost, 7, 10
    assert 1 < dear.best() < free.best()
    odds.pass_cost = speculate.packed_pass
    assert odds.speed(1) < 1 < odds.speed(15)
    # the paper's equation 1 by hand: rate 0.5 and two guesses give 1.75 tokens a pass
    odds.right, odds.tried, odds.pass_cost = 1, 2, lambda n: 1
    assert odds.speed(2) == 1.75


# The command line


@pytest.fixture
def inside(capfd, tiny_models_dir):
    def run(*arguments):
        flags = ["--model_size", "tiny", "--models_dir", str(tiny_models_dir)]
        code = cli.run([str(argument) for argument in (*flags, *arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("how", [["lookup"], ["auto"], ["auto", "--draft_model", "tiny"]])
@pytest.mark.parametrize("flags", [[], ["--temperature", 1, "--seed", 3, "--n_samples", 2]])
def test_the_text_is_the_same(inside, how, flags):
    for prompt in PROMPTS:
        _, plain, _ = inside(*flags, "--n_tokens_to_generate", 30, "--stream", "--", prompt)
        code, out, err = inside(*flags, "--n_tokens_to_generate", 30, "--speculate", *how, "--", prompt)
        assert (code, out) == (0, plain)
        assert "tokens: " in err and "passes: " in err and "tokens/s" in err


def test_the_report_counts(inside):
    _, _, err = inside("x", "--n_tokens_to_generate", 40, "--draft_model", "tiny")
    tokens, passes, each, guessed, right = map(float, re.findall(r"[\d.]+", err)[:5])
    assert err.startswith("note: tokens: 40, passes: ")
    assert guessed >= right == tokens - passes
    assert each == pytest.approx(tokens / passes, abs=0.01)


def test_counts_when_the_first_token_is_the_stop(params, expected):
    speculation = Speculation(params, N_HEAD)
    assert list(speculation.generate_tokens(SEQUENCES[0], N, stop_id=expected[0][0])) == []
    assert speculation.report(1.0).startswith("tokens: 0, passes: 1 (0.00 tokens each), guesses: 0, right: 0, 0.0")
    list(speculation.generate_tokens(SEQUENCES[0], 3))
    speculation.count_anew()
    assert speculation.report(1.0).startswith("tokens: 0, passes: 0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--speculate", "often"], ["--speculate", "often", "lookup"]),
        (["x", "--speculate", "lookup", "--draft_model", "tiny"], ["--draft_model", "--speculate lookup"]),
        (["x", "--draft_model", "other"], ["other (300 tokens)", "tiny (400 tokens)", "vocabulary"]),
    ],
)
def test_bad_input(capfd, tmp_path, tiny_models_dir, arguments, said):
    shutil.copytree(tiny_models_dir / "tiny", tmp_path / "tiny")
    (tmp_path / "other").mkdir()
    write_byte_vocabulary(tmp_path / "other", 300)
    write_safetensors(tmp_path / "other", TINY | {"n_vocab": 300}, random_tensors(TINY | {"n_vocab": 300}))
    code = cli.run(["--model_size", "tiny", "--models_dir", str(tmp_path), *arguments])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for part in said:
        assert part in err
