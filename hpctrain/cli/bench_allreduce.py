"""`hpctrain bench allreduce`: the sum over ranks, by MPI and by the sliced reduction of training.

Every rank contributes whole numbers whose sum is exact in float32, and compares every element of
every round with that sum. In each round all contenders run once, from a barrier to the last rank's
end; beside them all ranks copy as many bytes at once, which is what the memory allows.

On a GPU the numbers are in its memory, MPI_Allreduce is that of the reduction "allreduce" (on GPU
memory or through the host, by --gpu-mpi), and a round ends when the GPU is done.

Layer: cli. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.cli.bench import cpu_name, report, table
from hpctrain.cli.bench_contenders import (
    Contender,
    CopiedSlices,
    Copy,
    InPlace,
    OutOfPlace,
    Slices,
    Whole,
)
from hpctrain.cli.bench_plot import write_plot
from hpctrain.cli.bench_schedules import scheduled, schedules_named
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device import open_device
from hpctrain.device.build import lowest_level
from hpctrain.errors import UsageError
from hpctrain.mpi import facts, start
from hpctrain.mpi.topology import Topology, topology
from hpctrain.parallel.communicator import open_chosen_device

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["run"]

Array = NDArray[Any]
WARM_UP = 2  # rounds that do not count
SMALL, MANY = 1 << 20, 10  # below so many bytes a round is short: do as many times more


def run(args: argparse.Namespace) -> int:
    """Measure on all ranks, print on rank 0; 1 where an element was wrong. Collective."""
    device = open_chosen_device(args.device)
    world = start.start()
    itemsize = np.dtype(args.dtype).itemsize
    for size in args.sizes:
        if size % itemsize:
            raise UsageError(f"--sizes: {size} bytes is no whole number of {args.dtype} elements")
    if device.name == "cpu":
        device = open_device("cpu", lowest_level(world.allgather(device.level)))
    with topology(world) as ranks:
        device.prepare([args.dtype], ranks.node)
        found = [row for size in args.sizes for row in _measure(ranks, device, size, args)]
        if world.rank == 0:
            header = _header(ranks, args.dtype) | {"device": device.name, "gpu_mpi": args.gpu_mpi}
            report(args.json, header | {"results": found}, _text(header, found))
            if args.plot is not None:
                write_plot(args.plot, found, f"{header['mpi']}, {ranks.size} ranks")
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
    placed = source if device.name == "cpu" else device.from_host(source)
    slices = SliceReduction(ranks, device, n, args.dtype, gpu_mpi=args.gpu_mpi)
    contenders: list[Contender] = [InPlace(comm, source, expected)]
    contenders.append(OutOfPlace(comm, source, expected))
    whole: SliceReduction | None = None
    if device.name != "cpu":
        whole = SliceReduction(ranks, device, n, args.dtype, "allreduce", gpu_mpi=args.gpu_mpi)
        contenders[:] = [Whole(whole, placed, expected)]
    mpi = len(contenders)
    contenders += [Slices(slices, placed, expected), CopiedSlices(slices, placed, expected)]
    schedules = schedules_named(ranks, n, source.itemsize, args.algorithm, args.choices)
    programs, buffers = scheduled(ranks, device, schedules, placed, expected, args.gpu_mpi)
    contenders += [*programs, Copy(device, placed)]
    rounds = args.repeat * (MANY if nbytes < SMALL else 1)
    seconds = np.empty((WARM_UP + rounds, len(contenders)))
    wrong = np.zeros(len(contenders), np.int64)
    for row in seconds:
        for index, contender in enumerate(contenders):
            contender.fill()
            device.synchronize()
            comm.Barrier()
            begun = time.perf_counter()
            contender.add()
            device.synchronize()
            row[index] = time.perf_counter() - begun
            wrong[index] += contender.wrong()
    comm.Barrier()
    buffers.free()
    for reduction in filter(None, (slices, whole)):
        reduction.free()
    slowest = np.max(comm.allgather(seconds[WARM_UP:]), axis=0)
    wrong = np.sum(comm.allgather(wrong), axis=0)
    rows = _figures(nbytes, ranks.size, [c.name for c in contenders], slowest, wrong, mpi)
    return [{"count": n, "type": args.dtype, "redop": "sum"} | row for row in rows]


def _figures(
    nbytes: int,
    size: int,
    names: list[str],
    seconds: NDArray[np.float64],
    wrong: Array,
    ways: int = 2,
) -> list[dict[str, Any]]:
    """From seconds[round, contender], the last one being the copy, to rows of the table.

    `speedup` compares with the quickest of the first `ways`, which call MPI_Allreduce.
    """
    medians = np.median(seconds, axis=0)
    mpi = int(np.argmin(medians[:ways]))
    rows = []
    for index, name in enumerate(names[:-1]):
        bus = nbytes * 2 * (size - 1) / size / medians[index]
        rows.append(
            {
                "bytes": nbytes,
                "algorithm": name,
                "seconds": float(medians[index]),
                "bytes_per_second": float(nbytes / medians[index]),
                "bus_bytes_per_second": float(bus),
                "wrong": int(wrong[index]),
                "copy_seconds": float(medians[-1]),
                "speedup": float(np.median(seconds[:, mpi] / seconds[:, index])),
            }
        )
    return rows


def _text(header: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """The table for a terminal, with the columns of nccl-tests and their units."""
    rows = [
        [
            f"{row['bytes']}",
            row["algorithm"],
            f"{row['count']}",
            row["type"],
            row["redop"],
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['bytes_per_second'] / 1e9:.2f}",
            f"{row['bus_bytes_per_second'] / 1e9:.2f}",
            str(row["wrong"]),
            f"{row['copy_seconds'] * 1e6:.1f}",
            f"{row['speedup']:.2f}",
        ]
        for row in found
    ]
    head = ["size", "algorithm", "count", "type", "redop", "time", "algbw", "busbw", "#wrong"]
    units = ["B", "", "elements", "", "", "us", "GB/s", "GB/s", "elements", "us", "MPI = 1"]
    lines = [
        f"# {header['mpi']}, {header['ranks']} ranks on {header['nodes']} nodes, {header['host']}, "
        f"{header['cpu']}, memory of the device {header['device']}",
        "# time: median over rounds of the slowest rank. algbw: size over time. busbw: 2 (P - 1) / "
        "P of it.",
        "# #wrong: elements, of all rounds and ranks, that are not the exact sum. copy: all ranks "
        "copy as many bytes at once.",
        "# speed: times as fast as the quicker way to call MPI_Allreduce. slices: the update "
        "between reduce and gather is left out.",
    ]
    return lines + table([*head, "copy", "speed"], [units, *rows], left=2)
