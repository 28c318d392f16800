"""Numbers of 16 bits instead of float32: 64 bytes, then 2 for each element.

Too large for float16 becomes its largest number, 65504; the rest stays in the residual.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpctrain.compress.fixed import FixedCodec
from hpctrain.compress.interface import Extent, values_of
from hpctrain.errors import UsageError, nearest

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["Cast"]

Array = Any  # of the device
NAMES = {"bfloat16": "bf16", "float16": "fp16"}


class Cast(FixedCodec):
    """See `interface.Codec`."""

    def __init__(self, device: Device, extent: Extent, values: str = "bfloat16") -> None:
        """`values`: "bfloat16" or "float16"; `UsageError` for another."""
        if values not in NAMES:
            raise UsageError(f"no cast to {values!r}{nearest(values, NAMES)}: bfloat16 or float16")
        self.name, self.values = NAMES[values], values
        self._dtype = values_of(device, values)
        super().__init__(device, extent)

    @property
    def contraction(self) -> float:
        """bfloat16 rounds by 2^-8 of a number at most; float16 loses numbers below 2^-25."""
        return 1 - 2.0**-16 if self.values == "bfloat16" else 2.0**-24

    def number_bytes(self) -> int:
        """See `FixedCodec`."""
        return 2 * self.extent.n

    def encode(self, x: Array, scales: Array, numbers: Array) -> None:
        """See `FixedCodec`."""
        n = self.extent.n
        self._device.launch("cast_encode", x, numbers.view(self._dtype), n, work=n)

    def decode(self, scales: Array, numbers: Array, total: Array, factor: float) -> None:
        """See `FixedCodec`."""
        n = self.extent.n
        self._device.launch("cast_add", numbers.view(self._dtype), total, factor, n, work=n)
