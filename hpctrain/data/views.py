"""What a loader's samples are: the rows of a split, windows of its text, or patches of volumes.

A view numbers samples, groups them into blocks that are read together, and reads a block:

    Rows      sample i is row i; a block is a block of the shards
    Windows   the documents of a shard are one stream of T values. Window k of length L holds the
              L + 1 values from o + k L on (inputs and, one further on, targets); the offset o in
              [0, L) is drawn anew for every epoch and shard. (T - L) // L windows: every value is
              seen once per epoch but for less than 2 L at the ends of a shard
    Patches   boxes at the corners of a grid, the last one flush with the border; a block is the
              boxes with one first coordinate in one volume, and only that slab is read

Layer: data. Knows nothing of orders or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.dataset import Dataset, ShardFiles
from hpctrain.data.manifest import Field
from hpctrain.data.order import stream_key
from hpctrain.data.shard import storage_dtype
from hpctrain.errors import DataError, UsageError

__all__ = ["Patches", "View", "Windows", "open_view"]

Kinds = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Windows:
    """Windows of `length` values (and one more, the last target) of a ragged field."""

    field: str
    length: int


@dataclass(frozen=True)
class Patches:
    """Boxes of `size` at every `stride` (default: the size) of volumes.

    `size` and `stride` are of the first dims of the fields read; further dims are kept whole.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...] | None = None


class View(Protocol):
    """Samples of a split. `starts`: int64 (blocks + 1,), the id of each block's first sample.

    `fields`: name -> (dtype, shape of a sample). `varies`: what a sample holds depends on the
    epoch. `name` says in a saved state what the samples were.
    """

    name: str
    varies: bool
    starts: NDArray[np.int64]
    fields: Kinds

    def read(self, files: ShardFiles, key: tuple[int, int], block: int, out: Any) -> None:
        """Fill out[field], (samples of the block, *shape). `key`: (seed, epoch)."""


def open_view(
    dataset: Dataset, split: str, names: Sequence[str] | None, what: Windows | Patches | None
) -> View:
    """The view of a split that `what` asks for; None: its rows. `names`: fields to read.

    Raises `DataError` for fields that are not fit for it, `UsageError` for sizes that are not.
    """
    if isinstance(what, Windows):
        if names is not None and list(names) != [what.field]:
            raise UsageError(f"windows of {what.field!r} hold that field alone, not {list(names)}")
        return _Windows(dataset, split, what)
    if isinstance(what, Patches):
        return _Patches(dataset, split, _served(dataset, names), what)
    return _Rows(dataset, split, _served(dataset, names))


def _served(dataset: Dataset, names: Sequence[str] | None) -> dict[str, Field]:
    """The fields to read: those asked for, or all of fixed shape."""
    if names is None:
        return {n: f for n, f in dataset.fields.items() if f.shape != "ragged"}
    fields = {name: dataset.field(name) for name in names}
    ragged = [name for name, field in fields.items() if field.shape == "ragged"]
    if ragged:
        raise DataError(
            f"field {ragged[0]!r} of {dataset.path} is ragged: batches hold fields of fixed shape "
            f"only; read windows of it (Windows), or all of it with Dataset.read"
        )
    return fields


class _Rows:
    """The samples as they were packed."""

    name, varies = "rows", False

    def __init__(self, dataset: Dataset, split: str, fields: dict[str, Field]) -> None:
        self._table = dataset.table(split)
        self.starts = self._table.starts
        self.fields: Kinds = {n: (storage_dtype(f.dtype), _fixed(f)) for n, f in fields.items()}

    def read(self, files: ShardFiles, key: tuple[int, int], block: int, out: Any) -> None:
        shard = files[int(self._table.shard[block])]
        for name, array in out.items():
            shard.read_block(name, int(self._table.block[block]), array)


