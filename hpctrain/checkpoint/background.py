"""Checkpoints that training does not wait for: copied to memory, written by a thread.

    saver.begin(step, parts, state)     copies; collective
    ... forward, backward ...
    saver.settle()                      before anything of the copied arrays changes
    saver.wants(), saver.agree(sum)     around every step: go on with what is under way
    saver.finish()                      wait for it; collective

One checkpoint is under way at a time. What a thread fails at is raised by `agree` or `finish`, on
all ranks alike. MPI is called only in these methods, by the thread that calls them.

Where a node has too little memory for the copies, a checkpoint is written while training waits.

Layer: checkpoint. Is given parts, a device and a topology; knows nothing of what they mean.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.checkpoint import write
from hpctrain.checkpoint.agree import on_every_rank, on_rank_zero
from hpctrain.checkpoint.drain import Beat
from hpctrain.checkpoint.flights import Flight, LocalFlight, SharedFlight
from hpctrain.checkpoint.local import Bytes, Mark, NodeFolder, partners
from hpctrain.checkpoint.parts import Part, plan_files
from hpctrain.checkpoint.staging import Staging, needed_bytes
from hpctrain.errors import CheckpointError
from hpctrain.mpi.agree import first_problem
from hpctrain.mpi.memory import available_memory

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.mpi.topology import Topology

__all__ = ["Saved", "Saver"]

LOG = logging.getLogger(__name__)
MARGIN = 0.8  # of a node's available memory that copies may take


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        level: "shared" or "local".
        blocked: seconds for which training stood still for it.
        total: seconds from its beginning until it was complete.
        cpu: seconds of cores that all ranks used to write it, besides `blocked`.
        nbytes: of all ranks.
    """

    step: int
    level: str
    blocked: float
    total: float
    cpu: float
    nbytes: int


