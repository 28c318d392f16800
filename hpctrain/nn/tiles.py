"""Tiles of a convolution: pieces of a batch whose intermediate results stay in the cache.

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpctrain.device import Device
from hpctrain.device.dtypes import is_short, wide_dtype

__all__ = ["TILE_BYTES", "Buffer", "Sum", "runs", "widened", "zero"]

Array = Any
# Bytes of a tile's intermediate results. On the CPU about a core's L2 cache: 1.5 MiB was best where
# that is 1 MiB, as the first results are done with when the last are written. On a GPU enough to
# fill it.
TILE_BYTES = {"cpu": 3 << 19, "cuda": 64 << 20}


def runs(device: Device, lines: int, line_bytes: int) -> Iterator[slice]:
    """Lines 0 up to `lines`, cut into runs of nearly equal length within the device's tile."""
    tile_bytes = TILE_BYTES.get(device.name, TILE_BYTES["cpu"])
    count = min(max(-(-lines * line_bytes // tile_bytes), 1), max(lines, 1))
    for index in range(count if lines else 0):
        yield slice(index * lines // count, (index + 1) * lines // count)


def zero(device: Device, array: Array) -> None:
    """Fill a device array with zeros."""
    device.launch("fill", array, 0.0, array.size, work=array.size)


def widened(device: Device, array: Array) -> Array:
    """A copy of a 16-bit array in float32."""
    wide = device.empty(array.shape, wide_dtype(array.dtype))
    device.launch("sum_widened", array, None, 0, 0, wide, array.size, work=array.size)
    return wide


class Buffer:
    """Memory for the intermediate results of one tile after the other."""

    def __init__(self, device: Device, dtype: Any) -> None:
        self._device, self._dtype = device, dtype
        self._memory: Array = None

    def array(self, *shape: int) -> Array:
        """A C-contiguous array, valid until the next call; contents are undefined."""
        size = 1
        for extent in shape:
            size *= extent
        if self._memory is None or self._memory.size < size:
            self._memory = self._device.empty(size, self._dtype)
        return self._memory[:size].reshape(shape)


class Sum:
    """total = the sum of products of tiles: the first is written into it, the others are added.

    Of 16-bit products the sum is kept in float32 until the end.
    """

    def __init__(self, device: Device, total: Array) -> None:
        self.total = total
        self._device = device
        self._next = total
        self._wide: Array = None

    def add(self, a: Array, b: Array) -> None:
        """Add a @ b, of (stacks of) matrices."""
        self._device.matmul(a, b, self._next)
        size = self.total.size
        if self._next is self.total:
            self._next = self._device.empty(self.total.shape, self.total.dtype)
        elif not is_short(self.total.dtype):
            self._device.launch("add_into", self.total, self._next, size, work=size)
        else:
            if self._wide is None:
                self._wide = widened(self._device, self.total)
            self._device.launch("add_widened", self._next, self._wide, size, work=size)

    def finish(self) -> Array:
        """The total; zeros where nothing was added."""
        if self._next is self.total:
            zero(self._device, self.total)
        if self._wide is not None:
            size = self.total.size
            self._device.launch("narrow", self._wide, self.total, size, work=size)
        return self.total
