"""Sliced reductions on a simulated GPU: by CUDA IPC, by GPU-aware MPI and through the host.

Work on the simulated device is done as late as CUDA's rules allow, so a missing synchronization
gives wrong numbers here. The numbers are whole and add exactly; what is planted must be caught.
"""

from __future__ import annotations

import logging
import re
import time

import numpy as np
import pytest
from launching import ROOT

from hpctrain.collectives import across, carry
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device.sim import Machine, SimDevice
from hpctrain.errors import DeviceError, UsageError
from hpctrain.mpi import messages
from hpctrain.mpi.topology import topology

LAYOUTS = {
    1: ["1x1"],
    2: ["1x2", "2x1"],
    4: ["2x2", "3+1", "1x4", "0,1,0,1"],
}
SIZES = [0, 1, 1000, 5003]


def simulated(comm, order="late", kernels="host"):
    """A GPU per rank, with the summing kernel compiled by rank 0 first."""
    device = SimDevice(comm.rank, Machine(order, kernels))
    for turn in range(2):
        if (turn == 0) == (comm.rank == 0):
            for dtype in (np.float32, np.float64):
                one = device.zeros(1, dtype)
                device.launch("sum_peers", device.peers([one]), 1, 0, one, 1, work=1)
                device.synchronize()
        comm.Barrier()
    return device


@pytest.fixture(scope="module")
def device():
    from mpi4py import MPI

    return simulated(MPI.COMM_WORLD)


def whole_numbers(rank, n, dtype):
    """Small enough for any number of sums to be exact; different on every rank and place."""
    return ((np.arange(n) * 7 + rank * 11) % 101 - 50).astype(dtype)


def write(device, array, values):
    device.copy(array, device.from_host(values.astype(array.dtype)))


def one_step(device, reduction, gradient):
    """Write the gradient, reduce, add the sum to the own slice of the parameters, gather.

    Returns this rank's slice of the sums, and all parameters.
    """
    write(device, reduction.gradients, gradient)
    reduction.reduce()
    [(start, stop)] = reduction.owned
    table = device.peers([reduction.parameters, reduction.gradients])
    target = reduction.parameters[start:stop]
    device.launch("sum_peers", table, 2, start, target, stop - start, work=stop - start)
    reduction.gather()
    return device.to_host(reduction.gradients[start:stop]), device.to_host(reduction.parameters)


def errors(comm, device, reduction, steps=2):
    """Elements, over all steps and ranks, that are not the exact sum. Collective."""
    n, dtype = reduction.n, reduction.dtype
    total = sum(whole_numbers(rank, n, dtype) for rank in range(comm.size))
    [(start, stop)] = reduction.owned
    wrong, expected = 0, np.zeros(n, dtype)
    for step in range(1, steps + 1):
        sums, parameters = one_step(device, reduction, step * whole_numbers(comm.rank, n, dtype))
        expected += step * total
        wrong += np.count_nonzero(sums != step * total[start:stop])
        wrong += np.count_nonzero(parameters != expected)
    return comm.allreduce(int(wrong))


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
@pytest.mark.parametrize("mode", ["auto", "ipc", "messages", "allreduce"])
def test_every_mode_is_the_sum_on_every_topology(comm, device, mode, gpu_mpi):
    layouts = LAYOUTS[comm.size]
    for layout in layouts if mode == "ipc" else layouts[:1]:
        with topology(comm, layout) as where:
            for n, dtype in zip(SIZES, 2 * ["float32", "float64"], strict=True):
                reduction = SliceReduction(where, device, n, dtype, mode, gpu_mpi=gpu_mpi)
                several = max(where.local_sizes) > 1
                assert reduction.mode == (("messages", "ipc")[several] if mode == "auto" else mode)
                crosses = where.node_count > 1 if reduction.mode == "ipc" else comm.size > 1
                assert reduction.gpu_mpi == (gpu_mpi == "on" and crosses)
                assert errors(comm, device, reduction) == 0, (layout, n)
                reduction.free()


