"""Files read and written whole: JSON objects in, anything out by way of a temporary file."""

import contextlib
import errno
import json
import os
import tempfile

from weights.errors import CorruptFile, UserError


def decode_utf8(data, source):
    """Bytes to text; raises UserError, which names their source, where they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise UserError(f"{source} is not UTF-8 ({what}); convert it, with iconv for example") from None


def read_json(path):
    """The object in a JSON file; raises CorruptFile when there is something else."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, error) from None
    if not isinstance(found, dict):
        raise CorruptFile(path, "not a JSON object")
    return found


@contextlib.contextmanager
def atomic_write(path, remedy="choose another --models_dir"):
    """A binary file that takes path's place when all of it is written, and leaves nothing behind when it is not.

    remedy: what a person can do, besides making room, where that fails with a UserError.
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
    """Raises UserError where atomic_write() would, before there is work to lose."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EEXIST, "it is there and is no file")
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); {remedy}") from None


def same_file(path, other):
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)
