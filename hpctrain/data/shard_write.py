"""Writing a shard file. What is in one is said in `shard`.

Layer: data. Knows nothing of orders, ranks or what the samples mean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.ragged import Ragged
from hpctrain.data.shard import Header

__all__ = ["chunk_shape", "write_shard"]

SLAB = 1 << 20  # bytes: a sample larger than this is cut into several chunks
RAGGED_CHUNK = 1 << 18  # values
GROWTH = 4 << 20  # bytes that a shard in memory grows by


def chunk_shape(
    n_samples: int, block_samples: int, shape: tuple[int, ...], itemsize: int
) -> tuple[int, ...]:
    """One chunk per block; a single sample above 1 MiB is cut along its leading dims."""
    chunk = list(shape)
    if block_samples == 1:
        for dim in range(len(chunk)):
            rest = math.prod(chunk[dim + 1 :]) * itemsize
            chunk[dim] = max(1, min(chunk[dim], SLAB // max(rest, 1)))
            if chunk[dim] > 1:
                break
    return (min(block_samples, n_samples), *chunk)


def write_shard(
    path: Path,
    header: Header,
    fields: Mapping[str, NDArray[Any] | Ragged],
    index: Mapping[str, NDArray[Any]],
) -> None:
    """Write one shard and sync it to disk. Arrays have `header.n_samples` rows.

    The file is made in memory and written by one call: HDF5 crashes the process (2.0, on closing)
    or leaves a file open when a disk is full, a plain write raises `OSError`.
    """
    filters: dict[str, Any] = {"fletcher32": True}
    if header.gzip:
        filters |= {"compression": "gzip", "compression_opts": 1}
    with h5py.File(path, "w", driver="core", backing_store=False, block_size=GROWTH) as file:
        for key, value in header.attributes().items():
            file.attrs[key] = value
        for name, array in fields.items():
            _write_field(file, f"fields/{name}", array, header, filters)
        for name, array in index.items():
            _write_array(file, f"index/{name}", array, array.shape, {"fletcher32": True})
        file.attrs["complete"] = np.int64(1)
        file.flush()
        image = file.id.get_file_image()
    with path.open("wb") as written:
        written.write(image)
        written.flush()
        os.fsync(written.fileno())


def _write_field(
    file: h5py.File,
    where: str,
    array: NDArray[Any] | Ragged,
    header: Header,
    filters: dict[str, Any],
) -> None:
    if isinstance(array, Ragged):
        flat = (min(RAGGED_CHUNK, len(array.values)),)
        _write_array(file, f"{where}/data", array.values, flat, filters)
        _write_array(file, f"{where}/offsets", array.offsets, array.offsets.shape, filters)
        return
    chunk = chunk_shape(len(array), header.block_samples, array.shape[1:], array.dtype.itemsize)
    _write_array(file, where, array, chunk, filters)


def _write_array(
    file: h5py.File, where: str, array: NDArray[Any], chunk: tuple[int, ...], filters: Any
) -> None:
    dtype = array.dtype.newbyteorder("<")
    if array.size:
        file.create_dataset(where, data=array, dtype=dtype, chunks=chunk, **filters)
    else:  # HDF5 cannot cut nothing into chunks
        file.create_dataset(where, data=array, dtype=dtype)
