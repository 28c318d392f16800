"""Sliced reductions against the plain sum, on every kind of topology.

The numbers are small and whole, so they add exactly in any order, and no tolerance hides a slice
that was forgotten or added twice.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from hpctrain.collectives.slices import SliceReduction
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import DeviceError, UsageError
from hpctrain.mpi.topology import topology

LAYOUTS = {
    1: ["1x1"],
    2: ["1x2", "2x1"],
    3: ["1x3", "3x1", "2+1", "1+2", "0,1,0"],
    4: ["1x4", "2x2", "3+1", "1+3", "0,1,0,1", "1,0,0,0", "1+2+1", "4x1"],
}
MODES = ["auto", "shared", "messages", "allreduce"]  # those of a CPU
SIZES = [0, 1, 5, 1000, 100_003]


@pytest.fixture(scope="module")
def device():
    """A CPU whose summing kernel is compiled once, on rank 0."""
    from mpi4py import MPI

    device = CpuDevice()
    for rank in range(2):
        if (rank == 0) == (MPI.COMM_WORLD.rank == 0):
            for dtype in (np.float32, np.float64):
                one = np.ones(1, dtype)
                device.launch("sum_peers", device.peers([one]), 1, 0, one, 1, work=1)
        MPI.COMM_WORLD.Barrier()
    return device


class Detached(CpuDevice):
    """A device whose arrays MPI must not touch, as a GPU's: they are filled late, and copied."""

    name = "cuda"

    def __init__(self):
        super().__init__()
        self.pending = []

    def launch(self, name, *args, work):
        self.pending.append((name, args, work))

    def synchronize(self):
        pending, self.pending = self.pending, []
        for name, args, work in pending:
            super().launch(name, *args, work=work)

    def copy(self, target, source):
        self.synchronize()
        super().copy(target, source)

    def download(self, array, host):
        self.synchronize()
        return super().download(array, host)

    def upload(self, host, array):
        self.synchronize()
        return super().upload(host, array)

    def wrap(self, array):
        raise AssertionError("this device cannot use host memory")


def whole_numbers(rank, n, dtype):
    """Small enough for any number of sums to be exact; different on every rank and place."""
    return ((np.arange(n) * 7 + rank * 11) % 101 - 50).astype(dtype)


def check(comm, slices, n, dtype):
    """Two steps of reduce, update, gather, against the sum and the update of all ranks' data."""
    total = sum(whole_numbers(rank, n, dtype) for rank in range(comm.size))
    [(start, stop)] = slices.owned
    if slices.writes_parameters:
        slices.parameters[:] = 3
    slices.fence()
    for step in (1, 2):
        slices.gradients[:] = step * whole_numbers(comm.rank, n, dtype)
        slices.reduce()
        np.testing.assert_array_equal(slices.gradients[start:stop], step * total[start:stop])
        slices.parameters[start:stop] += slices.gradients[start:stop]
        slices.gather()
        expected = 3 + total * sum(range(1, step + 1))
        np.testing.assert_array_equal(slices.parameters, expected)
    assert slices.parameters.dtype == slices.gradients.dtype == dtype


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_mode_is_the_sum_on_every_topology(comm, device, mode, dtype):
    layouts = LAYOUTS[comm.size]
    for layout in layouts if mode == "shared" else layouts[:2]:  # others ignore the nodes
        with topology(comm, layout) as where:
            for n in SIZES:
                slices = SliceReduction(where, device, n, dtype, mode)
                assert slices.mode == ("shared" if mode == "auto" else mode)
                check(comm, slices, n, dtype)
                slices.free()


@pytest.mark.ranks(1, 2, 3, 4)
def test_the_real_topology(comm, device):
    with topology(comm) as where:
        check(comm, SliceReduction(where, device, 1000, "float32"), 1000, "float32")


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", ["shared", "messages", "allreduce"])
def test_long_buffers_go_in_several_messages(comm, device, mode):
    for layout in LAYOUTS[comm.size][-2:]:
        with topology(comm, layout) as where:
            for limit in (64, 1000):
                slices = SliceReduction(where, device, 997, "float64", mode, message_bytes=limit)
                check(comm, slices, 997, "float64")
                slices.free()


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("mode", ["shared", "messages"])
def test_owned_ranges_are_the_whole_array(comm, device, mode):
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            slices = SliceReduction(where, device, 1000, "float32", mode)
            seen = np.zeros(1000, np.int64)
            for [(start, stop)] in comm.allgather(slices.owned):
                seen[start:stop] += 1
            assert slices.sliced and (seen == 1).all()
            slices.free()


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", ["shared", "messages"])
def test_the_order_of_additions_is_the_documented_one(comm, device, mode):
    """Node by node in local rank order, then the nodes: to the last bit, on all ranks, twice."""
    n = 1003
    mine = np.random.default_rng(comm.rank).standard_normal(n, np.float32)
    everyone = comm.allgather(mine)
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            nodes = comm.allgather(where.node_index)
            by_node = {}
            for rank, node in enumerate(nodes if mode == "shared" else range(comm.size)):
                by_node[node] = (
                    by_node[node] + everyone[rank] if node in by_node else everyone[rank]
                )
            expected = by_node[0]
            for node in range(1, len(by_node)):
                expected = expected + by_node[node]
            for _ in range(2):
                slices = SliceReduction(where, device, n, "float32", mode)
                slices.gradients[:] = mine
                slices.reduce()
                [(start, stop)] = slices.owned
                slices.parameters[start:stop] = slices.gradients[start:stop]
                slices.gather()
                assert slices.parameters.tobytes() == expected.tobytes()
                slices.free()


