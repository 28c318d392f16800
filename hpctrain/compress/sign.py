"""One bit for each element, its sign, and the mean absolute value of each 2048 elements.

64 + 4 ceil(n / 2048) + ceil(n / 8) bytes. Zero has the sign +.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

from typing import Any

from hpctrain.compress.fixed import FixedCodec

__all__ = ["Sign"]

Array = Any  # of the device


class Sign(FixedCodec):
    """See `interface.Codec`."""

    name = "sign"
    block = 2048

    @property
    def contraction(self) -> float:
        """(sum |x|)^2 / (n sum x^2) of a block: 1 / n where but one element is not 0."""
        return 1 / max(min(self.block, self.extent.n), 1)

    def number_bytes(self) -> int:
        """See `FixedCodec`."""
        return -(-self.extent.n // 8)

    def encode(self, x: Array, scales: Array, numbers: Array) -> None:
        """See `FixedCodec`."""
        self._device.launch("sign_encode", x, scales, numbers, self.extent.n, work=self.blocks)

    def decode(self, scales: Array, numbers: Array, total: Array, factor: float) -> None:
        """See `FixedCodec`."""
        n = self.extent.n
        self._device.launch("sign_add", scales, numbers, total, factor, n, work=self.blocks)
