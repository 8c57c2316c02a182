"""Large arrays processed in chunks of a few rows, so that temporary arrays stay in the cache of the processor core."""

CHUNK_SIZE = 2**15  # elements: 128 KiB of float32, of which several fit into the cache of one core


def chunks(n_rows, row_size=1, scale=1):
    """Return slices that divide n_rows rows of row_size elements into chunks of about scale * CHUNK_SIZE elements."""
    step = max(1, scale * CHUNK_SIZE // row_size)
    return [slice(i, i + step) for i in range(0, n_rows, step)]
