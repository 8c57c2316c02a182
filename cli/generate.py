"""The command line of gpt2.py: its options, the checks of their combinations, and the choice of what to run."""

import argparse
import sys

from cli.devices import add_device_options
from cli.engine import add_engine_options, check_engine_options
from cli.options import Parser, exit_code, parse_count, parse_positive, parse_probability, parse_rate
from cli.session import Session
from encoder import END_OF_TEXT
from weights.errors import UserError
from weights.releases import N_PARAMS

EXPLAIN_OPTIONS = ("explain", "prompt", "model_size", "models_dir")  # the options that --explain uses
LIST_OPTIONS = ("list_models", "models_dir")


def parse_page(text):
    if not text.lower().endswith(".html"):
        raise argparse.ArgumentTypeError(
            f"{text[:100]!r} does not end in .html; to print the explanation as text, --explain goes last"
        )
    return text


def make_parser():
    parser = Parser(
        prog="gpt2.py",
        description="Continue a prompt with GPT-2, or explain its prediction.",
        epilog='Put -- before a prompt that starts with a dash: python gpt2.py -- "--dashes"',
        hint=" (a prompt of several words goes in quotes, one that starts with a dash after --)",
    )
    add_general_options(parser)
    add_sampling_options(parser.add_argument_group("sampling"))
    add_batch_options(parser.add_argument_group("batches"))
    add_speculative_options(parser.add_argument_group("speculative decoding (the same text, often faster)"))
    add_device_options(parser.add_argument_group("devices, with --engine jax").add_argument)
    return parser


def add_general_options(parser):
    add = parser.add_argument
    add("prompt", nargs="?", help="text to continue; -: read it from standard input; none: unconditional generation")
    add("--n_tokens_to_generate", type=parse_count, default=40, metavar="N", help="tokens to generate (default: 40)")
    add(
        "--model_size",
        default="124M",
        metavar="NAME",
        help=f"{', '.join(N_PARAMS)}, or a folder in models_dir (default: 124M)",
    )
    parser.add_models_dir()
    add("--list_models", action="store_true", help="print a table of the models in models_dir")
    add(
        "--slide",
        action="store_true",
        help="when the context is full, or the prompt exceeds it, go on with its newest half (default: an error)",
    )
    add("--stop_at_end_of_text", action="store_true", help=f"stop when the model generates {END_OF_TEXT}")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="print each token when it is generated (default: if the output is a terminal and --n_samples is 1)",
    )
    add("--interactive", action="store_true", help="read and continue one prompt per line until Ctrl-D")
    add_engine_options(add)
    add(
        "--explain",
        type=parse_page,
        nargs="?",
        const=True,
        metavar="OUT.html",
        help="explain the prediction instead of generating: print the tokens of the prompt and the most likely next "
        "tokens after each layer, or write them to a web page with the attention of each head (at most 128 tokens); "
        "goes after the prompt",
    )


def add_sampling_options(group):
    add = group.add_argument
    add(
        "--temperature",
        type=parse_rate,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token (default), 1 samples from the model's distribution, above 1 flattens it",
    )
    add("--top_k", type=parse_count, default=0, metavar="K", help="sample from the K most likely tokens (default: all)")
    add(
        "--top_p",
        type=parse_probability,
        default=1.0,
        metavar="P",
        help="sample from the fewest tokens whose probabilities sum to at least P (default: 1, all)",
    )
    add("--seed", type=parse_count, metavar="N", help="random seed: sample i uses N + i - 1 (default: a random one)")
    add("--n_samples", type=parse_positive, default=1, metavar="N", help="continuations per prompt (default: 1)")


def add_batch_options(group):
    add = group.add_argument
    add(
        "--prompts_file",
        metavar="FILE",
        help="continue one prompt per line of FILE (-: standard input); print one line of JSON per continuation",
    )
    add("--output", metavar="FILE", help="append the lines of JSON to FILE, except for those that it already has")
    add(
        "--batch_size",
        type=parse_positive,
        default=8,
        metavar="N",
        help="continuations generated at once, with --prompts_file or --n_samples (default: 8)",
    )


def add_speculative_options(group):
    add = group.add_argument
    add(
        "--speculate",
        choices=("off", "lookup", "self"),
        default="off",
        help="lookup drafts the tokens that followed the same words earlier in the text; self also those that the "
        "model chooses with quantized weights, and needs numba (default: off)",
    )
    add("--draft_model", metavar="NAME", help="draft with a smaller model, which has the same vocabulary")


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("gpt2.py", lambda: dispatch(make_parser().parse_args(argv)), argv)


def dispatch(options):
    """Check the options and run the part of the program that they ask for."""
    if options.list_models:
        from cli.list_models import run_list_models

        check_only(options, LIST_OPTIONS)
        run_list_models(options)
        return
    if options.explain is not None:
        from cli.explain import run_explain

        check_only(options, EXPLAIN_OPTIONS)
        run_explain(options)
        return
    check_options(options)
    if options.prompts_file is not None:
        from cli.prompts_file import run_prompts_file

        check_prompts_file_options(options)
        check_engine_options(options, options.speculate)
        run_prompts_file(options)
    else:
        check_engine_options(options, options.speculate)
        Session(options).run()


def check_only(options, used):
    """Raise UserError for options that are not among those that the first of them, which does not generate, uses."""
    parser = make_parser()
    given = [name for name, value in vars(options).items() if name not in used and value != parser.get_default(name)]
    if given:
        unused = ["the prompt" if name == "prompt" else f"--{name}" for name in given]
        raise UserError(f"--{used[0]} does not generate text; leave out {', '.join(unused)}")


def check_options(options):
    """Raise UserError for options that exclude each other; note those that have no effect."""
    sources = [options.prompt is not None, options.prompts_file is not None, options.interactive]
    if sum(sources) > 1:
        raise UserError("give one of a prompt, --prompts_file and --interactive, not several")
    if options.output is not None and options.prompts_file is None:
        raise UserError("--output needs --prompts_file; to save one continuation, redirect: > FILE")
    if options.draft_model is not None and options.speculate != "off":
        raise UserError(f"--draft_model and --speculate {options.speculate} both draft tokens; leave one out")
    if options.slide and options.engine == "jax":
        raise UserError(
            "--slide does not work with --engine jax, whose random numbers belong to positions; leave one out"
        )
    if options.temperature == 0 and (options.top_k or options.top_p < 1 or options.seed is not None):
        print(
            "note: at temperature 0 nothing is sampled, so --top_k, --top_p and --seed have no effect; "
            "set --temperature above 0",
            file=sys.stderr,
        )
    if options.temperature == 0 and options.n_samples > 1:
        print("note: at temperature 0 all samples of a prompt are the same; set --temperature above 0", file=sys.stderr)


def check_prompts_file_options(options):
    """Raise UserError for options that cannot be combined with --prompts_file."""
    if options.stream is not None:
        raise UserError("--prompts_file prints each continuation when it is complete; leave --stream out")
    if options.slide:
        raise UserError("--slide works on one continuation at a time; leave it out, or leave out --prompts_file")
    if options.draft_model is not None or options.speculate != "off":
        drafts = f"--speculate {options.speculate}" if options.draft_model is None else "--draft_model"
        raise UserError(f"{drafts} works on one prompt at a time; leave it out, or leave out --prompts_file")
