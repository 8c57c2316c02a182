"""The command line of official/compare.py."""

from cli.options import Parser, exit_code, parse_positive
from official import compare


def make_parser():
    parser = Parser(prog="official/compare.py", description=compare.__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--official_repo",
        required=True,
        metavar="PATH",
        help=f"checkout of {compare.URL} at commit {compare.COMMIT[:7]}",
    )
    add("--clone", action="store_true", help="create that checkout with git if it does not exist")
    parser.add_model_size()
    parser.add_models_dir()
    add("--n_tokens_to_generate", type=parse_positive, default=40, metavar="N", help="tokens per prompt (default: 40)")
    add("--prompt", metavar="TEXT", help="an additional prompt")
    return parser


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("official/compare.py", lambda: compare.run(make_parser().parse_args(argv)), argv)
