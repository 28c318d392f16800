"""What a rank's memory holds while a schedule is checked: symbols on ranges instead of numbers.

A symbol stands for a value as a formula of the ranks' inputs, with the order of its additions: two
ranks hold the same bits if they hold the same symbol. How long a range is makes no difference.

Layer: collectives. Knows nothing of rounds and messages.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

__all__ = ["Memory", "Segment", "Symbols"]


class Symbols:
    """Numbers for formulas: equal formulas have equal numbers. 0 to P - 1 are the ranks' inputs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: dict[tuple[object, ...], int] = {}
        self._ranks = [1 << rank for rank in range(size)]
        self._terms: list[tuple[object, ...]] = [(rank,) for rank in range(size)]
        self.all = (1 << size) - 1

    def ranks(self, symbol: int) -> int:
        """The ranks whose input is in a value, as bits."""
        return self._ranks[symbol]

    def add(self, a: int, b: int) -> int:
        """a + b, which in floating point is b + a, to the last bit."""
        return self._make(("+", min(a, b), max(a, b)), self._ranks[a] | self._ranks[b])

    def cast(self, a: int, name: str) -> int:
        """What is left of a value that went through a wire; doing so again changes nothing."""
        if self._terms[a][0] == name:
            return a
        return self._make((name, a), self._ranks[a])

    def _make(self, term: tuple[object, ...], ranks: int) -> int:
        symbol = self._known.get(term)
        if symbol is None:
            symbol = self._known[term] = len(self._terms)
            self._terms.append(term)
            self._ranks.append(ranks)
        return symbol

    def names(self, bits: int) -> str:
        """Ranks as text, at most four of them."""
        found = [rank for rank in range(self.size) if bits >> rank & 1][:5]
        return ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "")


class Segment(NamedTuple):
    """Addresses [start, stop) hold elements start - shift, ... of the value `symbol`.

    `since` is the writer's clock.
    """

    start: int
    stop: int
    symbol: int
    shift: int
    since: int


class Memory:
    """The segments of a rank's buffer and scratch memory, by address; gaps were never written."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._segments: list[Segment] = []

    def read(self, start: int, stop: int) -> list[Segment]:
        """The segments of a range, cut at its ends. Gaps are left out."""
        found = []
        at = max(bisect_right(self._starts, start) - 1, 0)
        for segment in self._segments[at:]:
            if segment.start >= stop:
                break
            first, last = max(segment.start, start), min(segment.stop, stop)
            if first < last:
                found.append(segment._replace(start=first, stop=last))
        return found

    def write(self, start: int, stop: int, segments: list[Segment]) -> None:
        """Replace a range by `segments`, which lie in it; neighbours with equal contents join."""
        first = max(bisect_left(self._starts, start) - 1, 0)
        last = bisect_right(self._starts, stop)
        old = self._segments[first:last]
        kept = [s._replace(stop=min(s.stop, start)) for s in old if s.start < start]
        behind = [s._replace(start=max(s.start, stop)) for s in old if s.stop > stop]
        joined: list[Segment] = []
        for segment in (*kept, *segments, *behind):
            if segment.start >= segment.stop:
                continue
            before = joined[-1] if joined else None
            if before and before.stop == segment.start and before[2:] == segment[2:]:
                joined[-1] = before._replace(stop=segment.stop)
            else:
                joined.append(segment)
        self._segments[first:last] = joined
        self._starts[first:last] = [s.start for s in joined]
