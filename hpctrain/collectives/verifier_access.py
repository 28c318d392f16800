"""Memories on which sums and copies are done in symbols, and the rules on who may touch what.

Layer: collectives. Knows nothing of when ranks meet.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.collectives.schedule import (
    Cast,
    Copy,
    Message,
    Place,
    Recv,
    Reduce,
    Schedule,
)
from hpctrain.collectives.verifier_memory import Memory, Segment, Symbols

__all__ = ["Access", "ScheduleFault", "shown"]


class ScheduleFault(Exception):
    """A schedule that breaks a rule: a mistake in the algorithm that made it."""


@dataclass
class Reading:
    """A peer's read of a range, at that peer's clock."""

    start: int
    stop: int
    reader: int
    when: int


def shown(start: int, stop: int, shift: int = 0) -> str:
    return f"[{start - shift:,}, {stop - shift:,})"


class Access:
    """The ranks' memories and clocks.

    A rank's own epoch begins at each fence. Its clock holds, for every rank it has met at fences,
    the last of that rank's epochs whose writes and reads are over.

    Attributes:
        under_way: for every rank the messages of its round that have been posted.
        read: for every rank the bytes it has read from peers.
    """

    def __init__(self, schedule: Schedule) -> None:
        size, n = schedule.size, schedule.n
        self.schedule = schedule
        self.symbols = Symbols(size)
        self.memory = [Memory() for _ in range(size)]
        for rank in range(size):
            given = ((0, n),) if "reduce" in schedule.kind else schedule.owned(rank)
            for start, stop in given:
                self.memory[rank].write(start, stop, [Segment(start, stop, rank, 0, 0)])
        self.round = [0] * size
        self.epoch = [0] * size
        self.known: list[dict[int, int]] = [{} for _ in range(size)]
        self.readings: list[list[Reading]] = [[] for _ in range(size)]
        self.under_way: list[tuple[Message, ...]] = [()] * size
        self.read = [0] * size

    def fault(self, rank: int, text: str) -> ScheduleFault:
        return ScheduleFault(f"rank {rank}, round {self.round[rank]}: {text}")

    def apply(self, rank: int, operation: object, messages: tuple[Message, ...]) -> None:
        """Do a sum, copy or cast; the ranges of `messages`, those in flight, are left alone."""
        if isinstance(operation, Cast):
            sources: tuple[Place, ...] = (Place(rank, operation.start),)
        elif isinstance(operation, Copy):
            sources = (operation.source,)
        elif isinstance(operation, Reduce):
            sources = operation.sources
        else:
            raise self.fault(rank, f"{operation!r} is no local operation")
        start, stop = operation.start, operation.stop
        for message in messages:
            self._apart(rank, message, sources, start, stop)
        parts = [self._read(rank, place, stop - start, start) for place in sources]
        if isinstance(operation, Cast):
            name = operation.wire.name
            parts[0] = [s._replace(symbol=self.symbols.cast(s.symbol, name)) for s in parts[0]]
        self._write(rank, start, stop, self._sum(rank, parts))

    def _apart(
        self, rank: int, message: Message, sources: tuple[Place, ...], start: int, stop: int
    ) -> None:
        """Nothing may write what a message in flight uses, or read what it writes."""
        touched = [(start, stop)]
        if isinstance(message, Recv):
            touched += [(p.start, p.start + stop - start) for p in sources if p.rank == rank]
        for first, last in touched:
            if first < message.stop and message.start < last:
                raise self.fault(
                    rank,
                    f"{shown(first, last)} is used while {message!r} is under way",
                )

    def _read(self, rank: int, place: Place, count: int, target: int) -> list[Segment]:
        """What is at a place, moved to `target`; a peer's must have been fenced off."""
        owner, start = place
        stop, moved = start + count, target - start
        found = self.memory[owner].read(start, stop)
        self.check_whole(rank, found, start, stop, f"of rank {owner}")
        if owner != rank:
            self._check_peer(rank, owner, start, stop, found)
            self.read[rank] += count * self.schedule.itemsize
        return [
            Segment(s.start + moved, s.stop + moved, s.symbol, s.shift + moved, 0) for s in found
        ]

    def check_whole(
        self, rank: int, found: list[Segment], start: int, stop: int, whose: str
    ) -> None:
        at = start
        for segment in [*found, Segment(stop, stop, 0, 0, 0)]:
            if segment.start > at:
                raise self.fault(
                    rank, f"uses {shown(at, segment.start)} {whose}, which nobody has written"
                )
            at = segment.stop

    def _check_peer(
        self, rank: int, owner: int, start: int, stop: int, found: list[Segment]
    ) -> None:
        nodes, what = self.schedule.nodes, f"{shown(start, stop)} of rank {owner}"
        if nodes[rank] != nodes[owner]:
            raise self.fault(rank, f"reads {what}, which is on another node")
        if stop > self.schedule.n:
            raise self.fault(rank, f"reads {what}, which is scratch memory")
        for message in self.under_way[owner]:
            if isinstance(message, Recv) and start < message.stop and message.start < stop:
                raise self.fault(rank, f"reads {what} while {message!r} writes it")
        since = max((s.since for s in found), default=0)
        if self.known[rank].get(owner, -1) < since:
            raise self.fault(rank, f"reads {what} with no fence after it was written")
        self.readings[owner].append(Reading(start, stop, rank, self.epoch[rank]))

    def _write(self, rank: int, start: int, stop: int, segments: list[Segment]) -> None:
        self.check_unread(rank, start, stop)
        now = self.epoch[rank]
        self.memory[rank].write(start, stop, [s._replace(since=now) for s in segments])

    def check_unread(self, rank: int, start: int, stop: int) -> None:
        known = self.known[rank]
        for reading in self.readings[rank]:
            over = known.get(reading.reader, -1) >= reading.when
            if not over and start < reading.stop and reading.start < stop:
                raise self.fault(
                    rank,
                    f"writes {shown(start, stop)} with no fence after rank {reading.reader} read "
                    f"{shown(reading.start, reading.stop)} of it",
                )

    def _sum(self, rank: int, parts: list[list[Segment]]) -> list[Segment]:
        """The parts added in order, cut wherever one of them is."""
        total, *others = parts
        for other in others:
            total = self._sum_of_two(rank, total, other)
        return total

    def _sum_of_two(self, rank: int, a: list[Segment], b: list[Segment]) -> list[Segment]:
        found, i, j = [], 0, 0
        while i < len(a) and j < len(b):
            x, y = a[i], b[j]
            start, stop = max(x.start, y.start), min(x.stop, y.stop)
            if x.shift != y.shift:
                raise self.fault(
                    rank,
                    f"adds elements {shown(start, stop, y.shift)} to {shown(start, stop, x.shift)}",
                )
            twice = self.symbols.ranks(x.symbol) & self.symbols.ranks(y.symbol)
            if twice:
                raise self.fault(
                    rank,
                    f"adds the input of rank {self.symbols.names(twice)} twice in "
                    f"{shown(start, stop)}",
                )
            found.append(Segment(start, stop, self.symbols.add(x.symbol, y.symbol), x.shift, 0))
            i, j = i + (x.stop == stop), j + (y.stop == stop)
        return found
