"""Faults planted in device/cuda.py, one at a time, each of which the simulated GPU must show.

A probe is a small use of the device with a known result. With the file as it is every probe gives
that result in every order; with a fault planted at least one probe does not in at least one order.
"""

import os
import types
from pathlib import Path

import numpy as np
import pytest
from simulated import ORDERS, open_sim, peek

from hpctrain.device import cuda
from hpctrain.device.sim import Machine, SimDevice
from hpctrain.device.sim.memory import CUDARuntimeError
from hpctrain.device.sim.stand_in import StandIn
from hpctrain.errors import KernelError

SOURCE = cuda.__file__


def fill(device, array, value):
    device.launch("fill", array, value, array.size, work=array.size)


def download_is_of_finished_work(device):
    x, host = device.zeros(64, "float64"), device.staging(512)
    fill(device, x, 5)
    device.download(x, host).wait()
    return host.view(np.float64).tolist() == [5] * 64


def download_of_memory_let_go(device):
    """The array is garbage at once, and its memory is wanted again."""
    host = device.staging(512)
    x = device.zeros(64, "float64")
    fill(device, x, 5)
    ticket = device.download(x, host)
    del x
    y = device.empty(64, "float64")
    fill(device, y, 7)
    device.synchronize()
    ticket.wait()
    return host.view(np.float64).tolist() == [5] * 64


def download_that_nobody_waits_for(device):
    """Its ticket is garbage at once."""
    host = device.staging(512)
    x = device.zeros(64, "float64")
    fill(device, x, 5)
    device.download(x, host)
    del x
    y = device.empty(64, "float64")
    fill(device, y, 7)
    device.synchronize()
    device._device.synchronize()
    return host.view(np.float64).tolist() == [5] * 64


def upload_is_seen_by_later_launches(device):
    host = device.staging(512).view(np.float64)
    host[:] = 3
    x, y = device.zeros(64, "float64"), device.zeros(64, "float64")
    fill(device, x, 1)
    ticket = device.upload(host, x)
    device.launch("add_into", y, x, 64, work=64)
    ticket.wait()
    host[:] = 9
    return device.to_host(y).tolist() == [3] * 64


def upload_from_memory_let_go(device):
    host = device.staging(512).view(np.float64)
    host[:] = 3
    x = device.zeros(64, "float64")
    device.upload(host, x)
    del host
    other = device.staging(512)
    other[:] = 0
    return device.to_host(x).tolist() == [3] * 64


def transfers_do_not_block(device):
    """Staging is pinned: the host waits where it says so."""
    x, host = device.zeros(64, "float64"), device.staging(512)
    device.reset_counts()
    device.download(x, host).wait()
    device.upload(host, x).wait()
    return device.counts().synchronizations == {"event": 2}


def mpi_reads_finished_work(device):
    x = device.zeros(64, "float64")
    fill(device, x, 5)
    device.synchronize()
    return peek(x).tolist() == [5] * 64


def synchronizing_waits_for_one_stream(device):
    device.reset_counts()
    device.synchronize()
    return device.counts().synchronizations == {"stream": 1}


def shared_memory_is_ready(device):
    return not peek(device.shared(64, "float64")).any()


def numbers_of_every_type(device):
    """Numbers of the real type, whichever it is, and integers."""
    results = []
    for dtype in ("float32", "float64"):
        x = device.zeros(64, dtype)
        fill(device, x, 0.5)
        device.launch("scale", x, 3.0, 64, work=64)
        results += device.to_host(x).tolist()
    return results == [1.5] * 128


def rows_and_elements(device):
    """More rows than blocks and more elements than threads."""
    x = device.zeros((300, 40), "float64")
    bias = device.from_host(np.arange(40.0))
    device.launch("add_bias", x, bias, 300, 40, work=300)
    return device.to_host(x).tolist() == [list(range(40))] * 300


def wrong_arguments_are_refused(device):
    x = device.zeros(64, "float32")
    try:
        device.launch("add_into", x, device.zeros(64, "float64"), 64, work=64)
    except KernelError:
        return True
    return False


def work_is_on_the_chosen_device(device):
    device.reset_counts()
    x = device.empty(64, "float64")
    fill(device, x, 5)
    host = device.staging(512)
    device.download(x, host).wait()
    return device.counts().launches == {"fill": 1} and x.data.device_id == 1


def map_as_another_process(device):
    """Memory that this process shares, mapped as if by another one."""
    handle = device.export(device.kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 0)
        return device.import_(handle, 64, "float64")


def closing_waits_for_work(device):
    device.kept = device.shared(64, "float64")
    fill(device, device.kept, 1)
    x = map_as_another_process(device)
    device.launch("add_into", x, x, 64, work=64)
    device.close(x)
    device.synchronize()
    return peek(device.kept).tolist() == [2] * 64


