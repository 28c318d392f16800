"""`hpctrain doctor --vet`: is each node of the job as quick as the others? In at most 20 s.

    memory copy               all ranks of the node at once, together
    matrix product            all ranks at once, with the threads that a run takes
    all-reduce in the node    MPI_Allreduce over its ranks
    all-reduce of two nodes   between the first ranks of neighbours; a node counts with the quicker
                              of its two neighbours, so that one slow node does not accuse two more
    file write, file read     the first rank of each node, in the folder of the runs, all at once

Exit status: 0 no outlier, 4 there are some, 1 an error.

Layer: cli. Measures; vet_figures judges.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import threadpoolctl

from hpctrain.cli.vet_figures import Node, document, lines_of, outliers_of
from hpctrain.errors import UsageError
from hpctrain.mpi.agree import on_first_rank
from hpctrain.mpi.start import start
from hpctrain.mpi.topology import Topology, topology

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["EXIT_OUTLIERS", "add_hosts", "copy_seconds", "product_seconds", "run"]

EXIT_OUTLIERS = 4
ROUNDS = 5
BUDGET = 2.0  # seconds of one measurement, beyond which no further round begins
COPY = 64 << 20  # bytes of each rank; more than caches hold
SIDE = 1024  # of the square matrices: 2.1 GFLOP
MESSAGE = 4 << 20  # bytes
FILE, PIECE = 64 << 20, 4 << 20  # bytes


def run(args: argparse.Namespace) -> int:
    """Measure, judge on rank 0, print; the exit status is the same on all ranks. Collective."""
    world = start()
    begun = time.perf_counter()
    with topology(world) as where:
        rates = measured(where, args.folder)
        mine = Node(platform.node(), where.rank, where.local_size, rates)
        told = world.gather(mine if where.local_rank == 0 else None)
    nodes = [node for node in told if node is not None] if told is not None else []
    outliers = outliers_of(nodes)
    if told is not None:
        seconds = time.perf_counter() - begun
        if args.json:
            print(json.dumps(document(nodes, outliers, seconds), indent=2), flush=True)
        else:
            print("\n".join(lines_of(nodes, outliers, seconds)), flush=True)
    if args.bad_nodes:
        hosts = [outlier.host for outlier in outliers]
        on_first_rank(world, lambda: add_hosts(Path(args.bad_nodes), hosts))
    bad: bool = world.bcast(bool(outliers))
    return EXIT_OUTLIERS if bad else 0


def add_hosts(file: Path, hosts: Sequence[str]) -> None:
    """Add hosts to a list of bad nodes, one a line, unless they are in it. Makes its folder.

    Raises `UsageError` where the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = file.read_text(encoding="utf-8").split() if file.exists() else []
        with file.open("a", encoding="utf-8") as out:
            out.writelines(f"{host}\n" for host in dict.fromkeys(hosts) if host not in known)
    except OSError as error:
        raise UsageError(f"cannot write --bad-nodes {file}: {error.strerror}") from None


def measured(where: Topology, folder: Path) -> dict[str, float]:
    """The rates of this rank's node, the same on all its ranks; nan: none. Collective."""
    node, ranks = where.node, where.local_size
    masks = node.allgather(os.sched_getaffinity(0))
    threads = max(len(set().union(*masks)) // ranks, 1)
    rates = {"copy": ranks * COPY / _rounds(node, copy_seconds())}
    with threadpoolctl.threadpool_limits(threads, "blas"):
        rates["product"] = ranks * 2 * SIDE**3 / _rounds(node, product_seconds())
    rates["inside"] = MESSAGE / _rounds(node, _sum_over(node)) if ranks > 1 else math.nan
    rates["between"] = node.bcast(_between(where.leaders))
    where.comm.Barrier()
    rates["write"], rates["read"] = node.bcast(_file_rates(folder, where.local_rank == 0))
    return rates


def _rounds(comm: MPI.Intracomm, seconds: Callable[[], float]) -> float:
    """The slowest rank's seconds in the quickest round. Collective over `comm`.

    What is wrong with a node is wrong in every round; what slows one down is something else.
    """
    found: list[float] = []
    while len(found) <= ROUNDS and sum(found) < BUDGET:  # the same numbers on all ranks
        comm.Barrier()
        found.append(max(comm.allgather(seconds())))
    return min(found)


def copy_seconds() -> Callable[[], float]:
    """A function that copies `COPY` bytes and returns the seconds it took."""
    source, target = np.ones(COPY, np.uint8), np.empty(COPY, np.uint8)
    return lambda: _timed(lambda: np.copyto(target, source))


def product_seconds() -> Callable[[], float]:
    """A function that multiplies two matrices of `SIDE` rows and returns the seconds it took."""
    a, out = np.full((SIDE, SIDE), 0.5, np.float32), np.empty((SIDE, SIDE), np.float32)
    return lambda: _timed(lambda: np.matmul(a, a, out=out))


def _sum_over(comm: MPI.Intracomm) -> Callable[[], float]:
    """A function that adds up `MESSAGE` bytes over `comm` and returns the seconds it took."""
    own, total = np.zeros(MESSAGE // 4, np.float32), np.empty(MESSAGE // 4, np.float32)
    return lambda: _timed(lambda: comm.Allreduce(own, total))


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _between(leaders: MPI.Intracomm | None) -> float:
    """This node's rate with the quicker of its neighbours in a ring of nodes. Collective.

    Neighbours sum in pairs, no node in two pairs at a time. nan on ranks that are no leaders, and
    with one node.
    """
    if leaders is None or leaders.size == 1:
        return math.nan
    size, rank, best = leaders.size, leaders.rank, 0.0
    pairs = [(first, (first + 1) % size) for first in range(size if size > 2 else 1)]
    last = [pairs.pop()] if size > 2 and size % 2 else []
    for together in (pairs[0::2], pairs[1::2], last):
        number = next((n for n, pair in enumerate(together) if rank in pair), len(together))
        pair = cast("MPI.Intracomm", leaders.Split(number, rank))
        if number < len(together):
            best = max(best, MESSAGE / _rounds(pair, _sum_over(pair)))
        pair.Free()
    return best


def _file_rates(folder: Path, first: bool) -> tuple[float, float]:
    """Bytes per second to a file in `folder` (or above it, before it exists) and back from it.

    Written to the disk, and read past the memory that the system keeps of it. nan where it fails.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    if not first:
        return math.nan, math.nan
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder, prefix=".vet-") as file:
        return _write_and_read(file.fileno())
    return math.nan, math.nan


def _write_and_read(descriptor: int) -> tuple[float, float]:
    piece, done, begun = os.urandom(PIECE), 0, time.perf_counter()
    while done < FILE and time.perf_counter() - begun < BUDGET:
        done += os.write(descriptor, piece)
        os.fdatasync(descriptor)
    write = done / (time.perf_counter() - begun)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    read, begun = 0, time.perf_counter()
    while (got := len(os.read(descriptor, PIECE))) and time.perf_counter() - begun < BUDGET:
        read += got
    return write, read / (time.perf_counter() - begun)
