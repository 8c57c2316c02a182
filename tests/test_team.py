"""team.py: processes that take the same steps and exchange numbers."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from engines.team import SLOT, Team
from tests.conftest import ROOT
from weights.errors import UserError


class Owner:
    """What a team lives for."""


def numbers(i, *shape):
    return np.random.default_rng(i).standard_normal(shape, dtype=np.float32)


def actions(team, done=None):
    """What the helpers of these tests do; the functions below do the same in the first process."""

    def fail(*_):
        raise ValueError

    return {
        "sum": lambda *shape: team.sum(numbers(team.i, *shape)),
        "join": lambda rows, widths: team.join(numbers(team.i, rows, widths[team.i]), widths),
        "sums": lambda n: [team.sum(numbers(team.i, 2)) for _ in range(n)],
        "fail": fail,
        "end": lambda: os._exit(3),
        "forget": lambda dropped: done and os.write(done, b"".join(dropped)),
    }


@contextlib.contextmanager
def started(n, done=None):
    team, owner = Team(n), Owner()
    team.start(lambda: actions(team, done))
    team.end_with(owner)
    yield team
    del owner


def summed(team, *shape):
    with team.together("sum", *shape):
        return team.sum(numbers(0, *shape))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_bring_what_is_summed(n):
    with started(n) as team:
        for shape in ((3,), (2, 5), (SLOT + 1,), (3, SLOT // 2), (0,)):
            total = summed(team, *shape)
            assert total.dtype == np.float32
            np.testing.assert_allclose(total, sum(numbers(i, *shape).astype(float) for i in range(n)), atol=1e-6)


@pytest.mark.parametrize("widths", [[5], [3, 4], [4, 0, 2]])
def test_columns_are_put_side_by_side(widths):
    rows = 2 * SLOT // max(widths) + 1  # more than can be shown at a time
    with started(len(widths)) as team:
        for n in (1, 7, rows):
            with team.together("join", n, widths):
                whole = team.join(numbers(0, n, widths[0]), widths)
            np.testing.assert_array_equal(whole, np.concatenate([numbers(i, n, w) for i, w in enumerate(widths)], 1))


def test_arrays_in_another_order_are_summed_too():
    with started(2) as team, team.together("sum", 4, 3):
        total = team.sum(numbers(0, 3, 4).reshape(4, 3, order="F"))
    np.testing.assert_array_equal(total, numbers(0, 3, 4).reshape(4, 3, order="F") + numbers(1, 4, 3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
@pytest.mark.parametrize("n_sums", [0, 1, 2, 5])
def test_a_pass_left_half_way_leaves_nothing_behind(error, n_sums):
    with started(3) as team:
        for _ in range(3):
            with pytest.raises(error), team.together("sums", 5):
                for _ in range(n_sums):
                    team.sum(numbers(0, 2))
                raise error
            expected = numbers(0, 6) + numbers(1, 6) + numbers(2, 6)
            np.testing.assert_array_equal(summed(team, 6), expected)


def test_a_pass_that_is_left_without_a_word():
    """As when a second Ctrl-C comes while the first is dealt with."""
    with started(2) as team:
        with pytest.raises(KeyboardInterrupt), team.together("sums", 5):
            team.sum(numbers(0, 2))
            raise KeyboardInterrupt
        team.counts[0] = 0
        np.testing.assert_array_equal(summed(team, 6), numbers(0, 6) + numbers(1, 6))


def test_what_is_refused_everywhere_ends_no_helper():
    with started(2) as team:
        with pytest.raises(ValueError, match="refused"), team.together("fail"):
            raise ValueError("refused")
        np.testing.assert_array_equal(summed(team, 6), numbers(0, 6) + numbers(1, 6))
        with pytest.raises(RuntimeError, match="could not"), team.together("fail"):
            team.sum(numbers(0, 6))
        np.testing.assert_array_equal(summed(team, 6), numbers(0, 6) + numbers(1, 6))


@pytest.mark.parametrize("busy", [False, True])
def test_a_helper_that_ends_is_said_to_have(busy):
    with started(2) as team:
        if busy:
            with pytest.raises(UserError, match=r"exit code 3\).*smaller model or batch"), team.together("end"):
                team.sum(numbers(0, 2))
        else:
            os.kill(team.helpers[0][0].pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(UserError, match="a helper process has ended"):
                summed(team, 3)


def test_helpers_are_told_what_they_may_forget():
    reader, writer = os.pipe()
    with started(2, writer) as team:
        team.dropped += [b"one ", b"two"]
        summed(team, 1)
        assert os.read(reader, 100) == b"one two"
        assert team.dropped == []
    os.close(reader), os.close(writer)


def is_there(pid):
    """Whether there is such a process, and not only its exit code."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError), open(f"/proc/{pid}/stat", encoding="utf-8") as f:
        return f.read().rpartition(") ")[2][0] != "Z"
    return False


def wait_for_the_end_of(pid):
    deadline = time.monotonic() + 20
    while is_there(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_helpers_end_with_their_owner():
    with started(3) as team, started(2) as other:
        pids = [helper.pid for helper, _ in team.helpers]
        assert all(is_there(pid) for pid in pids)
        first = started(2)
        with first as third:
            third_pid = third.helpers[0][0].pid
        del first
        gc.collect()
        wait_for_the_end_of(third_pid)
        np.testing.assert_array_equal(summed(other, 6), numbers(0, 6) + numbers(1, 6))
        assert all(is_there(pid) for pid in pids)
    gc.collect()
    for pid in pids:
        wait_for_the_end_of(pid)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_helpers_end_whatever_is_done_about_sigterm(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with started(3) as team:
            summed(team, 3)
            pids = [helper.pid for helper, _ in team.helpers]
        gc.collect()
        for pid in pids:
            wait_for_the_end_of(pid)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_helper_that_cannot_be_started(monkeypatch):
    def fork():
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match=r"cannot start a helper process .*temporarily.*OPENBLAS_NUM_THREADS=1"):
        Team(2).start(lambda: {})


def test_an_interrupted_message_ends_the_helpers(monkeypatch):
    with started(3) as team:
        _, (_, second) = team.helpers
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(second, "send", lambda message: (_ for _ in ()).throw(KeyboardInterrupt))
            summed(team, 3)
        with pytest.raises(UserError, match="a helper process has ended"):
            summed(team, 3)


KILLED = """
import sys, time
from tests.test_team import numbers, started
with started(3) as one, started(3) as two:
    print(*(helper.pid for team in (one, two) for helper, _ in team.helpers), flush=True)
    with one.together("sums", 5):  # one team waits in a pass, the other for a pass
        one.sum(numbers(0, 2))
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_helpers_end_with_the_program(how):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 4 and all(is_there(pid) for pid in pids)
        process.send_signal(how)
        process.wait(20)
        for pid in pids:
            wait_for_the_end_of(pid)
