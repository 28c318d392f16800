"""Reductions in buckets, and the plug for what crosses nodes, against the plain sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from hpctrain.collectives.across import Dense
from hpctrain.collectives.between import Column
from hpctrain.collectives.bucket import checked
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.dtypes import FLOATS
from hpctrain.errors import UsageError
from hpctrain.mpi.topology import topology

LAYOUTS = {
    1: ["1x1"],
    2: ["1x2", "2x1"],
    3: ["1x3", "3x1", "2+1", "0,1,0"],
    4: ["1x4", "2x2", "3+1", "1+3", "0,1,0,1", "4x1"],
}
# n, and where buckets end: empty ones, one of less than a cache line, more ranks than lines
BUCKETS = {
    0: (0, 0),
    5: (0, 5),
    1000: (32, 32, 992, 1000),
    100_003: (65_536, 65_600, 100_003),
}


def ranges(n):
    """The buckets of an array of n elements."""
    ends = [0, *BUCKETS[n]]
    return list(zip(ends, ends[1:], strict=False))


def numbers(rank, n, dtype):
    """Whole numbers that add exactly, different on every rank and place."""
    return ((np.arange(n) * 7 + rank * 11) % 101 - 50).astype(dtype)


def owned_places(slices):
    """The owned elements, in the order of `sums`."""
    return np.concatenate([np.arange(start, stop) for start, stop in slices.owned])


@dataclass(frozen=True)
class Everything:
    """Gives every node the whole column, by pickles: the plainest `Crossing` that is whole."""

    column: Column | None = None
    whole = True

    def __call__(self, column):
        return Everything(column)

    def reduce(self):
        start, stop = self.column.span
        rows = self.column.comm.allgather(self.column.gradients[start:stop].copy())
        self.column.sums[:] = np.sum(rows, axis=0, dtype=self.column.sums.dtype)

    def gather(self):
        pass


def check(comm, slices, n, dtype):
    """Two steps of reduce, update, gather, against the sum of all ranks' numbers."""
    total = sum(numbers(rank, n, dtype) for rank in range(comm.size))
    if slices.writes_parameters:
        slices.parameters[:] = 3
    slices.fence()
    places = owned_places(slices)
    for step in (1, 2):
        slices.gradients[:] = step * numbers(comm.rank, n, dtype)
        slices.reduce()
        sums = slices.sums.copy()
        slices.gradients[:] = -99  # the next backward pass
        np.testing.assert_array_equal(sums, step * total[places])
        slices.parameters[places] += sums
        slices.gather()
        np.testing.assert_array_equal(slices.parameters, 3 + total * sum(range(1, step + 1)))


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", ["shared", "messages"])
@pytest.mark.parametrize("crossing", [None, Everything()])
def test_buckets_add_up_on_every_topology(comm, mode, crossing):
    device, dtype = CpuDevice(), np.dtype(np.float64)
    for layout in LAYOUTS[comm.size][: None if mode == "shared" else 1]:
        for n in BUCKETS:
            with topology(comm, layout) as where:
                slices = SliceReduction(
                    where, device, n, dtype, mode, buckets=ranges(n), crossing=crossing
                )
                check(comm, slices, n, dtype)
                slices.free()


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("crossing", [None, Everything()])
def test_every_element_is_owned_and_counted_once(comm, crossing):
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            slices = SliceReduction(
                where, CpuDevice(), 1000, "float32", buckets=ranges(1000), crossing=crossing
            )
            assert len(slices.owned) == len(BUCKETS[1000])
            seen = np.zeros(1000, np.int64)
            for counted, owned in comm.allgather((slices.counted, slices.owned)):
                for start, stop in owned if counted else ():
                    seen[start:stop] += 1
            assert (seen == 1).all()
            assert slices.counted or (crossing is not None and where.node_index > 0)
            slices.free()


@pytest.mark.ranks(2, 4)
def test_16_bit_gradients_in_buckets(comm):
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            slices = SliceReduction(where, CpuDevice(), 1000, "float16", buckets=ranges(1000))
            slices.gradients[:] = numbers(comm.rank, 1000, "float16")
            slices.reduce()
            assert slices.sums.dtype == np.float32
            total = sum(numbers(rank, 1000, "float32") for rank in range(comm.size))
            np.testing.assert_array_equal(slices.sums, total[owned_places(slices)])
            slices.free()


def test_buckets_that_do_not_fit_are_refused():
    assert checked(None, 7, 16) == ((0, 7),)
    for buckets in ([(0, 16)], [(0, 16), (32, 40)], [(16, 40)], [(0, 48), (48, 40)], []):
        with pytest.raises(UsageError, match="must follow on one another from 0 to 40"):
            checked(buckets, 40, 16)
    with pytest.raises(UsageError, match="multiples of 16 elements"):
        checked([(0, 8), (8, 40)], 40, 16)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_16_bit_wire_rounds_nodes_sums_and_adds_in_float32(comm, wire, overlap):
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            slices = SliceReduction(
                where,
                CpuDevice(),
                1000,
                "float32",
                buckets=ranges(1000),
                crossing=Dense(wire),
                overlap=overlap,
            )
            mine = np.random.default_rng(comm.rank).standard_normal(1000, np.float32)
            every, nodes = comm.allgather(mine), comm.allgather(where.node_index)
            by_node = [np.zeros(1000, np.float32) for _ in range(where.node_count)]
            for rank, node in enumerate(nodes):
                by_node[node] = by_node[node] + every[rank]
            if where.node_count > 1:
                by_node = [x.astype(FLOATS[wire]).astype(np.float32) for x in by_node]
            expected = by_node[0]
            for node in by_node[1:]:
                expected = expected + node
            for _ in range(2):
                slices.gradients[:] = mine
                slices.reduce()
                np.testing.assert_array_equal(slices.sums, expected[owned_places(slices)])
            slices.free()


@pytest.mark.ranks(2)
def test_a_16_bit_wire_is_for_float32(comm):
    with topology(comm, "2x1") as where, pytest.raises(UsageError, match="gradients of float32"):
        SliceReduction(where, CpuDevice(), 100, "float64", crossing=Dense("float16"))


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", ["shared", "messages"])
@pytest.mark.parametrize("crossing", [None, Everything()])
def test_a_thread_leaves_the_same_bits(comm, mode, crossing):
    """Buckets that begin early and one by one, each rank at its own time, and late parameters."""
    for layout in LAYOUTS[comm.size][: None if mode == "shared" else 1]:
        found = {}
        with topology(comm, layout) as where:
            for overlap in ("off", "on"):
                slices = SliceReduction(
                    where,
                    CpuDevice(),
                    1000,
                    "float32",
                    mode,
                    buckets=ranges(1000),
                    crossing=crossing,
                    overlap=overlap,
                )
                found[overlap] = steps(comm, slices)
                slices.free()
        assert found["on"] == found["off"]


def steps(comm, slices):
    """The bits of sums and parameters over three steps."""
    rng, places, seen = np.random.default_rng(comm.rank), owned_places(slices), b""
    slices.parameters[places] = 1
    slices.gather()
    for step in range(3):
        slices.gradients[:] = rng.standard_normal(1000, np.float32)
        for count in range(1, len(slices.buckets) + 1):
            if (comm.rank + step) % 2:
                slices.begin(count)
        slices.reduce()
        seen += slices.sums.tobytes()
        slices.parameters[places] -= slices.sums
        slices.gather(wait=False)
        slices.arrive(len(slices.buckets) - 1)
        start, stop = slices.buckets[-1]
        seen += slices.parameters[start:stop].tobytes()
        slices.arrive()
        seen += slices.parameters.tobytes()
    return seen
