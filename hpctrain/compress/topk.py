"""Top-k: the k elements with the largest absolute values, as a payload of fixed size.

    64 bytes            header
    4 ceil(n / 65536)   for each block of 65,536 elements, how many entries lie in it
    k s                 values, ascending by index, of s bytes each
    2 k                 offsets of the entries in their blocks

What rounding takes from a value stays in the memory: nothing is lost with 16 bits either.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.compress.header import HEADER_BYTES, Header
from hpctrain.compress.interface import Extent, Payload, pack, unpack, values_of
from hpctrain.compress.select import Selector
from hpctrain.device.dtypes import wide_dtype
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["BLOCK", "TopK", "TopKReader", "topk_bytes"]

Array = Any  # of the device
BLOCK = 1 << 16  # elements


def topk_bytes(n: int, k: int, value_bytes: int) -> int:
    """Bytes of a payload of `k` of `n` elements."""
    return HEADER_BYTES + 4 * -(-n // BLOCK) + k * (value_bytes + 2)


class TopKReader:
    """Adds up payloads of one range with any number of entries; keeps n / 8192 bytes.

    Attributes:
        values: type of the values: "float32", "bfloat16", "float16" or "float64".
    """

    def __init__(self, device: Device, extent: Extent, values: str) -> None:
        self._device, self.extent = device, extent
        self._dtype = values_of(device, values)
        self.values = values
        self._blocks = -(-extent.n // BLOCK)
        self._starts = device.empty(self._blocks + 1, np.int64)

    def add_into(self, payload: Payload, total: Array, factor: float = 1.0) -> None:
        """See `Codec`."""
        entries, offsets = self._located(payload)
        self._device.launch(
            "topk_add", entries, offsets, self._starts, total, factor, payload.header.k,
            self._blocks, self.extent.n, work=payload.header.k,
        )  # fmt: skip

    def mask(self, payload: Payload, left: Array, u: Array) -> None:
        """See `SparseCodec`."""
        entries, offsets = self._located(payload)
        self._device.launch(
            "topk_mask", entries, offsets, self._starts, left, u, payload.header.k, self._blocks,
            self.extent.n, work=payload.header.k,
        )  # fmt: skip

    def _located(self, payload: Payload) -> tuple[Array, Array]:
        """A payload's values and offsets, once `_starts` tells the blocks they lie in."""
        counts, entries, offsets = self._parts(payload.data, payload.header.k)
        self._device.launch("topk_starts", counts, self._starts, self._blocks, work=1)
        return entries, offsets

    def _parts(self, data: Array, k: int) -> tuple[Array, Array, Array]:
        """Counts, values and offsets as arrays in a payload's bytes."""
        first = HEADER_BYTES + 4 * self._blocks
        second = first + k * self._dtype.itemsize
        return (
            data[HEADER_BYTES:first].view(np.uint32),
            data[first:second].view(self._dtype),
            data[second : second + 2 * k].view(np.uint16),
        )


class TopK(TopKReader):
    """See `interface.Codec`; arrays of float32, or of float64 with values of float64."""

    name = "topk"
    linear, fixed_size, unbiased = False, True, False

    def __init__(
        self,
        device: Device,
        extent: Extent,
        density: float,
        values: str = "float32",
        guess: str = "sample",
    ) -> None:
        """Keeps ceil(density n) elements.

        Args:
            values: type of values under way: "float32", "bfloat16", "float16" or "float64".
            guess: see `Selector`.

        Raises:
            UsageError: a density outside (0, 1].
        """
        super().__init__(device, extent, values)
        self._selector = Selector(device, extent.n, wide_dtype(self._dtype), guess)
        self._data = device.empty(0, np.uint8)
        self.density = density

    @property
    def density(self) -> float:
        """Fraction that is kept; may be set between steps, alike on all ranks."""
        return self._density

    @density.setter
    def density(self, density: float) -> None:
        if not 0 < density <= 1:
            raise UsageError(f"density {density}: it is a fraction of the elements, over 0 up to 1")
        self._density, self.k = density, self.kept(density)
        if self._data.shape[0] != self.nbytes:
            self._data = self._device.empty(self.nbytes, np.uint8)

    def kept(self, density: float) -> int:
        """Elements that are kept at a density."""
        return math.ceil(density * self.extent.n)

    @property
    def nbytes(self) -> int:
        return topk_bytes(self.extent.n, self.k, self._dtype.itemsize)

    @property
    def contraction(self) -> float:
        return self.k / self.extent.n if self.extent.n else 1.0

    def header(self, step: int) -> Header:
        """That of this step's payloads."""
        extent = self.extent
        return Header(
            self.name, self.values, step, extent.start, extent.stop, self.k, self.nbytes,
            extent.layout,
        )  # fmt: skip

    def compress(self, x: Array, step: int) -> Payload:
        """See `Codec`."""
        values, indices = self._selector.select(x, self.k)
        counts, entries, offsets = self._parts(self._data, self.k)
        launch = self._device.launch
        launch("topk_encode", values, indices, entries, offsets, self.k, work=self.k)
        launch("topk_counts", indices, counts, self.k, self._blocks, work=self._blocks)
        return pack(self._device, self.header(step), self._data)

    def received(self, data: Array, step: int, head: bytes | None = None) -> Payload:
        """See `Codec`."""
        return unpack(self._device, data, self.header(step), head)
