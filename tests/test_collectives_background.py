"""The thread that exchanges: calls in order, and errors that reach whoever waits."""

from __future__ import annotations

import threading
import traceback

import pytest

from hpctrain.collectives.background import Background
from hpctrain.device.cpu import CpuDevice


def planted():
    raise RuntimeError("planted")


def test_calls_are_done_in_order_by_a_thread_of_their_own():
    background, seen = Background(CpuDevice()), []
    gate = threading.Event()
    first = background.submit(gate.wait)
    numbers = [background.submit(lambda k=k: seen.append(k)) for k in range(5)]
    assert seen == [] and numbers == [first + 1 + k for k in range(5)]
    gate.set()
    background.wait(numbers[2])
    assert seen[:3] == [0, 1, 2]
    background.close()
    assert seen == [0, 1, 2, 3, 4] and background.waited >= 0
    background.wait(numbers[-1])


@pytest.mark.parametrize("way", ["wait", "submit", "close"])
def test_an_error_reaches_whoever_comes_next_with_its_place(way):
    background = Background(CpuDevice())
    background.wait(background.submit(lambda: None))
    number = background.submit(planted)
    if way == "submit":
        with pytest.raises(RuntimeError):
            background.wait(number)
    call = {
        "wait": lambda: background.wait(number),
        "submit": lambda: background.submit(lambda: None),
        "close": lambda: (background.wait(number - 1), background.wait(number)),
    }[way]
    with pytest.raises(RuntimeError, match="planted") as caught:
        call()
    assert "in planted" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(RuntimeError, match="planted"):
        background.close()


def test_nothing_is_done_after_an_error():
    background, seen, gate = Background(CpuDevice()), [], threading.Event()
    background.submit(gate.wait)
    number = background.submit(planted)
    later = background.submit(lambda: seen.append(1))
    gate.set()
    for awaited in (later, number):
        with pytest.raises(RuntimeError, match="planted"):
            background.wait(awaited)
    assert seen == []


def test_a_thread_that_ends_leaves_none_behind():
    before = threading.active_count()
    Background(CpuDevice()).close()
    assert threading.active_count() == before
