"""evaluate.py --tasks, beside the harness's own class for transformers' models on the same folder, item by item."""

import json
import logging
import shutil

import pytest

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from cli.harness import HarnessModel
from tests.conftest import PROMPTS
from utils import load_encoder_hparams_and_params

QUESTIONS = [
    {"question": "The answer is", "choices": [" life", " the universe", " everything, and more", " life"], "label": 0},
    {"question": "A trailing space ", "choices": ["stays", "goes"], "label": 1},
    {"question": "", "choices": ["No context", "<|endoftext|>a"], "label": 0},
    {"question": "1, 2, 3, 4, " * 60, "choices": ["5", "6", "7, 8, 9"], "label": 2},
    {"question": "Single tokens:", "choices": ["a", "b", "c"], "label": 1},
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
generation_kwargs: {until: ["\\n", "e", "th"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = {
    "choice": ("multiple_choice", CHOICE, QUESTIONS),
    "rolling": ("loglikelihood_rolling", ROLLING, DOCUMENTS),
    "generate": ("generate_until", GENERATE, GENERATIONS),
}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """A folder with the tasks in the harness's format, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (output_type, rest, documents) in TASKS.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        text = TASK.format(name=name, folder=folder, output_type=output_type, rest=rest)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hf_dir(tiny_models_dir, tmp_path_factory):
    """The tiny model with the names of files that transformers know."""
    folder = shutil.copytree(tiny_models_dir / "tiny", tmp_path_factory.mktemp("hf") / "tiny")
    (folder / "encoder.json").rename(folder / "vocab.json")
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    return folder


def results_of(model, tasks_dir, names=TASKS, **options):
    """Run the tasks; return for each item of each task what the model answered and the metrics."""
    tasks = TaskManager(include_path=tasks_dir, include_defaults=False)
    return simple_evaluate(model, tasks=list(names), task_manager=tasks, bootstrap_iters=0, **options)


@pytest.fixture(scope="module")
def their_results(hf_dir, tasks_dir):
    from lm_eval.models.huggingface import HFLM

    return results_of(HFLM(str(hf_dir), device="cpu", batch_size=4, dtype="float32"), tasks_dir)


def test_try(their_results, tasks_dir, hf_dir):
    ours = results_of(HarnessModel(*load_encoder_hparams_and_params("tiny", str(hf_dir.parent))), tasks_dir)
    for name in TASKS:
        for a, b in zip(ours["samples"][name], their_results["samples"][name], strict=True):
            print(a["resps"], b["resps"])
    print(ours["results"], their_results["results"], ours.keys(), ours["config"])
    assert 0
