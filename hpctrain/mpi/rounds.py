"""Messages that are posted together and waited for together, and fences of any ranks.

Layer: mpi. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["InFlight", "fence"]

Array = Any  # of bytes, in host memory
MESSAGE, MEETING = 11, 12  # tags
NOTHING = np.empty(0, np.uint8)


class InFlight:
    """Messages under way. Until `wait` returns, MPI reads and writes their buffers."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        receives: Sequence[tuple[int, Array]],
        sends: Sequence[tuple[int, Array]],
    ) -> None:
        """Post all, each a (rank of `comm`, bytes); a receive may get fewer bytes than it has room.

        Messages from one rank to another meet receives in the order in which both are posted.
        """
        from mpi4py import MPI

        self._all = MPI.Request.Waitall
        self._some = MPI.Request.Testall
        self._count = len(receives)
        self._requests = [comm.Irecv([b, MPI.BYTE], rank, MESSAGE) for rank, b in receives]
        self._requests += [comm.Isend([b, MPI.BYTE], rank, MESSAGE) for rank, b in sends]
        self._statuses = [MPI.Status() for _ in self._requests]

    def progress(self) -> None:
        """Let MPI move what it can: most libraries move long messages only when they are called."""
        # Completed requests become null ones, whose status says nothing: keep the first answer.
        if self._requests and self._some(self._requests, self._statuses):
            self._requests = []

    def wait(self) -> list[int]:
        """Wait for all; the bytes that each receive got."""
        from mpi4py import MPI

        if self._requests:
            self._all(self._requests, self._statuses)
            self._requests = []
        return [status.Get_count(MPI.BYTE) for status in self._statuses[: self._count]]


def fence(comm: MPI.Intracomm, members: Sequence[int]) -> None:
    """Wait until all `members` (ranks of `comm`, in the same order on all) have come here.

    Collective over `members`; ceil(lg n) empty messages each way. In round k everyone tells the
    member 2^k further on, so that in the end everyone has heard, directly or not, of everyone.
    What a rank wrote to memory before can be read by the others after: MPI's own transports rely
    on the same order.
    """
    me, size, apart = members.index(comm.rank), len(members), 1
    while apart < size:
        to, source = members[(me + apart) % size], members[(me - apart) % size]
        comm.Sendrecv(NOTHING, to, MEETING, NOTHING, source, MEETING)
        apart *= 2
