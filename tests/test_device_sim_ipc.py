"""Memory that simulated GPUs of several processes share: handles, late work, use after close."""

import subprocess
import sys

import numpy as np
import pytest
from launching import ROOT, environment
from simulated import open_sim, peek

from hpctrain.errors import DeviceError

# Another process: maps the handle, says what it reads, doubles it, says it is done, and waits for
# a line on its standard input before each further step.
PEER = """
import sys
from hpctrain.device import open_device
device = open_device("sim", local_rank=1)
def say(*words): print(*words, flush=True)
def go(): sys.stdin.readline()
x = device.import_(bytes.fromhex(sys.argv[1]), 3, "float64")
say(device.to_host(x).tolist())
go()
say(device.to_host(x).tolist())
device.launch("add_into", x, x, 3, work=3)
say("launched")
go()
device.synchronize()
say("done")
go()
say(device.to_host(x).tolist())
device.launch("add_into", x, x, 3, work=3)
device.close(x)
try:
    device.launch("add_into", x, x, 3, work=3)
    device.synchronize()
except Exception as error:
    say(error)
try:
    device.close(x)
except Exception as error:
    say(error)
"""


@pytest.fixture
def peer():
    """Starts PEER with a handle; ask(line) lets it go on and reads its next line."""
    started = []

    def start(handle):
        process = subprocess.Popen(
            [sys.executable, "-c", PEER, handle.hex()],
            cwd=ROOT,
            env=environment({"HPCTRAIN_SIM_ORDER": "late", "HPCTRAIN_SIM_KERNELS": "host"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)

        def ask(line=None):
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            return process.stdout.readline().strip()

        return ask

    yield start
    for process in started:
        process.communicate(timeout=20)
        assert process.returncode == 0


def fill(device, array, value):
    device.launch("fill", array, value, array.size, work=array.size)


def test_two_processes_see_one_memory_and_not_what_is_pending(peer):
    device = open_sim("late")
    x = device.shared(3, "float64")
    ask = peer(device.export(x))
    assert ask() == "[0.0, 0.0, 0.0]"
    fill(device, x, 4)
    assert ask("look") == "[0.0, 0.0, 0.0]"  # nobody has synchronized here
    assert ask() == "launched"
    device.synchronize()
    assert peek(x).tolist() == [4, 4, 4]  # the peer's work is pending
    assert ask("synchronize") == "done"
    assert peek(x).tolist() == [8, 8, 8]
    memory = x.data.mem.span
    where = memory.bytes.copy()
    assert where[:24].view(np.float64).tolist() == [8, 8, 8]
    del x, memory
    assert device.counts().bytes == 0  # freed: the peer reads poison
    assert ask("look") == "[nan, nan, nan]"
    assert "uses memory that was closed by ipcCloseMemHandle" in ask()
    assert "no open IPC memory begins there" in ask()


def test_work_on_memory_that_was_freed_is_an_error():
    device = open_sim("late")
    x = device.shared(3, "float64")
    address = x.data.ptr
    del x
    device.counts()  # takes it back
    y = device.zeros(3, "float64")
    table = device.from_host(np.array([address], np.uint64))
    device.launch("sum_peers", table, 1, 0, y, 3, work=3)
    with pytest.raises(RuntimeError, match=r"kernel sum_peers uses memory that was freed"):
        device.synchronize()


def test_a_table_of_nonsense_is_an_error():
    device = open_sim("late")
    y = device.zeros(3, "float64")
    device.launch("sum_peers", device.from_host(np.array([64], np.uint64)), 1, 0, y, 3, work=3)
    with pytest.raises(RuntimeError, match="0x40, which is no device memory"):
        device.synchronize()


def test_handles_are_of_whole_allocations_outside_the_pool():
    device = open_sim()
    x = device.shared(5, "float64")
    for array in (x[1:], device.zeros(1 << 20, "float64")):
        with pytest.raises(DeviceError, match="only whole arrays made by `shared`"):
            device.export(array)


def test_a_process_cannot_open_its_own_handle_nor_a_strange_one():
    device = open_sim()
    x = device.shared(5, "float64")
    with pytest.raises(DeviceError, match="cannot open its own IPC handle"):
        device.import_(device.export(x), 5, "float64")
    with pytest.raises(DeviceError, match="not a handle of simulated memory"):
        device.import_(bytes(64), 5, "float64")


def test_shared_memory_is_zero_when_it_is_handed_out():
    """Other processes are in the order of no stream of this one."""
    for order in ("late", "early", "3"):
        assert not peek(open_sim(order).shared(1000, "float32")).any()