class Saver:
    """Saves checkpoints of a run. All methods are collective but `wants`, `settle` and `busy`."""

    def __init__(
        self,
        folder: Path,
        where: Topology,
        device: Device,
        keep: int = 2,
        local: NodeFolder | None = None,
        alive: Beat = lambda: None,
        before: Beat = lambda: None,
    ) -> None:
        """
        Args:
            folder, keep: as for `save`.
            where: the ranks; a communicator of our own is made of it.
            local: this node's folder, to use the level "local".
            alive: called while a rank waits in `finish`, and its thread gets on.
            before: what rank 0's thread does just before a checkpoint gets its name.
        """
        self._folder, self._where, self._device, self._keep = folder, where, device, keep
        self._local, self._alive, self._before = local, alive, before
        self._comm = where.comm.Dup()
        self._pairs = partners(where) if local else None
        self._staging = Staging(device)
        self._arrivals: dict[int, Bytes] = {}
        self._flight: Flight | None = None
        self._settled = True
        self._begun = self._blocked = 0.0
        self._step = 0
        self.staged = True  # whether there is memory for copies; else `begin` does everything

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way; the same on all ranks."""
        return self._flight is not None

    def reserve(self, parts: Sequence[Part]) -> None:
        """Take the memory that `begin` will need, or warn, and do without. Collective."""
        where, plans = self._where, plan_files(parts)
        own = needed_bytes(plans, parts, where.rank == 0)
        sizes = self._comm.allgather(own)
        sources = self._pairs.sources if self._pairs else []
        total = where.node.allreduce(own + sum(sizes[rank] for rank in sources))
        free = int(MARGIN * available_memory())
        problem = ""
        if total > free:
            problem = f"{total / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB can be had"
        if found := first_problem(self._comm, problem):
            self.staged = False
            if where.rank == 0:
                LOG.warning(
                    "training will wait while checkpoints are written, and there are none on "
                    "nodes: no memory to copy them to (%s)",
                    found,
                )
            return

        def take() -> None:
            self._staging.reserve(own)
            self._arrivals = {rank: self._device.staging(sizes[rank]) for rank in sources}
            for room in self._arrivals.values():
                room.fill(0)

        on_every_rank(self._comm, "memory for copies of checkpoints", take)

    def begin(
        self, step: int, parts: Sequence[Part], state: Mapping[str, Any], level: str = "shared"
    ) -> Saved | None:
        """Begin to save; no other checkpoint may be under way. Collective.

        Args:
            step, parts, state: as for `save`; the parts' sizes are those that `reserve` was told.
            level: "shared", or "local" where the saver has a folder for it.

        Returns:
            what was saved where it is done already, for lack of memory, else None.

        Raises:
            CheckpointError: the same on all ranks.
        """
        if self._flight is not None:
            raise CheckpointError(f"step {self._step} is still being saved; call finish first")
        begun = time.perf_counter()
        if not self.staged:
            return self._at_once(step, parts, state, begun)
        comm, first = self._comm, self._comm.rank == 0
        draft, plans = write.begin(self._folder, step, parts, state, comm, self._keep)
        flight: Flight = SharedFlight(comm, draft, self._staging, self._before)
        if level == "local" and self._local and self._pairs:
            save = on_rank_zero(comm, write.doing(draft), lambda: secrets.token_hex(4))
            flight = LocalFlight(
                comm, self._local, Mark(step, comm.size, save), draft, self._staging, self._pairs,
                self._arrivals, needed_bytes(plans, parts, first), self._where.local_rank == 0,
            )  # fmt: skip
        flight.prepare()
        self._staging.copy(plans, parts, first)
        self._flight, self._settled, self._step = flight, False, step
        self._begun, self._blocked = begun, time.perf_counter() - begun
        return None

    def _at_once(
        self, step: int, parts: Sequence[Part], state: Mapping[str, Any], begun: float
    ) -> Saved:
        to_host = self._device.to_host
        write.save(self._folder, step, parts, state, self._comm, self._keep, to_host)
        seconds = time.perf_counter() - begun
        nbytes = needed_bytes(plan_files(parts), parts, self._comm.rank == 0)
        return Saved(step, "shared", seconds, seconds, 0.0, self._comm.allreduce(nbytes))

    def settle(self) -> None:
        """Wait until the arrays are copied, and let the thread write. Not collective."""
        if self._flight and not self._settled:
            begun = time.perf_counter()
            self._staging.settle()
            self._settled = True
            self._flight.start()
            self._blocked += time.perf_counter() - begun

    def wants(self) -> float:
        """1 while this rank is at work, else 0; to be added up over the ranks. Not collective."""
        return float(self._flight is not None and self._flight.working())

    def agree(self, working: float) -> Saved | None:
        """Go on where no rank is at work: `working` is the sum of what ranks want. Collective.

        Returns a checkpoint that is complete now. Raises `CheckpointError` on all ranks.
        """
        if self._flight is None or working:
            return None
        begun = time.perf_counter()
        flight = self._flight
        self._flight = None  # after an error there is none
        done = flight.advance()
        self._blocked += time.perf_counter() - begun
        if not done:
            self._flight = flight
            return None
        used = flight.cpu, float(self._staging.memory.nbytes)
        cpu, nbytes = (sum(values) for values in zip(*self._comm.allgather(used), strict=True))
        total = time.perf_counter() - self._begun
        return Saved(self._step, flight.level, self._blocked, total, cpu, int(nbytes))

    def finish(self) -> Saved | None:
        """Wait until nothing is under way; what became complete. Collective."""
        saved = None
        self.settle()
        while (flight := self._flight) is not None:
            begun = time.perf_counter()
            while flight.working():
                flight.nap(self._alive)
            self._blocked += time.perf_counter() - begun
            saved = self.agree(0.0)
        return saved

    def close(self, orderly: bool) -> None:
        """Give communicators and memory back; `orderly`: the shared checkpoints are enough, so
        that what is on the nodes goes. Collective."""
        if orderly and self._local and self._where.local_rank == 0:
            self._local.remove()
        self._comm.Free()
