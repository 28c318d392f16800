"""What codecs share whose payload has one place for every element: header, scales, numbers.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.compress.header import HEADER_BYTES, Header
from hpctrain.compress.interface import Extent, Payload, pack, unpack

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["FixedCodec"]

Array = Any  # of the device


class FixedCodec:
    """See `interface.Codec`; arrays of float32. A codec adds a name and its two kernels.

    Attributes:
        block: elements that share a scale; 0 for codecs without scales.
        values: type of the scales, or of the numbers.
    """

    name: str
    values = "float32"
    block = 0
    linear, fixed_size, unbiased = False, True, False

    def __init__(self, device: Device, extent: Extent) -> None:
        self._device, self.extent = device, extent
        self._data = device.empty(self.nbytes, np.uint8)

    def number_bytes(self) -> int:
        """Bytes of all numbers."""
        raise NotImplementedError

    def encode(self, x: Array, scales: Array, numbers: Array) -> None:
        """Write the scales, float32, and the numbers, uint8, of x."""
        raise NotImplementedError

    def decode(self, scales: Array, numbers: Array, total: Array, factor: float) -> None:
        """total <- total + factor * what they say."""
        raise NotImplementedError

    @property
    def contraction(self) -> float | None:
        """The least for any x."""
        return 1.0

    @property
    def blocks(self) -> int:
        """How many scales there are."""
        return -(-self.extent.n // self.block) if self.block else 0

    @property
    def nbytes(self) -> int:
        return HEADER_BYTES + 4 * self.blocks + self.number_bytes()

    def header(self, step: int) -> Header:
        """That of this step's payloads."""
        extent = self.extent
        return Header(
            self.name, self.values, step, extent.start, extent.stop, extent.n, self.nbytes,
            extent.layout,
        )  # fmt: skip

    def compress(self, x: Array, step: int) -> Payload:
        """See `Codec`."""
        self.encode(x, *self._parts(self._data))
        return pack(self._device, self.header(step), self._data)

    def received(self, data: Array, step: int, head: bytes | None = None) -> Payload:
        """See `Codec`."""
        return unpack(self._device, data, self.header(step), head)

    def add_into(self, payload: Payload, total: Array, factor: float = 1.0) -> None:
        """See `Codec`."""
        self.decode(*self._parts(payload.data), total, factor)

    def _parts(self, data: Array) -> tuple[Array, Array]:
        first = HEADER_BYTES + 4 * self.blocks
        return data[HEADER_BYTES:first].view(np.float32), data[first:]
