"""The words in which a collective is written down: rounds of messages, sums, copies and fences.

An algorithm is a function from a rank to its rounds, made one after the other as they are asked
for. Nothing in it touches memory: `verifier` checks it for any number of ranks without MPI, and
`interpreter` runs it.

Every rank has one flat buffer of n elements, at addresses 0 to n - 1, the same element at the same
address everywhere. From the next multiple of 64 bytes on it has scratch memory of its own.

A rank does its rounds in order, and in a round:

    first       local operations, one after the other
    messages    all are posted together
    meanwhile   local operations, one after the other, while the messages travel
                ... then it waits until all its messages have been received

There is no other order between ranks than that of messages and fences. A message may wait for its
receiver to post the receive (rendezvous); messages from one rank to another arrive in order.

Layer: collectives. Knows nothing of MPI, memory and algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import NamedTuple

from hpctrain.collectives.cut import GRAIN, bound

__all__ = [
    "KINDS",
    "Cast",
    "Chunks",
    "Copy",
    "Fence",
    "Local",
    "Message",
    "Place",
    "Range",
    "Recv",
    "Reduce",
    "Round",
    "Schedule",
    "Send",
    "Traffic",
    "Wire",
    "merged",
]

Range = tuple[int, int]  # (start, stop) in elements

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "broadcast")


class Wire(NamedTuple):
    """How elements travel, where not as they are.

    With `bound` None every element takes `itemsize` bytes (2 for bfloat16 and float16). Otherwise
    the message is an opaque payload of at most `bound` bytes, whatever the range: the receiver
    learns the size from the message.
    """

    name: str
    itemsize: int = 0
    bound: int | None = None

    def nbytes(self, count: int) -> int:
        """Bytes of a message of `count` elements; the most bytes of an opaque one."""
        return self.itemsize * count if self.bound is None else self.bound


class Send(NamedTuple):
    """Send [start, stop) to rank `peer`. Until the end of the round it is only read."""

    peer: int
    start: int
    stop: int
    wire: Wire | None = None


class Recv(NamedTuple):
    """Replace [start, stop) by what rank `peer` sends. Nobody else may touch it in this round."""

    peer: int
    start: int
    stop: int
    wire: Wire | None = None


class Place(NamedTuple):
    """An address of a rank. On another rank than the one that uses it: a peer read.

    Only ranks of the same node can be read, and only their buffer, not their scratch memory.
    """

    rank: int
    start: int


class Reduce(NamedTuple):
    """[start, stop) <- sum of as many elements from each of `sources`, added in this order.

    One source may be the target itself; otherwise they do not overlap it.
    """

    start: int
    stop: int
    sources: tuple[Place, ...]


class Copy(NamedTuple):
    """[start, stop) <- as many elements from `source`."""

    start: int
    stop: int
    source: Place


class Cast(NamedTuple):
    """Replace [start, stop) by what a receiver of `wire` gets, for the same bits on all ranks."""

    start: int
    stop: int
    wire: Wire


class Fence(NamedTuple):
    """Wait for `members`, in this order the same on all: what they wrote before can be read."""

    members: tuple[int, ...]


Message = Send | Recv
Local = Reduce | Copy | Cast | Fence


class Round(NamedTuple):
    """What a rank does between two waits for messages."""

    first: tuple[Local, ...] = ()
    messages: tuple[Message, ...] = ()
    meanwhile: tuple[Local, ...] = ()


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank moves: by messages, in bytes and in number, and by peer reads, in bytes."""

    sent: int = 0
    sends: int = 0
    received: int = 0
    receives: int = 0
    read: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Schedule:
    """A collective of all ranks on a buffer of `n` elements, as data.

    Attributes:
        name: of the algorithm, for people.
        kind: what holds at the end. "all-reduce": the sum over all ranks, on all. "reduce-scatter":
            the sum in the ranges that a rank owns. "all-gather": what was in the owner's range, on
            all. "broadcast": what the owner of everything had.
        nodes: the node of every rank.
        rounds: a rank's rounds, made as they are asked for.
        owned: a rank's ranges; those of all ranks together are [0, n), without overlap.
        traffic: what the algorithm's formula says that a rank moves.
    """

    name: str
    kind: str
    n: int
    itemsize: int
    nodes: tuple[int, ...]
    rounds: Callable[[int], Iterator[Round]]
    owned: Callable[[int], tuple[Range, ...]]
    traffic: Callable[[int], Traffic]

    @property
    def size(self) -> int:
        return len(self.nodes)

    @property
    def scratch(self) -> int:
        """The address at which scratch memory begins."""
        grain = GRAIN // self.itemsize
        return -(-self.n // grain) * grain

    def nbytes(self, message: Message) -> int:
        """Bytes of a message; of an opaque payload, the most."""
        count = message.stop - message.start
        return message.wire.nbytes(count) if message.wire else self.itemsize * count


class Chunks(NamedTuple):
    """[start, stop) cut into even `parts`, at multiples of `grain` elements after `start`.

    Chunks behind the last part are empty.
    """

    start: int
    stop: int
    parts: int
    grain: int

    def bound(self, index: int) -> int:
        """Where chunk `index` begins; that of `parts` and more is the end."""
        return bound((self.start, self.stop), self.parts, min(index, self.parts), self.grain)

    def chunk(self, index: int) -> Range:
        return self.bound(index), self.bound(index + 1)

    def span(self, first: int, last: int) -> Range:
        """Chunks `first` to `last` - 1 together."""
        return self.bound(first), self.bound(last)

    def holder(self, address: int) -> int:
        """The chunk that holds `address`, in [start, stop)."""
        grains = -(-(self.stop - self.start) // self.grain)
        at = (address - self.start) // self.grain
        return ((at + 1) * self.parts - 1) // grains


def merged(streams: Sequence[Iterator[Round]]) -> Iterator[Round]:
    """Streams of rounds side by side: the k-th rounds of all of them become one round.

    They must touch different memory. Where messages of one stream depend on another rank's, that
    rank must have them in its k-th round as well, or waiting may never end.
    """
    if len(streams) == 1:
        yield from streams[0]
        return
    for rounds in zip_longest(*streams, fillvalue=Round()):
        yield Round(
            tuple(operation for r in rounds for operation in r.first),
            tuple(message for r in rounds for message in r.messages),
            tuple(operation for r in rounds for operation in r.meanwhile),
        )
