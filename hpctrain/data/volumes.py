"""NIfTI-1 volumes (.nii, .nii.gz): header and values, without another library.

The header is 348 bytes: sizes at 40, type at 70, offset of the values at 108, slope and intercept
at 112. Values are stored with the first dim running fastest; a field holds them as (x, y, z), in
the type of the file, scaled to float32 only if the header scales them. Each file is read when its
shard is written; of a file in slabs, only the slab (of a .gz what is before it is unpacked, too).

Layer: data. Knows nothing of shards.

Reference: https://nifti.nimh.nih.gov/nifti-1
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.computed import Computed, ComputedRagged
from hpctrain.errors import DataError, UsageError

__all__ = ["Volume", "read_header", "read_values", "read_volumes"]

HEADER = 348
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4",
         1024: "i8", 1280: "u8"}  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """What a header says. `dtype` is the file's; `scaled`: values are slope x + intercept."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float

    @property
    def scaled(self) -> bool:
        return self.slope not in (0.0, 1.0) or self.intercept != 0.0

    @property
    def kept(self) -> np.dtype[Any]:
        """The dtype of the packed values."""
        return np.dtype(np.float32) if self.scaled else self.dtype.newbyteorder("=")


def read_header(path: Path) -> Volume:
    """Read and check the header of a NIfTI-1 file. Raises `DataError`."""
    raw = _read(path, 0, HEADER)
    for order in "<>":
        if struct.unpack_from(f"{order}i", raw)[0] == HEADER:
            break
    else:
        raise DataError(f"{path} is no NIfTI-1 file: its header is not {HEADER} bytes")
    if raw[344:348] not in (b"n+1\0", b"ni1\0"):
        raise DataError(f"{path} is no NIfTI-1 file: its magic is {raw[344:348]!r}")
    if raw[344:346] == b"ni":
        raise DataError(f"{path} keeps its values in a file of its own (.img): convert it to .nii")
    sizes = struct.unpack_from(f"{order}8h", raw, 40)
    kind = struct.unpack_from(f"{order}h", raw, 70)[0]
    offset, slope, intercept = struct.unpack_from(f"{order}3f", raw, 108)
    shape = sizes[1 : 1 + sizes[0]] if 1 <= sizes[0] <= 7 else ()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not shape or min(shape) < 1:
        raise DataError(f"{path} is damaged: its header has the dims {sizes}")
    if kind not in TYPES:
        raise DataError(f"{path} holds values of NIfTI type {kind}; known are {sorted(TYPES)}")
    slope, intercept = (x if math.isfinite(x) else 0.0 for x in (slope, intercept))
    return Volume(shape, np.dtype(order + TYPES[kind]), int(offset), slope, intercept)


def read_values(path: Path, volume: Volume, first: int = 0, last: int = -1) -> NDArray[Any]:
    """Planes first to last - 1 along the last dim (default: all), as `volume.kept`."""
    *plane, depth = volume.shape
    planes = (depth if last < 0 else last) - first
    nbytes = math.prod(plane) * volume.dtype.itemsize
    raw = _read(path, volume.offset + first * nbytes, planes * nbytes)
    values = np.frombuffer(raw, volume.dtype).reshape((*plane, planes), order="F")
    if volume.scaled:
        return (values * np.float64(volume.slope) + volume.intercept).astype(np.float32)
    return values.astype(volume.kept)


def read_volumes(
    paths: Sequence[Path], name: str = "volume", slab: int | None = None
) -> dict[str, Any]:
    """A field of volumes, (n, x, y, z); of unlike shapes: ragged, and "<name>_shape" beside it.

    With `slab` every volume gives z // slab samples of (x, y, slab), in the order of their planes;
    what is left over is left out. Raises `UsageError` where a volume has fewer planes.
    """
    volumes = [read_header(path) for path in paths]
    kept = {volume.kept for volume in volumes}
    dtype = kept.pop() if len(kept) == 1 else np.dtype(np.float32)
    parts = [part for i, v in enumerate(volumes) for part in _slabs(paths[i], i, v.shape, slab)]

    def read(sample: int) -> NDArray[Any]:
        i, first, last = parts[sample]
        return read_values(paths[i], volumes[i], first, last).astype(dtype, copy=False)

    shapes = [(*volumes[i].shape[:-1], last - first) for i, first, last in parts]
    if len(set(shapes)) == 1:
        return {name: Computed((len(parts), *shapes[0]), dtype, read)}
    if len({len(shape) for shape in shapes}) != 1:
        raise DataError(f"the volumes differ in their number of dims: {sorted(set(shapes))[:4]}")
    lengths = np.array([math.prod(shape) for shape in shapes], np.int64)
    ragged = ComputedRagged(lengths, dtype, lambda i: read(i).reshape(-1))
    return {name: ragged, f"{name}_shape": np.array(shapes, np.int32)}


def _slabs(
    path: Path, number: int, shape: tuple[int, ...], slab: int | None
) -> list[tuple[int, int, int]]:
    """(number, first, last plane) of each sample of a volume."""
    depth = shape[-1]
    if slab is not None and not 1 <= slab <= depth:
        raise UsageError(f"{path} has {depth} planes: it cannot be cut into slabs of {slab}")
    planes = slab or depth
    return [(number, first, first + planes) for first in range(0, depth - planes + 1, planes)]


def _read(path: Path, offset: int, nbytes: int) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            file.seek(offset)
            raw = file.read(nbytes)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(raw) != nbytes:
        raise DataError(f"{path} is truncated: {len(raw)} of {nbytes} bytes at {offset}")
    return raw
