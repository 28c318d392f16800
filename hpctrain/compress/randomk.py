"""Random-k: the same k elements on all ranks, drawn from the step; only values travel.

The elements are cut into k equal parts and one is drawn of each, by a counter of (seed, step,
start): all ranks draw the same without a message, and payloads may be added up as they are.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.compress.header import HEADER_BYTES, Header
from hpctrain.compress.interface import Extent, Payload, pack, unpack
from hpctrain.compress.topk import BLOCK
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["RandomK"]

Array = Any  # of the device


class RandomK:
    """See `interface.Codec`; float32.

    `scaled` makes it unbiased, by a factor of n / k, and then no contraction.
    """

    name = "randomk"
    linear, fixed_size = True, True

    def __init__(
        self, device: Device, extent: Extent, density: float, seed: int, scaled: bool = False
    ) -> None:
        """Raises `UsageError` for a density outside (0, 1]."""
        if not 0 < density <= 1:
            raise UsageError(f"density {density}: it is a fraction of the elements, over 0 up to 1")
        self._device, self.extent, self._seed = device, extent, seed
        self.k = math.ceil(density * extent.n)
        self.unbiased = scaled
        self._blocks = -(-extent.n // BLOCK)
        self._step = -1
        self._data = device.empty(self.nbytes, np.uint8)
        self._starts = device.empty(self._blocks + 1, np.int64)
        self._counts = device.empty(self._blocks, np.uint32)
        self._offsets = device.empty(self.k, np.uint16)
        self._numbers = device.zeros(self.k, np.float32)
        self._unused = device.empty(self.k, np.float32)
        self._indices: Array = None

    @property
    def contraction(self) -> float | None:
        if self.unbiased and self.k < self.extent.n:
            return None
        return self.k / self.extent.n if self.extent.n else 1.0

    @property
    def nbytes(self) -> int:
        return HEADER_BYTES + 4 * self.k

    def indices(self, step: int) -> NDArray[np.int64]:
        """The elements of a step: int64, shape (k,), ascending."""
        counter = np.random.Philox(key=[self._seed, self.extent.start], counter=step << 128)
        ends = np.arange(self.k + 1, dtype=np.int64) * self.extent.n // max(self.k, 1)
        drawn = np.random.Generator(counter).random(self.k)
        return ends[:-1] + (drawn * np.diff(ends)).astype(np.int64)

    def header(self, step: int) -> Header:
        """That of this step's payloads."""
        extent = self.extent
        return Header(
            self.name, "float32", step, extent.start, extent.stop, self.k, self.nbytes,
            extent.layout,
        )  # fmt: skip

    def compress(self, x: Array, step: int) -> Payload:
        """See `Codec`."""
        self._draw(step)
        launch, k = self._device.launch, self.k
        numbers = self._numbers
        launch("embedding_forward", x, self._indices, numbers, k, 1, work=k)
        if self.unbiased and k:
            launch("scale", numbers, self.extent.n / k, k, work=k)
        self._device.copy(self._values(self._data), numbers)
        return pack(self._device, self.header(step), self._data)

    def received(self, data: Array, step: int, head: bytes | None = None) -> Payload:
        """See `Codec`."""
        return unpack(self._device, data, self.header(step), head)

    def add_into(self, payload: Payload, total: Array, factor: float = 1.0) -> None:
        """See `Codec`."""
        self._draw(payload.header.step)
        self._device.launch(
            "topk_add", self._values(payload.data), self._offsets, self._starts, total, factor,
            self.k, self._blocks, self.extent.n, work=self.k,
        )  # fmt: skip

    def mask(self, payload: Payload, left: Array, u: Array) -> None:
        """See `SparseCodec`."""
        self._draw(payload.header.step)
        self._device.launch(
            "topk_mask", self._values(payload.data), self._offsets, self._starts, left, u, self.k,
            self._blocks, self.extent.n, work=self.k,
        )  # fmt: skip

    def _values(self, data: Array) -> Array:
        return data[HEADER_BYTES:].view(np.float32)

    def _draw(self, step: int) -> None:
        """The step's elements, as blocks and offsets."""
        if step == self._step:
            return
        self._step, launch, k = step, self._device.launch, self.k
        self._indices = self._device.from_host(self.indices(step))
        launch("topk_encode", self._numbers, self._indices, self._numbers, self._offsets, k, work=k)
        launch("topk_counts", self._indices, self._counts, k, self._blocks, work=self._blocks)
        launch("topk_starts", self._counts, self._starts, self._blocks, work=1)
