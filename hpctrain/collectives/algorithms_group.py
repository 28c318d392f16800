"""What an algorithm on one group of ranks is given, and the exchange that most of them are made of.

Layer: collectives. Knows nothing of nodes, levels and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hpctrain.collectives.cut import part
from hpctrain.collectives.schedule import (
    Cast,
    Chunks,
    Local,
    Message,
    Place,
    Range,
    Recv,
    Reduce,
    Round,
    Send,
    Traffic,
    Wire,
)

__all__ = ["Algorithm", "Group", "blank", "exchange", "exchange_and_add", "length"]

AT_ONCE = 32  # messages each way in a round: more partners than that take several rounds
LEAST_BYTES = 64 << 10  # of a message that is short because a group has very many ranks


@dataclass(frozen=True)
class Group:
    """Ranks that together add up, or complete, a range of their buffers.

    Attributes:
        members: the ranks; `index` is this rank's place among them.
        chunks: the range, cut into what each member owns: chunk k is member k's.
        longest: most elements in a chunk, the same for all groups a rank is in at the same time.
        segment: most elements in a message.
        scratch: the first address of this group's own scratch memory.
        wire: how elements travel; None: as they are.
    """

    members: Sequence[int]
    index: int
    chunks: Chunks
    longest: int
    segment: int
    itemsize: int
    scratch: int
    wire: Wire | None = None

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def elements(self) -> int:
        return self.chunks.stop - self.chunks.start

    @property
    def rank(self) -> int:
        return self.members[self.index]

    @property
    def own(self) -> Range:
        return self.chunks.chunk(self.index)

    def segments(self, elements: int, partners: int = 1) -> int:
        """In how many messages `elements` go, where as many come from each of `partners`."""
        least = LEAST_BYTES // self.itemsize
        most = self.segment if partners <= 1 else max(self.segment // partners, least)
        return max(-(-elements // most), 1)

    def width(self, elements: int, segments: int) -> int:
        """Room for one of `segments` parts of `elements`."""
        grains = -(-elements // self.chunks.grain)
        return -(-grains // segments) * self.chunks.grain

    def part(self, span: Range, segments: int, index: int) -> Range:
        return part(span, segments, index, self.chunks.grain)

    def messages(self, span: Range, segments: int) -> int:
        """How many of `segments` parts of `span` hold anything."""
        return min(-(-(span[1] - span[0]) // self.chunks.grain), segments)

    def all_messages(self, segments: int) -> int:
        """The same for all chunks together; their lengths differ by one grain at most."""
        chunks = self.chunks
        shorter, longer = divmod(-(-(chunks.stop - chunks.start) // chunks.grain), chunks.parts)
        return longer * min(shorter + 1, segments) + (chunks.parts - longer) * min(
            shorter, segments
        )

    def volume(self, elements: int, messages: int) -> int:
        """Bytes of so many elements in so many messages."""
        if self.wire is None:
            return self.itemsize * elements
        if self.wire.bound is not None:
            return self.wire.bound * messages
        return self.wire.itemsize * elements

    def send(self, index: int, span: Range) -> tuple[Message, ...]:
        """A message to a member, or nothing where it would be empty."""
        return (Send(self.members[index], *span, self.wire),) if span[0] < span[1] else ()

    def receive(self, index: int, start: int, stop: int) -> tuple[Message, ...]:
        return (Recv(self.members[index], start, stop, self.wire),) if start < stop else ()

    def cast(self, span: Range) -> tuple[Local, ...]:
        """Have the bits that others get of `span`."""
        if self.wire is None or span[0] == span[1]:
            return ()
        return (Cast(*span, self.wire),)


Rounds = Iterator[Round]


def length(span: Range) -> int:
    return span[1] - span[0]


def blank(rounds: int) -> Rounds:
    """Rounds in which others work: members of one group count them alike."""
    return iter([Round()] * rounds)


class Algorithm(NamedTuple):
    """A reduce-scatter (`down`: every member ends with the sum of its chunk) and an all-gather
    (`up`: every member had its chunk, and ends with all), with the formulas of what they move.

    `whole`: `down` leaves the whole sum on every member, and `up` does nothing.
    """

    down: Callable[[Group], Rounds]
    up: Callable[[Group], Rounds]
    down_traffic: Callable[[Group], Traffic]
    up_traffic: Callable[[Group], Traffic]
    scratch: Callable[[Group], int]
    whole: bool = False


def exchange_and_add(
    group: Group,
    target: Range,
    sends: Sequence[tuple[int, Range]],
    receives: Sequence[int],
    order: Sequence[int],
    segments: int,
    width: int,
) -> Rounds:
    """Add to `target` what members send of it, one segment after the other.

    Args:
        sends: (index of a member, range it adds up), the k-th in the same round as the k-th of
            the member's `receives`.
        receives: indices of the members that send `target`.
        order: the same indices and this member's own, in the order of the additions.
        segments, width: how a range is cut, and room for a part; the same on all members.

    A segment is added up while the next one travels. Scratch: two rows per receive, of `width`.
    """
    rows = {k: row for row, k in enumerate(k for k in order if k != group.index)}
    pending: tuple[Local, ...] = ()
    for turn in range(segments):
        base = group.scratch + turn % 2 * len(rows) * width
        start, stop = group.part(target, segments, turn)
        for first in range(0, max(len(sends), len(receives), 1), AT_ONCE):
            messages: tuple[Message, ...] = ()
            for index, span in sends[first : first + AT_ONCE]:
                messages += group.send(index, group.part(span, segments, turn))
            for index in receives[first : first + AT_ONCE]:
                row = base + rows[index] * width
                messages += group.receive(index, row, row + stop - start)
            yield Round((), messages, pending)
            pending = ()
        sources = tuple(
            Place(group.rank, start if k == group.index else base + rows[k] * width) for k in order
        )
        pending = (Reduce(start, stop, sources),) if receives and start < stop else ()
    yield Round(pending)


def exchange(
    group: Group,
    sends: Sequence[tuple[int, Range]],
    receives: Sequence[tuple[int, Range]],
    segments: int,
) -> Rounds:
    """Send ranges to members and put theirs into place; all segments of a range in one round."""
    for at in range(0, max(len(sends), len(receives), 1), AT_ONCE):
        messages: tuple[Message, ...] = ()
        for turn in range(segments):
            for index, span in sends[at : at + AT_ONCE]:
                messages += group.send(index, group.part(span, segments, turn))
            for index, span in receives[at : at + AT_ONCE]:
                messages += group.receive(index, *group.part(span, segments, turn))
        yield Round((), messages)
