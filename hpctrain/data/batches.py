"""One rank's part of the global batches: which positions it has, and the batches themselves.

Small batches are gathered several together, and handed from the loader's thread to the loop in
that group: a hand-over costs tens of microseconds, as much as the copy of a small batch.

Layer: data. Knows nothing of files, orders or MPI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.microbatches import assign, batch_bounds, cut, steps
from hpctrain.data.prefetch import Prefetch

__all__ = ["Batch", "Batches", "Memory", "Part", "Share"]

Arrays = dict[str, NDArray[Any]]
Kinds = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
ALIGNED = 64


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch. The consumer owns the arrays.

    Those of batches that were gathered together are parts of the same memory.
    """

    step: int  # number of the step within the epoch
    position: int  # the global batch is [position, position + global_samples) of the epoch
    fields: dict[str, NDArray[Any]]  # name -> C-contiguous (n, *shape), n = samples of this rank
    samples: NDArray[np.int64]  # (n,): ids of the samples within the split
    groups: NDArray[np.int64]  # (microbatches + 1,): offsets of the microbatches within the n
    global_samples: int  # samples of all ranks together

    def __len__(self) -> int:
        return len(self.samples)

    def split(self, count: int) -> list[Batch]:
        """This part in up to `count` parts of whole, consecutive microbatches; nothing is copied.

        In number of microbatches they are at most one apart. None is empty but the only one of an
        empty batch.
        """
        microbatches = len(self.groups) - 1
        if min(count, microbatches) <= 1:
            return [self]
        parts = []
        for index in range(min(count, microbatches)):
            mine = assign(microbatches, min(count, microbatches), index)
            groups = self.groups[mine.start : mine.stop + 1]
            rows = slice(int(groups[0]), int(groups[-1]))
            fields = {name: array[rows] for name, array in self.fields.items()}
            parts.append(
                replace(self, fields=fields, samples=self.samples[rows], groups=groups - groups[0])
            )
        return parts


@dataclass(frozen=True)
class Part:
    """Where one rank's part of a global batch is, before it is read."""

    step: int
    position: int
    global_samples: int
    first: int  # its samples are those at positions first to last - 1 of the epoch
    last: int
    groups: NDArray[np.int64]


class Share:
    """The parts of one rank of `size` in batches of `batch_size`, cut into microbatches."""

    def __init__(self, batch_size: int, microbatch: int, rank: int, size: int) -> None:
        self.batch_size, self._microbatch = batch_size, microbatch
        self._rank, self._size = rank, size
        self._whole = self._groups(batch_size)

    @property
    def most(self) -> int:
        """Samples that any rank's part may have."""
        groups = steps(steps(self.batch_size, self._microbatch), self._size)
        return min(groups * self._microbatch, self.batch_size)

    def parts(self, samples: int, step: int, position: int) -> Iterator[Part]:
        """The parts of an epoch of `samples`, from `position` on, where step `step` begins."""
        left = samples - position
        for number in range(steps(max(left, 0), self.batch_size)):
            first, last = batch_bounds(number, self.batch_size, left)
            count = last - first
            groups = self._whole if count == self.batch_size else self._groups(count)
            begin = position + first
            ends = begin + int(groups[0]), begin + int(groups[-1])
            yield Part(step + number, begin, count, *ends, groups - groups[0])

    def _groups(self, count: int) -> NDArray[np.int64]:
        bounds = cut(count, self._microbatch)
        mine = assign(len(bounds) - 1, self._size, self._rank)
        return bounds[mine.start : mine.stop + 1]


class Memory:
    """Memory of one group of batches: one array per field, of up to `rows` samples.

    `allocate(nbytes)` gives uint8 (nbytes,), such as page-locked memory.
    """

    def __init__(self, allocate: Callable[[int], NDArray[Any]], fields: Kinds, rows: int) -> None:
        sizes = {
            name: rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for name, (dtype, shape) in fields.items()
        }
        padded = {name: -(-size // ALIGNED) * ALIGNED for name, size in sizes.items()}
        memory, begin = allocate(sum(padded.values())), 0
        self.arrays: Arrays = {}
        for name, (dtype, shape) in fields.items():
            flat = memory[begin : begin + sizes[name]].view(dtype)
            self.arrays[name] = flat.reshape(rows, *shape)
            begin += padded[name]

    def first(self, count: int) -> Arrays:
        """The arrays of `count` samples."""
        return {name: array[:count] for name, array in self.arrays.items()}


class Batches(Iterator[Batch]):
    """The batches of an epoch, prepared in groups by a thread that ends with this iterator.

    Use it in a `for` loop or as a context manager. `waited`: seconds that `next` waited.
    """

    def __init__(
        self,
        make: Callable[[SimpleQueue[Memory], Event], Iterator[list[Batch]]],
        depth: int,
        memory: Callable[[], Memory] | None,
        on_wait: Callable[[float], None],
    ) -> None:
        """`memory`: makes what a group is gathered into; called by this thread, not by the other.

        `make(memories, closed)` gives the groups; it may wait for other ranks, as long as `closed`
        is not set.
        """
        self._memory = memory
        self._memories: SimpleQueue[Memory] = SimpleQueue()
        self._closed = Event()
        for _ in range(depth + 1 if memory else 0):
            self._supply()
        self._ready: deque[Batch] = deque()
        self._groups = Prefetch(make(self._memories, self._closed), depth, on_wait, self._closed)

    @property
    def waited(self) -> float:
        return self._groups.waited

    def __next__(self) -> Batch:
        while not self._ready:
            self._ready.extend(next(self._groups))
            self._supply()
        return self._ready.popleft()

    def close(self) -> None:
        """End the thread and drop what it prepared. May be called more than once."""
        self._ready.clear()
        self._groups.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _supply(self) -> None:
        """Memory for one more group: each that was taken makes room for one."""
        if self._memory is not None:
            self._memories.put(self._memory())
