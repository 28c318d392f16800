"""Samples of unequal length that are made one after the other, in bounded memory.

Their values are appended to a file without a name in $TMPDIR, which is mapped: the kernel keeps of
it what there is room for, and it is gone with its last use.

Layer: data. Knows nothing of what the samples are.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.data.ragged import Ragged
from hpctrain.errors import DataError

__all__ = ["collect"]

BUFFER = 1 << 20  # bytes


def collect(samples: Iterable[NDArray[Any]], dtype: DTypeLike) -> Ragged:
    """All samples, each one-dimensional. Raises `DataError` where the disk is full."""
    kind, lengths = np.dtype(dtype), array("q")
    try:
        with tempfile.TemporaryFile(buffering=BUFFER) as file:
            for sample in samples:
                file.write(np.ascontiguousarray(sample, kind).data)
                lengths.append(len(sample))
            file.flush()
            empty = not sum(lengths)
            values: Any = np.empty(0, kind) if empty else np.memmap(file, kind, "r")
    except OSError as error:
        raise DataError(
            f"cannot write values aside in {tempfile.gettempdir()}: {error.strerror or error}; set "
            f"TMPDIR to a disk with room for the sources, unpacked"
        ) from error
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.frombuffer(lengths, np.int64), out=offsets[1:])
    return Ragged(values, offsets)
