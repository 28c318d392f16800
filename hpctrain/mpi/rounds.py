"""Messages that are posted together and waited for together, and fences of any ranks.

Whoever waits beside a thread that computes gives an `idle` function, which is called between two
looks and sleeps: an MPI library's own waiting would take that thread's core. `nap` is one for those
who wait for slower ranks.

Layer: mpi. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Idle", "InFlight", "fence", "finish", "for_thread", "nap", "noted", "threads_may_call"]

Array = Any  # of bytes, in host memory
Idle = Callable[[float], None]  # is given the seconds waited so far
MESSAGE, MEETING = 11, 12  # tags
NOTHING = np.empty(0, np.uint8)
AT_ONCE, SHORTEST, LONGEST = 1e-4, 2e-5, 1e-3  # seconds; see `nap`


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

        self._comm, self._count = comm, len(receives)
        # Sends first. Over TCP, Open MPI answers a partner's announced message when its receive is
        # posted. If that answer comes before our own announcement, the partner begins to send and
        # answers us behind its whole message: one direction after the other, in twice the time.
        leaving = [comm.Isend([b, MPI.BYTE], rank, MESSAGE) for rank, b in sends]
        self._requests = [comm.Irecv([b, MPI.BYTE], rank, MESSAGE) for rank, b in receives]
        self._requests += leaving
        self._statuses = [MPI.Status() for _ in self._requests]

    @property
    def done(self) -> bool:
        """Whether nothing is under way any more, as far as `progress` has seen."""
        return not self._requests

    def progress(self) -> None:
        """Let MPI move what it can: most libraries move long messages only when they are called."""
        from mpi4py import MPI

        # Completed requests become null ones, whose status says nothing: keep the first answer.
        if self._requests and MPI.Request.Testall(self._requests, self._statuses):
            self._requests = []

    def wait(self, idle: Idle | None = None) -> list[int]:
        """Wait for all; the bytes that each receive got."""
        from mpi4py import MPI

        if self._requests:
            finish(self._comm, self._requests, idle, self._statuses)
            self._requests = []
        return [status.Get_count(MPI.BYTE) for status in self._statuses[: self._count]]


def finish(
    comm: MPI.Intracomm,
    requests: list[MPI.Request],
    idle: Idle | None = None,
    statuses: list[MPI.Status] | None = None,
    name: str = "exchange",
) -> None:
    """Wait for requests of `comm`; a watched communicator notes it as the collective `name`."""
    from mpi4py import MPI

    with noted(comm, name):
        if idle is None:
            MPI.Request.Waitall(requests, statuses)
            return
        begun = time.perf_counter()
        while not MPI.Request.Testall(requests, statuses):
            idle(time.perf_counter() - begun)


def nap(waited: float) -> None:
    """An `Idle`: look on for 0.1 ms, then sleep for a sixteenth of what was waited, 1 ms at most.

    So it ends at most 6 % late, and the core is left to other ranks where they have to share it: 8
    ranks on 2 cores, of 4 nodes on links of 100 Mbit/s, computed for 0.50 s of CPU time in a step
    that took 0.26 s; in MPI's own waiting they used 0.85 s, and the step took 0.38 s.
    """
    if waited > AT_ONCE:
        time.sleep(min(max(waited / 16, SHORTEST), LONGEST))


def fence(comm: MPI.Intracomm, members: Sequence[int], idle: Idle | None = None) -> None:
    """Wait until all `members` (ranks of `comm`, in the same order on all) have come here.

    Collective over `members`; ceil(lg n) empty messages each way. In round k everyone tells the
    member 2^k further on, so that in the end everyone has heard, directly or not, of everyone.
    What a rank wrote to memory before can be read by the others after: MPI's own transports rely
    on the same order.
    """
    me, size, apart = members.index(comm.rank), len(members), 1
    while apart < size:
        to, source = members[(me + apart) % size], members[(me - apart) % size]
        requests = [comm.Irecv(NOTHING, source, MEETING), comm.Isend(NOTHING, to, MEETING)]
        finish(comm, requests, idle, name="fence")
        apart *= 2


def noted(comm: MPI.Intracomm, name: str) -> contextlib.AbstractContextManager[None]:
    """Note what is done meanwhile as a collective of `comm`, where it is watched."""
    note = getattr(comm, "noted", None)
    return contextlib.nullcontext() if note is None else note(name)


def for_thread(*comms: MPI.Intracomm) -> list[MPI.Intracomm]:
    """Duplicates that another thread of this rank uses, beside the originals. Collective."""
    copies = [comm.Dup() for comm in comms]
    watched: list[Any] = [comm for comm in copies if hasattr(comm, "log")]
    if watched:
        branch = watched[0].log.branch()
        for comm in watched:
            comm.log = branch
    return copies


def threads_may_call() -> bool:
    """Whether several threads of this rank may be inside MPI at once."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)
