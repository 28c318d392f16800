"""A clock for each rank: all ranks, or those of a few nodes, do their rounds on a network's times.

Events are taken in the order of time. A message begins when both ends have posted it; ports, cores
and memory serve what asks first (`cost_ports`). What a rank sends to, or gets from, a rank that has
no clock here is taken to meet a partner that is exactly as far: on nodes that all do the same, the
same times as with all clocks.

Layer: collectives. Knows nothing of MPI, and not whether a schedule is right (`verifier` does).
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from typing import NamedTuple

from hpctrain.collectives.cost_ports import Ports
from hpctrain.collectives.network import Network
from hpctrain.collectives.schedule import (
    Cast,
    Copy,
    Fence,
    Local,
    Message,
    Reduce,
    Round,
    Schedule,
    Send,
)
from hpctrain.errors import UsageError

__all__ = ["Clocks"]

Posted = tuple[int, float, Message, int]  # rank, time, message, its place in the round


class Crossing(NamedTuple):
    """A message on its way: from `sender` (None: it has left) to `receiver` (None: no clock).

    `turn` is its place in the round: of a rank's messages the first ones posted leave first.
    """

    sender: int | None
    receiver: int | None
    inside: bool
    nbytes: int
    turn: int


class Clocks:
    """The ranks of a schedule that have clocks, at work.

    Attributes:
        places: the ranks: node, number on it, ranks of it.
        ports: what they share; afterwards, what went through it.
        ends: when each rank is done.
    """

    def __init__(
        self, schedule: Schedule, network: Network, places: dict[int, tuple[int, int, int]]
    ) -> None:
        """`places`: the ranks with clocks, whole nodes: node, number on it, ranks of it."""
        self._schedule, self._network = schedule, network
        self.places, self._nodes = places, schedule.nodes
        self.ports = Ports(network, places)
        self.ends: dict[int, float] = {}
        self._now = 0.0  # of the event that is looked at
        self._lives = {rank: self._life(rank) for rank in places}
        self._posted: dict[tuple[int, int, bool], deque[Posted]] = defaultdict(deque)
        self._open = dict.fromkeys(places, 0)  # messages of the round that have not met
        self._done = dict.fromkeys(places, 0.0)  # when the last message that met has arrived
        self._stopped: set[int] = set()  # ranks that wait for messages to meet
        self._fences: dict[Fence, dict[int, float]] = defaultdict(dict)
        self._count = 0  # of events so far: those of the same time are taken in their order
        self._events: list[tuple[float, int, int, int | Crossing]] = []
        for rank in places:
            self._push(0.0, rank)

    def run(self) -> None:
        """Until all are done. Raises `UsageError` for a schedule in which some never are."""
        while self._events:
            self._now, _, _, what = heapq.heappop(self._events)
            if isinstance(what, Crossing):
                self._cross(what)
            elif (later := next(self._lives[what], None)) is not None:
                self._push(later, what)
        missing = [rank for rank in self.places if rank not in self.ends]
        if missing:
            raise UsageError(
                f"the schedule {self._schedule.name!r} cannot be priced: rank {missing[0]} never "
                "ends; hpctrain.collectives.verifier.verify says why"
            )

    def _life(self, rank: int) -> Iterator[float | None]:
        """The rounds of a rank. Yields the time at which to go on; None: when woken."""
        now = 0.0
        for turn in self._schedule.rounds(rank):
            for part in turn.first:
                now = yield from self._local(rank, part, now)
            if turn.messages:
                now = yield from self._convert(rank, turn, now, leaving=True)
                yield now
                now = self._post(rank, turn.messages, now)
            for part in turn.meanwhile:
                now = yield from self._local(rank, part, now)
            if turn.messages:
                if self._open[rank]:
                    self._stopped.add(rank)
                    yield None
                now = max(now, self._done[rank])
                now = yield from self._convert(rank, turn, now, leaving=False)
        self.ends[rank] = now

    # what a rank does alone, or with its node

    def _local(self, rank: int, part: Local, now: float) -> Generator[float | None, None, float]:
        yield now
        if isinstance(part, Fence):
            return (yield from self._fence(rank, part, now))
        if not isinstance(part, Cast):
            sources = part.sources if isinstance(part, Reduce) else (part.source,)
            peers = sum(source.rank != rank for source in sources)
            self.ports.read(rank, peers * (part.stop - part.start) * self._schedule.itemsize)
        seconds, nbytes = self._cost(rank, part)
        return self.ports.work(rank, now, seconds, nbytes)

    def _cost(self, rank: int, part: Reduce | Copy | Cast) -> tuple[float, int]:
        """(seconds of a core, bytes of the node's memory) of an operation."""
        own, inside = self._network.rank, self._network.inside
        nbytes = (part.stop - part.start) * self._schedule.itemsize
        if isinstance(part, Cast):
            return own.launch_seconds + 2 * nbytes * own.copy_seconds_per_byte, 2 * nbytes
        if isinstance(part, Copy):
            here = part.source.rank == rank
            each = own.copy_seconds_per_byte if here else inside.read_seconds_per_byte
            return own.launch_seconds + nbytes * each, nbytes
        peers = sum(source.rank != rank for source in part.sources)
        read = max(own.add_seconds_per_byte, inside.read_seconds_per_byte)
        added = max(len(part.sources) - 1, 1)
        peers = min(peers, added)
        each = peers * read + (added - peers) * own.add_seconds_per_byte
        return own.launch_seconds + nbytes * each, nbytes * added

    def _fence(self, rank: int, part: Fence, now: float) -> Generator[float | None, None, float]:
        """All go on together, ceil(lg n) steps after the last one has come."""
        came = self._fences[part]
        came[rank] = now
        if not all(member in came or member not in self.places for member in part.members):
            yield None
            return self._now
        del self._fences[part]
        steps = (len(part.members) - 1).bit_length()
        later = max(came.values()) + steps * self._network.inside.fence_seconds
        for member in came:
            if member != rank:
                self._push(later, member)
        return later

    # messages

    def _convert(
        self, rank: int, turn: Round, now: float, leaving: bool
    ) -> Generator[float | None, None, float]:
        """Between elements and what messages carry, before they leave or after they arrive."""
        own, itemsize = self._network.rank, self._schedule.itemsize
        for message in turn.messages:
            if message.wire is not None and isinstance(message, Send) == leaving:
                yield now
                nbytes = (message.stop - message.start) * itemsize
                seconds = own.launch_seconds + nbytes * own.copy_seconds_per_byte
                now = self.ports.work(rank, now, seconds, nbytes)
        return now

    def _post(self, rank: int, messages: tuple[Message, ...], now: float) -> float:
        """Post all, receives first; when the rank is done with posting."""
        self._open[rank] = len(messages)
        self._done[rank] = now
        here = self._nodes[rank]
        ordered = sorted(messages, key=lambda message: isinstance(message, Send))
        for turn, message in enumerate(ordered):
            peer, sends = message.peer, isinstance(message, Send)
            inside = here == self._nodes[peer]
            network = self._network
            now += network.inside.message_seconds if inside else network.between.message_seconds
            if peer not in self.places:
                self._meet((rank, now, message, turn), None, inside)
                continue
            pair = (rank, peer, sends) if sends else (peer, rank, sends)
            other = self._posted[pair[0], pair[1], not sends]
            if other:
                self._meet((rank, now, message, turn), other.popleft(), inside)
            else:
                self._posted[pair].append((rank, now, message, turn))
        return now

    def _meet(self, one: Posted, other: Posted | None, inside: bool) -> None:
        """Both ends are posted: the message goes as soon as the later one is."""
        ready = max(one[1], other[1]) if other else one[1]
        sends = isinstance(one[2], Send)
        sender = one[0] if sends else other[0] if other else None
        receiver = one[0] if not sends else other[0] if other else None
        nbytes = self._schedule.nbytes(one[2])
        turn = one[3] if sends or not other else other[3]
        self._push(ready, Crossing(sender, receiver, inside, nbytes, turn))

    def _cross(self, message: Crossing) -> None:
        """It leaves by the sender's port, and from then on arrives by the receiver's."""
        begin, ports = self._now, self.ports
        if message.sender is not None:
            begin, done = ports.leave(message.sender, message.inside, begin, message.nbytes)
            self._finish(message.sender, done)
            if message.receiver is not None:
                self._push(begin, message._replace(sender=None))
        elif message.receiver is not None:
            level = self._network.inside if message.inside else self._network.between
            end = ports.arrive(message.receiver, message.inside, begin, message.nbytes)
            self._finish(message.receiver, end + level.latency_seconds)

    def _finish(self, rank: int, done: float) -> None:
        """One message less that a rank waits for."""
        self._done[rank] = max(self._done[rank], done)
        self._open[rank] -= 1
        if not self._open[rank] and rank in self._stopped:
            self._stopped.remove(rank)
            self._push(self._done[rank], rank)

    def _push(self, time: float, what: int | Crossing) -> None:
        """At the same time ranks come before messages."""
        self._count += 1
        turn = what.turn if isinstance(what, Crossing) else -1
        heapq.heappush(self._events, (time, turn, self._count, what))
