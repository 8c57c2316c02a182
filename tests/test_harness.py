"""evaluate.py --tasks: item by item, what the harness's own class for transformers' models gives on the same folder."""

import functools
import importlib.util
import json
import os
import shutil
import sys
import types

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the harness imports huggingface_hub
pytest.importorskip("lm_eval")
import datasets
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from cli import evaluate as cli
from cli.harness import STOP, HarnessModel, StopAt
from cli.tasks import Tasks, namesake_first
from encoder import END_OF_TEXT
from tests.conftest import N_HEAD, PROMPTS, ROOT, TINY, one_line_error
from tests.programs import assert_mistake

QUESTIONS = [
    {"question": "The answer is", "choices": [" life", " the universe", " everything, and more", " life"], "label": 0},
    {"question": "A trailing space ", "choices": ["stays", "goes"], "label": 1},
    {"question": "", "choices": ["No context", "<|endoftext|>a"], "label": 0},
    {"question": "1, 2, 3, 4, " * 60, "choices": ["5", "6", "7, 8, 9"], "label": 2},
    {"question": "The answer is", "choices": [chr(i) for i in range(33, 127)], "label": 1},
    {"question": "你好，世界 🤗", "choices": ["世", " 🤗🤗"], "label": 1},
]
DOCUMENTS = [{"text": text} for text in (*filter(None, PROMPTS), "Dear Sir or Madam, 1 2 3. " * 40)]
GENERATIONS = [{"text": text, "gold": "life"} for text in (*filter(None, PROMPTS), "In 1942, " * 60)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/{name}.jsonl
    train: {folder}/{name}.jsonl
test_split: test
fewshot_split: train
output_type: {output_type}
{rest}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
doc_to_text: "{{text}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["IT", "-", "e"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = {
    "choice": ("multiple_choice", CHOICE, QUESTIONS),
    "rolling": ("loglikelihood_rolling", ROLLING, DOCUMENTS),
    "generate": ("generate_until", GENERATE, GENERATIONS),
}


@pytest.fixture(autouse=True, scope="session")
def no_description_of_the_machine():
    """The harness asks pip for all packages in each run, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory):
    """A folder with the tasks in the harness's format, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (output_type, rest, documents) in TASKS.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        text = TASK.format(name=name, folder=folder, output_type=output_type, rest=rest)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def hf_dir(tiny_models_dir, tmp_path_factory):
    """The tiny model with the names of files that transformers know."""
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path_factory.mktemp("hf") / "tiny")
    (folder / "encoder.json").rename(folder / "vocab.json")
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    return folder


@pytest.fixture(scope="session")
def hf(hf_dir):
    """The harness's model of transformers' GPT-2."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(hf_dir), device="cpu", batch_size=4, dtype="float32")


def results_of(model, tasks_dir, names, **options):
    tasks = TaskManager(include_path=tasks_dir, include_defaults=False)
    return simple_evaluate(model, tasks=list(names), task_manager=tasks, bootstrap_iters=0, **options)


@pytest.fixture(scope="session")
def their_results(hf, tasks_dir):
    return results_of(hf, tasks_dir, TASKS)


def assert_same_items(ours, theirs, name):
    """All answers of the model to a task are the same, and so are the metrics of each item."""
    for our_item, their_item in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        for (our_answer,), (their_answer,) in zip(our_item["resps"], their_item["resps"], strict=True):
            if isinstance(their_answer, str):
                assert our_answer == their_answer
            else:
                assert our_answer == pytest.approx(their_answer, rel=1e-6, abs=1e-4)
        for metric in their_item["metrics"]:
            assert our_item[metric] == pytest.approx(their_item[metric], rel=1e-4)


def answers(results, name):
    return [answer for item in results["samples"][name] for (answer,) in item["resps"]]


def test_every_item_is_that_of_the_hf_model(their_results, tasks_dir, tiny, engine):
    encoder, hparams, params = tiny
    model, converted = engine(params)
    ours = results_of(HarnessModel(encoder, hparams, converted, model, batch_size=3), tasks_dir, TASKS)
    for name in TASKS:
        assert_same_items(ours, their_results, name)
    assert {is_greedy for _, is_greedy in answers(ours, "choice")} == {True, False}
    assert len({len(text) for text in answers(ours, "generate")}) > 5  # stop strings end texts at various lengths


def test_jax_gives_the_same_items(their_results, tasks_dir, tiny):
    pytest.importorskip("jax")
    from engines.jax_engine import jax_engine

    encoder, hparams, params = tiny
    ours = results_of(HarnessModel(encoder, hparams, *reversed(jax_engine(params, N_HEAD))), tasks_dir, TASKS)
    for name in TASKS:
        assert_same_items(ours, their_results, name)


def test_examples_before_a_question_are_the_same(hf, tasks_dir, tiny):
    ours, theirs = (results_of(model, tasks_dir, ["choice"], num_fewshot=2) for model in (HarnessModel(*tiny), hf))
    assert_same_items(ours, theirs, "choice")
    assert ours["n-shot"]["choice"] == 2


def request(context, **gen_kwargs):
    return types.SimpleNamespace(args=(context, {"max_gen_toks": 12} | gen_kwargs))


def test_samples_are_repeatable(tiny):
    model = HarnessModel(*tiny)
    sampled = [request("Dear", do_sample=True, temperature=1.5, top_k=50)] * 3
    texts = model.generate_until(sampled)
    assert model.generate_until(sampled) == texts and len(set(texts)) == 3
    assert model.generate_until([request("Dear")]) * 3 != texts


def test_a_text_ends_where_a_stop_string_is_complete_and_at_the_end_of_text(tiny):
    encoder = tiny[0]
    ids, end = encoder.encode("Dear Sir or Madam, 1, 2, 3"), encoder.encoder[END_OF_TEXT]

    def text_until(ids, stops):
        sampled = iter(ids)
        sampler = StopAt(lambda logits: next(sampled), encoder, stops)
        assert set(iter(functools.partial(sampler, None), STOP)) <= set(ids)
        return encoder.decode(sampler.ids)

    assert text_until([*ids, end, *ids], ["3D"]) == "Dear Sir or Madam, 1, 2, 3"
    assert text_until(ids, ["no", "r or M", "1"]).partition("r or M")[:2] == ("Dear Si", "r or M")


@pytest.mark.parametrize(
    ("gen_kwargs", "words"),
    [
        ({"max_gen_toks": TINY["n_ctx"]}, ["max_gen_toks", TINY["n_ctx"], "generation_kwargs"]),
        ({"num_beams": 4}, ["num_beams", "not supported"]),
        ({"max_gen_toks": -3}, ["max_gen_toks -3", "at least 0"]),
        ({"do_sample": True, "temperature": -1.0}, ["temperature", "-1.0", "at least 0"]),
        ({"do_sample": True, "top_p": 7}, ["top_p", "7", "at most 1"]),
    ],
)
def test_generation_that_is_not_possible_is_an_error(tiny, gen_kwargs, words):
    with one_line_error(*words):
        HarnessModel(*tiny).generate_until([request("a", **gen_kwargs)])


# The command line


@pytest.fixture
def evaluate(capfd, monkeypatch, tiny_flags):
    """Run the command line in this process, without the harness's own tasks, of which there are thousands."""
    init = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", init)

    def run_inside(*arguments):
        capfd.readouterr()
        return cli.run([*tiny_flags, *map(str, arguments)]), *capfd.readouterr()

    return run_inside