@pytest.mark.ranks(2, 4)
def test_ranks_of_a_node_share_memory(comm, device):
    with topology(comm, f"{comm.size // 2}x2") as where:
        slices = SliceReduction(where, device, 100, "float32")
        if slices.writes_parameters:
            slices.parameters[:] = where.node_index + 1
        slices.gradients[:] = comm.rank
        slices.fence()
        assert (slices.parameters == where.node_index + 1).all()
        ranks = where.node.allgather(comm.rank)
        assert [peer[0] for peer in slices.peers] == ranks
        assert where.node.allgather(slices.writes_parameters) == [True, False]


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", ["auto", "messages", "allreduce"])
def test_a_device_with_memory_of_its_own_goes_through_the_host(comm, device, mode):
    with topology(comm) as where:
        detached = Detached()
        slices = SliceReduction(where, detached, 1000, "float64", mode, message_bytes=512)
        assert slices.mode == ("allreduce" if mode == "allreduce" else "messages")
        values = detached.from_host(np.full(1000, 1.0 + comm.rank))
        table = detached.peers([values])
        detached.launch("sum_peers", table, 1, 0, slices.gradients, 1000, work=1000)
        slices.reduce()
        [(start, stop)] = slices.owned
        detached.synchronize()
        assert (slices.gradients[start:stop] == sum(range(1, comm.size + 1))).all()
        slices.parameters[start:stop] = np.arange(start, stop)
        slices.gather()
        np.testing.assert_array_equal(slices.parameters, np.arange(1000))
        slices.free()


@pytest.mark.ranks(2)
def test_too_little_memory_means_messages_and_one_warning(comm, device, monkeypatch, caplog):
    monkeypatch.setenv("HPCTRAIN_SHM_LIMIT", "9999")
    with topology(comm) as where, caplog.at_level(logging.WARNING):
        slices = SliceReduction(where, device, 1000, "float32")
        assert slices.mode == "messages"
        check(comm, slices, 1000, "float32")
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (comm.rank == 0)
    assert all("12,096 bytes" in text and "9,999 can be had" in text for text in warnings)


@pytest.mark.ranks(4)
def test_one_node_without_memory_decides_for_all(comm, device, monkeypatch):
    if comm.rank == 2:  # first of node 1 of 2
        monkeypatch.setenv("HPCTRAIN_SHM_LIMIT", "1")
    with topology(comm, "2x2") as where:
        assert SliceReduction(where, device, 10, "float32").mode == "messages"
        with pytest.raises(DeviceError, match='rank 2: .*use "messages"'):
            SliceReduction(where, device, 10, "float32", "shared")


@pytest.mark.ranks(1, 3)
def test_wrong_arguments(comm, device):
    with topology(comm) as where:
        with pytest.raises(UsageError, match="'share'.*did you mean 'shared'"):
            SliceReduction(where, device, 10, "float32", "share")
        with pytest.raises(UsageError, match="reduction of int32"):
            SliceReduction(where, device, 10, "int32")
        with pytest.raises(DeviceError, match="needs arrays in host memory"):
            SliceReduction(where, Detached(), 10, "float32", "shared")
        with pytest.raises(DeviceError, match="needs the memory of a GPU"):
            SliceReduction(where, device, 10, "float32", "ipc")


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("late", ["writing", "adding", "updating"])
def test_nobody_reads_too_early_or_writes_too_soon(comm, device, monkeypatch, late):
    """The last rank is late at one point; the others must wait, and not disturb it."""

    def delay(point):
        if point == late and comm.rank == comm.size - 1:
            time.sleep(0.05)

    def launch(*args, **options):
        delay("adding")
        CpuDevice.launch(device, *args, **options)

    monkeypatch.setattr(device, "launch", launch)
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            slices = SliceReduction(where, device, 1000, "float32")
            [(start, stop)] = slices.owned
            delay("writing")
            slices.gradients[:] = 1
            slices.reduce()
            mine = slices.gradients[start:stop].copy()
            slices.gradients[:] = -99  # the next step's backward pass
            delay("updating")
            slices.parameters[start:stop] = mine
            slices.gather()
            assert (slices.parameters == comm.size).all()
            slices.free()
