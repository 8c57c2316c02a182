"""weights/files.py and weights/resources.py: files are replaced at once or not at all; disk and memory are compared."""

import math
import os
import threading

import pytest

from tests.conftest import contents, one_line_error, set_free_space
from weights import resources
from weights.errors import CorruptFile, UserError
from weights.files import atomic_write, open_regular, read_json, remove_leftovers, set_aside
from weights.resources import available_memory, check_memory, check_space, format_bytes


def test_atomic_write_touches_no_other_file_and_follows_no_link(tmp_path, monkeypatch):
    """Neither the user's files whose names look temporary, nor a file behind a link that has the temporary's name."""
    (tmp_path / "out.html.tmp").write_bytes(b"the user's")
    (tmp_path / "elsewhere").write_bytes(b"the user's, too")
    (tmp_path / "out.html").symlink_to("elsewhere")
    before = contents(tmp_path)
    with atomic_write(str(tmp_path / "out.html")) as f:
        f.write(b"new")
        assert contents(tmp_path).items() >= before.items()
    assert not (tmp_path / "out.html").is_symlink()
    assert contents(tmp_path) == before | {"out.html": b"new"}

    monkeypatch.setattr("os.urandom", bytes)
    (tmp_path / f".{'0' * 16}.tmp").symlink_to("elsewhere")
    with one_line_error("out.html", "File exists"), atomic_write(str(tmp_path / "out.html")) as f:
        f.write(b"newer")
    assert (tmp_path / "elsewhere").read_bytes() == b"the user's, too"
    assert (tmp_path / "out.html").read_bytes() == b"new"


def test_two_writers_of_one_file_both_succeed(tmp_path):
    """The file is whole at any time: that of one writer or of the other."""
    path, barrier = tmp_path / "file", threading.Barrier(2)

    def write(data):
        with atomic_write(str(path)) as f:
            f.write(data[:5000])
            barrier.wait(timeout=60)
            f.write(data[5000:])

    threads = [threading.Thread(target=write, args=(letter * 10_000,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), KeyError()])
@pytest.mark.parametrize("before", [{}, {"file": b"old"}], ids=["new file", "old file"])
def test_after_an_exception_the_folder_is_as_before(tmp_path, error, before):
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises((UserError, type(error))) as caught, atomic_write(str(tmp_path / "file")) as f:
        f.write(b"half")
        raise error
    message = f"cannot write {tmp_path / 'file'} (No space left on device); make room, or choose another --models_dir"
    assert str(caught.value) == (message if isinstance(error, OSError) else "")
    assert contents(tmp_path) == before


def test_a_file_that_cannot_be_replaced_is_an_error_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, reason in (("folder", "Is a directory"), ("none/file", "No such file")):
        with one_line_error(tmp_path / name, reason, "--models_dir"), atomic_write(str(tmp_path / name)) as f:
            f.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_was_set_aside_is_not_overwritten(tmp_path):
    for i in range(3):
        (tmp_path / "file").write_bytes(b"%d" % i)
        set_aside(str(tmp_path / "file"))
    assert contents(tmp_path) == {"file.corrupt": b"0", "file.corrupt1": b"1", "file.corrupt2": b"2"}


def test_only_leftovers_of_killed_writers_are_removed(tmp_path):
    kept = ["file.tmp", ".tmp", ".0123456789abcde.tmp", ".0123456789ABCDEF.tmp", ".0123456789abcdef.tmp.gz"]
    for name in [*kept, ".0123456789abcdef.tmp"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".fedcba9876543210.tmp").mkdir()
    writer = atomic_write(str(tmp_path / "file"))
    writer.__enter__()  # and is killed
    remove_leftovers(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".fedcba9876543210.tmp"])


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for path in (tmp_path / "fifo", tmp_path / "link", os.devnull):
        with one_line_error(path, "not a regular file", kind=CorruptFile):
            open_regular(str(path))
    (tmp_path / "file").write_bytes(b"1")
    with open_regular(str(tmp_path / "file")) as f:
        assert f.read() == b"1"


