"""Tensors in a file, in the safetensors format, which other tools read without hpctrain.

    8 bytes    length of the header, a little-endian whole number
    header     JSON: name -> {"dtype", "shape", "data_offsets": [start, stop]}, padded with spaces
               so that the data begins at a multiple of 8
    data       the tensors, C-contiguous, little-endian, without holes; offsets count from here

A file's header is a function of names, shapes and dtypes alone. Ranks that agree on those know
where each byte goes, and write the data side by side.

Layer: checkpoint. Knows nothing of ranks and of what the tensors mean.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import CheckpointError

__all__ = ["SUFFIX", "Tensor", "encode_header", "read_header", "read_tensors"]

SUFFIX = ".safetensors"
PARAMETERS = f"parameters{SUFFIX}"

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
CODES = {np.dtype(text): code for code, text in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor's kind, and its place: bytes `start` up to `stop` of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def kind(self) -> str:
        """Such as "float32 (10, 784)"."""
        return f"{self.dtype} {self.shape}"


def encode_header(
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype[Any]]],
) -> tuple[bytes, dict[str, Tensor]]:
    """The first bytes of a file that holds `tensors` in this order, and where each will lie.

    `tensors`: (name, shape, dtype), each name once.
    """
    header, offset = {}, 0
    for name, shape, dtype in tensors:
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, _places(header, 8 + len(text))


def read_header(path: Path) -> dict[str, Tensor]:
    """Where each tensor of the file lies, in the order of the data.

    Raises:
        CheckpointError: this is no safetensors file, or it is not complete.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path} ends within its header: cut off, or no {SUFFIX} file")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = _places(header, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error!r})") from error
    end = 8 + length
    for name, tensor in tensors.items():
        expected = math.prod(tensor.shape) * tensor.dtype.itemsize
        if tensor.start != end or tensor.stop != end + expected:
            raise CheckpointError(f"{path}: the data of {name!r} is not where it must be")
        end = tensor.stop
    if end != size:
        raise CheckpointError(f"{path} has {size:,} bytes where its header says {end:,}")
    return tensors


def _places(header: dict[str, Any], base: int) -> dict[str, Tensor]:
    found = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} is {entry['dtype']}, which NumPy does not have")
        dtype, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
        found.append((name, Tensor(dtype, tuple(entry["shape"]), base + start, base + stop)))
    return dict(sorted(found, key=lambda item: (item[1].start, item[1].stop)))


def read_tensors(path: Path | str) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file by name; of a checkpoint's folder, its parameters.

    The arrays are read-only and mapped: a tensor's bytes are read when they are used, and nothing
    is verified but the header. Needs no MPI.

    Raises:
        CheckpointError: the file is missing, damaged or incomplete.
    """
    path = Path(path)
    file = path / PARAMETERS if path.is_dir() else path
    try:
        tensors = read_header(file)
        data = np.asarray(np.memmap(file, np.uint8, "r"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return {
        name: data[tensor.start : tensor.stop].view(tensor.dtype).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
