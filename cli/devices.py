"""The devices of --engine jax: their options, the start of JAX, and the errors of both."""

import argparse
import os
import re
import sys
import threading

from cli.options import discard, parse_count, parse_positive
from weights.errors import UserError

SECONDS_TO_JOIN = 60  # between the starts of the processes
SECONDS_TO_NOTICE = 60  # until the others end if one process no longer answers
OPTIONS = ("devices", "coordinator", "process_id", "n_processes")


def parse_devices(text):
    """Parse the number of devices: 8, or, along the axes data and model, 2x4."""
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a number of devices, such as 8, or 2x4")
    return tuple(map(int, text.split("x")))


def mesh_shape(devices, axis):
    """Return the shape of the mesh, (data, model), for --devices; of one number, the devices lie along that axis."""
    if devices is None or len(devices) == 2:
        return devices
    return (*devices, 1) if axis == "data" else (1, *devices)


def add_device_options(add, what="the model"):
    """Add the options to a parser or a group. add: its method add_argument. what: what N devices shard."""
    add(
        "--devices",
        type=parse_devices,
        metavar="N",
        help=f"shard {what} over N devices; 2x4: a batch over 2 groups, and the model over the 4 devices of each "
        "(default: all devices)",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="run on several machines: where process 0 listens; auto on a cluster that JAX detects",
    )
    add("--process_id", type=parse_count, metavar="I", help="number of this process, from 0; process 0 prints")
    add("--n_processes", type=parse_positive, metavar="N", help="number of processes")


def check_jax_options(options):
    """Raise UserError for options that need --engine jax without it, or that exclude it or each other."""
    given = [f"--{name}" for name in OPTIONS if getattr(options, name) is not None]
    given += ["--dtype bfloat16"] * (options.dtype == "bfloat16")
    given += [f"--{name}" for name in ("remat", "shard_optimizer") if getattr(options, name, False)]
    if options.engine != "jax":
        if given:
            raise UserError(f"{given[0]} needs JAX; set --engine jax")
        return
    speculate, draft_model = getattr(options, "speculate", "off"), getattr(options, "draft_model", None)
    excluded = [f"--dtype {options.dtype}"] * options.dtype.startswith("int")
    excluded += [f"--speculate {speculate}"] * (speculate != "off") + ["--draft_model"] * (draft_model is not None)
    if excluded:
        raise UserError(f"{excluded[0]} does not work with --engine jax; leave one of them out")
    check_process_options(options)


def check_process_options(options):
    """Raise UserError unless the options for several processes are complete and suit each other."""
    numbers = [options.process_id, options.n_processes]
    if options.coordinator is None and numbers != [None, None]:
        raise UserError("--process_id and --n_processes need --coordinator HOST:PORT, where process 0 listens")
    if options.coordinator is None:
        return
    if options.coordinator != "auto":
        if not re.fullmatch(r".+:\d+", options.coordinator):
            raise UserError(f"--coordinator {options.coordinator} is not HOST:PORT, such as 10.0.0.1:1234; correct it")
        if None in numbers:
            raise UserError("--coordinator needs --process_id I and --n_processes N, too")
        if options.process_id >= options.n_processes:
            raise UserError(
                f"--process_id {options.process_id} is too large; "
                f"set at most {options.n_processes - 1}, as --n_processes is {options.n_processes}"
            )
    if getattr(options, "interactive", False) or "-" in (
        getattr(options, "prompt", 0),
        getattr(options, "prompts_file", 0),
    ):
        raise UserError("several processes cannot share standard input; give each the prompt, or a --prompts_file")
    if getattr(options, "output", None) is not None:
        raise UserError("several processes cannot share --output; redirect the output of process 0: > FILE")


def start_jax(options):
    """Import JAX and join the other processes, of which only process 0 prints.

    Raises UserError if that does not work. JAX's own messages below errors are not shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import jax

        from engines.jax_engine import use_compilation_cache
    except ImportError as error:
        raise UserError(
            f"--engine jax needs the package jax ({error}); pip install -r requirements-jax.txt, or leave it out"
        ) from None
    use_compilation_cache()
    if options.coordinator is not None:
        join_processes(jax, options)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        where = f" on JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" if "JAX_PLATFORMS" in os.environ else ""
        reason = f" ({error})" if str(error) else ""
        raise UserError(
            f"JAX cannot start{where}{reason}; set JAX_PLATFORMS=cpu, or for GPUs pip install 'jax[cuda13]'"
        ) from None


def join_processes(jax, options):
    """Connect the processes; let all use the seed of process 0."""
    address = None if options.coordinator == "auto" else options.coordinator
    errors = []

    def initialize():
        timeouts = {
            "initialization_timeout": 2 * SECONDS_TO_JOIN,  # after which JAX would abort this process
            "heartbeat_timeout_seconds": SECONDS_TO_NOTICE,
            "shutdown_timeout_seconds": SECONDS_TO_NOTICE,
        }
        try:
            jax.distributed.initialize(address, options.n_processes, options.process_id, **timeouts)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_JOIN)
    if thread.is_alive() or errors:
        reason = errors[0] if errors else f"not all have connected within {SECONDS_TO_JOIN} s"
        if address is None and errors:
            reason = "JAX detects no cluster"
        raise UserError(
            f"the processes cannot join at --coordinator {options.coordinator} ({reason}); start all at about the same "
            "time, with the same HOST:PORT, where process 0 can listen"
        )
    sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115 (stays open)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Gloo reports its connections
    if jax.process_index() > 0:
        discard(sys.stdout)
    if hasattr(options, "seed") and options.seed is None:
        import secrets

        from jax.experimental.multihost_utils import broadcast_one_to_all

        options.seed = int(broadcast_one_to_all(secrets.randbits(31)))
