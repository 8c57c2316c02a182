"""engines/batching.py and gpt2.py --prompts_file: every continuation is the one that its prompt gets alone."""

import gc
import json
import os
import re
import signal
import threading
import time
import weakref

import numpy as np
import pytest

import gpt2
from cli import session
from engines import batching
from sampling import make_sampler
from tests.conftest import INPUTS, N_HEAD, N_NEW, PROMPTS, ROOT, TINY, contents, their_logits
from tests.programs import SECONDS, assert_mistake, command, started

LINES = [prompt.replace("\n", " ") for prompt in PROMPTS]


def generate_batch(model_and_params, requests, batch_size, n=N_NEW, stop_id=None):
    model, params = model_and_params
    return batching.generate_batch(requests, params, N_HEAD, n, batch_size, stop_id, model)


def greedy(inputs):
    return [(i, ids, [np.argmax]) for i, ids in enumerate(inputs)]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_each_row_is_what_transformers_generate_alone(model_and_params, expected, batch_size):
    results = generate_batch(model_and_params, greedy(INPUTS), batch_size)
    assert sorted(results) == [((i, 1), ids, "length") for i, ids in enumerate(expected)]


def test_the_samples_of_a_prompt_share_its_prefill_and_are_those_of_a_run_alone(model_and_params, params, monkeypatch):
    inputs, computed, prefill = INPUTS[:5], [], batching.prefill_packed
    requests = [(i, ids, [make_sampler(1.0, seed=s) for s in (3, 4, 3)]) for i, ids in enumerate(inputs)]
    with monkeypatch.context() as m:
        m.setattr(batching, "prefill_packed", lambda texts, *a: (computed.extend(texts), prefill(texts, *a)))
        found = {key: ids for key, ids, _ in generate_batch(model_and_params, requests, 4)}
    assert [ids for ids, _ in computed] == [ids[:-1] for ids in inputs if len(ids) > 1]
    for i, ids in enumerate(inputs):
        alone = [gpt2.generate(ids, params, N_HEAD, N_NEW, sample=make_sampler(1.0, seed=s)) for s in (3, 4)]
        assert [found[i, 1], found[i, 2], found[i, 3]] == [*alone, alone[0]]
        assert alone[0] != alone[1]


def test_other_rows_do_not_change_a_row(model_and_params):
    """More or fewer rows, other rows, another position; bit for bit in the compiled engine."""
    runs = []
    for others, batch_size in (([], 8), (INPUTS[:3], 8), (INPUTS[3:], 8), (INPUTS, 11)):
        runs.append(seen := [])
        own = ("it", INPUTS[5], [lambda logits, seen=seen: seen.append(logits.copy()) or np.argmax(logits)])
        list(generate_batch(model_and_params, [*greedy(others), own], batch_size))
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], rtol=0, atol=1e-5 if model_and_params[0] is gpt2 else 0)


