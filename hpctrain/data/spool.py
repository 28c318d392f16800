"""Samples from any Python iterable to arrays that can be packed, in bounded memory.

A packer must know all samples before it writes the first (their number gives the shards, their
order is drawn at random), and an iterable can be read once. So its values are appended to flat
files, one per field, which are then mapped into memory.

Layer: data.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.ragged import Ragged
from hpctrain.data.tables import Categories
from hpctrain.errors import DataError

__all__ = ["Spool", "Spooled", "spool_samples"]


@dataclass(frozen=True)
class Spooled:
    """One field of all samples, in a file. `shapes`: int64 (samples, dims of a sample)."""

    name: str
    path: Path
    dtype: str
    shapes: NDArray[np.int64]
    words: tuple[str, ...]  # in the order of their first occurrence

    def fields(self) -> dict[str, Any]:
        """The field mapped; if samples differ in shape, with a field "<name>_shape" beside it."""
        empty = not self.path.stat().st_size
        values: NDArray[Any] = (
            np.empty(0, self.dtype) if empty else np.memmap(self.path, self.dtype, mode="r")
        )
        if self.words:
            return {self.name: self._categories(values)}
        count, ndim = self.shapes.shape
        if count and (self.shapes == self.shapes[0]).all() and 0 not in self.shapes[0]:
            return {self.name: values.reshape(count, *self.shapes[0])}
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum(self.shapes.prod(axis=1), out=offsets[1:])
        fields: dict[str, Any] = {self.name: Ragged(values, offsets)}
        if ndim > 1:
            fields[f"{self.name}_shape"] = self.shapes.astype(np.int32)
        return fields

    def _categories(self, codes: NDArray[Any]) -> Categories:
        return Categories(np.asarray(codes, np.int32), self.words).ordered()


class Spool:
    """One field: values appended to a file. `name` is for messages."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._file: BinaryIO = path.open("wb")
        self._shapes = array("q")  # of all samples, one after the other
        self._dtype: np.dtype[Any] | None = None
        self._ndim = 0
        self._words: dict[str, int] | None = None
        self._count = 0

    def add(self, value: Any) -> None:
        """Append a sample's value: a number, a word, bytes or an array."""
        if isinstance(value, bytes | bytearray):
            value = np.frombuffer(value, np.uint8)
        found = self._code(value) if isinstance(value, str) else np.asarray(value)
        if self._dtype is None:
            self._dtype, self._ndim = found.dtype, found.ndim
            if found.dtype.kind not in "biuf":
                raise self._unlike(f"dtype {found.dtype}, which cannot be packed")
        if found.ndim != self._ndim:
            raise self._unlike(f"{found.ndim} dims, the first sample has {self._ndim}")
        if not np.can_cast(found.dtype, self._dtype, "safe"):
            raise self._unlike(f"dtype {found.dtype}, the first sample has {self._dtype}")
        self._file.write(np.ascontiguousarray(found, self._dtype).tobytes())
        self._shapes.extend(found.shape)
        self._count += 1

    def close(self) -> None:
        self._file.close()

    def spooled(self) -> Spooled:
        """What any rank needs to map the closed file."""
        shapes = np.array(self._shapes, np.int64).reshape(self._count, self._ndim)
        dtype = (self._dtype or np.dtype(np.uint8)).str
        return Spooled(self._name, self._path, dtype, shapes, tuple(self._words or ()))

    def _code(self, word: str) -> NDArray[Any]:
        if self._words is None:
            if self._count:
                raise self._unlike("a word, the first sample has a number")
            self._words = {}
        return np.asarray(self._words.setdefault(word, len(self._words)), np.int32)

    def _unlike(self, what: str) -> DataError:
        return DataError(f"field {self._name!r} of sample {self._count} has {what}")


def spool_samples(samples: Iterable[Mapping[str, Any]], folder: Path) -> list[Spooled]:
    """Write all samples to files in `folder`, one per field.

    Every sample has the fields of the first one. Numbers keep the dtype that NumPy gives the first
    sample's; arrays of one dim may differ in length, and of several dims in shape. Raises
    `DataError` naming field and sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spools: dict[str, Spool] = {}
    try:
        for number, sample in enumerate(samples):
            if not number:
                spools = {name: Spool(folder / f"{i}", name) for i, name in enumerate(sample)}
            if sample.keys() != spools.keys():
                raise DataError(
                    f"sample {number} has the fields {', '.join(sample)}; "
                    f"the first one has {', '.join(spools)}"
                )
            for name, value in sample.items():
                spools[name].add(value)
    finally:
        for spool in spools.values():
            spool.close()
    if not spools:
        raise DataError("there is nothing to pack: the iterable gave no samples with fields")
    return [spool.spooled() for spool in spools.values()]
