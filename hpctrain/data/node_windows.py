"""A split that is larger than a node's cache: its windows of blocks, decoded once per node.

The memory that the node's ranks share holds one or two windows of the order blockwin-v1. Rank r of
a node's S ranks decodes the blocks j of each window with j mod S = r; with two windows, those of
the next one while this one is used. So a node reads each block once in an epoch.

The loaders' threads, which must not call MPI, go in step by counters in the same memory. Each rank
writes its own line only:

    EPOCH      which epoch, counted from the making of the cache, the rest of the line is about
    DECODED    of this epoch's windows, how many this rank has decoded its blocks of
    DONE       how many it will not look at again
    STATE      0, or how the rank left the epoch: at its end, before it, or by an error

Window k may be written where window k - B was (B buffers) when DONE > k - B on all ranks, and be
read when DECODED > k on all ranks. A new epoch begins when all have left the one before. A rank
that is ahead has nothing to wait for, and the one that is behind finds its buffers free, so none
waits for ever, as long as all ranks take the same steps. Counters are written and read under a lock
of the node (`node_lock`), so that on any processor a rank that sees a counter also sees the blocks
that were decoded before it was written.

Layer: data. Is given a window of memory and a function that reads a block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.node_lock import LOCK_BYTES, NodeLock
from hpctrain.data.order import BlockWindowOrder
from hpctrain.errors import DataError

if TYPE_CHECKING:
    from hpctrain.mpi.topology import Topology
    from hpctrain.mpi.window import NodeWindow

__all__ = ["EpochClosed", "NodeWindows", "windows_bytes"]

Arrays = dict[str, NDArray[Any]]
Kinds = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
LINE = 8  # int64 per rank: a cache line of its own
EPOCH, DECODED, DONE, STATE = range(4)
ENDED, LEFT, FAILED = 1, 2, 3
SHORTEST, LONGEST = 5e-5, 2e-3  # seconds between two looks at the counters


class EpochClosed(Exception):
    """Nobody wants the rest of the epoch."""


def windows_bytes(fields: Kinds, rows: int, ranks: int) -> int:
    """Bytes for windows of `rows` samples together, for the lock and for the counters."""
    sizes = (dtype.itemsize * int(np.prod(shape)) for dtype, shape in fields.values())
    return LOCK_BYTES + ranks * LINE * 8 + sum(_padded(rows * size) for size in sizes)


class NodeWindows:
    """The shared memory and the counters; lives as long as its loader."""

    def __init__(
        self,
        window: NodeWindow,
        node: Topology,
        starts: NDArray[np.int64],
        fields: Kinds,
        width: int,
        buffers: int,
    ) -> None:
        """`window`: `windows_bytes` for `buffers` windows of `width` blocks, on local rank 0.

        Collective over the node: returns when the lock can be used.
        """
        self.starts, self.buffers = starts, buffers
        self.rank, self.ranks = node.local_rank, node.local_size
        self._window = window
        self._rows = int(np.diff(starts).max(initial=1))
        self._width = width
        memory = window.segment(0)
        begin = LOCK_BYTES + self.ranks * LINE * 8
        self.lock = NodeLock(memory[:LOCK_BYTES], create=self.rank == 0)
        self._lines = memory[LOCK_BYTES:begin].view(np.int64).reshape(self.ranks, LINE)
        self.memory: Arrays = {}
        for name, (dtype, shape) in fields.items():
            rows = buffers * width * self._rows
            nbytes = rows * int(np.prod(shape)) * dtype.itemsize
            self.memory[name] = memory[begin : begin + nbytes].view(dtype).reshape(rows, *shape)
            begin += _padded(nbytes)
        self._begun = 0
        self._turn = threading.Lock()  # one thread at a time, even if an old one ends late
        window.fence()

    def lines(self) -> NDArray[np.int64]:
        """The counters of all ranks as they are now, a copy: int64 (ranks, LINE)."""
        with self.lock:
            return self._lines.copy()

    def tell(self, what: int, value: int) -> None:
        """Set a counter of this rank; all that it wrote before is seen by who sees it."""
        with self.lock:
            self._lines[self.rank, what] = value

    def begin(self) -> int:
        """The number of an epoch that is to be read; as many on all ranks of the node."""
        self._begun += 1
        return self._begun

    def reader(
        self,
        number: int,
        order: BlockWindowOrder,
        position: int,
        closed: threading.Event,
        read: Callable[[int, Arrays], None],
    ) -> WindowReader:
        """This rank's view of epoch `number` as counted by `begin`, from `position` on.

        Waits until the one before is left by all ranks of the node.
        """
        self._turn.acquire()
        while number > 1:
            lines = self.lines()
            epochs, left = lines[:, EPOCH], lines[:, STATE] != 0
            if ((epochs >= number) | ((epochs == number - 1) & left)).all():
                break
            time.sleep(SHORTEST)
        with self.lock:
            self._lines[self.rank, DECODED:] = 0
            self._lines[self.rank, EPOCH] = number
        return WindowReader(self, order, position, closed, read, number)

    def give_back(self) -> None:
        """Let the next reader be made."""
        self._turn.release()

    def rows(self, number: int, blocks: int) -> NDArray[np.int64]:
        """The rows where the blocks of an epoch's window `number` begin, int64 (blocks,)."""
        return (number % self.buffers * self._width + np.arange(blocks)) * self._rows