@pytest.mark.parametrize("lengths", [[5, 1, 2, 90], [40, 3, 100], [1, 1], [100, 100]])
def test_prompts_that_start_together_are_computed_together(model_and_params, params, lengths, monkeypatch):
    """In passes of up to PREFILL_CHUNK tokens, a prompt in two of them if need be; with the results of each alone."""
    model, sizes, forward = model_and_params[0], [], model_and_params[0].gpt2
    monkeypatch.setattr(gpt2, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(model, "gpt2", lambda ids, *a, **k: (sizes.append(np.size(ids)), forward(ids, *a, **k))[1])
    inputs = [np.random.default_rng(n).integers(0, TINY["n_vocab"], n).tolist() for n in lengths]
    found = {i: ids for (i, _), ids, _ in generate_batch(model_and_params, greedy(inputs), 9, n=2)}
    total = sum(lengths) - len(lengths)
    assert sizes == [*[64] * (total // 64), *[total % 64] * (total % 64 > 0), len(lengths), len(lengths)]
    assert found == {i: gpt2.generate(ids, params, N_HEAD, 2) for i, ids in enumerate(inputs)}


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_a_scored_prompt_has_the_logits_of_transformers_and_is_computed(
    model_and_params, theirs, expected, monkeypatch, chunk
):
    monkeypatch.setattr(gpt2, "PREFILL_CHUNK", chunk)
    model, params = model_and_params
    for ids, continuation in zip(INPUTS, expected, strict=True):
        (row,) = batching.new_rows([("it", ids, [np.argmax])], params, N_NEW, None, model)
        logits = list(batching.score_prompt(row.prompt, params, N_HEAD, model))
        assert len(logits) == len(ids) - 1
        if logits:
            np.testing.assert_allclose(logits, their_logits(theirs, [ids])[0][:-1], rtol=1e-4, atol=1e-5)
        batch = batching.Batch(params, N_HEAD, 1, model)
        monkeypatch.setattr(batching, "prefill_packed", lambda *_: pytest.fail("computed again"))
        while not batch.step(iter([row] if not batch.rows else []))[0].stop_reason:
            pass
        assert row.ids == continuation


def test_the_next_prompt_takes_the_place_of_a_complete_row_at_once(model_and_params, monkeypatch):
    """With rows of unequal length every pass has batch_size rows while prompts are waiting."""
    sizes, advance_rows, stop, lengths = [], batching.advance_rows, 5, [3, 9, 1, 4, 6, 2, 3]
    monkeypatch.setattr(batching, "advance_rows", lambda rows, *a: sizes.append(len(rows)) or advance_rows(rows, *a))
    scripts = [iter([7] * n + [stop]) for n in lengths]
    requests = [(i, INPUTS[i], [lambda logits, script=script: next(script)]) for i, script in enumerate(scripts)]
    results = sorted(generate_batch(model_and_params, requests, 3, n=20, stop_id=stop))
    assert results == [((i, 1), [7] * n, "end_of_text") for i, n in enumerate(lengths)]
    assert max(sizes) == 3
    assert sum(sizes) == sum(lengths) + len(lengths)  # a pass for every token and one for the stop
    assert sizes == sorted(sizes, reverse=True)


def test_requests_are_taken_and_memory_is_used_for_batch_size_rows_at_a_time(model_and_params, monkeypatch):
    model, _ = model_and_params
    alive, most, taken, make = weakref.WeakSet(), [], [], model.KVCache
    monkeypatch.setattr(model, "KVCache", lambda n_max: alive.add(cache := make(n_max)) or cache)
    requests = (taken.append(request) or request for request in greedy(INPUTS[:6]))
    for _ in generate_batch(model_and_params, requests, 2, n=4):
        gc.collect(0)
        most.append((len(taken), len(alive)))
    assert most[0][0] == 2 and len(taken) == 6
    assert max(n_alive for _, n_alive in most) <= 3 * TINY["n_layer"]  # two rows, and the one that was just yielded


def test_nothing_to_generate_and_invalid_requests(model_and_params):
    nothing = [((0, 1), [], "length"), ((1, 1), [], "length")]
    assert list(generate_batch(model_and_params, greedy(INPUTS[:2]), 8, n=0)) == nothing
    assert list(generate_batch(model_and_params, [], 8)) == []
    for requests, batch_size, message in (
        (greedy([[]]), 8, "at least one token"),
        (greedy([[1] * 120]), 8, "120 tokens .* 24 more .* 144.* 128"),
        (greedy(INPUTS), 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            list(generate_batch(model_and_params, requests, batch_size))


def test_in_order_yields_each_value_as_soon_as_possible():
    results = iter([(2, "c"), (0, "a"), (1, "b"), (4, "e"), (3, "d")])
    ordered = batching.in_order(results, range(5))
    assert next(ordered) == "a"
    assert next(results) == (1, "b")  # not taken yet
    assert list(batching.in_order([(1, "b"), (2, "c"), (0, "a")], range(3))) == ["a", "b", "c"]


# The command line


@pytest.fixture
def flags(tiny_flags):
    return [*tiny_flags, "--n_tokens_to_generate", "10"]


def records(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def continue_file(inside, flags, tmp_path):
    """A function that writes prompts to a file and continues them; returns the records on standard output."""

    def continue_prompts(prompts, *arguments, err=b"", code=0):
        (tmp_path / "prompts").write_text(prompts, encoding="utf-8", newline="")
        found, out, said = inside("--prompts_file", tmp_path / "prompts", *flags, *arguments)
        assert (found, said) == (code, err)
        return records(out)

    return continue_prompts


@pytest.mark.parametrize("sampling", [[], ["--temperature", 1, "--top_k", 30, "--seed", 5]])
def test_one_line_per_prompt_in_order(inside, continue_file, flags, sampling):
    found = continue_file("\n".join(LINES), "--batch_size", 3, *sampling)
    assert [record["prompt"] for record in found] == LINES
    for record in found:
        assert (record["text"] + "\n").encode() == inside(*flags, *sampling, "--", record["prompt"])[1]
        assert (record["sample"], record["stop_reason"], len(record["ids"])) == (1, "length", 10)


def test_samples_are_those_of_one_prompt(inside, continue_file, flags):
    sampling = ["--n_samples", 3, "--temperature", 1, "--seed", 7]
    found = continue_file("Hello\n\nworld\n", *sampling)
    assert [(r["prompt"], r["sample"]) for r in found] == [(p, i) for p in ("Hello", "", "world") for i in (1, 2, 3)]
    one = "".join(f"=== sample {r['sample']} ===\n{r['text']}\n" for r in found[:3])
    assert inside("Hello", *flags, *sampling)[1] == one.encode()
    assert inside("Hello", *flags, *sampling, "--batch_size", 2)[1] == one.encode()


def test_line_ends_byte_order_marks_and_standard_input(continue_file, inside, flags):
    assert [record["prompt"] for record in continue_file("\ufeffa\r\n\r\nb")] == ["a", "", "b"]
    assert [record["prompt"] for record in continue_file("\n")] == [""]
    code, out, err = inside("--prompts_file", "-", *flags, typed=b"a\n\nb")
    assert (code, err, [record["prompt"] for record in records(out)]) == (0, b"", ["a", "", "b"])


def test_a_prompt_that_is_too_long_gets_an_error_record_once(continue_file, tiny, tmp_path):
    output, long = tmp_path / "output", "x" + " x" * 59
    assert len(tiny[0].encode(long)) == 119
    note, sampling = b"note: 2 of 6 lines contain an error and no text\n", ["--n_samples", 2, "--temperature", 1]
    found = continue_file(f"one\n{long}\ntwo\n", *sampling, err=note)
    assert [r["stop_reason"] for r in found] == ["length", "length", "error", "error", "length", "length"]
    assert found[2]["text"] == "" and found[2]["ids"] == []
    assert "prompt tokens + 10 to generate" in found[2]["error"] and "128" in found[2]["error"]
    error = b"gpt2.py: error: 1 of 1 lines contain an error and no text; correct the prompts\n"
    continue_file(long, "--output", output, err=error, code=2)
    complete = f"note: {output} is complete; for other options, name another --output\n".encode()
    continue_file(long, "--output", output, err=complete)
    assert [record["stop_reason"] for record in records(output.read_bytes())] == ["error"]


def test_two_processes_do_not_write_to_one_output(inside, flags, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "p").write_text("a\n", encoding="utf-8")
    with open(tmp_path / "output", "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        result = inside(*flags, "--prompts_file", tmp_path / "p", "--output", tmp_path / "output")
    assert_mistake(result, f"another process writes to --output {tmp_path / 'output'}")


def test_a_truncated_output_is_completed(continue_file, tmp_path):
    """Wherever it was cut: between lines, within a line, within a character."""
    prompts, sampling = "\n".join(LINES), ["--temperature", 1, "--seed", 3]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert continue_file(prompts, *sampling, "--output", whole) == []
    data = whole.read_bytes()
    assert records(data) == continue_file(prompts, *sampling)
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in (0, ends[0], ends[4] + 1, ends[6] - 1, len(data) - 2, data.index("你".encode()) + 1):
        part.write_bytes(data[:cut])
        continue_file(prompts, *sampling, "--output", part)
        assert part.read_bytes() == data


def test_a_stopped_run_is_continued(tiny_flags, inside, tmp_path):
    """Stopped by Ctrl-C, then killed."""
    prompts, output, whole = tmp_path / "prompts", tmp_path / "output", tmp_path / "whole"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(40)), encoding="utf-8")
    flags = [*tiny_flags, "--n_tokens_to_generate", "80", "--prompts_file", str(prompts)]
    sizes = [0]
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        with started(command(*flags, "--output", output)) as process:
            while not output.exists() or output.stat().st_size <= sizes[-1]:
                time.sleep(0.01)
            process.send_signal(how)
            process.communicate(timeout=SECONDS)
        assert process.returncode == code
        sizes.append(output.stat().st_size)
    assert output.read_bytes().count(b"\n") < 40, "not stopped in the middle"
    assert inside(*flags, "--output", output)[0] == inside(*flags, "--output", whole)[0] == 0
    assert output.read_bytes() == whole.read_bytes()


def test_the_documentation_shows_what_is_printed(inside, tmp_path):
    shown = re.search(r'^\{"prompt": .*$', (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    (tmp_path / "p").write_text(json.loads(shown)["prompt"] + "\n", encoding="utf-8")
    flags = ["--model_size", "shakespeare", "--models_dir", ROOT / "models", "--n_tokens_to_generate", 12]
    assert inside("--prompts_file", tmp_path / "p", *flags)[1].decode() == shown + "\n"


def test_samples_that_are_missing_are_added(continue_file, tmp_path):
    output, sampling = tmp_path / "output", ["--temperature", 1, "--seed", 3, "--n_samples"]
    expected = continue_file("a\nb\na\n", *sampling, 3)
    kept = [expected[i] for i in (4, 7)]  # the second sample of b, and of a
    output.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    continue_file("a\nb\na\n", *sampling, 3, "--output", output)
    assert records(output.read_bytes()) == kept + [expected[i] for i in (0, 2, 3, 5, 6, 7, 8)]


def test_a_fifo_of_prompts(continue_file, inside, flags, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_text, args=("a\nb\n",))
    writer.start()
    assert records(inside("--prompts_file", tmp_path / "fifo", *flags)[1]) == continue_file("a\nb\n")
    writer.join()


def test_finished_prompts_are_skipped_wherever_they_stand(continue_file, tmp_path, monkeypatch):
    output = tmp_path / "output"
    continue_file("a\nb\na\n", "--output", output)
    continue_file("c\na\nb\na\na\n", "--output", output)
    assert [record["prompt"] for record in records(output.read_bytes())] == ["a", "b", "a", "c", "a"]
    monkeypatch.setattr(session, "load_encoder_hparams_and_params", lambda *_: pytest.fail("the model is loaded"))
    note = f"note: {output} is complete; for other options, name another --output\n".encode()
    continue_file("a\nb\na\nc\n", "--output", output, err=note)
    output.write_bytes(complete := output.read_bytes()[:-1])
    continue_file("a\nb\na\nc\n", "--output", output, err=note)
    assert output.read_bytes() == complete


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("none", ["cannot open '{tmp}/none'", "No such file"]),
        ("empty", ["{tmp}/empty is empty", "one prompt per line"]),
        ("latin", ["{tmp}/latin is not UTF-8", "0xe9", "iconv"]),
        ("p --output {tmp}/none/out", ["cannot open '{tmp}/none/out'"]),
        ("p --output {tmp}", ["cannot open '{tmp}'"]),
        ("p --output {tmp}/p", ["{tmp}/p is the file of the prompts"]),
        ("p --output {tmp}/other", ["{tmp}/other, line 2", "another --output"]),
        ("p --output {tmp}/list", ["{tmp}/list, line 1"]),
        ("p --output {tmp}/notes", ["{tmp}/notes, line 1", "another --output"]),
        ("p --output /dev/full", ["/dev/full is not a file"]),
        ("p --output -", ["--output - is not a file", "standard output"]),
        ("p --output {tmp}/numbers", ["{tmp}/numbers, line 1", "another --output"]),
        ("p --output {tmp}/new --model_size ../x", ["../x"]),
        ("p x", ["one of a prompt", "--prompts_file"]),
        ("p --batch_size 0", ["--batch_size", "at least 1"]),
        ("p --stream", ["--stream", "--prompts_file"]),
        ("p --speculate lookup", ["--speculate lookup", "--prompts_file"]),
        ("p --draft_model tiny", ["--draft_model", "--prompts_file"]),
    ],
)
def test_mistakes_change_no_file(inside, flags, tmp_path, arguments, words):
    line = b'{"prompt": "a", "sample": 1, "stop_reason": "length"}\n'
    before = {"empty": b"", "latin": b"caf\xe9\n", "p": b"a\nb\n", "other": line + b"hello\n", "list": b"[1]\n"}
    before["numbers"] = line.replace(b"1", b"1.5")
    before["notes"] = b"precious, and without a line break"
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    result = inside(*flags, "--prompts_file", *f"{{tmp}}/{arguments}".format(tmp=tmp_path).split())
    assert_mistake(result, *(word.format(tmp=tmp_path) for word in words))
    assert contents(tmp_path) == before
