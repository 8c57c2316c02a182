"""The command line of official/compare.py."""

from cli.options import Parser, exit_code, parse_positive
from official import compare


def make_parser():
    checkout = f"a checkout of {compare.URL} at commit {compare.COMMIT[:7]}"
    parser = Parser(prog="official/compare.py", description=compare.__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--official_repo",
        required=True,
        metavar="PATH",
        help=checkout,
    )
    add("--clone", action="store_true", help="let git make that checkout first, if it is not there")
    add("--model_size", default="124M", help="the model, as for gpt2.py (default 124M)")
    parser.add_models_dir()
    add("--n_tokens_to_generate", type=parse_positive, default=40, metavar="N", help="tokens a prompt (default 40)")
    add("--prompt", metavar="TEXT", help="one more prompt, after the fixed ones")
    return parser


def run(argv=None):
    """Runs the command line argv (default sys.argv[1:]) and returns its exit code."""
    return exit_code("official/compare.py", lambda: compare.run(make_parser().parse_args(argv)))
