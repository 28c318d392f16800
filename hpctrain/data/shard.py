"""Shard files: what is in one, and reading its blocks with errors that say what is damaged.

    /                   attributes: format, format_version, split, shard_index, n_samples,
                        block_samples, schema_sha256, complete (written last)
    /fields/<name>      (n, *shape), one chunk per block, fletcher32, gzip if asked for
    /fields/<name>/data, /fields/<name>/offsets         a ragged field: values; int64 (n + 1,)
    /index/key          uint64 (n,): the sample's stable key
    /index/label        int32 (n,), where samples have a class

Block b of a shard is samples [b B, (b + 1) B); the last one is short. A block is the unit of
reading, checksums and shuffling. Types are plain little-endian numbers, so that HDF5 1.10 and
later read a shard in any language. The same content gives the same bytes (`shard_write`).

Files are opened without locks (parallel file systems often refuse them; a shard has one writer)
and without a chunk cache (blocks are read whole, once).

Layer: data. Knows nothing of orders, ranks or what the samples mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import VERSION, Field
from hpctrain.data.ragged import Ragged
from hpctrain.errors import DataError

__all__ = ["Header", "ShardReader", "check_filters", "storage_dtype"]

SHARD_FORMAT = b"hpctrain-shard"
_READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)


@dataclass(frozen=True)
class Header:
    """What a shard says about itself, and how its chunks are filtered."""

    split: str
    shard_index: int
    n_samples: int
    block_samples: int
    schema_sha256: str
    gzip: bool = False

    def attributes(self) -> dict[str, Any]:
        return {
            "format": np.bytes_(SHARD_FORMAT),
            "format_version": np.array(VERSION, "<i8"),
            "split": np.bytes_(self.split.encode()),
            "shard_index": np.int64(self.shard_index),
            "n_samples": np.int64(self.n_samples),
            "block_samples": np.int64(self.block_samples),
            "schema_sha256": np.bytes_(self.schema_sha256.encode()),
        }

    @property
    def blocks(self) -> int:
        return -(-self.n_samples // self.block_samples)

    def rows(self, block: int) -> tuple[int, int]:
        """First and last (exclusive) row of a block."""
        first = block * self.block_samples
        return first, min(first + self.block_samples, self.n_samples)


def storage_dtype(name: str) -> np.dtype[Any]:
    """The little-endian dtype called `name`."""
    return np.dtype(name).newbyteorder("<")


def check_filters(where: Path, features: Collection[str]) -> None:
    """Raise `DataError` if this HDF5 lacks a filter that the data set's chunks went through."""
    wanted = {"fletcher32": h5py.h5z.FILTER_FLETCHER32}
    if "gzip" in features:
        wanted["gzip"] = h5py.h5z.FILTER_DEFLATE
    lacking = [name for name, code in wanted.items() if not h5py.h5z.filter_avail(code)]
    if lacking:
        raise DataError(
            f"{where} was packed with the HDF5 filter {', '.join(lacking)}, which this HDF5 "
            f"({h5py.version.hdf5_version}) was built without: install h5py from PyPI"
        )


