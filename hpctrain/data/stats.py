"""Running count, mean, spread and range of a field, merged block by block.

    d = mean_b - mean_a,  n = n_a + n_b
    mean = mean_a + d n_b / n
    m2   = m2_a + m2_b + d^2 n_a n_b / n

Reference: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", COMPSTAT 1982.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import Column, Field, Stats
from hpctrain.data.ragged import Ragged

__all__ = ["FieldStatistics", "Running"]

RAGGED = 1 << 18  # values of a ragged field taken in at a time


class Running:
    """Statistics of all finite values that were added, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0
        self.min, self.max = np.inf, -np.inf

    def add(self, values: NDArray[Any]) -> None:
        """Take in an array of any shape and numeric dtype; NaN and infinities are left out."""
        x = values.astype(np.float64).ravel()
        x = x[np.isfinite(x)]
        if x.size:
            mean = float(x.mean())
            m2 = float(np.square(x - mean).sum())
            self._merge(x.size, mean, m2, float(x.min()), float(x.max()))

    def merge(self, other: Running) -> None:
        """Take in what another one has seen."""
        if other.count:
            self._merge(other.count, other.mean, other.m2, other.min, other.max)

    def _merge(self, count: int, mean: float, m2: float, low: float, high: float) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * count / total
        self.m2 += m2 + delta * delta * self.count * count / total
        self.count = total
        self.min, self.max = min(self.min, low), max(self.max, high)

    def result(self) -> Stats | None:
        """The statistics, or None if there was no finite value."""
        if not self.count:
            return None
        return Stats(self.count, self.mean, self.m2, self.min, self.max)


class FieldStatistics:
    """Running statistics of every field, and of every column of a table."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._whole = {name: Running() for name in fields}
        self._columns = {name: [Running() for _ in f.columns or ()] for name, f in fields.items()}

    def add(self, arrays: Mapping[str, NDArray[Any] | Ragged], rows: int) -> None:
        """Take in a shard, `rows` samples at a time: float64 copies stay small."""
        for name, array in arrays.items():
            values = array.values if isinstance(array, Ragged) else array
            step = RAGGED if isinstance(array, Ragged) else rows
            for first in range(0, len(values), step):
                part = values[first : first + step]
                self._whole[name].add(part)
                for column, running in enumerate(self._columns[name]):
                    running.add(part[:, column])

    def merge(self, other: FieldStatistics) -> None:
        """Take in another shard's statistics."""
        for name, running in self._whole.items():
            running.merge(other._whole[name])
            for mine, theirs in zip(self._columns[name], other._columns[name], strict=True):
                mine.merge(theirs)

    def into(self, fields: Mapping[str, Field]) -> dict[str, Field]:
        """The fields with their statistics."""
        return {
            name: msgspec.structs.replace(
                field, columns=self._named(name, field), stats=self._whole[name].result()
            )
            for name, field in fields.items()
        }

    def _named(self, name: str, field: Field) -> tuple[Column, ...] | None:
        if field.columns is None:
            return None
        pairs = zip(field.columns, self._columns[name], strict=True)
        return tuple(Column(column.name, running.result()) for column, running in pairs)
