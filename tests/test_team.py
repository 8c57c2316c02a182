"""engines/team.py: a group of processes that run the same steps and exchange arrays."""

import contextlib
import gc
import os
import signal
import sys
import time
import unittest.mock

import numpy as np
import pytest

from engines.team import SLOT, Team
from tests import programs
from weights.errors import UserError


def numbers(i, *shape):
    return np.random.default_rng(i).standard_normal(shape, dtype=np.float32)


def actions(team):
    """What the workers of these tests can run; the tests do the same in rank 0."""
    return {
        "sum": lambda *shape: team.sum(numbers(team.i, *shape)),
        "join": lambda rows, widths: team.join(numbers(team.i, rows, widths[team.i]), widths),
        "sums": lambda n: [team.sum(numbers(team.i, 2)) for _ in range(n)],
        "fail": lambda: 1 / 0,
        "end": lambda: os._exit(3),
        "forget": lambda dropped: [os.write(pipe, name) for pipe, name in dropped],
    }


@contextlib.contextmanager
def started(n):
    team, owner = Team(n), set()
    team.start(lambda: actions(team))
    team.end_with(owner)
    yield team
    del owner


def assert_sums(team, *shape):
    """One all-reduce in all processes, as a check that they are in step."""
    with team.together("sum", *shape):
        total = team.sum(numbers(0, *shape))
    assert total.dtype == np.float32
    np.testing.assert_allclose(total, sum(numbers(i, *shape).astype(float) for i in range(team.n)), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_all_reduce_sums_the_arrays_of_all_ranks(n):
    with started(n) as team:
        for shape in ((3,), (2, 5), (SLOT + 1,), (3, SLOT // 2), (0,)):
            assert_sums(team, *shape)
        with team.together("sum", 4, 3):
            total = team.sum(np.asfortranarray(numbers(0, 4, 3)))
    np.testing.assert_allclose(total, sum(numbers(i, 4, 3) for i in range(n)), atol=1e-6)


@pytest.mark.parametrize("widths", [[5], [3, 4], [4, 0, 2]])
def test_a_gather_puts_columns_side_by_side(widths):
    rows = 2 * SLOT // max(widths) + 1  # more than fit into a slot
    with started(len(widths)) as team:
        for n in (1, 7, rows):
            with team.together("join", n, widths):
                whole = team.join(numbers(0, n, widths[0]), widths)
            np.testing.assert_array_equal(whole, np.concatenate([numbers(i, n, w) for i, w in enumerate(widths)], 1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_call_that_is_left_half_way_leaves_nothing_behind(error):
    with started(3) as team:
        for n_sums in (0, 1, 2, 5):
            with pytest.raises(error), team.together("sums", 5):
                for _ in range(n_sums):
                    team.sum(numbers(0, 2))
                raise error
            if n_sums == 1:  # as when a second Ctrl-C comes while the first is handled
                team.counts[0] = 0
            assert_sums(team, 6)


def test_an_error_on_all_ranks_ends_no_worker():
    with started(2) as team:
        with pytest.raises(ValueError, match="refused"), team.together("fail"):
            raise ValueError("refused")
        assert_sums(team, 6)
        with pytest.raises(RuntimeError, match="could not"), team.together("fail"):
            team.sum(numbers(0, 6))
        assert_sums(team, 6)


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_ends_is_reported(busy):
    with started(2) as team:
        if busy:
            with pytest.raises(UserError, match=r"exit code 3\).*smaller model or batch"), team.together("end"):
                team.sum(numbers(0, 2))
        else:
            os.kill(team.helpers[0][0].pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(UserError, match="process has ended"):
                assert_sums(team, 3)


def test_an_interrupted_message_ends_the_workers(monkeypatch):
    with started(3) as team:
        _, (_, second) = team.helpers
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(second, "send", unittest.mock.Mock(side_effect=KeyboardInterrupt))
            assert_sums(team, 3)
        with pytest.raises(UserError, match="process has ended"):
            assert_sums(team, 3)


def test_a_worker_that_cannot_be_started(monkeypatch):
    error = BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(os, "fork", unittest.mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=r"cannot start a .*temporarily.*OPENBLAS_NUM_THREADS=1"):
        Team(2).start(dict)


def test_workers_are_told_what_to_drop():
    reader, writer = os.pipe()
    with started(2) as team:
        team.dropped += [(writer, b"one "), (writer, b"two")]
        assert_sums(team, 1)
        assert (os.read(reader, 100), team.dropped) == (b"one two", [])
    os.close(reader), os.close(writer)


def is_running(pid):
    """Whether there is such a process that has not exited."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError), open(f"/proc/{pid}/stat", encoding="utf-8") as f:
        return f.read().rpartition(") ")[2][0] != "Z"
    return False


def wait_for_the_end_of(pids):
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"one of the processes {pids} is still running"
        time.sleep(0.01)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_workers_end_with_their_owner_or_on_sigterm_whatever_handles_it_in_rank_0(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with started(3) as team:
            with started(2) as other:
                pids, others = ([helper.pid for helper, _ in t.helpers] for t in (team, other))
                assert_sums(other, 6)
            gc.collect()
            wait_for_the_end_of(others)
            assert_sums(team, 6)
            assert all(map(is_running, pids))
            os.kill(pids[0], signal.SIGTERM)
            wait_for_the_end_of(pids[:1])
        gc.collect()
        wait_for_the_end_of(pids)
    finally:
        signal.signal(signal.SIGTERM, before)


KILLED = """
import sys, time
from tests.test_team import numbers, started
with started(3) as one, started(3) as two:
    print(*(helper.pid for team in (one, two) for helper, _ in team.helpers), flush=True)
    with one.together("sums", 5):  # one team waits in a call, the other for a call
        one.sum(numbers(0, 2))
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_program(how):
    with programs.started([sys.executable, "-c", KILLED]) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 4 and all(map(is_running, pids))
        process.send_signal(how)
        process.wait(20)
        wait_for_the_end_of(pids)
