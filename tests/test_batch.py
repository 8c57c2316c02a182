"""batch.py and gpt2.py --prompts_file: many prompts at once, each with what it would get alone."""

import gc
import json
import os
import re
import signal
import sys
import time
import weakref

import numpy as np
import pytest

import gpt2
from cli import generate as cli
from engines import batching as batch
from engines import parallel
from sampling import make_sampler
from tests.conftest import PROMPTS, ROOT, TINY
from tests.random_model import random_tensors
from tests.test_cli import SECONDS, command, started
from tests.test_cli import run as run_program
from tests.test_gpt2 import their_greedy_ids
from tests.test_parallel import hugging_face_model
from weights.names import nest

N = 12
RNG = np.random.default_rng(5)
INPUTS = [RNG.integers(0, TINY["n_vocab"], n).tolist() for n in (7, 1, 30, 2, 100, 13, 1, 64, 5, 9)]


@pytest.fixture(scope="module")
def params():
    return nest(random_tensors(TINY), TINY["n_layer"])


@pytest.fixture(scope="module", params=["gpt2", "shared"])
def model_and_params(request, params):
    return (gpt2, params) if request.param == "gpt2" else parallel.shared(params, TINY["n_head"], 2)


@pytest.fixture(scope="module")
def expected():
    """What transformers continue each input with."""
    theirs = hugging_face_model(TINY, random_tensors(TINY))
    return [their_greedy_ids(theirs, ids, N) for ids in INPUTS]


def run(model_and_params, requests, batch_size, n=N, stop_id=None):
    model, params = model_and_params
    return list(batch.generate_batch(requests, params, TINY["n_head"], n, batch_size, stop_id, model))


def greedy(inputs):
    return [(i, ids, [np.argmax]) for i, ids in enumerate(inputs)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 50])
def test_each_row_is_what_transformers_give_it_alone(model_and_params, expected, batch_size):
    results = run(model_and_params, greedy(INPUTS), batch_size)
    assert {key: ids for key, ids, _ in results} == {(i, 1): ids for i, ids in enumerate(expected)}
    assert {reason for *_, reason in results} == {"length"}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_seeded_samples_are_those_of_a_run_alone(model_and_params, params, batch_size):
    requests = [(i, ids, [make_sampler(1.0, seed=s) for s in (3, 4, 3)]) for i, ids in enumerate(INPUTS)]
    found = {key: ids for key, ids, _ in run(model_and_params, requests, batch_size)}
    for i, ids in enumerate(INPUTS):
        alone = [gpt2.generate(ids, params, TINY["n_head"], N, sample=make_sampler(1.0, seed=s)) for s in (3, 4)]
        assert [found[i, 1], found[i, 2], found[i, 3]] == [*alone, alone[0]]
        assert alone[0] != alone[1]


def recorder(seen):
    def sample(logits):
        seen.append(logits.copy())
        return np.argmax(logits)

    return sample


def test_neighbours_do_not_change_a_row(params):
    """With more rows or fewer beside it, other rows, in another place; bit for bit where test_parallel finds it so."""
    weights = parallel.shared(params, TINY["n_head"], 2)
    runs = []
    for others, batch_size in (([], 8), (INPUTS[:3], 8), (INPUTS[3:], 8), (INPUTS, 3), (INPUTS, 11)):
        seen = []
        run(weights, [*greedy(others), ("it", INPUTS[5], [recorder(seen)])], batch_size)
        runs.append(np.array(seen))
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], rtol=0, atol=0 if parallel.has_small_kernels() else 1e-5)


def test_a_row_that_ends_makes_room_at_once(model_and_params, monkeypatch):
    """Rows of unequal length: no pass has fewer rows than are left to do, and none more than batch_size."""
    model, params = model_and_params
    sizes, whole = [], model.gpt2

    def counted(ids, *args, **kwargs):
        if np.ndim(ids) == 2:
            sizes.append(len(ids))
        return whole(ids, *args, **kwargs)

    monkeypatch.setattr(model, "gpt2", counted)
    stop, lengths = 5, [3, 9, 1, 4, 6, 2, 3]

    def stopping(n):
        left = [stop if i == n else 7 for i in range(n + 1)]
        return lambda logits: left.pop(0)

    requests = [(i, INPUTS[i], [stopping(n)]) for i, n in enumerate(lengths)]
    results = run((model, params), requests, 3, n=20, stop_id=stop)
    assert {key[0]: len(ids) for key, ids, _ in results} == dict(enumerate(lengths))
    assert {reason for *_, reason in results} == {"end_of_text"}
    assert max(sizes) == 3
    assert sum(sizes) == sum(lengths)  # a pass for every token but the first, and one for the stop
    assert sizes == sorted(sizes, reverse=True)  # full until there is nothing left to begin


