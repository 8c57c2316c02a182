"""What the command lines share: the argument parser, types of arguments, exit codes, error lines."""

import argparse
import math
import os
import signal
import sys

from weights.errors import UserError

EXIT_MISTAKE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 2, 130, 141  # the last two are 128 + SIGINT, 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """hint: what to say behind arguments that are not recognized."""

    def __init__(self, hint="", **options):
        super().__init__(allow_abbrev=False, **options)
        self.hint = hint

    def add_models_dir(self):
        self.add_argument(
            "--models_dir",
            type=os.path.expanduser,
            default="models",
            metavar="DIR",
            help="where the model folders are (default models)",
        )

    def error(self, message):
        hint = self.hint if message.startswith("unrecognized") else ""
        raise UserError(f"{message}{hint}; see python {self.prog} --help")


def parse_count(text):
    if not text.strip().isdecimal() or len(text) > 100:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a whole number from 0 up")
    return int(text)


def parse_positive(text):
    if (number := parse_count(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too few, at least 1")
    return number


def parse_number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def parse_rate(text):
    if not 0 <= parse_number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0 up")
    return parse_number(text)


def parse_probability(text):
    if not 0 < parse_number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return parse_number(text)


def parse_positive_rate(text):
    if not 0 < parse_number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return parse_number(text)


def parse_fraction(text):
    if not 0 <= parse_number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 up and below 1")
    return parse_number(text)


def n_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_code(program, work):
    """What work() returns, or the exit code of what it raises, explained in one line that begins with the program."""
    prepare_streams()
    try:
        return work() or 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end in a traceback of Python's own exit
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        drop_output()
        return EXIT_CLOSED_PIPE
    except (UserError, OSError, MemoryError) as error:
        print(f"{program}: error: {describe(error)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:  # no file of ours: standard output, on a full disk
            drop_output()
        return EXIT_MISTAKE


def prepare_streams():
    """UTF-8 in files and pipes, no failure over a character the terminal lacks, nothing where a stream is closed."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        nowhere = open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115 (one of the three from now on)
        sys.stdin, sys.stdout, sys.stderr = (stream or nowhere for stream in (sys.stdin, sys.stdout, sys.stderr))
    sys.stdout.reconfigure(**({"errors": "replace"} if sys.stdout.isatty() else {"encoding": "utf-8"}))
    sys.stderr.reconfigure(**({} if sys.stderr.isatty() else {"encoding": "utf-8"}), errors="backslashreplace")


def drop_output():
    """Sends to nowhere what is still buffered for a closed or full standard output: Python's exit would fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error):
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot open {error.filename!r}: {error.strerror}; check the path and its permissions"
    if isinstance(error, OSError):
        return f"cannot write the output: {error.strerror}; make room"
    if isinstance(error, MemoryError):
        return f"not enough memory ({error}); take a smaller model or batch"
    return str(error)
