"""`hpctrain bench allreduce`: the sum over ranks, by MPI and by the sliced reduction of training.

Every rank contributes whole numbers whose sum is exact in float32, and compares every element of
every round with that sum. In each round all contenders run once, from a barrier to the last rank's
end; beside them all ranks copy as many bytes at once, which is what the memory allows.

Layer: cli. Measures host memory; knows nothing of training.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.cli.bench import cpu_name, report, table
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device import open_device
from hpctrain.device.build import lowest_level
from hpctrain.errors import UsageError
from hpctrain.mpi import facts, messages, start
from hpctrain.mpi.topology import Topology, topology

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["run"]

Array = NDArray[Any]
WARM_UP = 2  # rounds that do not count
SMALL, MANY = 1 << 20, 10  # below so many bytes a round is short: do as many times more


def run(args: argparse.Namespace) -> int:
    """Measure on all ranks, print on rank 0; 1 where an element was wrong. Collective."""
    world = start.start()
    itemsize = np.dtype(args.dtype).itemsize
    for size in args.sizes:
        if size % itemsize:
            raise UsageError(f"--sizes: {size} bytes is no whole number of {args.dtype} elements")
    device = open_device("cpu", lowest_level(world.allgather(open_device("cpu").level)))
    with topology(world) as ranks:
        device.prepare([args.dtype], ranks.node)
        found = [row for size in args.sizes for row in _measure(ranks, device, size, args)]
        if world.rank == 0:
            header = _header(ranks, args.dtype)
            report(args.json, header | {"results": found}, _text(header, found))
    return 1 if any(row["wrong"] for row in found) else 0


def _header(ranks: Topology, dtype: str) -> dict[str, Any]:
    return {
        "mpi": facts.library(),
        "ranks": ranks.size,
        "nodes": ranks.node_count,
        "ranks_per_node": list(ranks.local_sizes),
        "host": platform.node(),
        "cpu": cpu_name(),
        "dtype": dtype,
    }


class Contender:
    """One way to add up: `fill` the input, `add` (what is timed), then count the `wrong`."""

    name = ""

    def fill(self) -> None:
        """Put this rank's numbers into place."""

    def add(self) -> None:
        """The sum over all ranks. Collective."""

    def wrong(self) -> int:
        """Elements of this rank's result that differ from the exact sum."""
        return 0


@dataclass
class InPlace(Contender):
    """MPI_Allreduce that replaces the input."""

    comm: MPI.Intracomm
    source: Array
    expected: Array
    name = "MPI_Allreduce in place"

    def __post_init__(self) -> None:
        self.array = np.empty_like(self.source)

    def fill(self) -> None:
        np.copyto(self.array, self.source)

    def add(self) -> None:
        messages.allreduce(self.comm, self.array)

    def wrong(self) -> int:
        return _differ(self.array, self.expected)


@dataclass
class OutOfPlace(Contender):
    """MPI_Allreduce from one array to another."""

    comm: MPI.Intracomm
    source: Array
    expected: Array
    name = "MPI_Allreduce"

    def __post_init__(self) -> None:
        self.result = np.empty_like(self.source)

    def fill(self) -> None:
        self.result.fill(-1)

    def add(self) -> None:
        count = messages.MESSAGE_BYTES // self.source.itemsize
        for first in range(0, self.source.size, count):
            part = slice(first, first + count)
            self.comm.Allreduce(self.source[part], self.result[part])

    def wrong(self) -> int:
        return _differ(self.result, self.expected)


@dataclass
class Slices(Contender):
    """Reduce and gather as in training, with nothing in between: the sums are in the gradients."""

    slices: SliceReduction
    source: Array
    expected: Array

    def __post_init__(self) -> None:
        self.name = f"slices ({self.slices.mode})"

    def fill(self) -> None:
        self.slices.fence()  # nobody reads these gradients any more
        np.copyto(self.slices.gradients, self.source)

    def add(self) -> None:
        self.slices.reduce()
        self.slices.gather()

    def wrong(self) -> int:
        first, last = self.slices.owned
        return _differ(self.slices.gradients[first:last], self.expected[first:last])


class CopiedSlices(Slices):
    """The same, and each slice is copied in between, so that all ranks can read all sums."""

    def __post_init__(self) -> None:
        self.name = f"slices ({self.slices.mode}) + copy"

    def add(self) -> None:
        first, last = self.slices.owned
        self.slices.reduce()
        np.copyto(self.slices.parameters[first:last], self.slices.gradients[first:last])
        self.slices.gather()

    def wrong(self) -> int:
        return _differ(self.slices.parameters, self.expected)