def test_memory_is_that_of_the_rows_at_work(model_and_params, monkeypatch):
    model, params = model_and_params
    alive, most, make = weakref.WeakSet(), [], model.KVCache

    def counted(n_max):
        cache = make(n_max)
        alive.add(cache)
        return cache

    monkeypatch.setattr(model, "KVCache", counted)
    for _ in batch.generate_batch(greedy(INPUTS * 2), params, TINY["n_head"], N, 2, model=model):
        gc.collect()
        most.append(len(alive))
    assert max(most) <= 3 * TINY["n_layer"]  # two rows, and the one that has just been yielded


def test_the_samples_of_a_prompt_share_its_passes(model_and_params, monkeypatch):
    model, params = model_and_params
    fed, prefill = [], model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids, *a: (fed.append(len(ids)), prefill(ids, *a))[1])
    requests = [("a", INPUTS[2], [make_sampler(1.0, seed=i) for i in range(8)]), ("b", INPUTS[0], [np.argmax])]
    results = run((model, params), requests, 4)
    assert fed == [len(INPUTS[2]), len(INPUTS[0])]
    assert len({tuple(ids) for (key, _), ids, _ in results if key == "a"}) == 8  # and are different texts


def test_requests_are_asked_for_when_there_is_room(model_and_params):
    asked = []

    def requests():
        for request in greedy(INPUTS):
            asked.append(request[0])
            yield request

    model, params = model_and_params
    results = batch.generate_batch(requests(), params, TINY["n_head"], N, 2, model=model)
    next(results)
    assert asked == [0, 1]


def test_nothing_to_generate(model_and_params):
    assert run(model_and_params, greedy(INPUTS[:2]), 8, n=0) == [((0, 1), [], "length"), ((1, 1), [], "length")]
    assert run(model_and_params, [], 8) == []


def test_what_does_not_fit_is_refused(model_and_params):
    with pytest.raises(ValueError, match="at least one token"):
        run(model_and_params, greedy([[]]), 8)
    with pytest.raises(ValueError, match="120 tokens and 12 more are 132; the context is 128"):
        run(model_and_params, greedy([[1] * 120]), 8)


def test_in_order():
    results = [(2, "c"), (0, "a"), (1, "b"), (4, "e"), (3, "d")]
    taken = []

    def watched():
        for result in results:
            taken.append(result[0])
            yield result

    ordered = batch.in_order(watched(), range(5))
    assert next(ordered) == "a" and taken == [2, 0]  # as soon as it can be
    assert list(ordered) == ["b", "c", "d", "e"]


# The command line


@pytest.fixture
def flags(tiny_models_dir):
    return ["--model_size", "tiny", "--models_dir", str(tiny_models_dir), "--n_tokens_to_generate", "10"]


@pytest.fixture
def inside(capfd):
    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(p.replace("\n", " ") + "\n" for p in PROMPTS), encoding="utf-8")
    return path


