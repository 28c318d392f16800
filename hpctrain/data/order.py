"""The order of samples in an epoch, as a pure function with random access.

    stream_key(*a)     = blake2b(repr(a)), 128 bits
    permutation(n, *a) = stable argsort of n raw words of Philox(stream_key(*a))

blockwin-v1: the blocks of a split, in manifest order, are permuted by (seed, epoch, "blocks") and
taken `window` at a time; the samples of window w are permuted by (seed, epoch, "win", w). What is
at a position depends on nothing else: not on ranks, nodes, batch sizes or what was read before.
So nothing need be remembered of an epoch but the position. Memory: 8 bytes per sample of one
window and per block.

NumPy keeps the raw stream of a bit generator the same between versions, but not what
`Generator.permutation` makes of it; hence the sort.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import UsageError, nearest

__all__ = [
    "ORDERS",
    "BlockWindowOrder",
    "Order",
    "SequentialOrder",
    "Window",
    "make_order",
    "permutation",
    "stream_key",
]

Window = int | Literal["all"]
BLOCKWIN = "blockwin-v1"
SEQUENTIAL = "sequential"
ORDERS = (BLOCKWIN, SEQUENTIAL)


def stream_key(*parts: int | str) -> int:
    """A 128-bit key for a counter-based generator, from whole numbers and strings."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def permutation(n: int, *parts: int | str) -> NDArray[np.int64]:
    """A permutation of range(n), int64 of shape (n,), that depends on n and `parts` only."""
    raw = np.random.Philox(key=stream_key(*parts)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


class BlockWindowOrder:
    """The order blockwin-v1 of one epoch. Not safe across threads: it keeps the last window."""

    def __init__(self, starts: NDArray[np.int64], seed: int, epoch: int, window: Window) -> None:
        """`starts`: int64 of shape (blocks + 1,), the id of each block's first sample."""
        self._starts = starts
        self._stream = (int(seed), int(epoch))
        count = len(starts) - 1
        self._width = max(count, 1) if window == "all" else window
        self._blocks = permutation(count, *self._stream, "blocks")
        ends = np.concatenate([[0], np.cumsum(np.diff(starts)[self._blocks])])
        edges = np.arange(-(-count // self._width) + 1) * self._width
        self._bounds = ends[np.minimum(edges, count)]  # position where each window begins
        self._last: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of the samples at positions [start, stop), int64 of shape (stop - start,)."""
        parts = []
        while start < stop:
            window = self.window_at(start)
            first, last = int(self._bounds[window]), int(self._bounds[window + 1])
            parts.append(self._window(window)[start - first : min(stop, last) - first])
            start = last
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @property
    def windows(self) -> int:
        """How many windows the epoch has."""
        return len(self._bounds) - 1

    def window_at(self, position: int) -> int:
        """The window that holds a position; the number of windows at the end of the epoch."""
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def end_of(self, window: int) -> int:
        """The position where the window after this one begins."""
        return int(self._bounds[window + 1])

    def blocks_of(self, window: int) -> NDArray[np.int64]:
        """The blocks of a window."""
        return self._blocks[window * self._width : (window + 1) * self._width]

    def blocks_around(self, position: int) -> NDArray[np.int64]:
        """The blocks of the window at `position`, and a share of the next window's blocks.

        The share is the part of this window that lies before `position`: read step by step, the
        next window is in memory when this one ends.
        """
        window = self.window_at(position)
        if window + 1 >= len(self._bounds):
            return np.empty(0, np.int64)
        first, last = int(self._bounds[window]), int(self._bounds[window + 1])
        share = -(-(position - first) * self._width // (last - first))
        return self._blocks[window * self._width : (window + 1) * self._width + share]

    def _window(self, window: int) -> NDArray[np.int64]:
        if self._last[0] != window:
            blocks = self.blocks_of(window)
            begins = self._starts[blocks]
            lengths = self._starts[blocks + 1] - begins
            ends = np.cumsum(lengths)
            total = int(ends[-1])
            ids = np.arange(total) + np.repeat(begins - (ends - lengths), lengths)
            self._last = (window, ids[permutation(total, *self._stream, "win", window)])
        return self._last[1]


class SequentialOrder:
    """Manifest order, for evaluation: position p is sample p in every epoch."""

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of the samples at positions [start, stop), int64 of shape (stop - start,)."""
        return np.arange(start, max(start, stop), dtype=np.int64)


Order = BlockWindowOrder | SequentialOrder


def make_order(
    name: str, starts: NDArray[np.int64], seed: int, epoch: int, window: Window
) -> Order:
    """The order called `name` ("blockwin-v1" or "sequential") of one epoch.

    Raises `UsageError` for another name, or for a window that is neither "all" nor 1 or more.
    """
    if name not in ORDERS:
        raise UsageError(
            f"no order is called {name!r}{nearest(name, ORDERS)}; there are {', '.join(ORDERS)}"
        )
    if window != "all" and window < 1:
        raise UsageError(f'window {window} is not a number of blocks: give 1 or more, or "all"')
    if name == SEQUENTIAL:
        return SequentialOrder()
    return BlockWindowOrder(starts, seed, epoch, window)
