"""Who adds up and who owns which range of a flat array, or of one bucket of it.

It is cut twice. First into C columns, C being the smallest number of ranks on any node:
column c belongs to the ranks with local rank c, one on every node. Then each column into one
slice per node. The rank with local rank c on node k owns slice k of column c; ranks with a local
rank of C or more own nothing.

The sums within a node are shared out evenly among all its ranks, also those that own nothing: a
rank adds up an even part of the array, cut where it crosses from one column into the next.

All boundaries are multiples of 64 bytes, so no cache line is written by two ranks. Every answer
is a pure function of its arguments: no list is as long as the number of ranks.

Layer: collectives. Knows nothing of MPI and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["GRAIN", "Cut", "Range", "bound"]

GRAIN = 64  # bytes

Range = tuple[int, int]  # (start, stop) in elements


def bound(span: Range, parts: int, index: int, grain: int) -> int:
    """Where part `index` of `parts` even ones of `span` starts, a multiple of `grain` after it."""
    start, stop = span
    grains = -(-(stop - start) // grain)
    return min(start + grains * index // parts * grain, stop)


def part(span: Range, parts: int, index: int, grain: int) -> Range:
    """Part `index` of `span` cut into `parts` even ones; empty if there are too few grains."""
    return bound(span, parts, index, grain), bound(span, parts, index + 1, grain)


@dataclass(frozen=True)
class Cut:
    """The cut of `n` elements of `itemsize` bytes for nodes of `local_sizes` ranks.

    `start`: the first of them, a multiple of 64 bytes.
    """

    n: int
    itemsize: int
    local_sizes: tuple[int, ...]
    start: int = 0

    @property
    def grain(self) -> int:
        """Elements in 64 bytes."""
        return GRAIN // self.itemsize

    @property
    def padded(self) -> int:
        """`n` rounded up to whole grains."""
        return -(-self.n // self.grain) * self.grain

    @property
    def span(self) -> Range:
        """All elements."""
        return self.start, self.start + self.n

    @property
    def columns(self) -> int:
        return min(self.local_sizes)

    def column(self, local_rank: int) -> Range:
        """The range of the ranks with this local rank; empty where they own nothing."""
        if local_rank >= self.columns:
            return self.start, self.start
        return part(self.span, self.columns, local_rank, self.grain)

    def slice(self, node: int, local_rank: int) -> Range:
        """The range that one rank owns. All ranks' together are `span`, without overlap."""
        return part(self.column(local_rank), len(self.local_sizes), node, self.grain)

    def sums(self, node: int, local_rank: int) -> Iterator[tuple[int, int, int]]:
        """What a rank adds up over its node: (local rank whose column it lies in, start, stop)."""
        start, stop = part(self.span, self.local_sizes[node], local_rank, self.grain)
        for owner in range(self.columns):
            first, last = self.column(owner)
            first, last = max(first, start), min(last, stop)
            if first < last:
                yield owner, first, last
