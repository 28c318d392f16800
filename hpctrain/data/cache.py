"""A bounded cache of decoded blocks, from which rows are gathered.

Memory is one array per field of `slots` blocks, allocated once (and touched as it fills). With a
slot for every block of the split nothing is read twice, and a gather is one `numpy.take` per
field; with fewer, the least recently used blocks make room.

Layer: data. Is given a function that reads a block; knows nothing of files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BlockCache"]

Arrays = dict[str, NDArray[Any]]


class BlockCache:
    """Rows of samples by id. Safe across threads: one gather at a time."""

    def __init__(
        self,
        starts: NDArray[np.int64],
        fields: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        slots: int,
        read: Callable[[int, Arrays], None],
    ) -> None:
        """`starts`: int64 (blocks + 1,), the id of each block's first sample.

        `read(block, out)` fills out[field], of shape (samples in the block, *shape).
        """
        self.blocks_read = 0
        self.misses = 0  # samples that were asked for when their block was not here
        self._starts, self._read = starts, read
        self._rows = int(np.diff(starts).max(initial=1))  # rows per slot
        self._memory: Arrays = {
            name: np.empty((slots * self._rows, *shape), dtype)
            for name, (dtype, shape) in fields.items()
        }
        self._slot_of = np.full(len(starts) - 1, -1, np.int64)
        self._block_in = np.full(slots, -1, np.int64)
        self._used = np.zeros(slots, np.int64)
        self._clock = 0
        self._missing = len(starts) - 1
        self._lock = threading.Lock()

    def gather(self, ids: NDArray[np.int64], out: Arrays) -> None:
        """Copy the samples `ids`, in that order, into out[name]: C-contiguous, (n, *shape)."""
        blocks = np.searchsorted(self._starts, ids, side="right") - 1
        with self._lock:
            if not self._missing:
                self._copy(ids, blocks, out)
                return
            held = self._slot_of[blocks]
            misses = int(np.count_nonzero(held < 0))
            if not misses:
                self._clock += 1
                self._used[held] = self._clock
                self._copy(ids, blocks, out)
                return
            self.misses += misses
            wanted = np.unique(blocks)
            slots = len(self._block_in)
            for first in range(0, len(wanted), slots):
                some = wanted[first : first + slots]
                self._hold(some)
                if len(some) == len(wanted):
                    self._copy(ids, blocks, out)
                else:
                    where = np.flatnonzero((blocks >= some[0]) & (blocks <= some[-1]))
                    self._scatter(ids[where], blocks[where], where, out)

    def preload(self, blocks: NDArray[np.int64]) -> None:
        """Bring blocks in before they are asked for; at most as many as there are slots."""
        with self._lock:
            if (self._slot_of[blocks] < 0).any():
                self._hold(blocks)

    def _positions(self, ids: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        positions: NDArray[np.int64] = (
            self._slot_of[blocks] * self._rows + ids - self._starts[blocks]
        )
        return positions

    def _copy(self, ids: NDArray[np.int64], blocks: NDArray[np.int64], out: Arrays) -> None:
        positions = self._positions(ids, blocks)
        for name, memory in self._memory.items():
            # "clip": with "raise" NumPy copies through a buffer; positions are valid here.
            np.take(memory, positions, axis=0, out=out[name], mode="clip")

    def _scatter(
        self,
        ids: NDArray[np.int64],
        blocks: NDArray[np.int64],
        where: NDArray[np.int64],
        out: Arrays,
    ) -> None:
        positions = self._positions(ids, blocks)
        for name, memory in self._memory.items():
            out[name][where] = memory[positions]

    def _hold(self, wanted: NDArray[np.int64]) -> None:
        """Bring blocks in, at most as many as there are slots, none pushing out another."""
        self._clock += 1
        slots = self._slot_of[wanted]
        self._used[slots[slots >= 0]] = self._clock
        for block in wanted[slots < 0]:
            slot = int(self._used.argmin())
            self._drop(slot)
            first, count = slot * self._rows, int(self._starts[block + 1] - self._starts[block])
            views = {name: m[first : first + count] for name, m in self._memory.items()}
            self._read(int(block), views)
            self._slot_of[block], self._block_in[slot] = slot, block
            self._used[slot] = self._clock
            self._missing -= 1
            self.blocks_read += 1

    def _drop(self, slot: int) -> None:
        block = self._block_in[slot]
        if block >= 0:
            self._slot_of[block] = self._block_in[slot] = -1
            self._missing += 1
        self._used[slot] = 0
