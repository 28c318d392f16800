"""Runs a schedule over MPI, in place, on a buffer of the device.

Every rank reads its own rounds once and keeps them as calls on memory that is already found; `run`
makes these calls as often as wanted. Additions are launches of our kernels, so they are float32 (or
float64) on every wire, in the schedule's order. MPI only moves bytes: those of the buffer itself on
the CPU, and on a GPU whose memory MPI may be given; else of pinned memory that they are copied
through.

Layer: collectives. Is given a schedule; knows nothing of how it was made, nor whether it is right
(`verifier` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hpctrain.collectives.carry import settle
from hpctrain.collectives.ports import Codec, Port, message_array
from hpctrain.collectives.schedule import (
    Cast,
    Copy,
    Fence,
    Local,
    Message,
    Place,
    Reduce,
    Round,
    Schedule,
    Send,
    Traffic,
    Wire,
)
from hpctrain.errors import UsageError
from hpctrain.mpi.messages import MESSAGE_BYTES
from hpctrain.mpi.rounds import Idle, InFlight, fence

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device
    from hpctrain.mpi.topology import Topology

__all__ = ["Interpreter", "Ranks", "node_list"]

Array = Any  # of the device
Call = Callable[[], None]
PROGRESS_BYTES = 1 << 20  # added or copied between two looks at the messages under way


class Ranks(Protocol):
    """The ranks that run a schedule: a `Topology`, or some of one."""

    @property
    def comm(self) -> MPI.Intracomm: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass
class Bound:
    """A round as calls."""

    first: list[Call]
    receives: list[tuple[int, Port]]
    sends: list[tuple[int, Port]]
    meanwhile: list[Call]


class Interpreter:
    """One schedule on one buffer, for any number of runs.

    Attributes:
        moved: what this rank has moved in the last run, as MPI was told, for comparison with
            `schedule.traffic`.
    """

    def __init__(
        self,
        topology: Ranks,
        device: Device,
        schedule: Schedule,
        array: Array,
        peers: Mapping[int, Array] | None = None,
        codecs: Mapping[str, Codec] | None = None,
        gpu_mpi: bool = False,
        idle: Idle | None = None,
    ) -> None:
        """Not collective; all ranks give the same schedule.

        Args:
            array: shape (n,) or longer, contiguous, on `device`, float32 or float64: this rank's
                buffer. It stays the caller's, between runs. With `gpu_mpi` an allocation of its own
                (`device.shared`): a GPU's pool may hand out memory that MPI cannot register.
            peers: rank to buffer, for the ranks of this node whose buffers the schedule reads:
                memory that their own interpreters were given as `array`.
            codecs: for opaque wires, by name. They work on the host, on a GPU too.
            gpu_mpi: whether MPI is given the arrays of a GPU as they are; see `mpi.gpu.decide`.
            idle: called between two looks at messages under way; None: waiting may block.

        Raises:
            UsageError: a schedule for other ranks or elements, a peer that is not in `peers`, a
                wire without a codec, or messages of more than 2^30 bytes.
        """
        self._check(topology, schedule, array)
        self.schedule, self.moved = schedule, Traffic()
        self._comm, self._rank, self._device = topology.comm, topology.rank, device
        self._staged, self._idle = device.name != "cpu" and not gpu_mpi, idle
        self._array, self._peers, self._codecs = array, dict(peers or {}), dict(codecs or {})
        rounds = [turn for turn in schedule.rounds(self._rank) if any(turn)]
        self._begin = schedule.scratch
        self._scratch = message_array(device, self._scratch_size(rounds), array.dtype, self._staged)
        self._read = 0
        self._tabled: list[Sequence[Array]] = []  # a table holds only the addresses of arrays
        self._rounds = [self._bind(turn) for turn in rounds]

    def run(self) -> None:
        """The collective, on what is in the buffers now. Collective over all ranks.

        With peer reads, nobody may write to its buffer from the first rank's call on, and all may
        again once their own call has returned.
        """
        sent = sends = received = receives = 0
        for bound in self._rounds:
            for call in bound.first:
                call()
            if not bound.sends and not bound.receives:
                for call in bound.meanwhile:
                    call()
                continue
            arrived, left = self._exchange(bound)
            sent, sends = sent + left, sends + len(bound.sends)
            received, receives = received + arrived, receives + len(bound.receives)
        self.moved = Traffic(sent, sends, received, receives, self._read)

    def _exchange(self, bound: Bound) -> tuple[int, int]:
        """All messages of a round, and what is to be done meanwhile; bytes received and sent."""
        for _, port in bound.sends:
            port.start()
        leaving = [(peer, port.leave()) for peer, port in bound.sends]
        arriving = [(peer, port.room()) for peer, port in bound.receives]
        if not self._staged:
            settle(self._device, self._idle)
        flight = InFlight(self._comm, arriving, leaving)
        for call in bound.meanwhile:
            call()
            flight.progress()
        sizes = flight.wait(self._idle)
        for (_, port), nbytes in zip(bound.receives, sizes, strict=True):
            port.arrive(nbytes)
        return sum(sizes), sum(payload.nbytes for _, payload in leaving)

    def _check(self, topology: Ranks, schedule: Schedule, array: Array) -> None:
        if schedule.size != topology.size:
            raise UsageError(
                f"a schedule for {schedule.size} ranks cannot run on {topology.size}: make it from "
                "this topology's node list"
            )
        if array.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise UsageError(
                f"a buffer of {array.dtype} cannot be added up: use float32 or float64"
            )
        if array.shape[0] < schedule.n or array.dtype.itemsize != schedule.itemsize:
            raise UsageError(
                f"a schedule for {schedule.n:,} elements of {schedule.itemsize} bytes does not fit "
                f"a buffer of {array.shape[0]:,} of {array.dtype}"
            )

    def _scratch_size(self, rounds: Iterable[Round]) -> int:
        stops = [
            part.stop
            for turn in rounds
            for part in (*turn.first, *turn.messages, *turn.meanwhile)
            if not isinstance(part, Fence)
        ]
        return max(max(stops, default=0) - self._begin, 0)

    def _view(self, start: int, stop: int) -> Array:
        """A range of this rank's buffer or scratch memory."""
        if start >= self._begin and start < stop:
            return self._scratch[start - self._begin : stop - self._begin]
        return self._array[start:stop]

    def _at(self, place: Place, first: int, last: int) -> Array:
        """Elements `first` to `last` - 1 from a place on."""
        start, stop = place.start + first, place.start + last
        if place.rank == self._rank:
            return self._view(start, stop)
        if place.rank not in self._peers:
            raise UsageError(
                f"the schedule {self.schedule.name!r} reads the memory of rank {place.rank}: give "
                "its buffer in `peers`, or use a schedule without peer reads"
            )
        return self._peers[place.rank][start:stop]

    def _bind(self, turn: Round) -> Bound:
        busy = bool(turn.messages)
        return Bound(
            [call for part in turn.first for call in self._calls(part, split=False)],
            [(m.peer, self._port(m)) for m in turn.messages if not isinstance(m, Send)],
            [(m.peer, self._port(m)) for m in turn.messages if isinstance(m, Send)],
            [call for part in turn.meanwhile for call in self._calls(part, split=busy)],
        )

    def _port(self, message: Message | Cast) -> Port:
        view, wire = self._view(message.start, message.stop), message.wire
        nbytes = wire.nbytes(view.shape[0]) if wire else view.nbytes
        if nbytes > MESSAGE_BYTES:
            raise UsageError(
                f"a message of {nbytes:,} bytes is above {MESSAGE_BYTES:,}: make the schedule with "
                "smaller segment_bytes"
            )
        return Port(self._device, view, wire, self._codec(wire), self._staged, self._idle)

    def _codec(self, wire: Wire | None) -> Codec | None:
        return self._codecs.get(wire.name) if wire else None

    def _calls(self, part: Local, split: bool) -> list[Call]:
        """A local operation, in several calls where messages have to be looked after meanwhile."""
        if isinstance(part, Fence):
            return [partial(self._fence, part.members)]
        if isinstance(part, Cast):
            return [self._port(part).round_trip]
        sources = part.sources if isinstance(part, Reduce) else (part.source,)
        count = part.stop - part.start
        self._read += sum(count for s in sources if s.rank != self._rank) * self.schedule.itemsize
        width = PROGRESS_BYTES // self.schedule.itemsize if split else max(count, 1)
        calls: list[Call] = []
        for first in range(0, count, width):
            last = min(first + width, count)
            target = self._view(part.start + first, part.start + last)
            found = [self._at(source, first, last) for source in sources]
            if isinstance(part, Copy):
                calls.append(partial(self._device.copy, target, found[0]))
            else:
                calls.append(self._sum(target, found))
        return calls

    def _sum(self, target: Array, sources: Sequence[Array]) -> Call:
        table, count = self._device.peers(sources), target.shape[0]
        self._tabled.append(sources)
        return partial(
            self._device.launch, "sum_peers", table, len(sources), 0, target, count, work=count
        )

    def _fence(self, members: Sequence[int]) -> None:
        settle(self._device, self._idle)
        fence(self._comm, members, self._idle)


def node_list(topology: Topology) -> tuple[int, ...]:
    """The node of every rank, as schedules want it. Collective over `topology.comm`."""
    return tuple(topology.comm.allgather(topology.node_index))