def records(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("sampling", [[], ["--temperature", 1, "--top_k", 30, "--seed", 5]])
def test_a_line_for_each_prompt_in_order(inside, flags, prompts_file, sampling):
    code, out, err = inside("--prompts_file", prompts_file, "--batch_size", 3, *flags, *sampling)
    assert (code, err) == (0, "")
    prompts = prompts_file.read_text(encoding="utf-8").split("\n")[:-1]
    assert [record["prompt"] for record in records(out)] == prompts
    for record in records(out):
        alone = inside(*flags, *sampling, "--", record["prompt"])[1]
        assert record["text"] + "\n" == alone
        assert (record["sample"], record["stop_reason"], len(record["ids"])) == (1, "length", 10)


def test_samples_are_those_of_one_prompt(inside, flags, tmp_path):
    (tmp_path / "p").write_text("Hello\n\nworld\n", encoding="utf-8")
    sampling = ["--n_samples", 3, "--temperature", 1, "--seed", 7]
    found = records(inside("--prompts_file", tmp_path / "p", *flags, *sampling)[1])
    assert [(r["prompt"], r["sample"]) for r in found] == [(p, i) for p in ("Hello", "", "world") for i in (1, 2, 3)]
    one = inside("Hello", *flags, *sampling)[1]
    assert one == "".join(f"=== sample {r['sample']} ===\n{r['text']}\n" for r in found[:3])


def test_several_samples_at_once_are_those_made_one_by_one(inside, flags):
    sampling = ["Hello", "--n_samples", 5, "--temperature", 1, "--seed", 7, *flags]
    assert inside(*sampling) == inside(*sampling, "--stream") == inside(*sampling, "--batch_size", 2)


def test_line_ends_and_marks(inside, flags, tmp_path):
    (tmp_path / "p").write_bytes("\ufeffa\r\n\r\nb".encode())
    assert [r["prompt"] for r in records(inside("--prompts_file", tmp_path / "p", *flags)[1])] == ["a", "", "b"]
    (tmp_path / "p").write_bytes(b"\n")
    assert [r["prompt"] for r in records(inside("--prompts_file", tmp_path / "p", *flags)[1])] == [""]


def test_a_prompt_that_is_too_long_gets_an_error_record(inside, flags, tmp_path):
    (tmp_path / "p").write_text(f"one\n{'x ' * 200}\ntwo\n", encoding="utf-8")
    code, out, err = inside("--prompts_file", tmp_path / "p", *flags, "--n_samples", 2)
    found = records(out)
    assert code == 0
    assert err == "note: 2 of 6 lines hold an error and no text\n"
    assert [r["stop_reason"] for r in found] == ["length", "length", "error", "error", "length", "length"]
    assert found[2]["text"] == "" and found[2]["ids"] == []
    assert "prompt tokens + 10 to generate" in found[2]["error"] and "128" in found[2]["error"]
    (tmp_path / "p").write_text("x " * 200, encoding="utf-8")  # nothing but what does not fit
    assert records(inside("--prompts_file", tmp_path / "p", *flags)[1])[0]["stop_reason"] == "error"


def test_an_interrupted_run_goes_on(inside, flags, prompts_file, tmp_path):
    """From wherever it was cut: between lines, within a line, within a character."""
    whole = tmp_path / "whole.jsonl"
    arguments = ["--prompts_file", prompts_file, "--n_samples", 2, "--temperature", 1, "--seed", 3, *flags]
    assert inside(*arguments, "--output", whole) == (0, "", "")
    assert whole.read_text(encoding="utf-8") == inside(*arguments)[1]
    data, part = whole.read_bytes(), tmp_path / "part.jsonl"
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in (0, ends[0], ends[4], ends[4] + 1, ends[6] - 1, len(data) - 2, data.index("你".encode()) + 1):
        part.write_bytes(data[:cut])
        assert inside(*arguments, "--output", part) == (0, "", "")
        assert part.read_bytes() == data


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_at_any_time_goes_on(flags, inside, tmp_path, how):
    prompts, output, whole = tmp_path / "p", tmp_path / "out", tmp_path / "whole"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(60)), encoding="utf-8")
    flags = [*flags[:-1], "100", "--prompts_file", str(prompts)]
    with started(command(*flags, "--output", output)) as process:
        while not (output.exists() and output.read_bytes()):
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=SECONDS)
    n_lines = output.read_bytes().count(b"\n")
    assert 0 < n_lines < 60, "not stopped in the middle"
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert inside(*flags, "--output", output)[0] == inside(*flags, "--output", whole)[0] == 0
    assert output.read_bytes() == whole.read_bytes()