def closed_memory_is_refused(device):
    device.kept = device.shared(64, "float64")
    x = map_as_another_process(device)
    device.close(x)
    try:
        fill(device, x, 1)
        device.synchronize()
    except RuntimeError:
        return True
    return False


PROBES = [
    work_is_on_the_chosen_device,
    closing_waits_for_work,
    closed_memory_is_refused,
    download_is_of_finished_work,
    download_of_memory_let_go,
    download_that_nobody_waits_for,
    upload_is_seen_by_later_launches,
    upload_from_memory_let_go,
    transfers_do_not_block,
    mpi_reads_finished_work,
    synchronizing_waits_for_one_stream,
    shared_memory_is_ready,
    numbers_of_every_type,
    rows_and_elements,
    wrong_arguments_are_refused,
]

# What is planted: (in place of, this, the probe that must see it)
FAULTS = {
    "host reads a pending result": (
        "            self.event.synchronize()\n",
        "            pass\n",
        download_is_of_finished_work,
    ),
    "copy of work that is not finished": (
        "        stream.wait_event(self._event(self._cupy.cuda.get_current_stream()))\n",
        "",
        download_is_of_finished_work,
    ),
    "event of the wrong stream": (
        "stream.wait_event(self._event(self._cupy.cuda.get_current_stream()))",
        "stream.wait_event(self._event(stream))",
        download_is_of_finished_work,
    ),
    "ticket of the wrong stream": (
        "nbytes, stream)\n        return self._ticket(stream, array, host)",
        "nbytes, stream)\n"
        "        return self._ticket(self._cupy.cuda.get_current_stream(), array, host)",
        download_is_of_finished_work,
    ),
    "memory of a pending copy is not kept": (
        "self._copies, self.event, self._memory = copies, event, memory",
        "self._copies, self.event = copies, event",
        download_of_memory_let_go,
    ),
    "memory is kept by the ticket only": (
        "        self._open.add(ticket)\n",
        "",
        download_that_nobody_waits_for,
    ),
    "upload that launches do not wait for": (
        "        stream = self._cupy.cuda.get_current_stream()\n"
        "        array.data.copy_from_host_async(",
        "        stream = self._copy_stream()\n        array.data.copy_from_host_async(",
        upload_is_seen_by_later_launches,
    ),
    "staging that is not pinned": (
        "memory = self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1))",
        "memory = bytearray(max(nbytes, 1))",
        transfers_do_not_block,
    ),
    "no synchronization before MPI": (
        "        self._cupy.cuda.get_current_stream().synchronize()\n",
        "        pass\n",
        mpi_reads_finished_work,
    ),
    "synchronization of the wrong stream": (
        "        self._cupy.cuda.get_current_stream().synchronize()\n",
        "        self._copy_stream().synchronize()\n",
        mpi_reads_finished_work,
    ),
    "synchronization of the whole device": (
        "        self._cupy.cuda.get_current_stream().synchronize()\n",
        "        self._device.synchronize()\n",
        synchronizing_waits_for_one_stream,
    ),
    "shared memory handed out before it is zero": (
        "        self.synchronize()  # other processes are not in the order of this stream\n",
        "",
        shared_memory_is_ready,
    ),
    "device that is not chosen": (
        "            self._device.use()\n",
        "",
        work_is_on_the_chosen_device,
    ),
    "memory closed under pending work": (
        "        self._device.synchronize()\n",
        "",
        closing_waits_for_work,
    ),
    "memory used after close": (
        "        self._cupy.cuda.runtime.ipcCloseMemHandle(array.data.mem.ptr)\n",
        "        pass\n",
        closed_memory_is_refused,
    ),
    "numbers of a wrong type": (
        "None if p.pointers else DTYPES[resolved(p.type, real)].type",
        "None if p.pointers else DTYPES['float64' if p.type == 'wide' else p.type].type",
        numbers_of_every_type,
    ),
    "arguments in the wrong order": (
        "            function((blocks,), (threads,), raw)\n",
        "            function((blocks,), (threads,), raw[::-1])\n",
        numbers_of_every_type,
    ),
    "arguments that nobody checks": (
        "            check_arguments(kernel, real, args)\n",
        "",
        wrong_arguments_are_refused,
    ),
    "too few threads": (
        "function((blocks,), (threads,), raw)",
        "function((blocks,), (16,), raw)",
        rows_and_elements,
    ),
    "too few blocks": (
        "function((blocks,), (threads,), raw)",
        "function((blocks - 1,), (threads,), raw)",
        numbers_of_every_type,
    ),
}
# The simulator itself refuses a wrong type: here the second check stands when the first is gone.
CAUGHT_TWICE = {"arguments that nobody checks"}


def device_of(text, order, kernels="host"):
    """The device that this text of cuda.py makes, on a simulated machine."""
    module = types.ModuleType("planted")
    exec(compile(text, SOURCE, "exec"), module.__dict__)
    machine = Machine(order, kernels, 2)

    class Planted(module.CudaDevice):
        counts, reset_counts = SimDevice.counts, SimDevice.reset_counts

    device = Planted(1, StandIn(machine), "sim")
    device._processor = machine.processors[1]
    return device


