"""Compare what is about to be used with what there is: space on the disk, and memory."""

import os
import shutil

from weights.errors import UserError

CGROUPS = "/sys/fs/cgroup"  # version 2


def check_space(path, n_bytes):
    """Raise UserError unless the disk of path has n_bytes of free space."""
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if n_bytes > free:
        raise UserError(
            f"{path} needs {format_bytes(n_bytes)} and the disk has {format_bytes(free)} free; "
            "make room, or choose another --models_dir or --data_dir"
        )


def check_memory(what, n_bytes, remedy):
    """Raise UserError unless n_bytes of memory are available. what: the subject of the message; remedy ends it."""
    available = available_memory()
    if n_bytes > available:
        needed = f"{what} needs about {format_bytes(n_bytes)} of memory"
        raise UserError(f"{needed} and {format_bytes(available)} are available; {remedy}")


def available_memory():
    """Return how many bytes this process can still allocate, limited by the machine and by its cgroup.

    Infinite where the operating system does not tell.
    """
    with_unit = read_numbers("/proc/meminfo")  # MemAvailable:  23456789 kB
    available = 1024 * with_unit["MemAvailable:"] if "MemAvailable:" in with_unit else float("inf")
    folder = own_cgroup()
    while folder.startswith(CGROUPS):
        limit, used = (read_numbers(os.path.join(folder, name)) for name in ("memory.max", "memory.current"))
        if limit and used:
            cached = read_numbers(os.path.join(folder, "memory.stat")).get("inactive_file", 0)
            available = min(available, max(0, limit[""] - used[""] + cached))
        folder = os.path.dirname(folder)
    return available


def own_cgroup():
    """Return the folder of this process's cgroup, "" if there is none."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as f:
            paths = [line.strip()[len("0::/") :] for line in f if line.startswith("0::/")]
    except OSError:
        return ""
    return os.path.join(CGROUPS, *paths).rstrip("/") if paths else ""


def read_numbers(path):
    """Return a dict of the first number of each line by the word before it; {} if there is no such file."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line.split() for line in f]
    except OSError:
        return {}
    pairs = [("", *words) if len(words) == 1 else words[:2] for words in lines if words]
    return {name: int(number) for name, number in pairs if number.isdecimal()}


def format_bytes(n):
    """Return a size in the largest unit of which there is at least one: 512 bytes, 3.5 kB, 1.2 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 1000 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} bytes"
