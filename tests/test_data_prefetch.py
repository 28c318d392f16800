"""The prefetch thread: ahead but not far, loud when it fails, gone when nobody wants it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from data_sets import no_thread_left

from hpctrain.data.prefetch import Prefetch


def test_gives_all_items_in_order():
    with no_thread_left():
        assert list(Prefetch(iter(range(100)), 2)) == list(range(100))


def test_runs_ahead_by_depth_only():
    made = []
    with no_thread_left(), Prefetch((made.append(i) for i in range(100)), 3) as items:
        next(items)
        end = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three in the queue, one waiting for room


def test_raises_what_the_thread_raised_after_what_came_before():
    def items():
        yield 1
        raise KeyError("sample 7")

    with no_thread_left():
        prefetch = Prefetch(items(), 2)
        assert next(prefetch) == 1
        with pytest.raises(KeyError, match="sample 7"):
            next(prefetch)
        assert list(prefetch) == []


def test_leaving_a_loop_ends_the_thread():
    with no_thread_left():
        for item in Prefetch(iter(range(1000)), 2):
            if item == 3:
                break


def test_an_exception_in_the_loop_ends_the_thread():
    with no_thread_left(), pytest.raises(ZeroDivisionError):
        for item in Prefetch(iter(range(1000)), 2):
            item / 0


def test_close_is_quick_even_if_the_thread_is_stuck():
    release = threading.Event()

    def stuck():
        yield 1
        release.wait(30)

    with no_thread_left():
        prefetch = Prefetch(stuck(), 2)
        next(prefetch)
        start = time.monotonic()
        prefetch.close()
        assert time.monotonic() - start < 1
        assert list(prefetch) == []
        release.set()


def test_never_started_loops_leave_nothing():
    with no_thread_left():
        prefetch = Prefetch(iter(range(10)), 1)
        del prefetch


def test_interpreter_exits_with_a_waiting_thread():
    program = (
        "from hpctrain.data.prefetch import Prefetch\n"
        "items = Prefetch(iter(range(1000)), 2)\n"
        "print(next(items))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