def check_in_rounds(comm, order, gpu_mpi):
    """Many more rounds than staging buffers, so that each is used again while copies are open."""
    device = simulated(comm, order)
    for layout, mode in [(LAYOUTS[comm.size][-1], "ipc"), ("", "messages"), ("", "allreduce")]:
        with topology(comm, layout or None) as where:
            for n, limit in ((151, 64), (1001, 640)):
                reduction = SliceReduction(
                    where, device, n, "float64", mode, message_bytes=limit, gpu_mpi=gpu_mpi
                )
                assert errors(comm, device, reduction) == 0, (mode, limit)
                reduction.free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
@pytest.mark.parametrize("order", ["late", "early", "1", "2", "3"])
def test_in_rounds_whatever_the_order_of_the_gpu(comm, order, gpu_mpi):
    check_in_rounds(comm, order, gpu_mpi)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("order, gpu_mpi", [("late", "off"), ("4", "on")])
def test_in_rounds_on_unusual_nodes(comm, order, gpu_mpi):
    check_in_rounds(comm, order, gpu_mpi)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("mode", ["ipc", "messages"])
def test_the_bits_are_those_of_the_cpu(comm, device, mode):
    """Node by node in local rank order, then the nodes: directly and through the host."""
    n = 1003
    mine = np.random.default_rng(comm.rank).standard_normal(n).astype(np.float32)
    everyone = comm.allgather(mine)
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            nodes = comm.allgather(where.node_index if mode == "ipc" else comm.rank)
            by_node = {}
            for node, values in zip(nodes, everyone, strict=True):
                by_node[node] = by_node[node] + values if node in by_node else values
            expected = by_node[0]
            for node in range(1, len(by_node)):
                expected = expected + by_node[node]
            for gpu_mpi in ("on", "off"):
                reduction = SliceReduction(where, device, n, "float32", mode, gpu_mpi=gpu_mpi)
                _, parameters = one_step(device, reduction, mine)
                assert parameters.tobytes() == expected.tobytes()
                reduction.free()


@pytest.mark.ranks(2, 4)
def test_kernels_are_checked_thread_by_thread_on_peers_memory(comm):
    device = simulated(comm, kernels="simt")
    with topology(comm, LAYOUTS[comm.size][0]) as where:
        reduction = SliceReduction(where, device, 500, "float32", "ipc", gpu_mpi="on")
        assert errors(comm, device, reduction) == 0
        reduction.free()


def costs():
    """The rows of the table of docs/gpu-mpi.md, by ranks."""
    text = (ROOT / "docs" / "gpu-mpi.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\dx\d) \| (\w+) \| (on|off) \|((?: \d+ \|){5})$", text, re.MULTILINE)
    return [(*row[:3], [int(cell) for cell in row[3].split("|")[:-1]]) for row in rows]


@pytest.mark.ranks(2, 4)
def test_what_a_step_costs(comm, device):
    """No host copy of gradients with GPU-aware MPI, and never a wait for the whole device."""
    n = 64_000
    assert len(costs()) == 8
    for layout, mode, gpu_mpi, wanted in costs():
        nodes, local = map(int, layout.split("x"))
        if nodes * local != comm.size:
            continue
        with topology(comm, layout) as where:
            reduction = SliceReduction(where, device, n, "float32", mode, gpu_mpi=gpu_mpi)
            for _ in range(2):  # the first step makes tables of addresses
                device.reset_counts()
                reduction.reduce()
                reduction.gather()
                counts = device.counts()
            assert counts.synchronizations["device"] == counts.synchronizations["copy"] == 0
            found = [counts.synchronizations["stream"]]
            found += [counts.copies[way] for way in ("to host", "to device", "on device")]
            assert [*found, counts.launches["sum_peers"]] == wanted, (layout, mode, gpu_mpi)
            # Half a column of gradients and half of parameters, or all gradients.
            moved = 4 * n // local if found[1] else 0
            assert counts.copied["to host"] == counts.copied["to device"] == moved
            device.synchronize()
            reduction.free()


