"""Processes that take the same steps, each with a share of the numbers, and exchange what they have found.

Threads would do for BLAS, which lets go of Python's lock, but not for what is in Python between two products. And the
processes wait for each other by looking again and again: to be woken up takes as long as a fifth of a layer does.
"""

import contextlib
import mmap
import multiprocessing
import os
import signal
import time
import warnings
import weakref

import numpy as np

from weights.errors import UserError

SLOT = 2**20  # numbers that a process can show to the others at a time
LINE = 8  # words from the count of one process to the next one's: a line of the processor's cache for each
LOOKS = 20_000  # in a row, about a millisecond; from then on with pauses


class PassIsOver(Exception):
    """The first process has left the pass that a helper is in."""


class Team:
    """This process and its helpers, which sleep between passes and are gone when the program is.

    What is exchanged lies in memory that all share. Whoever sees a count must see what was written before it, which
    holds on x86. To fork has to be possible.
    """

    def __init__(self, n):
        self.n, self.i, self.helpers = n, 0, []
        self.n_pass, self.n_met, self.n_done = 0, 0, 0  # passes begun; meetings in this one; the last that was ended
        self.dropped = []  # names of what helpers need no more: they are told so with the next pass
        if n > 1:
            n_bytes = 8 * LINE * (n + 1)
            memory = mmap.mmap(-1, n_bytes + 2 * n * SLOT * 4)
            self.counts = memoryview(memory)[:n_bytes].cast("q")  # [0]: the last pass that was left before its end
            self.slots = np.frombuffer(memory, np.float32, offset=n_bytes).reshape(2, n, SLOT)

    def start(self, make_actions):
        """Makes the helpers: each calls make_actions(), which returns functions by name, and waits to be told one."""
        for i in range(1, self.n):
            try:
                self.helpers.append(self.start_helper(i, make_actions))
            except OSError as error:
                remedy = "close other programs, or set OPENBLAS_NUM_THREADS=1, which does without"
                raise UserError(f"cannot start a helper process ({error.strerror}); {remedy}") from None

    def start_helper(self, i, make_actions):
        """(process, this end of a pipe to it)"""
        fork = multiprocessing.get_context("fork")
        theirs, ours = fork.Pipe(duplex=False)
        helper = fork.Process(target=self.help, args=(i, os.getpid(), theirs, ours, make_actions), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the helper ignores it
        try:
            with warnings.catch_warnings():  # of threads in this process: they are BLAS's, which is prepared for it
                warnings.simplefilter("ignore")
                helper.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return helper, ours

    def end_with(self, owner):
        """The helpers will end when owner is no more."""
        weakref.finalize(owner, send_home, self.helpers, os.getpid())

    def help(self, i, parent, pipe, other_end, make_actions):
        """What a helper does all its life."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to deal with
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever that has made of it
        other_end.close()
        self.i, self.parent = i, parent
        with contextlib.suppress(MemoryError, EOFError):  # it ends, and the first process will find out, or has ended
            actions = make_actions()
            while True:
                self.n_pass, dropped, name, args = pipe.recv()
                self.n_met = 0
                actions["forget"](dropped)
                try:
                    self.meet()
                    actions[name](*args)
                except PassIsOver:
                    pass
                except (MemoryError, EOFError):
                    raise
                except Exception:  # the first process has met the same one; if not, it is to hear of it
                    self.counts[LINE * (i + 1) + 1] = self.n_pass

    @contextlib.contextmanager
    def together(self, name, *args):
        """`with` it helpers do what the name says, while this process does the same with its share.

        Raises UserError when a helper has ended.
        """
        if self.n == 1 or self.i:
            yield
            return
        dropped, self.dropped = self.dropped, []
        if self.n_done != self.n_pass:  # a second Ctrl-C came where the first was dealt with
            self.counts[0] = self.n_pass
        self.n_pass, self.n_met = self.n_pass + 1, 0
        try:
            self.tell((self.n_pass, dropped, name, args))
            self.meet()
            yield
            self.n_done = self.n_pass
        except BaseException:  # Ctrl-C, too: helpers are not to wait for what does not come
            self.counts[0] = self.n_pass
            raise

    def tell(self, message):
        """Sends it to all helpers, or ends them: half a message in a pipe would make nonsense of the next one."""
        try:
            for _, pipe in self.helpers:
                with contextlib.suppress(OSError):  # it has ended: meet() will say so
                    pipe.send(message)
        except BaseException:
            send_home(self.helpers, os.getpid())
            raise

    def meet(self):
        """Waits until all processes have come as far in this pass."""
        self.n_met += 1
        here = self.n_pass << 32 | self.n_met
        self.counts[LINE * (self.i + 1)] = here
        for j in range(self.n):
            looks = 0
            while self.counts[LINE * (j + 1)] < here:
                looks += 1
                if looks > LOOKS:
                    self.look_after(j)
                    time.sleep(5e-5)
        if self.i and self.counts[0] >= self.n_pass:
            raise PassIsOver

    def look_after(self, j):
        """Raises what there is to raise when process j is long in coming."""
        if self.i and self.counts[0] >= self.n_pass:
            raise PassIsOver
        if self.i and os.getppid() != self.parent:
            raise EOFError
        if self.i:
            return
        helper = self.helpers[j - 1][0]
        if self.counts[LINE * (j + 1) + 1] == self.n_pass:
            raise RuntimeError("a helper process could not do what this one could")
        if not helper.is_alive():
            code = f"exit code {helper.exitcode}"
            raise UserError(f"a helper process has ended ({code}); if memory was short, take a smaller model or batch")

    def sum(self, y):  # [...] -> [...]
        """The sum of what all processes bring, in each of them the same to the bit."""
        if self.n == 1:
            return y
        flat, total = y.reshape(-1), np.empty(y.size, np.float32)
        for start in range(0, y.size, SLOT):
            piece = flat[start : start + SLOT]
            self.show(piece)[:, : piece.size].sum(axis=0, out=total[start : start + SLOT])
        return total.reshape(y.shape)

    def join(self, y, widths):  # [rows, n_share] -> [rows, n]
        """What all processes bring side by side, [rows, widths[i]] of each; it is there in the first process only."""
        if self.n == 1:
            return y
        rows = SLOT // max(widths)
        whole = np.empty((len(y), sum(widths) if self.i == 0 else 0), np.float32)
        for start in range(0, len(y), rows):
            piece = y[start : start + rows]
            slots, end = self.show(piece.reshape(-1)), 0
            for slot, width in zip(slots, widths if self.i == 0 else [], strict=False):
                end += width
                whole[start : start + rows, end - width : end] = slot[: len(piece) * width].reshape(len(piece), width)
        return whole

    def show(self, piece):  # [n_piece] -> [n, SLOT]
        """What each process shows, once all do. It stays until the next but one is shown."""
        slots = self.slots[self.n_met % 2]
        slots[self.i, : piece.size] = piece
        self.meet()
        return slots


def send_home(helpers, pid):
    if os.getpid() != pid:  # a helper has copies of other teams
        return
    for helper, pipe in helpers:
        pipe.close()
        helper.kill()  # in the midst of what is no longer wanted
    for helper, _ in helpers:
        helper.join()
