"""evaluate.py --tasks: tasks of EleutherAI's lm-evaluation-harness. Imports lm_eval, which nothing else needs.

Standard output carries the harness's tables; its progress bars and messages go to standard error. The harness downloads
the data sets.
"""

import contextlib
import difflib
import json
import os
import sys

from jinja2 import TemplateError
from lm_eval import __version__, simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from threadpoolctl import threadpool_limits

import gpt2
from cli.engine import check_engine_options, model_and_params, set_threads
from cli.harness import HarnessModel
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.files import atomic_write, check_writable

REMEDY = "name another --output"
# What the harness and the functions of tasks raise for options and data that do not fit
TASK_ERRORS = (TemplateError, AssertionError, LookupError, TypeError, ValueError, ZeroDivisionError)


def run_tasks(options):
    """Run the tasks, write the results to --output, and print the tables."""
    if options.include_path and not os.path.isdir(options.include_path):
        raise UserError(f"--include_path {options.include_path} is not a folder; correct it")
    if options.output is not None:
        check_writable(options.output, REMEDY)
    check_engine_options(options)
    with namesake_first(), threadpool_limits(options.threads):
        results = evaluate_tasks(options)
    if options.output is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        with atomic_write(options.output, REMEDY) as f:
            f.write(text.encode("utf-8") + b"\n")
    limit = f", limit {options.limit}: not comparable with complete results" if options.limit else ""
    lossy = "" if options.dtype == "float32" else f", weights {options.dtype} (lossy)"
    print(f"{options.model_size}, lm_eval {__version__}{lossy}{limit}\n{make_table(results)}")
    if results.get("groups"):
        print(make_table(results, "groups"))


@contextlib.contextmanager
def namesake_first():
    """Let tasks import Hugging Face's package `evaluate`, which has the name of evaluate.py."""
    root, ours = os.path.dirname(os.path.abspath(gpt2.__file__)), sys.modules.pop("evaluate", None)
    path, sys.path = sys.path, [*(folder for folder in sys.path if os.path.abspath(folder) != root), root]
    try:
        yield
    finally:
        sys.path = path
        sys.modules.pop("evaluate", None)
        if ours:
            sys.modules["evaluate"] = ours


class Tasks(TaskManager):
    """The tasks of the harness and of --include_path."""

    def load(self, names):
        """Load tasks and their data. What fails here is an error of the task or of the network."""
        try:
            return super().load(names)
        except ConnectionError as error:
            raise UserError(f"{error}; a task's first run downloads its data: check the network") from error
        except Exception as error:
            raise UserError(f"cannot load {', '.join(names)} ({error or type(error).__name__}); correct it") from error

    def find(self, name):
        """Return the names that a name, a pattern such as anli_*, or the path of a YAML file stands for."""
        found = self.match_tasks([name]) or [name] * os.path.isfile(name)
        if not found:
            near = difflib.get_close_matches(name, self.all_tasks)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            listed = "python -m lm_eval ls tasks lists them, and --include_path adds your own"
            raise UserError(f"unknown task {name!r}; {hint}{listed}")
        return found


def evaluate_tasks(options):
    """Return the harness's dict of results."""
    tasks = Tasks(include_path=options.include_path)
    names = [found for name in options.tasks.split(",") for found in tasks.find(name)]
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, options.models_dir)
    model, params = model_and_params(options, params, hparams["n_head"], worth_it=True)
    if model is not gpt2 and options.engine != "jax":
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
    except UserError:
        raise
    except TASK_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot run {options.tasks} ({reason}); correct --num_fewshot or the task") from error
    results["config"] |= {"model": options.model_size, "model_args": {"engine": options.engine, "dtype": options.dtype}}
    return results