def nothing(device, idle=None):
    """In the place of `carry.settle`: MPI and peers do not wait for the stream."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "layout, mode, gpu_mpi, caught",
    [
        ("2x1", "messages", "on", True),
        ("2x1", "allreduce", "on", True),
        ("1x2", "ipc", "on", True),
        ("2x1", "messages", "off", False),  # waits for copies, and needs nothing else
        ("2x1", "allreduce", "off", False),
    ],
)
def test_no_synchronization_before_mpi_is_caught(
    comm, device, monkeypatch, layout, mode, gpu_mpi, caught
):
    with topology(comm, layout) as where:
        reduction = SliceReduction(where, device, 1000, "float32", mode, gpu_mpi=gpu_mpi)
        with monkeypatch.context() as patch:
            patch.setattr(carry, "settle", nothing)
            to_host = device.to_host

            def later(array):  # all is done late: without this, both might just happen to do it
                time.sleep(0.2 * comm.rank)  # at one time, each before the other reads
                return to_host(array)

            patch.setattr(device, "to_host", later)
            assert (errors(comm, device, reduction) > 0) == caught
        device.synchronize()
        reduction.free()


@pytest.mark.ranks(2)
def test_the_next_download_overlaps_with_mpi(comm, device, monkeypatch):
    """Piece k + 1 is on its way to the host while MPI exchanges piece k; nobody waits for it."""
    events, download, exchange = [], device.download, messages.exchange

    class Watched:
        def __init__(self, number, ticket):
            self.number, self.ticket = number, ticket

        def wait(self, idle=None):
            self.ticket.wait(idle)
            events.append(f"arrived {self.number}")

    def begun(array, host):
        number = sum(event.startswith("begun") for event in events)
        events.append(f"begun {number}")
        return Watched(number, download(array, host))

    def exchanged(*arguments):
        events.append("exchange")
        exchange(*arguments)

    with topology(comm, "2x1") as where:
        reduction = SliceReduction(
            where, device, 300, "float32", "messages", message_bytes=256, gpu_mpi="off"
        )
        with monkeypatch.context() as patch:
            patch.setattr(device, "download", begun)
            patch.setattr(messages, "exchange", exchanged)
            reduction.reduce()
        reduction.free()
    expected = ["begun 0"]
    for k in range(3):
        expected += [f"arrived {k}", *([f"begun {k + 1}"] if k < 2 else []), "exchange"]
    assert events == expected


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_nobody_reads_too_early_or_writes_too_soon(comm, device, monkeypatch, gpu_mpi):
    """The last rank's GPU is late; the others must wait for it, and not disturb it."""

    def tardy(device, idle=None):
        time.sleep(0.02 * (comm.rank == comm.size - 1))
        device.synchronize()

    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            reduction = SliceReduction(where, device, 1000, "float32", "ipc", gpu_mpi=gpu_mpi)
            part = slice(*reduction.owned[0])
            with monkeypatch.context() as patch:
                patch.setattr(carry, "settle", tardy)
                write(device, reduction.gradients, np.ones(1000))
                reduction.reduce()
                mine = device.to_host(reduction.gradients[part])
                write(device, reduction.gradients, np.full(1000, -99.0))  # the next step's
                device.synchronize()
                write(device, reduction.parameters[part], mine)
                reduction.gather()
                assert (device.to_host(reduction.parameters) == comm.size).all()
            reduction.free()


class Impatient:
    """A ticket that nobody waits for."""

    def wait(self, idle=None):
        pass


@pytest.mark.ranks(2)
def test_not_waiting_for_a_download_is_caught(comm, device, monkeypatch):
    """Host buffers are read before they are filled."""
    download, kept = device.download, []

    def begun(array, host):
        kept.append(download(array, host))
        return Impatient()

    with topology(comm, "2x1") as where:
        reduction = SliceReduction(
            where, device, 3000, "float32", "messages", message_bytes=512, gpu_mpi="off"
        )
        with monkeypatch.context() as patch:
            patch.setattr(device, "download", begun)
            assert errors(comm, device, reduction) > 0
        for ticket in kept:
            ticket.wait()
        reduction.free()


