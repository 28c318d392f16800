"""Exchanges of payloads whose sizes only their senders know: everyone to everyone.

A receiver makes room for the most a payload can take (a *bound*, known to both sides), and learns
the size from the messages. No sizes are exchanged before.

`gather_and_add` and `two_shot` say the same as schedules, with the bound as the size of every
payload, so that `verifier` checks them and `cost` prices them for any number of ranks.

Layer: collectives. Is given bytes; knows nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.algorithms import Level, all_reduce
from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.schedule import (
    Cast,
    Place,
    Recv,
    Reduce,
    Round,
    Schedule,
    Send,
    Traffic,
    Wire,
)
from hpctrain.errors import UsageError
from hpctrain.mpi.messages import MESSAGE_BYTES
from hpctrain.mpi.rounds import Idle, InFlight

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Exchange", "gather_and_add", "two_shot"]

Bytes = Any  # uint8, shape (n,): of NumPy, or of a GPU whose memory is given to MPI
EMPTY: NDArray[np.uint8] = np.empty(0, np.uint8)


def host_bytes(nbytes: int) -> Bytes:
    """Room for what comes, in host memory."""
    return np.empty(nbytes, np.uint8)


class Exchange:
    """Payloads between all ranks of a communicator, and what was counted on the way.

    Attributes:
        sent, received: bytes of this rank's messages since the beginning; messages: those sent.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        message_bytes: int = MESSAGE_BYTES,
        idle: Idle | None = None,
        allocate: Callable[[int], Bytes] = host_bytes,
    ) -> None:
        """`message_bytes`: the most in one message, the same on all ranks. `idle`: see `rounds`.

        `allocate(nbytes)`: makes the memory that messages arrive in; kept and used again. Memory of
        a GPU is given to MPI as it is: the caller has waited for all work on it, and on payloads.
        """
        self.comm, self.size, self.rank = comm, comm.size, comm.rank
        self.sent = self.received = self.messages = 0
        self._limit, self._idle, self._allocate = message_bytes, idle, allocate
        self._room: list[Bytes] = [EMPTY] * comm.size

    def all_to_all(self, payloads: Sequence[Bytes], bounds: Sequence[int]) -> list[Bytes]:
        """Give `payloads[k]` to rank k; what each rank gave to this one. Collective.

        Args:
            payloads: contiguous, only read.
            bounds: the most bytes that each rank gets from any other, the same on all ranks. To a
                rank of bound 0 goes no message.

        Returns:
            bytes by rank, valid until the next exchange; in this rank's own place its own payload.

        One message each way and pair, or as many as `message_bytes` asks for. All are posted
        together, to rank + 1 first, so that no rank is everyone's first.

        Raises:
            UsageError: a payload above its bound.
        """
        return self._swap(payloads, bounds, [bounds[self.rank]] * self.size)

    def all_gather(self, payload: Bytes, bounds: Sequence[int]) -> list[Bytes]:
        """Give `payload` to all; what each rank gave. Collective.

        `bounds`: the most that each rank gives, the same on all ranks; from a rank of bound 0 comes
        no message. For the rest see `all_to_all`.
        """
        return self._swap([payload] * self.size, [bounds[self.rank]] * self.size, bounds)

    def _swap(
        self, payloads: Sequence[Bytes], out: Sequence[int], into: Sequence[int]
    ) -> list[Bytes]:
        """`out`, `into`: the bound of what goes to, and comes from, each rank."""
        me, size = self.rank, self.size
        for rank in range(size):
            if rank != me and payloads[rank].nbytes > out[rank]:
                raise UsageError(
                    f"a payload of {payloads[rank].nbytes:,} bytes for rank {rank} is above the "
                    f"bound of {out[rank]:,} that its room is made for"
                )
        receives = [
            (rank, piece)
            for rank in ((me - k) % size for k in range(1, size))
            for piece in self._pieces(self._make_room(rank, into[rank]), into[rank])
        ]
        sends = [
            (rank, piece)
            for rank in ((me + k) % size for k in range(1, size))
            for piece in self._pieces(payloads[rank], out[rank])
        ]
        sizes = InFlight(self.comm, receives, sends).wait(self._idle)
        got = [0] * size
        for (rank, _), nbytes in zip(receives, sizes, strict=True):
            got[rank] += nbytes
        self.sent += sum(piece.nbytes for _, piece in sends)
        self.messages += len(sends)
        self.received += sum(sizes)
        found = [self._room[rank][:nbytes] for rank, nbytes in enumerate(got)]
        found[me] = payloads[me]
        return found

    def _make_room(self, rank: int, nbytes: int) -> Bytes:
        if self._room[rank].nbytes < nbytes:
            self._room[rank] = self._allocate(nbytes)
        return self._room[rank]

    def _pieces(self, payload: Bytes, bound: int) -> Iterator[Bytes]:
        """A payload in as many messages as its bound takes; the last ones may be empty."""
        for start in range(0, bound, self._limit):
            yield payload[start : min(start + self._limit, bound)]


def gather_and_add(nodes: tuple[int, ...], n: int, itemsize: int, bound: int) -> Schedule:
    """Everyone gives its payload of all `n` elements to everyone, and adds them in rank order.

    Sent and received per rank: (P - 1) times `bound` bytes, in P - 1 messages.
    """
    size = len(nodes)
    wire = Wire("payload", bound=bound)
    grain = GRAIN // itemsize
    width = -(-n // grain) * grain

    def rounds(rank: int) -> Iterator[Round]:
        if size == 1 or not n:
            return
        row = {peer: width * (1 + k) for k, peer in enumerate(p for p in range(size) if p != rank)}
        out = [Send((rank + k) % size, 0, n, wire) for k in range(1, size)]
        into = [Recv(peer, start, start + n, wire) for peer, start in row.items()]
        yield Round((Cast(0, n, wire),), (*out, *into))
        places = tuple(Place(rank, row.get(peer, 0)) for peer in range(size))
        yield Round((Reduce(0, n, places),))

    def traffic(rank: int) -> Traffic:
        count = size - 1 if n else 0
        return Traffic(count * bound, count, count * bound, count)

    return Schedule(
        "payload all-gather", "all-reduce", n, itemsize, nodes, rounds,
        lambda rank: ((0, n),) if rank == 0 else (), traffic,
    )  # fmt: skip


def two_shot(nodes: tuple[int, ...], n: int, itemsize: int, bound: int) -> Schedule:
    """Chunks go to their owners, which add them up and give the sums to everyone.

    `bound`: bytes of a payload of one chunk. Sent per rank: 2 (P - 1) payloads.
    """
    level = Level("direct", wire=Wire("payload", bound=bound))
    return all_reduce(
        nodes, n, itemsize, (level,), name="payload two-shot", segment_bytes=max(n, 1) * itemsize
    )
