"""How many bytes a kernel moves, from the accesses that the SIMT simulator recorded.

A GPU moves memory in sectors of 32 bytes. What the 32 lanes of a warp ask for in one instruction
is one request: lanes that read side by side share sectors, lanes that read far apart do not. Two
figures follow:

    requested   sectors of every request: what the first cache is asked for. Lanes far apart, and
                data read again, make it larger than what has to be moved.
    moved       sectors that each block reads or writes, each once, and not read where the block has
                written it: what crosses memory while the cache holds what a block uses again.

Which accesses of the lanes belong to one instruction is told by the place in the code and by how
often the lane has been there. Where lanes go different ways that is a guess, and `requested` is
too high.

Layer: device. Given records of dtype TOUCH; knows nothing of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SECTOR", "Traffic", "traffic"]

SECTOR = 32  # bytes
WARP = 32
SHARED, ATOMIC, WRITE = 4, 2, 1

Array = NDArray[Any]


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory: `asked` by the threads, in `requested` sectors, `moved` sectors."""

    asked: int
    requested: int
    moved: int


def traffic(touches: Array, block: int) -> Traffic:
    """Count the accesses of a launch with `block` threads per block; shared memory is left out.

    `touches`: (n,) of dtype TOUCH, in the order of execution within each thread.
    """
    touches = touches[touches["use"] < SHARED]
    atomic = touches[touches["use"] == ATOMIC]  # reads, and then writes
    kinds = np.concatenate([touches["use"] == WRITE, np.ones(len(atomic), bool)])
    touches = np.concatenate([touches, atomic])
    turn = _turns(touches["thread"], touches["pc"])
    address = touches["address"].astype(np.int64)
    first, last = address // SECTOR, (address + touches["bytes"] - 1) // SECTOR
    pieces = np.concatenate([np.arange(len(touches)), np.flatnonzero(last > first)])
    sector = np.concatenate([first, last[last > first]])  # an access lies in at most two
    thread = touches["thread"].astype(np.int64)[pieces]
    kind = kinds[pieces].astype(np.int64)
    requests = [thread // WARP, touches["pc"][pieces].astype(np.int64), turn[pieces], kind, sector]
    return Traffic(
        asked=int(touches["bytes"].sum()),
        requested=SECTOR * _distinct(requests),
        moved=SECTOR * _moved(thread // block, sector, kind),
    )


def _moved(block: Array, sector: Array, kind: Array) -> int:
    """Sectors read before their block wrote them, and sectors written; accesses in order."""
    order = np.lexsort((sector, block))  # stable: in each group the accesses stay in order
    block, sector, kind = block[order], sector[order], kind[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (np.diff(block) != 0) | (np.diff(sector) != 0)
    reads = int((kind[starts] != WRITE).sum())
    written = np.add.reduceat(kind, np.flatnonzero(starts)) > 0 if len(kind) else kind
    return reads + int(written.sum())


def _turns(thread: Array, place: Array) -> Array:
    """How often the thread had been at the place before, for each access."""
    order = np.lexsort((np.arange(len(thread)), place, thread))
    changed = np.ones(len(thread), bool)
    changed[1:] = (np.diff(thread[order].astype(np.int64)) != 0) | (
        np.diff(place[order].astype(np.int64)) != 0
    )
    starts = np.flatnonzero(changed)
    turn = np.empty(len(thread), np.int64)
    turn[order] = np.arange(len(thread)) - np.repeat(
        starts, np.diff(np.append(starts, len(thread)))
    )
    return turn


def _distinct(columns: list[Array]) -> int:
    """The number of different rows of the matrix with these columns."""
    if not len(columns[0]):
        return 0
    order = np.lexsort(columns)
    changed = np.zeros(len(order) - 1, bool)
    for column in columns:
        changed |= np.diff(column[order]) != 0
    return 1 + int(changed.sum())
