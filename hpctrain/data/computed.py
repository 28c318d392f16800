"""Samples that are made when a shard is written: decoded images, sequences, volumes.

A packer needs to know how many samples there are, their shapes and their dtype before the first
byte is written; the values it takes shard by shard. So memory holds one shard's samples, and a rank
decodes only what it writes.

Layer: data. Knows nothing of files: it is given a function that reads a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.ragged import Ragged
from hpctrain.errors import DataError

__all__ = ["Computed", "ComputedRagged"]

Read = Callable[[int], NDArray[Any]]


@dataclass(frozen=True)
class Computed:
    """n samples of one shape. `shape` is (n, *sample shape); `read(i)` makes sample i."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The samples `rows`, in that order: (len(rows), *sample shape)."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for place, row in enumerate(rows):
            out[place] = self.read(int(row))
        return out


@dataclass(frozen=True)
class ComputedRagged:
    """n one-dimensional samples: lengths[i] values of sample i, made by `read(i)`.

    `lengths` is int64 of shape (n,).
    """

    lengths: NDArray[np.int64]
    dtype: np.dtype[Any]
    read: Read

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """The samples `rows`, in that order. Raises `DataError` if a length is not as promised."""
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.empty(int(offsets[-1]), self.dtype)
        for place, row in enumerate(rows):
            sample = self.read(int(row))
            if len(sample) != lengths[place]:
                raise DataError(
                    f"sample {row} has {len(sample)} values now and had {lengths[place]} when it "
                    f"was first read; do not change the files while they are packed"
                )
            values[offsets[place] : offsets[place + 1]] = sample
        return Ragged(values, offsets)
