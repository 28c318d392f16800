"""Which parts of a range are worth compressing: large tensors of two or more dims.

Biases, norms and other small tensors hold few bytes and are easily harmed: they go as they are,
together in one message. A column's bounds may lie in the middle of a tensor, so what is compressed
are pieces.

Layer: compress. Is given a layout; knows nothing of ranks and methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.compress.powersgd import Matrix
from hpctrain.nn.layout import Layout

__all__ = ["Portions", "clear", "portions", "put", "taken"]


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


def taken(x: NDArray[Any], spans: tuple[tuple[int, int], ...]) -> NDArray[Any]:
    """A copy of the spans of `x`, one after the other; there, zeros are left."""
    found = [x[start:stop].copy() for start, stop in spans]
    clear(x, spans)
    return np.concatenate(found) if found else x[:0].copy()


def clear(x: NDArray[Any], spans: tuple[tuple[int, int], ...]) -> None:
    """Set the spans of `x` to 0."""
    for start, stop in spans:
        x[start:stop] = 0


def put(x: NDArray[Any], spans: tuple[tuple[int, int], ...], values: NDArray[Any]) -> None:
    """Write back what `taken` gave."""
    at = 0
    for start, stop in spans:
        x[start:stop] = values[at : at + stop - start]
        at += stop - start
