"""Which parts of a range are worth compressing: large tensors of two or more dims.

Biases, norms and other small tensors hold few bytes and are easily harmed: they go as they are,
together in one message. A column's bounds may lie in the middle of a tensor, so what is compressed
are pieces.

Layer: compress. Is given a layout; knows nothing of ranks and methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.compress.powersgd import Matrix
from hpctrain.nn.layout import Layout

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["Pieces", "Portions", "portions"]

Array = Any  # of the device: float32, shape (n,)
PIECE = 1024  # elements that a warp of a GPU moves


@dataclass(frozen=True)
class Portions:
    """A range of elements: what goes as it is, and what may be compressed.

    Attributes:
        small: (start, stop) of what goes as it is, counted from the range's start; ascending.
        matrices: whole rows of large tensors, for methods that need them.
        edges: like `small`: parts of rows at the range's ends, which those methods leave.
        gaps: like `small`: padding between tensors, which no checkpoint keeps: it must stay 0.
    """

    small: tuple[tuple[int, int], ...]
    matrices: tuple[Matrix, ...]
    edges: tuple[tuple[int, int], ...]
    gaps: tuple[tuple[int, int], ...]


def portions(layout: Layout, start: int, stop: int, least: int) -> Portions:
    """Cut [start, stop) of a layout. Tensors below `least` elements are small."""
    small: list[tuple[int, int]] = []
    edges: list[tuple[int, int]] = []
    gaps: list[tuple[int, int]] = []
    matrices: list[Matrix] = []
    end = 0
    for entry, first, last in layout.pieces(start, stop):
        begin = entry.offset + first - start
        gaps.append((end, begin))
        if len(entry.shape) < 2 or entry.size < least:
            # with the padding that comes before it
            joined = small and small[-1][1] == end
            small[-1:] = [(small[-1][0], begin + last - first)] if joined else [
                *small[-1:], (begin, begin + last - first)
            ]  # fmt: skip
        else:
            cols = entry.size // entry.shape[0]
            head = min(-(-first // cols) * cols, last)
            tail = max(last // cols * cols, head)
            if head < tail:
                matrices.append(Matrix(begin + head - first, (tail - head) // cols, cols))
            ends = ((begin, begin + head - first), (begin + tail - first, begin + last - first))
            edges += [span for span in ends if span[0] < span[1]]
        end = begin + last - first
    gaps = [span for span in (*gaps, (end, stop - start)) if span[0] < span[1]]
    return Portions(tuple(small), tuple(matrices), tuple(edges), tuple(gaps))


class Pieces:
    """Spans of flat arrays of n elements that a device takes out, puts back or clears at once.

    Attributes:
        size: elements in all spans.
    """

    def __init__(self, device: Device, spans: Sequence[tuple[int, int]]) -> None:
        """`spans`: (start, stop), without overlap."""
        self._device = device
        pieces = [
            (at, min(at + PIECE, stop)) for start, stop in spans for at in range(start, stop, PIECE)
        ]
        self._count = len(pieces)
        starts = np.cumsum([0, *(stop - start for start, stop in pieces)], dtype=np.int64)
        self.size = int(starts[-1])
        self._begins = device.from_host(np.array([start for start, _ in pieces], np.int64))
        self._starts = device.from_host(starts)

    def take(self, x: Array) -> Array:
        """A copy of the spans of `x`, one after the other; there, zeros are left."""
        taken = self._device.empty(self.size, np.float32)
        self._device.launch(
            "pieces_take", x, self._begins, self._starts, taken, self._count, work=self._count
        )
        return taken

    def put(self, x: Array, values: Array) -> None:
        """Write back what `take` gave."""
        self._put(x, values)

    def clear(self, x: Array) -> None:
        """Set the spans of `x` to 0."""
        self._put(x, None)

    def _put(self, x: Array, values: Array | None) -> None:
        self._device.launch(
            "pieces_put", values, self._begins, self._starts, x, self._count, work=self._count
        )
