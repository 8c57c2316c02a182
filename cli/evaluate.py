"""The command line of evaluate.py."""

import importlib.util
import math

import numpy as np

import gpt2
from cli.devices import add_device_options
from cli.engine import add_engine_options, check_engine_options, model_and_params, pays_off, set_threads
from cli.options import Parser, exit_code, parse_count, parse_positive, parse_up_to
from evaluate import total_loss
from training.dataset import read_dataset, split_text
from training.options import MAX_THREADS
from utils import load_encoder_hparams_and_params
from weights.errors import UserError
from weights.names import count_params
from weights.resources import available_cores

TEXT_OPTIONS = ("dataset", "split", "context", "stride", "data_dir")
TASK_OPTIONS = ("include_path", "num_fewshot", "limit", "batch_size", "output", "log_samples")


def make_parser():
    parser = Parser(
        prog="evaluate.py",
        description="Measure how well a model predicts a text, or run tasks of EleutherAI's lm-evaluation-harness.",
        hint=" (the model goes after --model_size)",
    )
    add = parser.add_argument
    add("dataset", nargs="?", metavar="FILE", help="a UTF-8 text file, or tinyshakespeare, which is downloaded")
    add(
        "--split",
        choices=["all", "train", "val"],
        default="all",
        help="val: the last tenth, which train.py --layout plain holds out (default: all)",
    )
    parser.add_model_size()
    add("--context", type=parse_positive, metavar="N", help="tokens per window (default: the model's context)")
    add("--stride", type=parse_positive, metavar="N", help="tokens from window to window (default: half the context)")
    parser.add_models_dir()
    parser.add_data_dir()
    add(
        "--threads",
        type=parse_up_to(MAX_THREADS),
        default=available_cores(),
        metavar="N",
        help="threads (default: number of cores)",
    )
    add_engine_options(add)
    add_task_options(parser.add_argument_group("tasks of lm-evaluation-harness, instead of FILE").add_argument)
    add_device_options(parser.add_argument_group("devices, with --engine jax").add_argument)
    return parser


def add_task_options(add):
    add("--tasks", metavar="NAMES", help="names with commas between them, or paths of YAML files; needs lm_eval")
    add("--include_path", metavar="DIR", help="folder with further tasks")
    add("--num_fewshot", type=parse_count, metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=parse_positive, metavar="N", help="only the first N items of each task, to try it out")
    add("--batch_size", type=parse_positive, default=8, metavar="N", help="texts generated at once (default: 8)")
    add("--output", metavar="FILE", help="write the results to FILE, as JSON")
    add("--log_samples", action="store_true", help="with --output: every item, with the model's results for it")


def dispatch(options):
    """Evaluate a text, or run tasks."""
    check_options(options)
    if options.tasks is None:
        evaluate(options)
    elif importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness; pip install -r requirements-eval.txt")
    else:
        from cli.tasks import run_tasks

        run_tasks(options)


def check_options(options):
    """Raise UserError unless either a text or tasks are named, with options that belong to them."""
    parser, runs_tasks = make_parser(), options.tasks is not None
    names = TEXT_OPTIONS if runs_tasks else TASK_OPTIONS
    given = [name for name in names if getattr(options, name) != parser.get_default(name)]
    unused = ", ".join("FILE" if name == "dataset" else f"--{name}" for name in given)
    if unused and runs_tasks:
        raise UserError(f"--tasks names what is read; leave out {unused}")
    if unused:
        raise UserError(f"{unused}: for tasks only; name them with --tasks")
    if not runs_tasks and options.dataset is None:
        raise UserError("nothing to evaluate; name a text file, or tasks with --tasks")
    if options.log_samples and options.output is None:
        raise UserError("--log_samples writes to a file; name it with --output")


def evaluate(options):
    """Print the loss, the perplexity, and the loss per character and per byte."""
    check_engine_options(options)
    text = read_dataset(options.dataset, options.data_dir)
    if options.split != "all":
        text = split_text(text)[options.split]
    encoder, hparams, params = load_encoder_hparams_and_params(options.model_size, options.models_dir)
    context = options.context or hparams["n_ctx"]
    stride = options.stride or max(1, context // 2)
    if context > hparams["n_ctx"]:
        raise UserError(
            f"--context {context} is larger than the context of {options.model_size}; set at most {hparams['n_ctx']}"
        )
    if stride > context:
        raise UserError(f"--stride {stride} is larger than --context {context}; set at most {context}")
    ids = encoder.encode(text)
    n_scored = len(ids) - 1
    if n_scored < 1:
        raise UserError(f"{options.dataset} has {len(ids)} tokens; at least 2 are needed, as the first is not scored")
    worth_it = pays_off(count_params(**hparams), n_scored * context / stride)
    model, params = model_and_params(options, params, hparams["n_head"], worth_it)
    if model is gpt2:
        model = None
    elif options.engine != "jax":
        set_threads(options.threads)
    loss = total_loss(ids, params, hparams["n_head"], context, stride, options.threads, model) / n_scored
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    scored = encoder.decode(ids[1:])
    nats_per_char = n_scored * loss / len(scored)
    bits_per_byte = n_scored * loss / len(scored.encode("utf-8")) / math.log(2)
    lossy = "" if options.dtype == "float32" else f", weights {options.dtype} (lossy)"
    perplexity = np.exp(loss)  # infinite where math.exp would raise OverflowError
    print(
        f"{options.model_size} on {options.dataset} ({options.split}): {len(ids)} tokens, {len(text)} characters\n"
        f"context {context}, stride {stride}{lossy}\n"
        f"loss        {loss:.4f} nats per token\n"
        f"perplexity  {perplexity:.4f} per token\n"
        f"            {nats_per_char:.4f} nats per character\n"
        f"            {bits_per_byte:.4f} bits per byte"
    )


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("evaluate.py", lambda: dispatch(make_parser().parse_args(argv)), argv)