class WindowReader:
    """One epoch of one rank. Windows are numbered from the one that the epoch begins in."""

    def __init__(
        self,
        cache: NodeWindows,
        order: BlockWindowOrder,
        position: int,
        closed: threading.Event,
        read: Callable[[int, Arrays], None],
        epoch: int,
    ) -> None:
        self._cache, self._order, self._closed, self._read = cache, order, closed, read
        self._epoch = epoch
        self._first = order.window_at(position)
        self._count = order.windows - self._first
        self._row_of = np.zeros(len(cache.starts) - 1, np.int64)  # of the blocks of a window
        self._window = -1  # that `_row_of` is of
        self._at = (0, cache.rank)  # window and place of the block to be decoded next
        self.misses = 0  # samples of windows that were not ready when they were asked for

    def gather(self, spans: list[tuple[int, int]], out: Arrays) -> NDArray[np.int64]:
        """The samples at some ranges of positions, in ascending order, into `out`; their ids."""
        parts, begin = [], 0
        for start, stop in spans:
            while start < stop:
                window = self._order.window_at(start)
                end = min(stop, self._order.end_of(window))
                late = self._enter(window - self._first)
                ids = self._order.samples(start, end)
                self.misses += len(ids) if late else 0
                self._copy(ids, {n: a[begin : begin + len(ids)] for n, a in out.items()})
                parts.append(ids)
                begin, start = begin + len(ids), end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def read_ahead(self, position: int) -> None:
        """Decode a share of the next window, if its place is free; never waits."""
        if self._cache.buffers < 2:
            return
        window = self._order.window_at(position)
        number = window - self._first + 1
        free = 0 < number < self._count and number == self._at[0]
        if not free or not self._reached(DONE, number - self._cache.buffers + 1):
            return
        begin = self._order.end_of(window - 1) if window else 0
        blocks = len(self._order.blocks_of(window + 1))
        share = -(-(position - begin) * blocks // (self._order.end_of(window) - begin))
        self._decode(number, share)

    def finish(self) -> None:
        """Decode what is left of this rank's blocks: others may need them."""
        self._cache.tell(DONE, self._count)
        for number in range(self._at[0], self._count):
            self._decode_all(number)

    def leave(self, error: BaseException | None) -> None:
        """End the epoch on this rank; the others see if it was before its time."""
        failed = error is not None and not isinstance(error, EpochClosed | GeneratorExit)
        early = LEFT if self._at[0] < self._count else ENDED
        self._cache.tell(STATE, FAILED if failed else early)
        self._cache.give_back()

    def _enter(self, number: int) -> bool:
        """Bring a window in; whether it had to be waited for."""
        if self._window == number:
            return False
        self._cache.tell(DONE, number)
        late = not self._reached(DECODED, number + 1)
        for earlier in range(self._at[0], number + 1):
            self._decode_all(earlier)
        self._wait(DECODED, number + 1)
        blocks = self._order.blocks_of(self._first + number)
        self._row_of[blocks] = self._cache.rows(number, len(blocks))
        self._window = number
        return late

    def _copy(self, ids: NDArray[np.int64], out: Arrays) -> None:
        starts = self._cache.starts
        blocks = np.searchsorted(starts, ids, side="right") - 1
        rows = self._row_of[blocks] + ids - starts[blocks]
        for name, memory in self._cache.memory.items():
            np.take(memory, rows, axis=0, out=out[name], mode="clip")

    def _decode_all(self, number: int) -> None:
        self._wait(DONE, number - self._cache.buffers + 1)
        self._decode(number, len(self._order.blocks_of(self._first + number)))

    def _decode(self, number: int, share: int) -> None:
        """Decode this rank's blocks among the first `share` of a window, in order."""
        cache, blocks = self._cache, self._order.blocks_of(self._first + number)
        if self._at[0] > number:
            return
        place, rows = self._at[1], cache.rows(number, len(blocks)).tolist()
        while place < min(share, len(blocks)):
            block, row = int(blocks[place]), rows[place]
            count = int(cache.starts[block + 1] - cache.starts[block])
            self._read(block, {n: m[row : row + count] for n, m in cache.memory.items()})
            place += cache.ranks
            self._at = (number, place)
        if share >= len(blocks):
            self._at = (number + 1, cache.rank)
            self._cache.tell(DECODED, number + 1)

    def _reached(self, what: int, value: int) -> bool:
        """Whether all ranks are in this epoch and have come to `value`."""
        lines = self._cache.lines()
        behind = (lines[:, EPOCH] != self._epoch) | (lines[:, what] < value)
        gone = behind & (lines[:, EPOCH] == self._epoch) & (lines[:, STATE] != 0)
        if not gone.any():
            return not behind.any()
        rank = int(gone.argmax())
        if lines[rank, STATE] == FAILED:
            raise DataError(
                f"local rank {rank} of this node could not read its share of the data; it says why"
            )
        raise DataError(
            f"local rank {rank} of this node has left the epoch that the others are in: with a "
            f"cache of the node all ranks take the same steps"
        )

    def _wait(self, what: int, value: int) -> None:
        """Look at the counters until all ranks have come to `value`."""
        pause = SHORTEST
        while not self._reached(what, value):
            if self._closed.is_set():
                raise EpochClosed
            time.sleep(pause)
            pause = min(2 * pause, LONGEST)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