def test_the_command_prints_the_harness_s_table_and_writes_its_results(
    evaluate, their_results, tasks_dir, hf_dir, tmp_path
):
    output, names = tmp_path / "results.json", f"{tasks_dir / 'choice.yaml'},rol*"
    model = ("--models_dir", hf_dir.parent, "--engine", "numpy")
    arguments = ("--tasks", names, "--include_path", tasks_dir, "--limit", "4", "--output", output, "--log_samples")
    code, out, err = evaluate(*model, *arguments)
    assert code == 0, err
    lines, results = out.splitlines(), json.loads(output.read_text(encoding="utf-8"))
    assert lines[0].startswith("tiny, lm_eval 0.") and "limit 4" in lines[0]
    assert ["acc" in line for line in lines].count(True) == 2 and "word_perplexity" in out
    assert list(results["results"]) == ["choice", "rolling"]
    assert results["config"]["model"] == "tiny"
    theirs = {"samples": {name: their_results["samples"][name][:4] for name in ("choice", "rolling")}}
    for name in results["results"]:
        results["samples"][name] = [item | {"resps": typed(item["resps"])} for item in results["samples"][name]]
        assert_same_items(results, theirs, name)


def typed(resps):
    """The answers in a JSON file, as the model gave them."""
    if isinstance(resps[0][0], list):
        return [[(float(log_prob), str(is_greedy) == "True")] for ((log_prob, is_greedy),) in resps]
    return [[float(log_prob)] for (log_prob,) in resps]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["name a text file, or tasks with --tasks"]),
        (["text.txt", "--tasks", "choice", "--stride", "4"], ["leave out FILE, --stride"]),
        (["text.txt", "--limit", "4", "--output", "o"], ["--limit, --output", "--tasks"]),
        (["--tasks", "choice", "--log_samples"], ["--output"]),
        (["--tasks", "choice", "--include_path", "no-such-folder"], ["no-such-folder"]),
        (["--tasks", "choice", "--output", "no-such-folder/o"], ["no-such-folder/o", "--output"]),
        (["--tasks", "choice", "--output", ""], ["the name is empty", "--output"]),
        (["--tasks", "choise"], ["unknown task 'choise'", "lm_eval ls tasks", "--include_path"]),
    ],
)
def test_mistakes_are_one_line(evaluate, arguments, words):
    assert_mistake(evaluate(*arguments), *words, script="evaluate.py")


def test_a_similar_name_is_suggested(evaluate, tasks_dir):
    result = evaluate("--tasks", "choise", "--include_path", tasks_dir)
    assert_mistake(result, "did you mean choice?", script="evaluate.py")


def test_more_examples_than_there_are(evaluate, tasks_dir):
    code, _, err = evaluate("--tasks", "choice", "--include_path", tasks_dir, "--num_fewshot", "100")
    assert code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("evaluate.py: error: cannot run choice (ValueError: ")


def test_a_file_with_the_name_of_a_task_is_not_read(tasks_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "choice").touch()
    tasks = Tasks(include_path=tasks_dir, include_defaults=False)
    assert [tasks.find(name) for name in ("choice", str(tmp_path / "choice"))] == [["choice"], [f"{tmp_path}/choice"]]


def test_without_the_harness_the_error_says_what_to_install(evaluate, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert_mistake(evaluate("--tasks", "choice"), "pip install -r requirements-eval.txt", script="evaluate.py")


def test_without_network_the_error_says_so(evaluate, monkeypatch, tasks_dir):
    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    result = evaluate("--tasks", "choice", "--include_path", tasks_dir)
    assert_mistake(result, "Couldn't reach 'data' on the Hub", "network", script="evaluate.py")


def test_tasks_import_hugging_face_s_evaluate():
    before = sys.modules.get("evaluate")
    with namesake_first():
        assert not importlib.util.find_spec("evaluate").origin.startswith(str(ROOT / "evaluate.py"))
    assert sys.modules.get("evaluate") is before
