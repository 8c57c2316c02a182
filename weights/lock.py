"""An inter-process lock, and folders that are removed if they stay empty."""

import contextlib
import os
import time

POLL = 0.1  # seconds between two attempts to get a lock


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
def hold_lock(path, waiting):
    """Hold the lock that is the file path. Its folder is created if necessary, and removed if it is empty at the end.

    waiting() is called once if another process holds the lock, before waiting for it; it may raise an exception
    instead. Raises OSError if the file cannot be created.
    """
    from filelock import FileLock, Timeout

    folder = os.path.dirname(path) or "."
    with new_folder(folder):
        lock, waits = FileLock(path), False
        while not lock.is_locked:
            os.makedirs(folder, exist_ok=True)  # the process that held the lock may have removed it
            os.close(os.open(path, os.O_RDWR | os.O_CREAT))  # where this fails, FileLock may wait for ever
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not waits:
                    waiting()
                waits = True
                time.sleep(POLL)
        try:
            yield
        finally:
            if os.listdir(folder) == [os.path.basename(path)]:
                os.remove(path)  # before the release: FileLock does not take a file that has been removed meanwhile
            lock.release()
