"""What the command lines share: the argument parser, types of arguments, exit codes, error lines.

Exit codes: 0 success, 2 a user error, explained in one line on standard error, 130 stopped with Ctrl-C, 141 nothing
reads standard output or standard error any more.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import warnings

from weights.errors import UserError, printable
from weights.files import FULL

# The commands that pip installs, of pyproject.toml, by script
COMMANDS = {
    "gpt2.py": "gpt2",
    "train.py": "gpt2-train",
    "evaluate.py": "gpt2-evaluate",
    "serve.py": "gpt2-serve",
}
EXIT_MISTAKE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 2, 130, 141  # the last two are 128 + SIGINT, 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated options that raises UserError for mistakes. It has --help and --version.

    prog: the name of the script. hint: text appended to the message about unrecognized arguments.
    """

    def __init__(self, prog, hint="", **options):
        super().__init__(command_name(prog), allow_abbrev=False, **options)
        self.hint = hint
        help_text = "show the versions of this project, Python, NumPy and its BLAS, numba and JAX, and exit"
        self.add_argument("--version", action=ShowVersions, nargs=0, dest=argparse.SUPPRESS, help=help_text)

    def parse_args(self, args=None):
        if "_ARGCOMPLETE" in os.environ:  # a shell asks how to complete a command: see docs/cli.md
            import argcomplete

            argcomplete.autocomplete(self)
        return super().parse_args(args)

    def add_models_dir(self):
        self.add_argument(
            "--models_dir",
            type=os.path.expanduser,
            default="models",
            metavar="DIR",
            help="folder that contains the model folders (default: models)",
        )

    def add_model_size(self):
        self.add_argument("--model_size", default="124M", help="the model, as for gpt2.py (default: 124M)")

    def add_data_dir(self):
        self.add_argument(
            "--data_dir",
            default="data",
            metavar="DIR",
            help="where tinyshakespeare is downloaded to (default: data)",
        )

    def error(self, message):
        hint = self.hint if message.startswith("unrecognized") else ""
        command = self.prog if self.prog in COMMANDS.values() else f"python {self.prog}"
        raise UserError(f"{message}{hint}; see {command} --help")


class ShowVersions(argparse.Action):
    """Print the versions and exit."""

    def __call__(self, parser, *_):
        from cli.version import describe_versions

        print(describe_versions())
        parser.exit()


def command_name(script):
    """Return the command that this process is, if pip has installed it for a script, or else the script."""
    started = os.path.basename(sys.argv[0]).removesuffix(".exe")
    return started if started == COMMANDS.get(script) else script


def parse_count(text):
    if text.strip().isdecimal() and len(text) > 100:
        raise argparse.ArgumentTypeError(f"{text[:20]!r}... has more than 100 digits")
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a whole number of at least 0")
    return int(text)


def parse_positive(text):
    if (number := parse_count(text)) == 0:
        raise argparse.ArgumentTypeError("'0' is not a whole number of at least 1")
    return number


def parse_up_to(largest):
    """Return an argparse type for whole numbers from 1 to largest."""

    def parse(text):
        if (number := parse_positive(text)) > largest:
            raise argparse.ArgumentTypeError(f"{number} is too large; the maximum is {largest}")
        return number

    return parse


def number_type(is_valid, description):
    """Return an argparse type for valid numbers; description follows "is not" in the error message."""

    def parse(text):
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not is_valid(number):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return number

    return parse


parse_rate = number_type(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
parse_positive_rate = number_type(lambda x: 0 < x < math.inf, "a finite number above 0")
parse_probability = number_type(lambda x: 0 < x <= 1, "above 0 and at most 1")
parse_fraction = number_type(lambda x: 0 <= x < 1, "at least 0 and below 1")


def exit_code(program, work, argv=None):
    """Call work() and return its result, an exit code (None: 0); print an exception as one line and return its code.

    program: the name of the script. argv is None when a program calls this and then exits; it then ignores further
    Ctrl-C.
    """
    prepare_streams()
    with contextlib.redirect_stderr(BestEffort(sys.stderr)):
        try:
            code = run_and_flush(work)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
            leave_others(code)
        except BrokenPipeError:
            return EXIT_CLOSED_PIPE
        except (UserError, FloatingPointError, OSError, MemoryError) as error:
            line = shorten(printable(describe(error)).replace("\n", " "))
            with contextlib.suppress(BrokenPipeError):
                print(f"{command_name(program)}: error: {line}", file=sys.stderr, flush=True)
            leave_others(EXIT_MISTAKE)
            return EXIT_MISTAKE
        if code == EXIT_INTERRUPTED and argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it would print a traceback while Python exits
        return code


def shorten(line, n=500):
    """Return a line without its middle if it has more than 2 * n characters: its end says what to do."""
    return line if len(line) <= 2 * n else f"{line[:n]} ... {line[-n:]}"


def run_and_flush(work):
    """Call work(), flush standard output, and return the result of work() (None: 0)."""
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # damaged weights are an error
            return work() or 0
    except RuntimeError as error:
        if "can't start new thread" in str(error):
            raise UserError(f"{error}; lower --threads, or raise the limits of this process") from None
        if "RESOURCE_EXHAUSTED" in str(error):  # JAX
            remedy = "set a smaller --batch_size, more --devices, --dtype bfloat16 or, to train, --remat"
            raise UserError(f"the device has too little memory; {remedy}") from None
        if one_of_several():
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the processes cannot go on ({reason}), probably because another one has ended; start all again, and "
                "a training with --resume"
            ) from None
        raise
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            discard(sys.stdout)
            raise


def one_of_several():
    """Return whether this process has joined others (see cli/devices.py)."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave_others(code):
    """If this process has joined others, end it at once, because otherwise JAX would wait for them."""
    if one_of_several():
        os._exit(code)


class BestEffort:
    """A text stream for messages: what a full disk has no room for is discarded, a closed pipe raises an exception."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError as error:
            discard(self.stream)
            if isinstance(error, BrokenPipeError):
                raise


def prepare_streams():
    """Use UTF-8 for files and pipes, replace what cannot be encoded, and replace closed streams by os.devnull."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        devnull = open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115 (stays open as a standard stream)
        sys.stdin, sys.stdout, sys.stderr = (stream or devnull for stream in (sys.stdin, sys.stdout, sys.stderr))
    elsewhere = {"encoding": "utf-8", "errors": "backslashreplace"}  # a file's name may not be valid Unicode
    sys.stdout.reconfigure(**({"errors": "replace"} if sys.stdout.isatty() else elsewhere))
    sys.stderr.reconfigure(**({} if sys.stderr.isatty() else {"encoding": "utf-8"}), errors="backslashreplace")


def discard(stream):
    """Redirect a stream to os.devnull: flushing its remaining output at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def describe(error):
    """Return what an error line says of an exception."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"cannot write {error.filename or 'the output'}: {error.strerror}; make room"
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {error.filename!r}: {error.strerror}; check the path and its permissions"
    if isinstance(error, OSError):
        return f"input or output failed: {error.strerror or error}; check where the program reads and writes"
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}; choose a smaller model or batch"
    if isinstance(error, FloatingPointError):
        return f"{error}: the weights are damaged; remove the model's folder to download it again, or train it again"
    return str(error)
