"""Lines of progress every 30 s where standard error is not a terminal, which has a progress bar instead."""

import sys
import time

LINE_INTERVAL = 30  # seconds


class Lines:
    """Print a line of progress if the last one is LINE_INTERVAL ago and standard error is not a terminal."""

    def __init__(self):
        self.last = time.perf_counter()

    def show(self, text):
        if time.perf_counter() - self.last >= LINE_INTERVAL and not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            self.last = time.perf_counter()
