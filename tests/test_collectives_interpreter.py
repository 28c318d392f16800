"""Schedules run over MPI: against the plain sum, on every kind of topology.

Numbers are small and whole, so they add exactly in any order; bits are compared with fractions.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from launching import ROOT, mpirun
from simulated import open_sim

from hpctrain.collectives import interpreter as interpreting
from hpctrain.collectives.algorithms import (
    PRESETS,
    Level,
    all_gather,
    all_reduce,
    broadcast,
    reduce_scatter,
)
from hpctrain.collectives.buffers import Buffers
from hpctrain.collectives.interpreter import Interpreter, node_list
from hpctrain.collectives.ports import BFLOAT16, FLOAT16
from hpctrain.collectives.schedule import Wire
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import UsageError
from hpctrain.mpi.memory import available_memory
from hpctrain.mpi.topology import topology

LAYOUTS = {
    1: ["1x1"],
    2: ["1x2", "2x1"],
    3: ["1x3", "2+1", "0,1,0"],
    4: ["1x4", "2x2", "3+1", "0,1,0,1", "1+2+1"],
    5: ["3+2", "5x1", "0,1,0,2,1"],
    6: ["1+2+3"],
    8: ["2x4", "4x2", "3+5"],
}
SIZES = [0, 1, 5, 1000, 20_003]
ALL = (1, 2, 3, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def device():
    """A CPU whose kernels are compiled once, on rank 0."""
    from mpi4py import MPI

    device = CpuDevice()
    device.prepare(["float32", "float64", "bfloat16", "float16"], MPI.COMM_WORLD)
    return device


def whole_numbers(rank, n, dtype):
    return ((np.arange(n) * 7 + rank * 11) % 101 - 50).astype(dtype)


def total_of(size, n, dtype):
    return sum(whole_numbers(rank, n, dtype) for rank in range(size))


def ready(where, device, schedule, dtype="float32", **options):
    buffers = Buffers(where, device, schedule.n, dtype)
    array, peers = buffers.array, buffers.peers
    return array, Interpreter(where, device, schedule, array, peers, **options)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [5, 6, 8])
def test_passes_on(ranks):
    """The numbers of ranks that the whole suite is not run on."""
    options = ["-q", "--color=no", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    done = mpirun(ranks, "-m", "pytest", *options, __file__, timeout=240)
    assert done.returncode == 0, done.stdout


@pytest.mark.ranks(*ALL)
@pytest.mark.parametrize("name", PRESETS)
def test_every_algorithm_is_the_sum_on_every_topology(comm, device, name):
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            nodes = node_list(where)
            for n in SIZES:
                dtype, depth = ("float32", 1) if n % 2 else ("float64", 3)
                itemsize = np.dtype(dtype).itemsize
                schedule = all_reduce(
                    nodes, n, itemsize, PRESETS[name], depth=depth, segment_bytes=4096
                )
                array, interpreter = ready(where, device, schedule, dtype)
                for _ in range(2):
                    array[:] = whole_numbers(comm.rank, n, dtype)
                    interpreter.run()
                    np.testing.assert_array_equal(array, total_of(comm.size, n, dtype))
                assert interpreter.moved == schedule.traffic(comm.rank)


@pytest.mark.ranks(*ALL)
@pytest.mark.parametrize("name", PRESETS)
def test_all_ranks_hold_the_same_bits_on_every_run(comm, device, name):
    n = 5003
    mine = np.random.default_rng(comm.rank).standard_normal(n, np.float32)
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            schedule = all_reduce(node_list(where), n, 4, PRESETS[name], segment_bytes=3000)
            array, interpreter = ready(where, device, schedule)
            found = set()
            for _ in range(2):
                array[:] = mine
                interpreter.run()
                found |= set(comm.allgather(array.tobytes()))
            assert len(found) == 1


@pytest.mark.ranks(*ALL)
def test_two_levels_add_in_the_documented_order(comm, device):
    """Node by node in rank order, then the nodes: to the last bit."""
    n = 1003
    everyone = comm.allgather(np.random.default_rng(comm.rank).standard_normal(n, np.float32))
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            nodes = node_list(where)
            sums = {}
            for rank, node in enumerate(nodes):
                sums[node] = sums[node] + everyone[rank] if node in sums else everyone[rank]
            expected = sums[0]
            for node in range(1, len(sums)):
                expected = expected + sums[node]
            array, interpreter = ready(where, device, all_reduce(nodes, n, 4, PRESETS["two-level"]))
            array[:] = everyone[comm.rank]
            interpreter.run()
            assert array.tobytes() == expected.tobytes()


@pytest.mark.ranks(*ALL)
@pytest.mark.parametrize("name", ["ring", "rabenseifner", "direct", "two-level", "three-level"])
def test_scatter_then_update_then_gather(comm, device, name):
    """A training step: each rank updates what it owns of the sum, and all get everything."""
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            nodes, levels = node_list(where), PRESETS[name]
            for n in SIZES:
                scatter, gather = (f(nodes, n, 4, levels) for f in (reduce_scatter, all_gather))
                array, down = ready(where, device, scatter)
                values, up = ready(where, device, gather)
                array[:] = whole_numbers(comm.rank, n, "float32")
                values[:] = -1
                down.run()
                for start, stop in scatter.owned(comm.rank):
                    values[start:stop] = 2 * array[start:stop]
                array[:] = np.nan
                up.run()
                np.testing.assert_array_equal(values, 2 * total_of(comm.size, n, "float32"))


@pytest.mark.ranks(*ALL)
def test_broadcasts(comm, device):
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            nodes = node_list(where)
            for n in SIZES:
                for root, long in ((0, False), (comm.size - 1, False), (comm.size // 2, True)):
                    schedule = broadcast(nodes, n, 4, root, long=long, segment_bytes=4096)
                    array, interpreter = ready(where, device, schedule)
                    array[:] = whole_numbers(comm.rank, n, "float32")
                    interpreter.run()
                    np.testing.assert_array_equal(array, whole_numbers(root, n, "float32"))


@pytest.mark.ranks(2, 3, 4, 5, 8)
@pytest.mark.parametrize("wire", [BFLOAT16, FLOAT16], ids=lambda wire: wire.name)
@pytest.mark.parametrize("algorithm", ["ring", "direct", "halving", "doubling"])
def test_a_short_wire_halves_the_bytes_and_keeps_ranks_alike(comm, device, wire, algorithm):
    n = 4000
    values = np.random.default_rng(comm.rank).standard_normal(n, np.float32)
    exact = np.sum(comm.allgather(values.astype(np.float64)), axis=0)
    with topology(comm, LAYOUTS[comm.size][-1]) as where:
        nodes, results = node_list(where), []
        for chosen in (None, wire):
            levels = (Level("peer", "node"), Level(algorithm, wire=chosen))
            schedule = all_reduce(nodes, n, 4, levels)
            array, interpreter = ready(where, device, schedule)
            array[:] = values
            interpreter.run()
            assert len(set(comm.allgather(array.tobytes()))) == 1
            results.append(interpreter.moved)
        assert results[0].sent == 2 * results[1].sent
        assert results[0].sends == results[1].sends
        np.testing.assert_allclose(array, exact, atol=0.1 * comm.size)


class Nearly:
    """An opaque payload of varying length: the count of leading whole numbers, then those."""

    def encode(self, values, payload):
        used = np.flatnonzero(values)
        count = int(used[-1]) + 1 if used.size else 0
        payload[:count] = values[:count].astype(np.int8).view(np.uint8)
        return count

    def decode(self, payload, values):
        values[:] = 0
        values[: payload.size] = payload.view(np.int8)


@pytest.mark.ranks(2, 3, 4)
def test_opaque_payloads_stay_below_their_bound(comm, device):
    """Only the leading elements are not zero: less is sent than the bound allows."""
    n, wire = 256, Wire("nearly", bound=300)
    with topology(comm) as where:
        schedule = all_reduce(node_list(where), n, 4, (Level("direct", wire=wire),))
        array, interpreter = ready(where, device, schedule, codecs={"nearly": Nearly()})
        array[:] = 0
        array[:70] = comm.rank - 1
        interpreter.run()
        expected = np.zeros(n)
        expected[:70] = sum(range(comm.size)) - comm.size
        np.testing.assert_array_equal(array, expected)
        limit = schedule.traffic(comm.rank)
        assert interpreter.moved.sends == limit.sends
        assert interpreter.moved.sent < limit.sent


def errors_on_gpu(where, gpu, schedule, gpu_mpi, runs=2):
    """Elements, over all runs and ranks, that are not the exact sum. Collective."""
    comm, n, wrong = where.comm, schedule.n, 0
    buffers = Buffers(where, gpu, n, "float32")
    program = Interpreter(where, gpu, schedule, buffers.array, buffers.peers, gpu_mpi=gpu_mpi)
    expected = total_of(comm.size, n, "float32")
    for run in range(1, runs + 1):
        mine = run * whole_numbers(comm.rank, n, "float32")
        gpu.copy(buffers.array, gpu.from_host(mine))
        program.run()
        wrong += int(np.count_nonzero(gpu.to_host(buffers.array) != run * expected))
    assert program.moved == schedule.traffic(comm.rank)
    del program
    buffers.free()
    return comm.allreduce(wrong)


WAYS = pytest.mark.parametrize("gpu_mpi", [True, False], ids=["gpu-mpi", "staged"])
ON_NODES = {1: ["1x1"], 2: ["2x1"], 3: ["2+1"], 4: ["2x2", "3+1"]}


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("order", ["late", "1"])
@WAYS
def test_gpu_memory_to_mpi_and_through_the_host(comm, order, gpu_mpi):
    """Every algorithm, with reads of mapped memory where ranks share a node, on two wires."""
    n, gpu = 1501, open_sim(order)
    for layout in ON_NODES[comm.size]:
        with topology(comm, layout) as where:
            nodes = node_list(where)
            for name, levels in PRESETS.items():
                schedule = all_reduce(nodes, n, 4, levels, segment_bytes=1024, depth=2)
                assert errors_on_gpu(where, gpu, schedule, gpu_mpi) == 0, (layout, name)
            short = (Level("peer", "node"), Level("direct", wire=BFLOAT16))
            assert errors_on_gpu(where, gpu, all_reduce(nodes, n, 4, short), gpu_mpi) == 0


@pytest.mark.slow
@pytest.mark.ranks(2, 4)
@WAYS
def test_gpu_memory_in_any_order_of_its_work(comm, gpu_mpi):
    for order in ("early", *map(str, range(2, 6))):
        for layout in ON_NODES[comm.size]:
            with topology(comm, layout) as where:
                for levels in PRESETS.values():
                    schedule = all_reduce(node_list(where), 700, 4, levels, segment_bytes=900)
                    assert errors_on_gpu(where, open_sim(order), schedule, gpu_mpi) == 0


@pytest.mark.ranks(2, 4)
@WAYS
def test_the_bits_of_gpus_are_those_of_the_cpu(comm, device, gpu_mpi):
    n, gpu = 1003, open_sim()
    mine = np.random.default_rng(comm.rank).standard_normal(n, np.float32)
    for layout in ON_NODES[comm.size]:
        with topology(comm, layout) as where:
            for name in ("ring", "two-level"):
                schedule = all_reduce(node_list(where), n, 4, PRESETS[name])
                array, program = ready(where, device, schedule)
                array[:] = mine
                program.run()
                buffers = Buffers(where, gpu, n, "float32")
                options = {"peers": buffers.peers, "gpu_mpi": gpu_mpi}
                on_gpu = Interpreter(where, gpu, schedule, buffers.array, **options)
                gpu.copy(buffers.array, gpu.from_host(mine))
                on_gpu.run()
                assert gpu.to_host(buffers.array).tobytes() == array.tobytes()
                del on_gpu
                buffers.free()


def nothing(device, idle):
    """In the place of `carry.settle`: MPI and peers do not wait for the stream."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "name, layout, gpu_mpi, caught",
    [
        ("ring", "2x1", True, True),
        ("doubling", "2x1", True, True),
        ("two-level", "1x2", False, True),  # peers are read before they have written
        ("ring", "2x1", False, False),  # waits for copies, and needs nothing else
    ],
)
def test_no_synchronization_before_mpi_is_caught(comm, monkeypatch, name, layout, gpu_mpi, caught):
    """All is done late, so that what was not waited for is not there."""
    gpu = open_sim("late")
    to_host = gpu.to_host

    def later(array):  # else both might just happen to do it before the other reads
        comm.Barrier()
        time.sleep(0.2 * comm.rank)
        return to_host(array)

    with topology(comm, layout) as where:
        schedule = all_reduce(node_list(where), 3001, 4, PRESETS[name])
        with monkeypatch.context() as patch:
            patch.setattr(interpreting, "settle", nothing)
            patch.setattr(gpu, "to_host", later)
            buffers = Buffers(where, gpu, 3001, "float32")
            program = Interpreter(
                where, gpu, schedule, buffers.array, buffers.peers, gpu_mpi=gpu_mpi
            )
            gpu.copy(buffers.array, gpu.from_host(whole_numbers(comm.rank, 3001, "float32")))
            program.run()
            wrong = gpu.to_host(buffers.array) != total_of(2, 3001, "float32")
        assert (comm.allreduce(int(wrong.sum())) > 0) == caught
        gpu.synchronize()
        del program
        buffers.free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("gpu_mpi", [True, False])
