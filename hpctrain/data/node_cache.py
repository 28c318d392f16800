"""Blocks decoded once per node, in memory that the node's ranks share.

A split that fits is decoded whole, when the cache is opened. Rank r of a node's S ranks reads the
blocks b with b mod S = r into the memory of the node's first rank; after a fence every rank gathers
rows from it. Nothing is read twice, and nothing is exchanged afterwards, so a loader's thread needs
no MPI. Larger splits go by windows: see `node_windows`.

Layer: data. Is given a topology and a function that reads a block; knows nothing of files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.agreed import agreed
from hpctrain.data.node_windows import NodeWindows, windows_bytes
from hpctrain.data.order import Window

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
        self._window = window
        memory, begin = window.segment(0), 0
        self._memory: Arrays = {}
        for name, (dtype, shape) in fields.items():
            nbytes = samples * math.prod(shape) * dtype.itemsize
            flat = memory[begin : begin + nbytes].view(dtype)
            self._memory[name] = flat.reshape(samples, *shape)
            begin += _padded(nbytes)

    def gather(self, ids: NDArray[np.int64], out: Arrays) -> None:
        """Copy the samples `ids`, in that order, into out[name]: C-contiguous, (n, *shape)."""
        for name, memory in self._memory.items():
            np.take(memory, ids, axis=0, out=out[name], mode="clip")

    def views(self, first: int, last: int) -> Arrays:
        """The memory of samples first to last - 1, to be filled."""
        return {name: memory[first:last] for name, memory in self._memory.items()}


def open_node_cache(
    node: Topology,
    starts: NDArray[np.int64],
    fields: Kinds,
    read: Callable[[int, Arrays], None],
    whole: bool = True,
    window: Window | None = None,
    limit: int | None = None,
) -> NodeCache | NodeWindows | None:
    """Memory for a split, or for windows of it, on every node; None, with a warning, if none fits.

    Collective over `node.comm`.

    Args:
        starts: int64 (blocks + 1,), the id of each block's first sample.
        read: `read(block, out)` fills out[field].
        whole: keep all of the split if it fits; then it is read now, and a block that cannot be
            read is a `DataError` on all ranks.
        window: of the order, if it has windows of blocks.
        limit: bytes per node; None: what the node has.
    """
    from hpctrain.mpi.window import NodeWindow, WindowError

    problem, blocks = "the order has no windows of blocks", len(starts) - 1
    width = None if window is None else blocks if window == "all" else min(window, blocks)
    for buffers, nbytes in _sizes(node, starts, fields, whole, width):
        if limit is not None and nbytes > limit:
            problem = f"{nbytes:,} bytes are needed, node_bytes is {limit:,}"
            continue
        try:
            memory = NodeWindow(node, nbytes if node.local_rank == 0 else 0)
        except WindowError as error:
            problem = str(error)
            continue
        if not buffers:
            return _filled(NodeCache(memory, int(starts[-1]), fields), memory, node, starts, read)
        assert width is not None  # there are buffers of windows
        return NodeWindows(memory, node, starts, fields, width, buffers)
    if node.comm.rank == 0:
        logging.getLogger("hpctrain").warning(
            "blocks are not kept once per node (%s); every rank keeps blocks of its own", problem
        )
    return None


def _sizes(
    node: Topology, starts: NDArray[np.int64], fields: Kinds, whole: bool, width: int | None
) -> Iterator[tuple[int, int]]:
    """(buffers, bytes) of what may be tried, the best first; 0 buffers: the split as a whole."""
    samples, blocks = int(starts[-1]), len(starts) - 1
    if whole:
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in fields.values()]
        yield 0, sum(_padded(samples * size) for size in sizes)
    if width is None or (whole and width == blocks):
        return
    rows = width * int(np.diff(starts).max(initial=1))
    most = max(node.comm.allgather(node.local_size))
    for buffers in (2, 1) if width < blocks else (1,):
        yield buffers, windows_bytes(fields, buffers * rows, most)


def _filled(
    cache: NodeCache,
    window: NodeWindow,
    node: Topology,
    starts: NDArray[np.int64],
    read: Callable[[int, Arrays], None],
) -> NodeCache:
    """The cache with all of the split in it. Collective over `node.comm`."""

    def fill() -> None:
        for block in range(node.local_rank, len(starts) - 1, node.local_size):
            read(block, cache.views(int(starts[block]), int(starts[block + 1])))

    agreed(node.comm, "fill the node's cache", fill)
    window.fence()
    return cache


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED
