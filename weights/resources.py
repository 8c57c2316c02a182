"""The space on the disk, the memory and the processor cores that this process may use."""

import math
import os

from weights.errors import UserError

PROC, CGROUPS = "/proc", "/sys/fs/cgroup"


def check_space(path, n_bytes, remedy="choose another --models_dir"):
    """Raise UserError unless the disk of path has n_bytes of free space; remedy ends the message."""
    import shutil

    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if n_bytes > free:
        raise UserError(
            f"{path} needs {format_bytes(n_bytes)} and the disk has {format_bytes(free)} free; make room, or {remedy}"
        )


def check_memory(what, n_bytes, remedy):
    """Raise UserError unless n_bytes of memory are available. what: the subject of the message; remedy ends it."""
    available = available_memory()
    if n_bytes > available:
        needed = f"{what} needs about {format_bytes(n_bytes)} of memory"
        raise UserError(f"{needed} and {format_bytes(available)} are available; {remedy}")


def available_memory():
    """Return how many bytes this process can still allocate, limited by the machine and by its cgroup.

    Infinite where /proc does not exist.
    """
    with_unit = read_numbers(PROC, "meminfo")  # MemAvailable:  23456789 kB
    available = 1024 * with_unit["MemAvailable:"] if "MemAvailable:" in with_unit else float("inf")
    for folder in own_cgroups("memory"):
        limit = read_numbers(folder, "memory.max") or read_numbers(folder, "memory.limit_in_bytes")
        used = read_numbers(folder, "memory.current") or read_numbers(folder, "memory.usage_in_bytes")
        if limit and used:
            found = read_numbers(folder, "memory.stat")
            cached = sum(found.get(f"total_{name}", found.get(name, 0)) for name in ("active_file", "inactive_file"))
            available = min(available, max(0, limit[""] - used[""] + cached))
    return available


def available_cores():
    """Return the number of processor cores that this process may use, limited by its affinity and its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in own_cgroups("cpu"):
        limits = read_numbers(folder, "cpu.max")  # version 2: microseconds per period, or max, and the period
        quota, period = read_numbers(folder, "cpu.cfs_quota_us"), read_numbers(folder, "cpu.cfs_period_us")
        if quota and period:
            limits = {str(quota[""]): period[""]}
        cores = min([cores, *(math.ceil(int(n) / period) for n, period in limits.items() if n.isdecimal())])
    return max(1, cores)


def own_cgroups(controller):
    """Return the folders of this process's cgroups, of versions 2 and 1, and of the groups that contain them."""
    try:
        with open(os.path.join(PROC, "self", "cgroup"), encoding="utf-8") as f:
            found = [line.rstrip("\n").split(":", 2) for line in f]
    except OSError:
        return []
    own = [
        os.path.join(CGROUPS, name, path.strip("/"))
        for _, name, path in found
        if name == "" or controller in name.split(",")
    ]
    return [folder for group in own for folder in with_parents(group)]


def with_parents(folder):
    parent = os.path.dirname(folder)
    return [folder] if parent == folder else [folder, *with_parents(parent)]


def read_numbers(*path):
    """Return a dict of the first number of each line by the word before it; {} if there is no such file."""
    try:
        with open(os.path.join(*path), encoding="utf-8") as f:
            lines = [line.split() for line in f]
    except OSError:
        return {}
    pairs = [("", *words) if len(words) == 1 else words[:2] for words in lines if words]
    return {name: int(number) for name, number in pairs if number.isdecimal()}


def format_bytes(n):
    """Return a size in the largest unit of which there is at least one: 512 bytes, 3.5 kB, 1.2 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 999.5 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} bytes"