def test_readme_shows_what_is_printed(inside, tmp_path):
    shown = re.search(r'^\{"prompt": .*$', (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    (tmp_path / "p").write_text(json.loads(shown)["prompt"] + "\n", encoding="utf-8")
    flags = ["--model_size", "shakespeare", "--models_dir", ROOT / "models", "--n_tokens_to_generate", 12]
    assert inside("--prompts_file", tmp_path / "p", *flags)[1] == shown + "\n"


def test_prompts_that_are_done_are_skipped_wherever_they_stand(inside, flags, tmp_path):
    prompts, output = tmp_path / "p", tmp_path / "out"
    prompts.write_text("a\nb\na\n", encoding="utf-8")
    inside("--prompts_file", prompts, *flags, "--output", output)
    prompts.write_text("c\na\nb\na\na\n", encoding="utf-8")
    assert inside("--prompts_file", prompts, *flags, "--output", output) == (0, "", "")
    assert [r["prompt"] for r in records(output.read_text(encoding="utf-8"))] == ["a", "b", "a", "c", "a"]


def test_all_done_loads_no_model(inside, flags, tmp_path, monkeypatch):
    (tmp_path / "p").write_text("a\n", encoding="utf-8")
    inside("--prompts_file", tmp_path / "p", *flags, "--output", tmp_path / "out")
    monkeypatch.setattr(cli, "load_encoder_hparams_and_params", lambda *_: pytest.fail("loaded"))
    code, out, err = inside("--prompts_file", tmp_path / "p", *flags, "--output", tmp_path / "out")
    assert (code, out) == (0, "") and f"{tmp_path / 'out'} has all of it" in err


def test_a_complete_last_line_is_kept_without_its_end(inside, flags, tmp_path):
    prompts, output = tmp_path / "p", tmp_path / "out"
    prompts.write_text("a\nb\n", encoding="utf-8")
    arguments = ["--prompts_file", prompts, *flags, "--temperature", 1, "--output", output]  # no seed
    inside(*arguments)
    first, second = output.read_text(encoding="utf-8").splitlines()
    output.write_text(first, encoding="utf-8")
    assert inside(*arguments)[0] == 0
    assert output.read_text(encoding="utf-8").splitlines()[0] == first
    output.write_text(first + "\n" + second, encoding="utf-8")
    assert inside(*arguments)[0] == 0
    assert output.read_text(encoding="utf-8") == first + "\n" + second  # nothing to do, nothing done


def test_what_did_not_fit_is_tried_again(inside, flags, tiny, tmp_path):
    prompts, output, text = tmp_path / "p", tmp_path / "out", "x"
    while len(tiny[0].encode(text)) + 10 <= TINY["n_ctx"]:
        text += " x"
    prompts.write_text(text, encoding="utf-8")
    inside("--prompts_file", prompts, *flags, "--output", output)
    flags[-1] = "1"
    assert inside("--prompts_file", prompts, *flags, "--output", output) == (0, "", "")
    assert [r["stop_reason"] for r in records(output.read_text(encoding="utf-8"))] == ["error", "length"]


def test_prompts_from_standard_input(flags, tmp_path):
    code, out, err = run_program("--prompts_file", "-", *flags, input=b"a\n\nb")
    assert (code, err) == (0, b"")
    assert [r["prompt"] for r in records(out.decode("utf-8"))] == ["a", "", "b"]


def test_a_bar_on_a_terminal_makes_room_for_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for item in cli.with_bar(iter("abc"), 3, "letter", printed=True):
        print(item, file=sys.stderr)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() in ("a", "b", "c")] == ["a", "b", "c"]
    assert any("generating" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts_file", "{tmp}/none"], ["cannot open '{tmp}/none'", "No such file"]),
        (["--prompts_file", "{tmp}"], ["cannot open '{tmp}'", "directory"]),
        (["--prompts_file", "{tmp}/empty"], ["{tmp}/empty is empty", "a prompt a line"]),
        (["--prompts_file", "{tmp}/latin"], ["{tmp}/latin is not UTF-8", "0xe9", "iconv"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}/none/out"], ["cannot open '{tmp}/none/out'"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}"], ["cannot open '{tmp}'"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}/p"], ["{tmp}/p is the prompts' own file"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}/other"], ["{tmp}/other, line 2", "another --output"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}/list"], ["{tmp}/list, line 1"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}/notes"], ["{tmp}/notes, line 1", "another --output"]),
        (["--prompts_file", "{tmp}/p", "--output", "/dev/full"], ["/dev/full is not a file"]),
        (["--prompts_file", "{tmp}/p", "--output", "{tmp}/new", "--model_size", "../x"], ["../x"]),
        (["--prompts_file", "{tmp}/p", "--batch_size", "0"], ["--batch_size", "at least 1"]),
        (["--prompts_file", "{tmp}/p", "x"], ["give one of a prompt", "--prompts_file"]),
        (["--prompts_file", "{tmp}/p", "--interactive"], ["--interactive"]),
        (["--prompts_file", "{tmp}/p", "--stream"], ["--stream"]),
        (["--prompts_file", "{tmp}/p", "--speculate", "lookup"], ["--speculate lookup", "--prompts_file"]),
        (["--prompts_file", "{tmp}/p", "--draft_model", "tiny"], ["--draft_model", "--prompts_file"]),
        (["x", "--output", "{tmp}/out"], ["--output", "--prompts_file"]),
    ],
)
def test_bad_input(inside, flags, tmp_path, arguments, said):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    (tmp_path / "p").write_text("a\nb\n", encoding="utf-8")
    line = '{"prompt": "a", "sample": 1, "stop_reason": "length"}\n'
    (tmp_path / "other").write_text(line + "hello\n", encoding="utf-8")
    (tmp_path / "list").write_text("[1]\n", encoding="utf-8")
    (tmp_path / "notes").write_text("precious, and without a line break", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = inside(*flags, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("gpt2.py: error: ")
    for part in said:
        assert part.format(tmp=tmp_path) in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written(inside, flags, prompts_file, tmp_path):
    (tmp_path / "out").touch(mode=0o400)
    code, _, err = inside("--prompts_file", prompts_file, *flags, "--output", tmp_path / "out")
    assert code == 2 and "Permission denied" in err
