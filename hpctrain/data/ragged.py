"""Samples of unequal length: one flat array of values and the offsets that cut it.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ragged"]


@dataclass(frozen=True)
class Ragged:
    """n one-dimensional samples; sample i is values[offsets[i]:offsets[i + 1]].

    `values` has shape (offsets[-1],) and any dtype, `offsets` is int64 of shape (n + 1,).
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, samples: Sequence[Any], dtype: Any = None) -> Ragged:
        """Join one-dimensional samples; `dtype` is needed when there are none."""
        arrays = [np.asarray(sample, dtype) for sample in samples]
        if any(array.ndim != 1 for array in arrays):
            raise ValueError("a ragged field is made of one-dimensional samples")
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype)
        return cls(values, offsets)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of values of every sample, int64 (n,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> NDArray[Any]:
        return self.values[self.offsets[sample] : self.offsets[sample + 1]]

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """The samples `rows`, in that order."""
        return Ragged.of([self[row] for row in rows], self.values.dtype)
