"""Whole numbers from -127 to 127 and a scale for each 512 elements: 64 + 4 ceil(n / 512) + n bytes.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

from typing import Any

from hpctrain.compress.fixed import FixedCodec

__all__ = ["Int8"]

Array = Any  # of the device


class Int8(FixedCodec):
    """See `interface.Codec`."""

    name = "int8"
    block = 512

    @property
    def contraction(self) -> float:
        """A block's largest element arrives; the others lose at most 1 / 254 of it."""
        return 1 - (self.block - 1) / (self.block - 1 + 254.0**2)

    def number_bytes(self) -> int:
        """See `FixedCodec`."""
        return self.extent.n

    def encode(self, x: Array, scales: Array, numbers: Array) -> None:
        """See `FixedCodec`."""
        self._device.launch("int8_encode", x, scales, numbers, self.extent.n, work=self.blocks)

    def decode(self, scales: Array, numbers: Array, total: Array, factor: float) -> None:
        """See `FixedCodec`."""
        n = self.extent.n
        self._device.launch("int8_add", scales, numbers, total, factor, n, work=self.blocks)