def test_a_text_file_as_large_as_weights_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as f:
        f.truncate(10**9)
    with one_line_error(tmp_path / "config.json", "1000000000 bytes; up to 100000000 are read", kind=CorruptFile):
        read_json(str(tmp_path / "config.json"))


# Resources


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Pretend to be on a machine with 8,000 kB of memory available; returns a function that writes its files."""
    monkeypatch.setattr(resources, "PROC", str(tmp_path / "proc"))
    monkeypatch.setattr(resources, "CGROUPS", str(tmp_path / "cgroup"))

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    write("proc/meminfo", "MemTotal:       16000 kB\nMemAvailable:    8000 kB\nHugePages_Total:       0\n")
    return write


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
CGROUPS = {  # /proc/self/cgroup; the files of cgroups, of which cached files do not count; the bytes available
    "none": (None, {}, 8_192_000),
    "no files": ("0::/a/b\n", {}, 8_192_000),
    "version 2": ("0::/a/b\n", {"a/b": (*V2, 5_000_000, 1_000_000)}, 4_000_000),
    "above": ("0::/a/b\n", {"a/b": (*V2, "max", 1), "a": (*V2, 3_000_000, 1_000_000)}, 2_000_000),
    "full": ("0::/\n", {"": (*V2, 1_000_000, 1_000_001)}, 0),
    "more than the machine": ("0::/a\n", {"a": (*V2, 10**12, 0)}, 8_192_000),
    "version 1": ("4:memory:/a\n2:cpu:/a\n0::/\n", {"memory/a": (*V1, 6_000_000, 1_000_000)}, 5_000_000),
    "another process's": ("0::/a\n", {"b": (*V2, 1, 1)}, 8_192_000),
    "cached": ("0::/a\n", {"a": (*V2, 900_000, 800_000, "anon 5\nactive_file 200000\ninactive_file 1")}, 300_001),
    "cached, version 1": (
        "0::/a\n",
        {"a": (*V2, 900_000, 800_000, "active_file 7\ntotal_active_file 100000\ntotal_inactive_file 2")},
        200_002,
    ),
}


@pytest.mark.parametrize("how", CGROUPS)
def test_available_memory_is_that_of_the_machine_and_its_cgroups(machine, how):
    own, groups, expected = CGROUPS[how]
    if own:
        machine("proc/self/cgroup", own)
    for group, (limit_file, used_file, limit, used, *stat) in groups.items():
        machine(f"cgroup/{group}/{limit_file}", f"{limit}\n")
        machine(f"cgroup/{group}/{used_file}", f"{used}\n")
        machine(f"cgroup/{group}/memory.stat", "".join(stat))
    assert available_memory() == expected


def test_messages_have_both_sizes(machine, tmp_path, monkeypatch):
    with one_line_error("a batch of 3 needs about 9 MB of memory and 8.19 MB are available; take fewer"):
        check_memory("a batch of 3", 9_000_000, "take fewer")
    check_memory("a batch of 2", 8_192_000, "take fewer")
    (tmp_path / "proc" / "meminfo").unlink()  # another operating system
    assert available_memory() == math.inf
    check_memory("a batch", 10**100, "take fewer")

    set_free_space(monkeypatch, 2_000)
    with one_line_error("file needs 3 kB and the disk has 2 kB free; make room"):
        check_space("file", 3_000)
    check_space("file", 2_000)


def test_sizes_have_units_that_fit():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1 kB", 1234: "1.23 kB", 999_499: "999 kB", 999_999: "1000 kB"}
    sizes |= {10**6: "1 MB", 497_759_232: "498 MB", 3.7e9: "3.7 GB", 64e12: "64 TB", 10**18: "1000000 TB"}
    assert {n: format_bytes(n) for n in sizes} == sizes