@dataclass
class Copy(Contender):
    """Not a sum: all ranks copy as many bytes at once."""

    source: Array
    name = "copy"

    def __post_init__(self) -> None:
        self.target = np.empty_like(self.source)

    def fill(self) -> None:
        self.target.fill(0)

    def add(self) -> None:
        np.copyto(self.target, self.source)


def _differ(array: Array, expected: Array) -> int:
    return int(np.count_nonzero(array != expected))


def _whole_numbers(rank: int, n: int, dtype: str) -> Array:
    """Different for each rank and from element to element; from -8 to 8."""
    pattern = ((np.arange(17 * 64) * 7 + rank * 13) % 17 - 8).astype(dtype)
    return np.resize(pattern, n)


def _measure(
    ranks: Topology, device: Device, nbytes: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of figures per contender, the same on all ranks. Collective."""
    comm, n = ranks.comm, nbytes // np.dtype(args.dtype).itemsize
    source = _whole_numbers(ranks.rank, n, args.dtype)
    expected = np.zeros_like(source)
    for rank in range(ranks.size):
        expected += _whole_numbers(rank, n, args.dtype)
    slices = SliceReduction(ranks, device, n, args.dtype)
    contenders = [
        InPlace(comm, source, expected),
        OutOfPlace(comm, source, expected),
        Slices(slices, source, expected),
        CopiedSlices(slices, source, expected),
        Copy(source),
    ]
    rounds = args.repeat * (MANY if nbytes < SMALL else 1)
    seconds = np.empty((WARM_UP + rounds, len(contenders)))
    wrong = np.zeros(len(contenders), np.int64)
    for row in seconds:
        for index, contender in enumerate(contenders):
            contender.fill()
            comm.Barrier()
            begun = time.perf_counter()
            contender.add()
            row[index] = time.perf_counter() - begun
            wrong[index] += contender.wrong()
    comm.Barrier()
    slices.free()
    slowest = np.max(comm.allgather(seconds[WARM_UP:]), axis=0)
    wrong = np.sum(comm.allgather(wrong), axis=0)
    return _figures(nbytes, ranks.size, [c.name for c in contenders], slowest, wrong)


def _figures(
    nbytes: int, size: int, names: list[str], seconds: NDArray[np.float64], wrong: Array
) -> list[dict[str, Any]]:
    """From seconds[round, contender], the last one being the copy, to rows of the table.

    `speedup` compares with the quicker of the two ways to call MPI_Allreduce.
    """
    medians = np.median(seconds, axis=0)
    mpi = int(np.argmin(medians[:2]))
    rows = []
    for index, name in enumerate(names[:-1]):
        bus = nbytes * 2 * (size - 1) / size / medians[index]
        rows.append(
            {
                "bytes": nbytes,
                "algorithm": name,
                "seconds": float(medians[index]),
                "bus_bytes_per_second": float(bus),
                "wrong": int(wrong[index]),
                "copy_seconds": float(medians[-1]),
                "speedup": float(np.median(seconds[:, mpi] / seconds[:, index])),
            }
        )
    return rows


def _text(header: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """The table for a terminal."""
    rows = [
        [
            _size(row["bytes"]),
            row["algorithm"],
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['bus_bytes_per_second'] / 1e9:.2f}",
            str(row["wrong"]),
            f"{row['copy_seconds'] * 1e3:.3f}",
            f"{row['speedup']:.2f}",
        ]
        for row in found
    ]
    head = ["size", "algorithm", "time ms", "bus GB/s", "wrong", "copy ms", "x MPI"]
    lines = [
        f"# {header['mpi']}, {header['ranks']} ranks on {header['nodes']} nodes, {header['host']}, "
        f"{header['cpu']}, {header['dtype']}",
        "# time: median over rounds of the slowest rank. bus: 2 (P - 1) / P of the size over the "
        "time.",
        "# wrong: elements, of all rounds and ranks, that are not the exact sum. copy: all ranks "
        "copy as many bytes at once.",
        "# x MPI: times as fast as the quicker way to call MPI_Allreduce. slices: the update "
        "between reduce and gather is left out.",
    ]
    return lines + table(head, rows, left=2)


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes % scale == 0:
            return f"{nbytes // scale} {unit}"
    return f"{nbytes} B"
