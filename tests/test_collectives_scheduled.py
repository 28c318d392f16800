"""Columns reduced and gathered by schedules, and which algorithm is picked for them."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.collectives.across import Dense
from hpctrain.collectives.algorithms import ACROSS, all_reduce
from hpctrain.collectives.cost import price
from hpctrain.collectives.cost_across import MARGIN, pick, picks
from hpctrain.collectives.cut import Cut
from hpctrain.collectives.network import COMMON
from hpctrain.collectives.scheduled import schedules
from hpctrain.collectives.slices import SliceReduction
from hpctrain.collectives.verifier import verify
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.dtypes import FLOATS, wide_dtype
from hpctrain.device.sim import Machine, SimDevice
from hpctrain.mpi.topology import topology

NAMES = ("halving", "ring")
BUCKETS = [(0, 32), (32, 96), (96, 4000), (4000, 70_001)]
LAYOUTS = {2: ["1x2", "2x1"], 3: ["3x1", "2+1"], 4: ["4x1", "2x2", "3+1", "0,1,0,1"]}


# the schedules


@pytest.mark.parametrize(
    ("name", "size", "dtype", "wire"),
    [
        ("halving", 5, "float32", "bfloat16"),
        ("ring", 3, "bfloat16", "same"),
        *(
            pytest.param(name, size, dtype, wire, marks=pytest.mark.slow)
            for name in NAMES
            for size in (2, 3, 8, 13)
            for dtype, wire in (("float32", "same"), ("float64", "same"), ("bfloat16", "same"))
        ),
    ],
)
def test_schedules_keep_all_rules_and_own_what_the_cut_says(name, size, dtype, wire):
    for n in (0, 1, 33, 1000, 9999):
        scatter, gather = schedules(name, size, n, FLOATS[dtype], wire, 2048)
        verify(scatter)
        verify(gather)
        cut = Cut(n, FLOATS[dtype].itemsize, (1,) * size)
        each = gather.itemsize // FLOATS[dtype].itemsize
        for rank in range(size):
            start, stop = cut.slice(rank, 0)
            if start < stop:
                assert scatter.owned(rank) == ((start, stop),)
                assert gather.owned(rank) == ((start // each, -(-stop // each)),)
            else:
                assert scatter.owned(rank) == gather.owned(rank) == ()


# the sums


def whole(rank, n, dtype):
    """Numbers that add exactly, in 16 bits too."""
    return ((np.arange(n) * 7 + rank * 11) % 15 - 7).astype(dtype)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize(
    ("name", "dtype", "overlap"),
    [
        ("halving", "float32", "on"),
        ("ring", "bfloat16", "off"),
        *(
            pytest.param(name, dtype, overlap, marks=pytest.mark.slow)
            for name in NAMES
            for dtype in ("float32", "float64", "bfloat16")
            for overlap in ("off", "on")
        ),
    ],
)
def test_sums_and_parameters_are_those_of_all_ranks(comm, name, dtype, overlap):
    dtype, n = FLOATS[dtype], BUCKETS[-1][1]
    wire = "float16" if dtype == np.float32 else "same"
    for layout in LAYOUTS[comm.size]:
        with topology(comm, layout) as where:
            crossing = Dense(wire, dict.fromkeys(BUCKETS[1:], name))  # the first one: direct
            slices = SliceReduction(
                where, CpuDevice(), n, dtype, buckets=BUCKETS, crossing=crossing, overlap=overlap
            )
            places = np.concatenate([np.arange(*span) for span in slices.owned])
            total = sum(whole(rank, n, np.float64) for rank in range(comm.size))
            for step in (1, 2):
                slices.gradients[:] = step * whole(comm.rank, n, np.float64).astype(dtype)
                slices.reduce()
                assert slices.sums.dtype == wide_dtype(dtype)
                np.testing.assert_array_equal(slices.sums, step * total[places])
                slices.parameters[places] = slices.sums.astype(dtype)
                slices.gather()
                np.testing.assert_array_equal(slices.parameters.astype(np.float64), step * total)
            slices.free()


# the choice


def test_what_is_picked_is_cheapest_and_direct_where_little_is_won():
    for nodes in (tuple(range(64)), tuple(r // 4 for r in range(64)), (0, 0, 0, 1, 2)):
        for n in (1 << 12, 1 << 18, 1 << 22):
            found = pick(nodes, n, 4, COMMON)
            times = {
                name: price(all_reduce(nodes, n, 4, levels), COMMON).seconds
                for name, levels in ACROSS.items()
            }
            assert times[found.algorithm] * MARGIN <= min(times.values())
            if found.algorithm != "direct":
                assert times[found.algorithm] < MARGIN * times["direct"]
            for name, seconds in found.seconds.items():
                assert seconds == times[name]


def test_many_nodes_and_few_bytes_ask_for_few_messages():
    many = tuple(rank // 8 for rank in range(64 * 8))
    small, large = picks(many, [1 << 14, 25 << 18], 4, COMMON)
    assert (small.algorithm, large.algorithm) == ("halving", "direct")
    assert str(small).startswith("halving (direct ") and "ms" in str(small)
    assert [p.algorithm for p in picks((0, 0, 1, 1), [1 << 14, 0], 4, COMMON)] == ["direct"] * 2
    assert pick(many, 1 << 14, 4, COMMON, "ring").algorithm == "ring"


# on a GPU


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("gpu_mpi", "dtype"),
    [
        ("off", "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("off", "float32"), ("on", "float32"), ("on", "bfloat16"))
        ),
    ],
)
def test_simulated_gpus_send_as_they_are_or_through_the_host(comm, gpu_mpi, dtype):
    """Work is done as late as CUDA's rules allow: a missing wait would give other sums."""
    device, n = SimDevice(comm.rank, Machine("late", "host")), BUCKETS[-1][1]
    device.prepare(["float32"], comm)
    crossing = Dense("same", dict.fromkeys(BUCKETS, "halving"))
    total = sum(whole(rank, n, np.float64) for rank in range(comm.size))
    with topology(comm, f"{comm.size}x1") as where:
        slices = SliceReduction(
            where, device, n, FLOATS[dtype], gpu_mpi=gpu_mpi, buckets=BUCKETS, crossing=crossing
        )
        places = np.concatenate([np.arange(*span) for span in slices.owned])
        for step in (1, 2):
            mine = step * whole(comm.rank, n, np.float64)
            device.copy(slices.gradients, device.from_host(mine.astype(FLOATS[dtype])))
            slices.reduce()
            np.testing.assert_array_equal(device.to_host(slices.sums), step * total[places])
            everything = device.from_host((step * total).astype(FLOATS[dtype]))
            for start, stop in slices.owned:
                device.copy(slices.parameters[start:stop], everything[start:stop])
            slices.gather()
            found = device.to_host(slices.parameters).astype(np.float64)
            np.testing.assert_array_equal(found, step * total)
        slices.free()
