"""Schedules run over MPI: against the plain sum, on every kind of topology.

Numbers are small and whole, so they add exactly in any order; bits are compared with fractions.
"""

from __future__ import annotations

import numpy as np
import pytest
from launching import ROOT, mpirun
from simulated import open_sim

from hpctrain.collectives.algorithms import (
    PRESETS,
    Level,
    all_gather,
    all_reduce,
    broadcast,
    reduce_scatter,
)
from hpctrain.collectives.interpreter import Interpreter, node_list, shared_buffers
from hpctrain.collectives.peers import MappedMemory
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
    array, peers = shared_buffers(where, device, schedule.n, dtype)
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


ORDERS = ["late", "early"]  # in which a GPU does what it is free to do when it likes


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wire", [None, BFLOAT16], ids=["as-it-is", "bfloat16"])
@pytest.mark.parametrize("name", ["ring", "doubling", "rabenseifner", "direct"])
def test_gpu_memory_goes_through_the_host(comm, order, wire, name):
    n, gpu, [level] = 3001, open_sim(order), PRESETS[name]
    with topology(comm) as where:
        levels = (Level(level.algorithm, wire=wire),)
        schedule = all_reduce(node_list(where), n, 4, levels, segment_bytes=2048)
        array = gpu.shared(n, "float32")
        interpreter = Interpreter(where, gpu, schedule, array)
        mine = gpu.from_host(whole_numbers(comm.rank, n, "float32"))
        for _ in range(2):
            gpu.copy(array, mine)
            interpreter.run()
            expected = total_of(comm.size, n, "float32")
            np.testing.assert_array_equal(gpu.to_host(array), expected)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["two-level", "leader", "three-level"])
def test_gpus_of_a_node_read_each_other(comm, order, name):
    """Peer reads of memory that is mapped by CUDA IPC, messages through the host."""
    n, gpu = 3001, open_sim(order)
    with topology(comm, f"{comm.size // 2}x2") as where:
        schedule = all_reduce(node_list(where), n, 4, PRESETS[name], depth=2)
        memory = MappedMemory(where, gpu, schedule.scratch, np.dtype("float32"))
        peers = dict(zip(where.node.allgather(comm.rank), memory.peers, strict=True))
        interpreter = Interpreter(where, gpu, schedule, memory.gradients, peers)
        mine = gpu.from_host(whole_numbers(comm.rank, schedule.scratch, "float32"))
        for _ in range(2):
            gpu.copy(memory.gradients, mine)
            interpreter.run()
            found = gpu.to_host(memory.gradients)[:n]
            np.testing.assert_array_equal(found, total_of(comm.size, n, "float32"))
        del interpreter, peers
        memory.free()


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
