"""Read JSON and UTF-8 with errors that name the file, and write files atomically."""

import contextlib
import errno
import json
import mmap
import os
import tempfile

from weights.errors import CorruptFile, UserError


def decode_utf8(data, source):
    """Return the text that data encodes; raise UserError, which names the source, if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise UserError(f"{source} is not UTF-8 ({what}); convert it, with iconv for example") from None


def read_json(path):
    """Return the dict in a JSON file; raise CorruptFile if it contains anything else."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, error) from None
    if not isinstance(found, dict):
        raise CorruptFile(path, "not a JSON object")
    return found


def map_file(path):
    """Return the bytes of a file as a read-only memory map; raise CorruptFile for an empty file."""
    with open(path, "rb") as f:
        try:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CorruptFile(path, "0 bytes") from None


@contextlib.contextmanager
def atomic_write(path, remedy="choose another --models_dir"):
    """Open a binary file that replaces path when the block ends, and is removed if the block raises an exception.

    Raises UserError if writing fails; remedy is what the message suggests besides making room.
    """
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); make room, or {remedy}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")


def check_writable(path, remedy):
    """Raise UserError if path cannot be written. Call it before long work; remedy ends the message."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EEXIST, "it is not a regular file")
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); {remedy}") from None


def same_file(path, other):
    """Return whether both paths exist and lead to the same file."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)
