"""Sparse vectors on the host: ascending indices and values; and payloads of parts of a range.

A payload is one of `topk`, header included: `Format` makes and reads, in NumPy, those of a part of
a range with any number of entries, for reducers that cut a selection up. An entry takes 2 bytes
beside its value wherever it lies, and an index may have any size.

Layer: compress. Knows nothing of gradients and messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.compress.header import HEADER_BYTES, Header
from hpctrain.compress.interface import Extent, Payload
from hpctrain.compress.topk import BLOCK, topk_bytes
from hpctrain.device.dtypes import dtype_named
from hpctrain.errors import HpctrainError, UsageError

__all__ = ["Entries", "Format", "concatenated", "find"]

Bytes = NDArray[np.uint8]


class Entries(NamedTuple):
    """k numbers of a vector of zeros.

    indices: int64, shape (k,), ascending, each once. values: float32, shape (k,).
    """

    indices: NDArray[np.int64]
    values: NDArray[np.float32]

    @property
    def size(self) -> int:
        return int(self.indices.size)

    def between(self, start: int, stop: int) -> Entries:
        """Those with indices from `start` up to `stop`: views."""
        first, last = np.searchsorted(self.indices, [start, stop])
        return Entries(self.indices[first:last], self.values[first:last])

    def where(self, kept: NDArray[np.bool_]) -> Entries:
        """Those for which `kept` is true."""
        return Entries(self.indices[kept], self.values[kept])


@dataclass(frozen=True)
class Format:
    """Payloads of parts of one range.

    Attributes:
        extent: the range; indices of entries are counted from its start.
        values: type of values under way: "float32", "bfloat16" or "float16".
    """

    extent: Extent
    values: str

    def nbytes(self, elements: int, k: int) -> int:
        """Bytes of `k` entries of a part of so many elements."""
        return topk_bytes(elements, k, dtype_named(self.values).itemsize)

    def pack(self, entries: Entries, start: int, stop: int, step: int) -> Payload:
        """Entries of the part [start, stop) of the range, values rounded.

        Raises:
            UsageError: entries outside it.
        """
        local = entries.indices - start
        if local.size and not (local[0] >= 0 and local[-1] < stop - start):
            raise UsageError(
                f"entries from {entries.indices[0]} to {entries.indices[-1]} do not lie in the "
                f"part from {start} up to {stop}"
            )
        header = self._header(start, stop, entries.size, step)
        counts = np.bincount(local // BLOCK, minlength=-(-(stop - start) // BLOCK))
        parts = (
            np.frombuffer(header.encode(), np.uint8),
            counts.astype(np.uint32),
            entries.values.astype(dtype_named(self.values)),
            (local % BLOCK).astype(np.uint16),
        )
        return Payload(header, np.concatenate([part.view(np.uint8) for part in parts]))

    def unpack(self, data: Bytes, start: int, stop: int, step: int) -> Entries:
        """What `pack` was given, values widened to float32; copies.

        Raises:
            HpctrainError: another payload, of whatever kind.
        """
        header = Header.decode(data[:HEADER_BYTES].tobytes())
        header.require(self._header(start, stop, header.k, step))
        first = HEADER_BYTES + 4 * -(-(stop - start) // BLOCK)
        counts = data[HEADER_BYTES:first].view(np.uint32).astype(np.int64)
        if data.nbytes != header.nbytes or int(counts.sum()) != header.k:
            raise HpctrainError(
                f"a payload of {data.nbytes} bytes, with {counts.sum()} entries in its blocks, "
                f"says that it has {header.nbytes} bytes and {header.k} entries: it is damaged"
            )
        second = data.nbytes - 2 * header.k
        values = data[first:second].view(dtype_named(self.values)).astype(np.float32)
        offsets = data[second:].view(np.uint16).astype(np.int64)
        bases = np.repeat(np.arange(counts.size, dtype=np.int64) * BLOCK + start, counts)
        return Entries(bases + offsets, values)

    def _header(self, start: int, stop: int, k: int, step: int) -> Header:
        base, nbytes = self.extent.start, self.nbytes(stop - start, k)
        return Header(
            "topk", self.values, step, base + start, base + stop, k, nbytes, self.extent.layout
        )


def find(wanted: NDArray[np.int64], among: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each of `wanted` whether it is one of `among`; both ascending."""
    if not among.size:
        return np.zeros(wanted.shape, np.bool_)
    places = np.minimum(np.searchsorted(among, wanted), among.size - 1)
    found: NDArray[np.bool_] = among[places] == wanted
    return found


def concatenated(parts: Sequence[Entries]) -> Entries:
    """Parts whose spans follow on one another, as one."""
    return Entries(
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.values for part in parts]),
    )
