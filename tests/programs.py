"""Run the programs as a person does, and check how they end."""

import contextlib
import os
import socket
import subprocess
import sys

from tests.conftest import ROOT

SECONDS = 60  # a run that takes longer fails its test


def command(*arguments, script="gpt2.py"):
    """Return a command as bytes, since an argument may be bytes that are not UTF-8."""
    return [os.fsencode(argument) for argument in (sys.executable, ROOT / script, *arguments)]


def run(*arguments, script="gpt2.py", **options):
    """Run a program in a process; return its exit code, standard output and standard error, the latter as bytes."""
    options = {"input": b"", "capture_output": True, "timeout": SECONDS} | options
    done = subprocess.run(command(*arguments, script=script), check=False, **options)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def started(arguments, **options):
    """A running process, which is killed at the end."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with subprocess.Popen(arguments, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def on_devices(n):
    """Return the environment of a program for which JAX finds n devices, parts of the CPU."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"}


def assert_runs_on_8_devices(program):
    """Run Python source that asserts; it ends with 0 and without a message."""
    options = {"cwd": ROOT, "env": on_devices(8), "capture_output": True, "encoding": "utf-8", "timeout": 2 * SECONDS}
    done = subprocess.run([sys.executable, "-c", program], check=False, **options)
    assert (done.returncode, done.stderr) == (0, "")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_mistake(result, *words, script="gpt2.py"):
    """Exit code 2, nothing on standard output, one line on standard error that contains the words."""
    code, out, err = result
    text = err if isinstance(err, str) else err.decode("utf-8")
    assert (code, len(out)) == (2, 0), text
    assert text.startswith(f"{script}: error: ") and text.endswith("\n") and text.count("\n") == 1, text
    for word in words:
        assert word in text


def assert_prints(result, text):
    """Exit code 0, the text and a newline on standard output, nothing on standard error."""
    assert result == (0, text.encode("utf-8") + b"\n", b"")