def test_what_gpu_memory_to_mpi_saves(comm, gpu_mpi):
    """No byte goes through the host, and there is one wait for the stream in each round."""
    gpu = open_sim()
    with topology(comm, "2x1") as where:
        schedule = all_reduce(node_list(where), 4000, 4, PRESETS["direct"])
        array = gpu.shared(4000, "float32")
        program = Interpreter(where, gpu, schedule, array, gpu_mpi=gpu_mpi)
        gpu.reset_counts()
        program.run()
        counts = gpu.counts()
    staged = [] if gpu_mpi else ["to device", "to host"]
    assert sorted(way for way, count in counts.copies.items() if count) == staged
    rounds = sum(bool(turn.messages) for turn in schedule.rounds(comm.rank))
    assert counts.synchronizations["stream"] == (rounds if gpu_mpi else 0)
    assert counts.launches["sum_peers"] > 0


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["two-level", "ring"])
def test_more_than_4_gib_in_all(comm, device, name):
    """2 GiB and a little on each of two ranks: offsets in bytes pass 2^31."""
    n = (1 << 29) + 8
    if available_memory() < 9 << 30:
        pytest.skip("less than 9 GiB of memory")
    with topology(comm) as where:
        schedule = all_reduce(node_list(where), n, 4, PRESETS[name], segment_bytes=64 << 20)
        array, interpreter = ready(where, device, schedule)
        array[:] = comm.rank + 1
        array[-1] = 10 * comm.rank
        interpreter.run()
        assert array.min() == 3 and array[-1] == 10 and (array[:-1] == 3).all()


@pytest.mark.ranks(2)
def test_what_does_not_fit(comm, device):
    with topology(comm, "1x2") as where:
        nodes = node_list(where)
        array = np.zeros(10, np.float32)
        ring = all_reduce(nodes, 10, 4, PRESETS["ring"])
        with pytest.raises(UsageError, match="for 3 ranks cannot run on 2"):
            schedule = all_reduce((0, 0, 0), 10, 4, PRESETS["ring"])
            Interpreter(where, device, schedule, array)
        with pytest.raises(UsageError, match="int32 cannot be added up"):
            Interpreter(where, device, ring, np.zeros(10, np.int32))
        with pytest.raises(UsageError, match="10 elements of 4 bytes does not fit"):
            Interpreter(where, device, ring, array[:9])
        with pytest.raises(UsageError, match="give its buffer in `peers`"):
            Interpreter(where, device, all_reduce(nodes, 10, 4, PRESETS["two-level"]), array)
        with pytest.raises(UsageError, match="no codec for the wire 'topk'"):
            wired = all_reduce(nodes, 10, 4, (Level("ring", wire=Wire("topk", bound=8)),))
            Interpreter(where, device, wired, array)