class ShardReader:
    """One open shard. All errors are `DataError`s that name file, field and block."""

    def __init__(
        self, path: Path, header: Header, fields: Mapping[str, Field], nbytes: int | None = None
    ) -> None:
        """Open `path` and check it against `header` and, if given, its size in the manifest."""
        self.path, self.header, self._fields = path, header, fields
        self._sets: dict[str, Any] = {}
        self._file: Any = None
        self._check_size(nbytes)
        try:
            self._file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)
            found = dict(self._file.attrs)
        except _READ_ERRORS as error:
            self.close()
            raise self._damaged("cannot be opened", error) from error
        try:
            self._check_header(found)
        except DataError:
            self.close()
            raise

    def close(self) -> None:
        self._sets.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read_block(self, name: str, block: int, out: NDArray[Any]) -> None:
        """Read a block of a fixed-shape field into `out`, of the block's shape and dtype."""
        first, last = self.header.rows(block)
        field = self._field(name)
        try:
            field.read_direct(out, np.s_[first:last])
        except _READ_ERRORS as error:
            raise self._damaged(self._place(name, block), error) from error

    def read_ragged(self, name: str, block: int) -> Ragged:
        """Read a block of a ragged field."""
        first, last = self.header.rows(block)
        try:
            offsets = self._offsets(name)[first : last + 1]
            values = self._data(f"fields/{name}/data")[int(offsets[0]) : int(offsets[-1])]
        except _READ_ERRORS as error:
            raise self._damaged(self._place(name, block), error) from error
        if len(values) != offsets[-1] - offsets[0] or (np.diff(offsets) < 0).any():
            raise self._damaged(self._place(name, block), "offsets outside the data")
        return Ragged(values, offsets - offsets[0])

    def read_values(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Values first to last - 1 of a ragged field, over the borders of its samples."""
        try:
            values: NDArray[Any] = self._data(f"fields/{name}/data")[first:last]
        except _READ_ERRORS as error:
            raise self._damaged(f"field {name!r}, values {first} to {last - 1}", error) from error
        if len(values) != last - first:
            raise self._damaged(f"field {name!r}", f"ends before value {last - 1}")
        return values

    def read_slab(self, name: str, row: int, first: int, last: int) -> NDArray[Any]:
        """Planes first to last - 1 along the first dim of one sample; the others are not read."""
        field = self._field(name)
        try:
            slab: NDArray[Any] = field[row, first:last]
        except _READ_ERRORS as error:
            block = row // self.header.block_samples
            raise self._damaged(self._place(name, block), error) from error
        return slab

    def read_index(self, name: str) -> NDArray[Any]:
        """Read the index dataset `name` whole: shape (n_samples,)."""
        try:
            index: NDArray[Any] = self._data(f"index/{name}")[...]
        except _READ_ERRORS as error:
            raise self._damaged(f"index {name!r} cannot be read", error) from error
        if index.shape != (self.header.n_samples,):
            raise self._damaged(f"index {name!r}", f"has shape {index.shape}")
        return index

    def blocks(self, name: str) -> Iterator[NDArray[Any] | Ragged]:
        """All blocks of a field, one after the other, each in memory of its own."""
        field = self._fields[name]
        for block in range(self.header.blocks):
            if field.shape == "ragged":
                yield self.read_ragged(name, block)
            else:
                first, last = self.header.rows(block)
                out = np.empty((last - first, *field.shape), field.dtype)
                self.read_block(name, block, out)
                yield out

    def _check_size(self, nbytes: int | None) -> None:
        try:
            found = self.path.stat().st_size
        except OSError as error:
            raise self._damaged("is missing", error.strerror) from error
        if nbytes is not None and found != nbytes:
            what = "is truncated" if found < nbytes else "is too long"
            raise self._damaged(what, f"{found} bytes, {nbytes} in the manifest")

    def _check_header(self, found: Mapping[str, Any]) -> None:
        version = found.get("format_version")
        for key, value in self.header.attributes().items():
            if key == "format_version":
                same = version is not None and len(version) == 2 and version[0] == value[0]
            else:
                same = key in found and found[key] == value
            if not same:
                raise self._damaged(
                    "is not the shard the manifest means",
                    f"{key} is {found.get(key)!r}, not {value!r}",
                )
        if found.get("complete") != 1:
            raise self._damaged("was not written to its end", "attribute complete is not 1")

    def _data(self, where: str) -> Any:
        if where not in self._sets:
            self._sets[where] = self._file[where]
        return self._sets[where]

    def _offsets(self, name: str) -> NDArray[np.int64]:
        where = f"fields/{name}/offsets"
        if not isinstance(self._sets.get(where), np.ndarray):
            self._sets[where] = self._file[where][...]
        offsets: NDArray[np.int64] = self._sets[where]
        return offsets

    def _field(self, name: str) -> Any:
        """The HDF5 dataset of a fixed-shape field, with the manifest's shape and dtype."""
        where = f"fields/{name}"
        if where in self._sets:
            return self._sets[where]
        try:
            field = self._file[where]
            found = (str(field.dtype), tuple(field.shape))
        except (*_READ_ERRORS, AttributeError) as error:
            raise self._damaged(f"has no readable field {name!r}", error) from error
        schema = self._fields[name]
        promised = (schema.dtype, (self.header.n_samples, *schema.shape))
        if found != promised:
            raise self._damaged(
                f"field {name!r} does not fit the manifest", f"{found}, not {promised}"
            )
        self._sets[where] = field
        return field

    def _place(self, name: str, block: int) -> str:
        first, last = self.header.rows(block)
        return f"field {name!r}, block {block} (rows {first} to {last - 1}) cannot be read"

    def _damaged(self, what: str, why: object) -> DataError:
        where = self.path.parent.parent
        return DataError(
            f"{self.path}: {what} ({why}); `hpctrain data verify {where}` checks every file: "
            f"restore the damaged ones, or pack the data again"
        )