@pytest.mark.ranks(2)
def test_the_use_of_a_peers_memory_after_free_is_caught(comm, device):
    with topology(comm, "1x2") as where:
        reduction = SliceReduction(where, device, 1000, "float32", "ipc")
        peer = reduction.peers[1 - comm.rank]
        device.to_host(peer)
        reduction.free()
        with pytest.raises(RuntimeError, match="closed by ipcCloseMemHandle"):
            device.to_host(peer)
        comm.Barrier()


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("broken", ["export", "import_", "to_host"])
def test_without_ipc_on_one_rank_all_use_messages(comm, device, monkeypatch, caplog, broken):
    """As where Slurm gives each rank a cgroup with one GPU: cuIpcOpenMemHandle fails."""

    def fails(*arguments):
        raise DeviceError("cudaErrorInvalidDevice")

    with topology(comm, f"1x{comm.size}") as where:
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
            if comm.rank == 1:
                patch.setattr(device, broken, fails)
            reduction = SliceReduction(where, device, 1000, "float32", gpu_mpi="off")
            with pytest.raises(DeviceError, match='"ipc" is not possible: rank 1: .*"messages"'):
                SliceReduction(where, device, 1000, "float32", "ipc")
        assert reduction.mode == "messages"
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2 * (comm.rank == 0)
        assert all("cudaErrorInvalidDevice" in text for text in lines[:1])
        assert all("pinned host memory: by order" in text for text in lines[1:])
        assert errors(comm, device, reduction) == 0
        reduction.free()


@pytest.mark.ranks(2)
def test_memory_that_reads_wrong_is_not_used(comm, device, monkeypatch, caplog):
    with topology(comm, "1x2") as where:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(device, "import_", lambda handle, n, dtype: device.zeros(n, dtype))
            patch.setattr(device, "close", lambda array: None)
            reduction = SliceReduction(where, device, 1000, "float32", gpu_mpi="on")
        assert reduction.mode == "messages"
        assert not comm.rank or not caplog.records
        assert comm.rank or "reads [1, 0] from its peers" in caplog.text
        assert errors(comm, device, reduction) == 0
        reduction.free()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("dtype", ["float16", "int16", "bool", "complex64"])
def test_mpi_never_adds_16_bit_floats(comm, device, dtype):
    array = np.ones(4, dtype)
    with pytest.raises(UsageError, match=f"MPI_SUM cannot add {dtype}"):
        messages.allreduce(comm, array)
    with pytest.raises(UsageError, match=f"MPI_SUM cannot add {dtype}"):
        messages.allreduce(comm, device.from_host(array))


@pytest.mark.ranks(1)
def test_wrong_arguments(comm, device):
    with topology(comm) as where:
        with pytest.raises(DeviceError, match="needs arrays in host memory"):
            SliceReduction(where, device, 10, "float32", "shared")
        with pytest.raises(UsageError, match="did you mean 'ipc'"):
            SliceReduction(where, device, 10, "float32", "icp")


@pytest.mark.ranks(2)
def test_one_line_says_how_buffers_go(comm, device, monkeypatch, caplog):
    monkeypatch.delenv("HPCTRAIN_GPU_MPI", raising=False)
    with topology(comm, "2x1") as where, caplog.at_level(logging.INFO):
        for gpu_mpi in ("auto", "off"):
            SliceReduction(where, device, 10, "float32", gpu_mpi=gpu_mpi).free()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 * (comm.rank == 0)
    if lines:
        assert "given to MPI: the simulated device's memory is the host's" in lines[0]
        assert "through pinned host memory: by order (--gpu-mpi off" in lines[1]


@pytest.mark.ranks(2)
def test_pieces_are_smaller_through_the_host(comm, device):
    for gpu_mpi, nbytes in ((False, carry.STAGE_BYTES), (True, across.ROUND_BYTES)):
        _, width = across.carrier(comm, device, np.dtype("float32"), 1 << 24, gpu_mpi, None)
        assert width * 4 == nbytes // comm.size