def visible(text, probe):
    """Whether the probe shows that something is wrong, in at least one order."""
    for order in ORDERS:
        try:
            if not probe(device_of(text, order)):
                return True
        except (KernelError, CUDARuntimeError):  # no others: the planted text itself must run
            return True
    return False


@pytest.fixture(scope="module")
def source():
    return Path(SOURCE).read_text(encoding="utf-8")


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_as_it_is_every_order_is_right(source, probe):
    for order in ORDERS:
        assert probe(device_of(source, order)), order


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(source, fault):
    right, wrong, probe = FAULTS[fault]
    assert source.count(right) == 1, "the fault is no longer at this place"
    assert visible(source.replace(right, wrong), probe) == (fault not in CAUGHT_TWICE)


# A kernel that is right for one shape of launch only, as none in cuda/ may be.
OWN = """
#include "kernel.h"
ELEMENTS_KERNEL twice(real* x, int64 n) { GRID_STRIDE(i, n) { x[i] = 2 * x[i]; } }
"""
THREAD_PER_ELEMENT = OWN.replace(
    "GRID_STRIDE(i, n) { x[i] = 2 * x[i]; }",
    "\n#ifdef HPCTRAIN_SIMT\n const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;\n"
    " if (i < n) x[i] = 2 * x[i];\n#else\n GRID_STRIDE(i, n) { x[i] = 2 * x[i]; }\n#endif\n",
)
RACE = OWN.replace("x[i] = 2 * x[i]", "x[0] = x[i]")
BEYOND = OWN.replace("x[i] = 2 * x[i]", "x[i] = x[i + 1]")


def run_own(code, threads, blocks=1, n=100, kernels="simt"):
    device = open_sim(kernels=kernels)
    module = device._cupy.RawModule(code=code, options=("-DREAL=double",))
    x = device.from_host(np.ones(n))
    module.get_function("twice")((blocks,), (threads,), (x, np.int64(n)))
    return device.to_host(x).tolist()


def test_own_kernels_run_and_too_few_threads_give_a_wrong_result():
    assert run_own(OWN, 64) == run_own(OWN, 64, kernels="host") == [2] * 100
    assert run_own(THREAD_PER_ELEMENT, 128) == [2] * 100
    assert run_own(THREAD_PER_ELEMENT, 64) == [2] * 64 + [1] * 36


@pytest.mark.parametrize(
    ("code", "says"), [(RACE, r"race.*kernel\.cu:3"), (BEYOND, "out of bounds.*x")]
)
def test_own_kernels_are_watched(code, says):
    """At the synchronization, as CUDA would report it; with "first" too, which watches it once."""
    for kernels in ("simt", "first"):
        with pytest.raises(KernelError, match=says):
            run_own(code, 64, kernels=kernels)


def test_a_kernel_is_watched_once_for_each_shape():
    device = open_sim(kernels="first")
    for n in (100, 100, 50, 100):
        fill(device, device.empty(n, "float32"), 1)
    device.synchronize()
    assert device.counts().checked == 2 and device.counts().launches == {"fill": 4}


@pytest.mark.parametrize(
    ("grid", "block", "says"),
    [((1,), (48,), "48 threads"), ((0,), (64,), "0 blocks"), ((1, 2), (64,), "use one dim")],
)
def test_impossible_launches_are_refused(grid, block, says):
    device = open_sim()
    function = device._module("elementwise", "float64").get_function("fill")
    x = device.zeros(3, "float64")
    with pytest.raises((KernelError, RuntimeError), match=says):
        function(grid, block, (x, np.float64(1), np.int64(3)))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((np.float64(1), np.int64(3)), "y is a pointer"),
        ((np.zeros(3), np.float64(1), np.int64(3)), "y is a pointer"),
        (("x", np.float32(1), np.int64(3)), "a is float64 by value and was given float32"),
        (("x", "x", np.int64(3)), "a is float64 by value and was given an array"),
        (("x", 1, np.int64(3)), "a is float64 by value and was given int64"),
        (("x", np.float64(1), np.int32(3)), "n is int64 by value and was given int32"),
        (("x", np.float64(1)), "takes 3 arguments"),
        (("f", np.float64(1), np.int64(3)), "y has dtype float32, the kernel needs float64"),
    ],
)
def test_arguments_that_a_gpu_would_misread_are_refused(args, says):
    device = open_sim()
    function = device._module("elementwise", "float64").get_function("fill")
    arrays = {"x": device.zeros(3, "float64"), "f": device.zeros(3, "float32")}
    with pytest.raises(KernelError, match=says):
        function((1,), (64,), [arrays[a] if isinstance(a, str) else a for a in args])
