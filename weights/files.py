"""Read JSON and UTF-8 with errors that name the file, and write files atomically."""

import contextlib
import errno
import itertools
import json
import mmap
import os
import re
import stat

from weights.errors import CorruptFile, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError while writing
LONGEST_TEXT = 100_000_000  # bytes of a file that is read at once; a large vocabulary has 20 million


def decode_utf8(data, source):
    """Return the text that data encodes; raise UserError, which names the source, if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise UserError(f"{source} is not UTF-8 ({what}); convert it, with iconv for example") from None


def open_regular(path):
    """Open a regular file for reading its bytes; raise CorruptFile for another kind: reading a FIFO would wait."""
    at_once = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait, too
    f = open(path, "rb", opener=lambda path, flags: os.open(path, flags | at_once))  # noqa: SIM115 (the caller's)
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        f.close()
        raise CorruptFile(path, "not a regular file")
    return f


def read_text(path):
    """Return the text of a UTF-8 file; raise CorruptFile for a file that contains anything else, or is too long."""
    with open_regular(path) as f:
        if (size := os.fstat(f.fileno()).st_size) > LONGEST_TEXT:
            raise CorruptFile(path, f"{size} bytes; up to {LONGEST_TEXT} are read")
        try:
            return f.read().decode("utf-8")
        except ValueError as error:
            raise CorruptFile(path, error) from None


def read_json(path):
    """Return the dict in a JSON file; raise CorruptFile if it contains anything else."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, str(error).partition(";")[0]) from None  # no advice for programmers
    if not isinstance(found, dict):
        raise CorruptFile(path, "not a JSON object")
    return found


def map_file(path):
    """Return the bytes of a file as a read-only memory map; raise CorruptFile for an empty file."""
    with open_regular(path) as f:
        try:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CorruptFile(path, "0 bytes") from None


def cannot_write(path, error, remedy):
    """Return the UserError for an OSError that occurred while path was written; remedy ends the message."""
    room = "make room, or " if error.errno in FULL else ""
    return UserError(f"cannot write {path} ({error.strerror or error}); {room}{remedy}")


@contextlib.contextmanager
def atomic_write(path, remedy="choose another --models_dir"):
    """Open a binary file that replaces path when the block ends, and is removed if the block raises an exception.

    It is a new file with a random name in the same folder. Raises UserError if writing fails; remedy ends the message.
    """
    temporary = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as f:
            yield f
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error, remedy) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def set_aside(path):
    """Rename a file to path.corrupt, or to path.corrupt1 and so on if that exists."""
    names = (f"{path}.corrupt{n or ''}" for n in itertools.count())
    os.replace(path, next(name for name in names if not os.path.lexists(name)))


def remove_leftovers(folder):
    """Remove the temporary files of writers that were killed. The caller holds a lock that other writers wait for."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def check_writable(path, remedy):
    """Raise UserError if path cannot be written. Call it before long work; remedy ends the message."""
    from tempfile import TemporaryFile

    try:
        if not path:
            raise OSError(errno.ENOENT, "the name is empty")
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EEXIST, "it is not a regular file")
        with TemporaryFile(dir=os.path.dirname(path) or "."):
            pass
    except OSError as error:
        raise cannot_write(path, error, remedy) from None


def same_file(path, other):
    """Return whether both paths exist and lead to the same file."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)