class _Windows:
    """Windows of a stream of values."""

    varies = True

    def __init__(self, dataset: Dataset, split: str, what: Windows) -> None:
        field = dataset.field(what.field)
        if field.shape != "ragged":
            raise DataError(f"field {what.field!r} of {dataset.path} is not ragged: it has no text")
        if what.length < 1:
            raise UsageError(f"windows of length {what.length}: give 1 or more")
        self._field, self._length = what.field, what.length
        dtype = storage_dtype(field.dtype)
        self.name = f"windows {what.field} {what.length}"
        self.fields: Kinds = {what.field: (dtype, (what.length + 1,))}
        self._each = max(1, BLOCK_BYTES // ((what.length + 1) * dtype.itemsize))  # per block
        totals = [(shard.values or {}).get(what.field, 0) for shard in dataset.split(split).shards]
        places, lengths = [], []
        for shard, total in enumerate(totals):
            count = max(0, (total - what.length) // what.length)
            for first in range(0, count, self._each):
                places.append((shard, first))
                lengths.append(min(self._each, count - first))
        if not places:
            raise DataError(
                f"split {split!r} of {dataset.path} has no window of {what.length}: its shards "
                f"hold at most {max(totals, default=0)} values of {what.field!r}"
            )
        self._places = places
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def read(self, files: ShardFiles, key: tuple[int, int], block: int, out: Any) -> None:
        shard, first = self._places[block]
        array, length = out[self._field], self._length
        offset = stream_key(*key, "window offset", shard) % length + first * length
        values = files[shard].read_values(self._field, offset, offset + len(array) * length + 1)
        array[:, :length] = values[:-1].reshape(-1, length)
        array[:, length] = values[length::length]


class _Patches:
    """Boxes of volumes."""

    varies = False

    def __init__(
        self, dataset: Dataset, split: str, fields: dict[str, Field], what: Patches
    ) -> None:
        dims = len(what.size)
        stride = what.stride or what.size
        shapes = {_fixed(f)[:dims] for f in fields.values() if len(f.shape) >= dims}
        fields = {n: f for n, f in fields.items() if len(f.shape) >= dims}
        if len(shapes) != 1 or not dims:
            raise DataError(
                f"patches of {what.size} need fields with the same first {dims} dims; "
                f"{dataset.path} has {', '.join(f'{n} {f.shape}' for n, f in fields.items())}"
            )
        shape = shapes.pop()
        if len(stride) != dims or any(
            not 1 <= p <= n or s < 1 for p, n, s in zip(what.size, shape, stride, strict=True)
        ):
            raise UsageError(f"patches of {what.size} at {stride} do not fit volumes of {shape}")
        self.name = f"patches {what.size} {stride}"
        self._size = what.size
        self._corners = [_grid(n, p, s) for n, p, s in zip(shape, what.size, stride, strict=True)]
        self.fields: Kinds = {
            n: (storage_dtype(f.dtype), (*what.size, *_fixed(f)[dims:])) for n, f in fields.items()
        }
        self._shapes = {n: _fixed(f) for n, f in fields.items()}
        self._rows = [
            (index, row)
            for index, shard in enumerate(dataset.split(split).shards)
            for row in range(shard.n)
        ]
        self._each = math.prod(len(c) for c in self._corners[1:])
        blocks = len(self._rows) * len(self._corners[0])
        self.starts = np.arange(blocks + 1, dtype=np.int64) * self._each

    def read(self, files: ShardFiles, key: tuple[int, int], block: int, out: Any) -> None:
        volume, slab = divmod(block, len(self._corners[0]))
        index, row = self._rows[volume]
        first, last = self._corners[0][slab], self._corners[0][slab] + self._size[0]
        rest = np.stack(np.meshgrid(*self._corners[1:], indexing="ij"), -1).reshape(self._each, -1)
        for name, array in out.items():
            values = files[index].read_slab(name, row, first, last)
            for place, corner in enumerate(rest.tolist()):
                box = zip(corner, self._size[1:], strict=True)
                array[place] = values[(slice(None), *(slice(c, c + p) for c, p in box))]

    def corner(self, sample: int) -> tuple[int, ...]:
        """(volume, corner along each dim) of a sample."""
        block, rest = divmod(sample, self._each)
        volume, slab = divmod(block, len(self._corners[0]))
        inner = np.unravel_index(rest, [len(c) for c in self._corners[1:]])
        others = (c[int(i)] for c, i in zip(self._corners[1:], inner, strict=True))
        return volume, self._corners[0][slab], *others


def _grid(length: int, patch: int, stride: int) -> list[int]:
    """Corners along one dim: every `stride`, and one flush with the end."""
    corners = list(range(0, length - patch + 1, stride))
    return corners if corners[-1] == length - patch else [*corners, length - patch]


def _fixed(field: Field) -> tuple[int, ...]:
    return () if field.shape == "ragged" else field.shape
