"""Files that can be packed: .npy, .npz, idx-ubyte (plain or gzip), CSV and TSV.

Each gives named arrays with one row per sample. Plain .npy and idx files are mapped, not read, so
they may be larger than memory.

Layer: data. Knows nothing of shards.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import Source
from hpctrain.data.tables import read_table
from hpctrain.errors import DataError

__all__ = ["SourceData", "describe", "read_source"]

IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
KNOWN = ".npy, .npz, .csv, .tsv (also .csv.gz, .tsv.gz), idx-ubyte files (also .gz)"


@dataclass(frozen=True)
class SourceData:
    """The fields of a source, and what is known of them, by field."""

    fields: dict[str, Any]
    columns: dict[str, list[str]] = field(default_factory=dict)  # of a table
    vocabularies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # to be kept beside the shards


def read_source(
    path: Path,
    name: str | None = None,
    apart: Collection[str] = (),
    drop: Collection[str] = (),
    require: Collection[str] = (),
) -> SourceData:
    """Read the fields of a file, whose kind follows from its name and first bytes.

    `name` names the field of a file that holds one array (default: "features" for the numbers of
    a table, else the file's stem); for `apart`, `drop` and `require`, columns of tables, see
    `read_table`. Raises `DataError`.
    """
    suffixes = [s for s in path.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    try:
        if suffix == ".npz":
            return _npz(path, name)
        if suffix == ".npy":
            return SourceData({name or path.stem: _npy(path)})
        if suffix in (".csv", ".tsv"):
            name = name or "features"
            fields, columns = read_table(path, name, apart, drop, require)
            return SourceData(fields, {name: columns} if columns else {})
        return SourceData({name or path.name.split(".")[0]: _idx(path)})
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def describe(path: Path) -> Source:
    """Name (without its folder), size and sha256 of a file; of a folder, over all its files."""
    if path.is_dir():
        parts = [describe(file) for file in sorted(path.rglob("*")) if file.is_file()]
        lines = "\n".join(f"{part.name} {part.sha256}" for part in parts)
        every = hashlib.sha256(lines.encode()).hexdigest()
        return Source(path.name, sum(part.bytes for part in parts), every)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(path.name, path.stat().st_size, digest)


def _npy(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _npz(path: Path, name: str | None) -> SourceData:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    if name is not None:
        if len(arrays) != 1:
            raise DataError(
                f"{path} holds {len(arrays)} arrays, so {name!r} does not say which to take: give "
                f"the file without a field name and choose with --input and --label"
            )
        arrays = {name: next(iter(arrays.values()))}
    return SourceData(dict(arrays))


def _idx(path: Path) -> NDArray[Any]:
    """An idx file: two zero bytes, type, number of dims, big-endian sizes, then the values."""
    packed = path.suffix == ".gz"
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not magic[3]:
            raise DataError(f"{path} is of no known kind; known are {KNOWN}")
        sizes = file.read(4 * magic[3])
        shape = struct.unpack(f">{magic[3]}I", sizes) if len(sizes) == 4 * magic[3] else (-1,)
        dtype = np.dtype(IDX_TYPES[magic[2]])
        content = file.read() if packed else b""
        begin = 4 + 4 * magic[3]
    nbytes = math.prod(shape) * dtype.itemsize
    found = len(content) if packed else path.stat().st_size - begin
    if found != nbytes:
        raise DataError(f"{path} is damaged: its header promises {nbytes} bytes, it has {found}")
    if packed:
        return np.frombuffer(content, dtype).reshape(shape)
    return np.memmap(path, dtype, "r", begin, shape)
