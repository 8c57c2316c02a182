"""Memory allocation for large temporary arrays."""

import numpy as np


def keep_freed_memory():
    """Make glibc keep freed blocks of up to 31 MiB, so that the next temporary array of that size reuses them.

    glibc returns large freed blocks to the operating system, and each new array is then faulted in page by page, which
    takes a third of the time of a 512-token prompt. Allocating and freeing one such block is enough, because glibc's
    threshold adapts to the largest block freed (mallopt(3), M_MMAP_THRESHOLD). Other allocators ignore this.
    """
    np.empty(31 * 2**20, dtype=np.uint8)
