"""Matrix products on the CPU that BLAS does not offer: of 16-bit numbers, and in lower precision.

Matrices of bfloat16 and float16 are widened and multiplied in float32, and the product is rounded
once: what the matrix units of a GPU do. (NumPy's own product of float16 runs at 0.3 GFLOP/s.) In
the precisions "tf32" and "bf16" float32 matrices are rounded to 10 and 7 bits of mantissa first, so
that a run on the CPU shows what these precisions of a GPU will do to it.

Only tiles of them are widened: a product takes a bounded amount of memory more, some 40 MiB.

Layer: device. Is given a device's memory and kernels; knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import DeviceError, nearest

if TYPE_CHECKING:
    from hpctrain.device.interface import Device

__all__ = ["DEPTH", "MANTISSA", "TILE", "Tiled", "check_precision", "product", "rounded"]

Array = NDArray[Any]
MANTISSA = {"float32": 23, "tf32": 10, "bf16": 7}  # bits that a product in float32 reads
# Elements of a widened tile, 8 MiB: long enough for BLAS, and for widening to cost a few percent of
# the multiplication. With half of it large products took a tenth longer.
TILE = 1 << 21
DEPTH = 2048  # terms that BLAS adds up at once
NARROW = 512  # rows or columns: with fewer, how the other matrix lies in memory decides instead


def check_precision(name: str) -> str:
    """`name`, if it is a precision of products; else a `DeviceError`."""
    if name not in MANTISSA:
        raise DeviceError(
            f"no matmul precision is called {name!r}{nearest(name, MANTISSA)}; there are "
            f"{', '.join(MANTISSA)}"
        )
    return name


def product(device: Device, a: Array, b: Array, out: Array, precision: str) -> Array:
    """out = a @ b of 16-bit matrices, or of float32 matrices in the precision `precision`.

    `out` has the dtype of a and b and is C-contiguous.
    """

    def widen(x: Array) -> Array:
        wide: Array = device.empty(x.shape, np.float32)
        if x.dtype.itemsize == 2:
            device.launch("sum_widened", x, None, 0, 0, wide, x.size, work=x.size)
        else:
            device.launch("round_mantissa", x, wide, MANTISSA[precision], x.size, work=x.size)
        return wide

    def narrow(wide: Array, place: Array) -> None:
        short = place if place.flags.c_contiguous else device.empty(place.shape, place.dtype)
        device.launch("narrow", wide, short, short.size, work=short.size)
        if short is not place:
            place[...] = short

    return Tiled(widen, narrow, device.empty).product(a, b, out)


def rounded(x: Array, precision: str) -> Array:
    """float32 numbers as a product in this precision reads them; for what stands for cuBLAS."""
    drop = np.uint32(MANTISSA["float32"] - MANTISSA[precision])
    if drop == 0:
        return x
    bits = x.view(np.uint32)
    half = np.uint32((1 << (int(drop) - 1)) - 1)
    kept = ((bits + half + ((bits >> drop) & np.uint32(1))) >> drop) << drop
    return np.where(np.isnan(x), x, kept.view(np.float32))


@dataclass(frozen=True)
class Tiled:
    """Products tile by tile.

    Attributes:
        widen: a C-contiguous array in float32, as it is multiplied.
        narrow: writes a float32 array into one of 16 bits.
        empty: an array of a shape and dtype, with undefined contents.
    """

    widen: Callable[[Array], Array]
    narrow: Callable[[Array, Array], None]
    empty: Callable[[tuple[int, ...], Any], Array]

    def product(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b, of (stacks of) matrices.

        Terms are added in float32, `DEPTH` of them by BLAS, and such sums in order.
        """
        with np.errstate(all="ignore"):  # float16 overflows now and then, and training sees to it
            for x, y, z in _parts(a, b, out):
                if max(x.size, y.size, z.size) <= TILE:
                    self._tile([(self._wide(x), self._wide(y))], z)
                else:
                    self._matrix(x, y, z)
        return out

    def _matrix(self, a: Array, b: Array, out: Array) -> None:
        """A product of two matrices of which one is no tile."""
        terms = list(_cuts(a.shape[1], _most_terms(a, b)))
        deepest = max(last - first for first, last in terms)
        for left, right in _cuts(out.shape[1], TILE // max(deepest, 1)):
            known = self._wide(b[:, left:right]) if len(terms) == 1 else None
            for top, bottom in _cuts(out.shape[0], TILE // max(deepest, right - left)):
                factors = (
                    (
                        self._wide(a[top:bottom, first:last]),
                        self._wide(b[first:last, left:right]) if known is None else known,
                    )
                    for first, last in terms
                )
                self._tile(factors, out[top:bottom, left:right])

    def _tile(self, factors: Iterable[tuple[Array, Array]], out: Array) -> None:
        """out = the sum of products of float32 matrices."""
        wide = out if out.dtype == np.float32 else self.empty(out.shape, np.float32)
        more = None
        for index, (x, y) in enumerate(factors):
            if index == 0:
                np.matmul(x, y, out=wide)
                continue
            more = self.empty(out.shape, np.float32) if more is None else more
            np.add(wide, np.matmul(x, y, out=more), out=wide)
        if wide is not out:
            self.narrow(wide, out)

    def _wide(self, x: Array) -> Array:
        """x in float32 and rounded; of a transposed view a transposed view."""
        turned = _turned(x)
        wide = self.widen(np.ascontiguousarray(x.swapaxes(-1, -2) if turned else x))
        return wide.swapaxes(-1, -2) if turned else wide


def _parts(a: Array, b: Array, out: Array) -> Iterator[tuple[Array, Array, Array]]:
    """A stack of products in parts that are tiles; single matrices where one is larger."""
    most = max(a.size, b.size, out.size)
    if out.ndim == 2 or most <= TILE:
        yield a, b, out
        return
    step = max(TILE * len(out) // most, 1)
    for first in range(0, len(out), step):
        part = slice(first, first + step)
        x, y = (x[part] if x.ndim == out.ndim and len(x) > 1 else x for x in (a, b))
        z = out[part]
        if len(z) == 1:  # a matrix, or a stack in a stack
            x, y, z = (x[0] if x.ndim == out.ndim else x for x in (x, y, z))
        yield from _parts(x, y, z)


def _turned(x: Array) -> bool:
    """Whether its columns lie in memory one after the other, not its rows."""
    return bool(x.strides[-2] < x.strides[-1])


def _most_terms(a: Array, b: Array) -> int:
    """How many terms of a sum a tile has, so that it can be cut without copying much.

    Where the product is narrow, the larger matrix is read about once, and its tiles are whole rows
    of memory.
    """
    rows, cols = a.shape[0], b.shape[1]
    if min(rows, cols) > NARROW:
        return DEPTH
    larger, side = (b, cols) if cols > rows else (a.T, rows)
    return max(TILE // 64 if _turned(larger) else TILE // max(side, 1), 64)


def _cuts(n: int, most: int) -> Iterator[tuple[int, int]]:
    """0 up to n in nearly equal parts of at most `most`; one empty part of nothing."""
    count = max(-(-n // most), 1)
    for index in range(count):
        yield index * n // count, (index + 1) * n // count
