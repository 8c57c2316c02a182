"""Memory allocation for large temporary arrays."""

import contextlib
import ctypes

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_freed_memory():
    """Make glibc keep freed blocks of up to 31 MiB, so that the next temporary array of that size reuses them.

    glibc returns large freed blocks to the operating system, and each new array is then faulted in page by page, which
    takes a third of the time of a 512-token prompt. Allocating and freeing one such block is enough, because glibc's
    threshold adapts to the largest block freed (mallopt(3), M_MMAP_THRESHOLD). Other allocators ignore this.
    """
    np.empty(31 * 2**20, dtype=np.uint8)


def keep_all_freed_memory():
    """Make glibc keep freed blocks of any size, from now on and in all threads; other allocators ignore this.

    A training step frees what the next one needs: at 124M shape, 1.5 GB, which take 0.3 s to be faulted in again.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)  # only the first arena holds blocks of more than 64 MiB
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
