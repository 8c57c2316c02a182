"""evaluate.py --tasks: tasks of EleutherAI's lm-evaluation-harness.

Standard output carries the harness's tables; its progress bars and messages go to standard error. The data sets are
downloaded by the harness, from where a task says.
"""

import contextlib
import difflib
import importlib.util
import json
import os
import sys

from threadpoolctl import threadpool_limits

from cli.engine import check_engine_options, model_and_params, set_threads
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import atomic_write, check_writable

LIST = "python -m lm_eval ls tasks"
OUTPUT = "name another --output"


def run_tasks(options):
    """Run the tasks, print the tables, and write the results to --output."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness; pip install -r requirements-eval.txt")
    if options.include_path and not os.path.isdir(options.include_path):
        raise UserError(f"--include_path {options.include_path} is not a folder")
    if options.output:
        check_writable(options.output, OUTPUT)
    check_engine_options(options)
    with namesake_first(), threadpool_limits(options.threads):
        results = evaluate_tasks(options)
    if options.output:
        write_results(results, options.output)
    print_tables(results, options)


@contextlib.contextmanager
def namesake_first():
    """Let tasks import Hugging Face's `evaluate`, which has the name of evaluate.py."""
    root, ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), sys.modules.pop("evaluate", None)
    path, sys.path = sys.path, [*(folder for folder in sys.path if os.path.abspath(folder) != root), root]
    try:
        yield
    finally:
        sys.path = path
        sys.modules.pop("evaluate", None)
        if ours:
            sys.modules["evaluate"] = ours


def evaluate_tasks(options):
    """Return the harness's dict of results."""
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from cli.harness import HarnessModel

    class Tasks(TaskManager):
        def load(self, names):
            """Load tasks and their data sets; what fails here is an error of the task, or of the network."""
            try:
                return super().load(names)
            except ConnectionError as error:
                raise UserError(f"{error}; a task's first run downloads its data set: check the network") from error
            except Exception as error:
                raise UserError(f"cannot load {', '.join(names)} ({error or type(error).__name__})") from error

    tasks = Tasks(include_path=options.include_path)
    names = task_names(options, tasks)
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, options.models_dir)
    model, params = model_and_params(options, params, hparams["n_head"], worth_it=True)
    if hasattr(model, "RowCaches"):  # compiled
        set_threads(options.threads)
    try:
        results = simple_evaluate(
            HarnessModel(encoder, hparams, params, model, options.batch_size),
            tasks=names,
            task_manager=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            log_samples=options.log_samples,
        )
    except TemplateError as error:
        raise UserError(f"a template of {options.tasks} does not fit its documents: {error}") from error
    results["config"] |= {"model": options.model_size, "model_args": {"engine": options.engine, "dtype": options.dtype}}
    return results


def task_names(options, tasks):
    """Return the names, or paths of YAML files, in --tasks; a pattern such as mmlu_* stands for all names it matches.

    Raises UserError for an unknown name.
    """
    found = []
    for name in options.tasks.split(","):
        matches = [name] if os.path.isfile(name) else tasks.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, tasks.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"unknown task {name!r}; {hint}{LIST} lists them, and --include_path adds your own")
        found += matches
    return found


def print_tables(results, options):
    from lm_eval.utils import make_table

    limit = f", limit {options.limit} (not comparable with full results)" if options.limit else ""
    lossy = "" if options.dtype == "float32" else f", weights {options.dtype} (lossy)"
    print(f"{options.model_size}, lm_eval {results['lm_eval_version']}{lossy}{limit}\n{make_table(results)}")
    if results.get("groups"):
        print(make_table(results, "groups"))


def write_results(results, path):
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    with atomic_write(path, OUTPUT) as f:
        f.write(text.encode("utf-8") + b"\n")
