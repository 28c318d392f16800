"""Layouts and stores: where each tensor lies in one flat array.

A *layout* maps names to aligned ranges of a flat array; a *store* is such an array. Parameters,
gradients and each optimizer state are stores of one layout, so a bucket, a rank's slice, a tensor
in a checkpoint are all ranges, and nothing is packed or unpacked.

The order is that in which gradients become ready: the reverse of the forward pass. A tied
parameter is one entry, placed by its first use, which is the last to contribute.

Layer: nn. Knows nothing of ranks.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from hpctrain.errors import UsageError, nearest

__all__ = ["ALIGNMENT", "Entry", "Layout", "Store"]

ALIGNMENT = 64  # bytes
Array = Any


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place: elements `offset` up to `offset + size`. `decay`: weight decay applies."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    decay: bool


class Layout:
    """Names, shapes and 64-bit offsets of the tensors in a flat array of one dtype.

    `size` counts elements, padding included: every tensor starts at a multiple of 64 bytes, and
    `size` is such a multiple. Padding is zero in every store and stays so.
    """

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...], bool]], dtype: DTypeLike):
        """`tensors`: (name, shape, decay), in the order of the layout."""
        self.dtype = np.dtype(dtype)
        self.granule = ALIGNMENT // self.dtype.itemsize  # elements
        self.entries: list[Entry] = []
        self._by_name: dict[str, Entry] = {}
        offset = 0
        for name, shape, decay in tensors:
            if name in self._by_name:
                raise UsageError(f"two tensors are called {name!r}; give each its own name")
            entry = Entry(name, tuple(shape), offset, math.prod(shape), decay)
            self.entries.append(entry)
            self._by_name[name] = entry
            offset += -(-entry.size // self.granule) * self.granule
        self.size = offset
        self._offsets = [entry.offset for entry in self.entries]

    def with_dtype(self, dtype: DTypeLike) -> Layout:
        """The same tensors at the same elements of an array of another dtype."""
        other = copy.copy(self)
        other.dtype = np.dtype(dtype)
        return other

    def __len__(self) -> int:
        return len(self.entries)

    def locate(self, name: str) -> Entry:
        """The entry called `name`; a `UsageError` with the nearest name where there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            hint = nearest(name, self._by_name)
            raise UsageError(f"no tensor is called {name!r}{hint}") from None

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Entry, int, int]]:
        """The parts of tensors in the range [start, stop) of the flat array, in order.

        Yields (entry, first, last): elements first up to last of the flattened tensor.
        """
        index = max(bisect_right(self._offsets, start) - 1, 0)
        for entry in self.entries[index:]:
            if entry.offset >= stop:
                return
            first = max(start - entry.offset, 0)
            last = min(stop - entry.offset, entry.size)
            if first < last:
                yield entry, first, last

    def decay_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """The range [start, stop) cut where weight decay switches on or off, padding included."""
        begin, decay = start, None
        for entry, _, _ in self.pieces(start, stop):
            if decay is not None and entry.decay != decay:
                yield begin, entry.offset, decay
                begin = entry.offset
            decay = entry.decay
        if start < stop:
            yield begin, stop, bool(decay)


class Store:
    """A flat array laid out by a layout. The array is the caller's; views share its memory."""

    def __init__(self, layout: Layout, array: Array) -> None:
        if array.shape != (layout.size,) or array.dtype != layout.dtype:
            raise UsageError(
                f"a store of this layout needs {layout.size} elements of {layout.dtype}, "
                f"got shape {array.shape} of {array.dtype}"
            )
        self.layout = layout
        self.array = array

    def view(self, name: str) -> Array:
        """The tensor called `name`, in its shape."""
        entry = self.layout.locate(name)
        return self.array[entry.offset : entry.offset + entry.size].reshape(entry.shape)

    def views(self) -> dict[str, Array]:
        """All tensors by name."""
        return {entry.name: self.view(entry.name) for entry in self.layout.entries}
