"""A split decoded once per node, in memory that the node's ranks share.

Rank r of a node's S ranks reads the blocks b with b mod S = r into the memory of the node's first
rank; after a fence every rank gathers rows from it. Nothing is read twice, and nothing is exchanged
afterwards, so a loader's thread needs no MPI.

Layer: data. Is given a topology and a function that reads a block; knows nothing of files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.agreed import agreed

if TYPE_CHECKING:
    from hpctrain.mpi.topology import Topology
    from hpctrain.mpi.window import NodeWindow

__all__ = ["NodeCache", "open_node_cache"]

Arrays = dict[str, NDArray[Any]]
Kinds = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
ALIGNED = 64


class NodeCache:
    """All rows of a split. Holds the shared memory as long as it lives."""

    def __init__(self, window: NodeWindow, samples: int, fields: Kinds) -> None:
        self.misses = 0
        self._window = window
        memory, begin = window.segment(0), 0
        self._memory: Arrays = {}
        for name, (dtype, shape) in fields.items():
            nbytes = samples * math.prod(shape) * dtype.itemsize
            flat = memory[begin : begin + nbytes].view(dtype)
            self._memory[name] = flat.reshape(samples, *shape)
            begin += _padded(nbytes)

    def gather(self, ids: NDArray[np.int64]) -> Arrays:
        """Copies of the samples `ids`, in that order: name -> C-contiguous (len(ids), *shape)."""
        return {
            name: np.take(memory, ids, axis=0, mode="clip") for name, memory in self._memory.items()
        }

    def views(self, first: int, last: int) -> Arrays:
        """The memory of samples first to last - 1, to be filled."""
        return {name: memory[first:last] for name, memory in self._memory.items()}


def open_node_cache(
    node: Topology,
    starts: NDArray[np.int64],
    fields: Kinds,
    read: Callable[[int, Arrays], None],
) -> NodeCache | None:
    """Read a split into the memory of every node; None, with one warning, if there is too little.

    Collective over `node.comm`. `starts`: int64 (blocks + 1,), the id of each block's first
    sample; `read(block, out)` fills out[field]. Raises `DataError` on all ranks if a block cannot
    be read on one.
    """
    from hpctrain.mpi.window import NodeWindow, WindowError

    samples = int(starts[-1])
    nbytes = sum(
        _padded(samples * math.prod(shape) * dtype.itemsize) for dtype, shape in fields.values()
    )
    try:
        window = NodeWindow(node, nbytes if node.local_rank == 0 else 0)
    except WindowError as error:
        if node.comm.rank == 0:
            logging.getLogger("hpctrain").warning(
                "the split is not kept once per node (%s); every rank keeps blocks of its own",
                error,
            )
        return None
    cache = NodeCache(window, samples, fields)

    def fill() -> None:
        for block in range(node.local_rank, len(starts) - 1, node.local_size):
            read(block, cache.views(int(starts[block]), int(starts[block + 1])))

    agreed(node.comm, "fill the node's cache", fill)
    window.fence()
    return cache


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED
