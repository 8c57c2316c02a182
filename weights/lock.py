"""An inter-process lock, and folders that are removed if they stay empty."""

import contextlib
import os

from weights.files import cannot_write


@contextlib.contextmanager
def new_folder(path):
    """Create the folder path if necessary; when the block ends, remove what was created, if it is empty."""
    created, folder = [], os.path.abspath(path)
    while not os.path.isdir(folder):
        created.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(path, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in created:
                os.rmdir(folder)


@contextlib.contextmanager
def hold_lock(path, on_wait, remedy):
    """Hold the lock that is the file path. Its folder is created if necessary; the file stays.

    on_wait() is called before waiting for another process that holds the lock; it may raise an exception instead.
    Raises UserError, which remedy ends, if the file cannot be created.
    """
    from filelock import FileLock, Timeout

    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))  # where this fails, FileLock may wait for ever
    except OSError as error:
        raise cannot_write(path, error, remedy) from None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
