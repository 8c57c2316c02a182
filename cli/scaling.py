"""The command line of training/scaling.py: a table of models on meshes of devices, in Markdown."""

import argparse
import math
import re

from cli.devices import parse_devices
from cli.options import Parser, exit_code, parse_positive, parse_positive_rate, parse_probability
from training.scaling import ITEMSIZE, Device, Step, hparams_near, limit, memory, seconds, sent
from weights.errors import UserError
from weights.names import count_params

UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}
COLUMNS = ("parameters", "devices", "tokens", "batches")
COLUMNS += ("weights", "gradients", "moments", "activations", "logits", "sum", "sent along model", "along data")
COLUMNS += ("compute, s", "model, s", "data, s", "limit")
OF_DEVICES = {  # options by field of Device: (type, help text)
    "memory": (parse_positive_rate, "GB per device"),
    "tflops": (parse_positive_rate, "10^12 operations per second; 67 in float32"),
    "utilization": (parse_probability, "part of --tflops that is reached"),
    "node_bandwidth": (parse_positive_rate, "GB/s that a device sends within its node"),
    "network_bandwidth": (parse_positive_rate, "GB/s that a device sends to other nodes"),
    "node_size": (parse_positive, "devices per node"),
}


def parse_size(text):
    """Parse a number of parameters, such as 124M, 6.7B or 1T."""
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?[MBT]", text, re.ASCII) or float(text[:-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a number of parameters, such as 124M, 6.7B or 1T")
    return float(text[:-1]) * UNITS[text[-1]]


def make_parser():
    parser = Parser(
        prog="-m training.scaling",
        description="Print what a training step takes per device, for each model on each mesh, in GB (10^9 bytes) and "
        "seconds. docs/scaling.md explains the columns.",
    )
    add = parser.add_argument
    add("--n_params", type=parse_size, nargs="+", required=True, metavar="N", help="124M, 6.7B, ...: the nearest shape")
    add("--devices", type=parse_devices, nargs="+", required=True, metavar="N", help="data x model, such as 8x1 or 2x4")
    add("--block_size", type=parse_positive, default=1024, metavar="N", help="context length (default: 1024)")
    add("--windows", type=parse_positive, default=8, metavar="N", help="windows per batch and data rank (default: 8)")
    add("--tokens", type=parse_positive, default=2**19, metavar="N", help="tokens per step, at least (default: 524288)")
    add("--dtype", choices=[*ITEMSIZE], default="bfloat16", help="of products (default: bfloat16)")
    add("--remat", action="store_true", help="keep only the inputs of blocks for the backward pass")
    add("--shard_optimizer", action="store_true", help="shard AdamW's moments over the data ranks")
    group = parser.add_argument_group("the devices; the defaults are those of NVIDIA's H200, eight per node")
    for name, (kind, text) in OF_DEVICES.items():
        default = getattr(Device, name)
        group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: {default})")
    return parser


def make_step(n_params, mesh, options):
    """Return the Step of a model on a mesh; raise UserError unless its heads divide by the devices along model."""
    hparams, (n_data, n_model) = hparams_near(n_params, options.block_size), mesh
    if (n_head := hparams["n_head"]) % n_model:
        usable = ", ".join(str(n) for n in range(1, n_head + 1) if n_head % n == 0)
        raise UserError(
            f"{n_head} heads, of {count_params(**hparams) / 1e6:,.0f}M parameters, do not divide by {n_model} devices; "
            f"set --devices {n_data}xN with N one of {usable}"
        )
    n_batches = math.ceil(options.tokens / (n_data * options.windows * options.block_size))
    flags = options.dtype, options.remat, options.shard_optimizer
    return Step(hparams, n_data, n_model, options.windows, n_batches, *flags)


def row(step, device):
    """Return the cells of a step's row by COLUMNS."""
    n_bytes = memory(step)
    gigabytes = [n / 1e9 for n in (*n_bytes.values(), sum(n_bytes.values()), *sent(step).values())]
    return [
        f"{count_params(**step.hparams) / 1e6:,.0f}M",
        f"{step.n_data}x{step.n_model}",
        f"{step.n_batches * step.n_data * step.n_local_tokens:,}",
        str(step.n_batches),
        *(f"{x:.3g}" if x < 999.5 else f"{x:,.0f}" for x in (*gigabytes, *seconds(step, device).values())),
        limit(step, device),
    ]


def print_table(options):
    """Print a row for each model on each mesh."""
    device = Device(**{name: getattr(options, name) for name in OF_DEVICES})
    steps = [make_step(n_params, mesh, options) for n_params in options.n_params for mesh in options.devices]
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *(row(step, device) for step in steps)):
        print("|", " | ".join(cells), "|")


def run(argv=None):
    """Run the command line argv (default: sys.argv[1:]); return the exit code."""
    return exit_code("training/scaling.py", lambda: print_table(make_parser().parse_args(argv)), argv)
