"""All ranks of a schedule at work on symbols: messages that meet their other half, and fences.

Layer: collectives. Knows nothing of what a schedule should achieve.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from hpctrain.collectives.schedule import (
    Fence,
    Message,
    Recv,
    Schedule,
    Send,
    Traffic,
)
from hpctrain.collectives.verifier_access import Access, shown
from hpctrain.collectives.verifier_memory import Segment

__all__ = ["Arrival", "Machine"]


@dataclass
class Arrival:
    """A posted message; for a receive also what has come, ready to be put into place."""

    rank: int
    message: Message
    segments: list[Segment] | None = None
    met: bool = False


@dataclass
class Counts:
    """A rank's traffic so far."""

    sent: int = 0
    sends: int = 0
    received: int = 0
    receives: int = 0
    posted: list[Arrival] = field(default_factory=list)


class Machine(Access):
    """The ranks' memories, messages and fences.

    Attributes:
        round: the round that each rank is in.
        ready: ranks that may be able to go on.
        outstanding: for every rank the messages of its round that have not met their other half.
        fenced: ranks that wait at a fence.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.counts = [Counts() for _ in range(schedule.size)]
        self.outstanding = [0] * schedule.size
        self.ready: deque[int] = deque()
        self.fenced: dict[int, Fence] = {}
        self._arrived: dict[Fence, set[int]] = defaultdict(set)
        self._sends: dict[tuple[int, int], deque[Arrival]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Arrival]] = defaultdict(deque)

    @property
    def traffic(self) -> list[Traffic]:
        return [
            Traffic(c.sent, c.sends, c.received, c.receives, read)
            for c, read in zip(self.counts, self.read, strict=True)
        ]

    def local(self, rank: int, operation: object, messages: tuple[Message, ...]) -> bool:
        """Do one; True where the rank may have to wait (at a fence).

        `messages`: those in flight, whose ranges must be left alone.
        """
        if isinstance(operation, Fence):
            self._fence(rank, operation)
            return True
        self.apply(rank, operation, messages)
        return False

    # fences

    def _fence(self, rank: int, fence: Fence) -> None:
        if rank not in fence.members:
            raise self.fault(rank, f"is at a fence of ranks {fence.members}")
        self._arrived[fence].add(rank)
        self.fenced[rank] = fence
        if len(self._arrived[fence]) < len(fence.members):
            return
        del self._arrived[fence]
        joined: dict[int, int] = {}
        for member in fence.members:
            for other, epoch in self.known[member].items():
                joined[other] = max(joined.get(other, -1), epoch)
        for member in fence.members:
            joined[member] = self.epoch[member]
        for member in fence.members:
            self.known[member] = dict(joined)
            self.epoch[member] += 1
            self.readings[member] = [
                r for r in self.readings[member] if joined.get(r.reader, -1) < r.when
            ]
            del self.fenced[member]
            if member != rank:
                self.ready.append(member)

    # messages

    def post(self, rank: int, messages: tuple[Message, ...]) -> list[Arrival]:
        """Post all messages of a round; each meets its other half as soon as that is posted too."""
        self._check_round(rank, messages)
        counts, arrivals = self.counts[rank], []
        for message in messages:
            arrival = Arrival(rank, message)
            arrivals.append(arrival)
            nbytes = self.schedule.nbytes(message)
            if isinstance(message, Send):
                counts.sent, counts.sends = counts.sent + nbytes, counts.sends + 1
                mine, theirs = self._sends[rank, message.peer], self._receives[rank, message.peer]
            else:
                self.check_unread(rank, message.start, message.stop)
                counts.received, counts.receives = counts.received + nbytes, counts.receives + 1
                mine, theirs = self._receives[message.peer, rank], self._sends[message.peer, rank]
            self.outstanding[rank] += 1
            if theirs:
                other = theirs.popleft()
                pair = (arrival, other) if isinstance(message, Send) else (other, arrival)
                self._meet(*pair)
            else:
                mine.append(arrival)
        counts.posted = arrivals
        self.under_way[rank] = messages
        return arrivals

    def _check_round(self, rank: int, messages: tuple[Message, ...]) -> None:
        """No message of a round may write what another one uses."""
        ends = {True: -1, False: -1}  # furthest so far: of receives, of sends
        for message in sorted(messages, key=lambda m: m.start):
            writes = isinstance(message, Recv)
            if message.start >= message.stop:
                raise self.fault(rank, f"{message!r} is empty")
            if not 0 <= message.peer < self.schedule.size or message.peer == rank:
                raise self.fault(rank, f"{message!r} is no message between two ranks")
            if message.start < (max(ends.values()) if writes else ends[True]):
                raise self.fault(rank, f"{message!r} overlaps another message of the round")
            ends[writes] = max(ends[writes], message.stop)

    def _meet(self, sent: Arrival, received: Arrival) -> None:
        send, receive = sent.message, received.message
        count = send.stop - send.start
        if count != receive.stop - receive.start or send.wire != receive.wire:
            raise self.fault(
                sent.rank, f"{send!r} meets {receive!r} of rank {received.rank}: another size"
            )
        found = self.memory[sent.rank].read(send.start, send.stop)
        self.check_whole(sent.rank, found, send.start, send.stop, "in a message")
        moved = receive.start - send.start
        received.segments = [
            Segment(
                s.start + moved,
                s.stop + moved,
                self.symbols.cast(s.symbol, send.wire.name) if send.wire else s.symbol,
                s.shift + moved,
                0,
            )
            for s in found
        ]
        for arrival in (sent, received):
            arrival.met = True
            self.outstanding[arrival.rank] -= 1
            if not self.outstanding[arrival.rank] and arrival.rank not in self.fenced:
                self.ready.append(arrival.rank)

    def receive(self, rank: int, arrivals: list[Arrival]) -> None:
        """At the end of a round: put what has come into place."""
        self.counts[rank].posted = []
        self.under_way[rank] = ()
        now = self.epoch[rank]
        for arrival in arrivals:
            if isinstance(arrival.message, Recv) and arrival.segments is not None:
                written = [s._replace(since=now) for s in arrival.segments]
                self.memory[rank].write(arrival.message.start, arrival.message.stop, written)

    # the end

    def check_end(self) -> None:
        """Afterwards every rank may write all of its buffer."""
        for rank in range(self.schedule.size):
            self.round[rank] += 1
            self.check_unread(rank, 0, self.schedule.n)

    def waits_for(self, rank: int, ended: set[int]) -> tuple[int, str]:
        """The rank that this one waits for, and to do what."""
        if rank in self.fenced:
            fence = self.fenced[rank]
            missing = [m for m in fence.members if m not in self._arrived[fence]]
            return missing[0], f"at the fence of ranks {fence.members}"
        open_ones = [a.message for a in self.counts[rank].posted if not a.met]
        message = next((m for m in open_ones if m.peer in ended), open_ones[0])
        verb = "to receive" if isinstance(message, Send) else "to send"
        return message.peer, f"{verb} {shown(message.start, message.stop)}"
