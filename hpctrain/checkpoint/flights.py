"""A checkpoint under way: staged in memory, on its way to where it is kept.

A flight has phases; in each a thread of this rank works, and when those of all ranks are done, all
ranks together (`advance`) exchange what they must know and begin the next phase:

    shared    write, hash, sync  |  rank 0: state.json, rename, remove old ones
    local     write, hash; send to the next node, write what comes  |  records  |  remove old ones

Layer: checkpoint. Is given communicators; knows nothing of what the bytes mean, and when to save.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from hpctrain.checkpoint.agree import on_every_rank, on_rank_zero
from hpctrain.checkpoint.draft import Draft
from hpctrain.checkpoint.drain import Beat, Drain
from hpctrain.checkpoint.local import Bytes, LocalRecord, Mark, NodeFolder, Partners
from hpctrain.checkpoint.record import Piece
from hpctrain.checkpoint.staging import Staging
from hpctrain.checkpoint.write import doing
from hpctrain.errors import CheckpointError
from hpctrain.mpi.rounds import InFlight

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Flight", "LocalFlight", "SharedFlight"]

MESSAGE = 1 << 30  # bytes of one message at most
POLL = 0.002  # seconds between looks for messages


class Flight(Protocol):
    """What `background` asks of a checkpoint under way."""

    level: str

    @property
    def cpu(self) -> float:
        """Seconds of a core that this rank's threads have used."""

    def prepare(self) -> None:
        """Make the folders. Collective."""

    def start(self) -> None:
        """The staged bytes are complete: write them. Not collective."""

    def working(self) -> bool:
        """Whether this rank is at work in this phase; lets messages move. Not collective."""

    def nap(self, beat: Beat) -> None:
        """Wait for a moment; `beat` is called where the work has got on. Not collective."""

    def advance(self) -> bool:
        """No rank is at work: go on, and say whether all is done. Collective.

        Raises `CheckpointError` on all ranks where one has failed; then the flight is over, and
        nothing of it is left.
        """


class SharedFlight:
    """To the folder that all ranks share."""

    level = "shared"

    def __init__(self, comm: MPI.Intracomm, draft: Draft, staging: Staging, before: Beat) -> None:
        """`before`: what rank 0's thread does just before the checkpoint gets its name."""
        self._comm, self._draft, self._staging = comm, draft, staging
        self._before = before
        self._writing: Drain[list[Piece]] | None = None
        self._publishing: Drain[None] | None = None

    @property
    def cpu(self) -> float:
        return sum(drain.cpu for drain in (self._writing, self._publishing) if drain)

    def prepare(self) -> None:
        try:
            on_rank_zero(self._comm, doing(self._draft), self._draft.prepare)
        except CheckpointError:
            self._discard()
            raise

    def start(self) -> None:
        self._writing = Drain("write", lambda beat: self._draft.write(self._staging.blocks(), beat))

    def working(self) -> bool:
        current = self._publishing or self._writing
        return current is None or not current.done

    def nap(self, beat: Beat) -> None:
        current = self._publishing or self._writing
        if current:
            current.nap(beat)

    def advance(self) -> bool:
        try:
            return self._advance()
        except CheckpointError:
            self._discard()
            raise

    def _advance(self) -> bool:
        comm, what, draft = self._comm, doing(self._draft), self._draft
        if self._publishing is None:
            pieces = on_every_rank(comm, what, self._written)
            lists = comm.gather(pieces) or []

            def publish(beat: Beat) -> None:
                if comm.rank == 0:
                    self._before()
                    draft.publish(lists)
                    draft.prune()

            self._publishing = Drain("publish", publish)
            return False
        on_rank_zero(comm, what, self._publishing.result)
        return True

    def _written(self) -> list[Piece]:
        return self._writing.result() if self._writing else []

    def _discard(self) -> None:
        on_rank_zero(self._comm, doing(self._draft), self._draft.discard)


class LocalFlight:
    """To this node's folder, and to the next node's."""

    level = "local"

    def __init__(
        self,
        comm: MPI.Intracomm,
        folder: NodeFolder,
        mark: Mark,
        draft: Draft,
        staging: Staging,
        pairs: Partners,
        arrivals: dict[int, Bytes],
        nbytes: int,
        first_of_node: bool,
    ) -> None:
        """
        Args:
            comm: all ranks; no other messages pass on it.
            draft: says what state.json would; nothing of it is written.
            arrivals: memory for what each of `pairs.sources` sends.
            nbytes: of this rank's own.
            first_of_node: this rank removes what is old.
        """
        self._comm, self._folder, self._mark, self._draft = comm, folder, mark, draft
        self._staging, self._pairs, self._arrivals = staging, pairs, arrivals
        self._needed = nbytes + sum(map(len, arrivals.values()))
        self._first = first_of_node
        self._writing: Drain[list[Piece]] | None = None
        self._messages: InFlight | None = None
        self._copying: Drain[None] | None = None
        self._last: Drain[None] | None = None
        self._complete = False
        self.cpu = 0.0

    @property
    def _what(self) -> str:
        return f"checkpoint {self._mark.name} cannot be written to {self._folder.path}"

    def prepare(self) -> None:
        folder, mark, needed = self._folder, self._mark, self._needed
        on_every_rank(self._comm, self._what, lambda: folder.prepare(mark, needed))

    def start(self) -> None:
        rank, memory = self._comm.rank, self._staging.memory
        self._writing = Drain(
            "write", lambda beat: self._folder.write(self._mark, rank, self._staging.blocks(), beat)
        )
        receives = [(rank, cut) for rank, room in self._arrivals.items() for cut in _cuts(room)]
        sends = [] if self._pairs.to is None else [(self._pairs.to, cut) for cut in _cuts(memory)]
        self._messages = InFlight(self._comm, receives, sends)

    def working(self) -> bool:
        if self._last:
            return not self._last.done
        if self._messages is None or self._writing is None:
            return True
        self._messages.progress()
        if not self._messages.done:
            return True
        if self._copying is None:
            self._copying = Drain("copy", self._copy)
        return not (self._writing.done and self._copying.done)

    def _copy(self, beat: Beat) -> None:
        for rank, data in self._arrivals.items():
            self._folder.write_copy(self._mark, rank, data, beat)

    def nap(self, beat: Beat) -> None:
        for drain in (self._last, self._copying, self._writing):
            if drain and not drain.done:
                drain.nap(beat)
                return
        time.sleep(POLL)  # messages

    def advance(self) -> bool:
        if self._last is None:
            pieces = on_every_rank(self._comm, self._what, self._written)
            records = self._exchange(pieces)
            self._last = Drain("record", lambda beat: self._folder.complete(self._mark, records))
            return False
        on_every_rank(self._comm, self._what, self._last.result)
        self.cpu += self._last.cpu
        if not self._complete:
            self._complete = True
            self._last = Drain("prune", self._prune)
            return False
        return True

    def _written(self) -> list[Piece]:
        pieces: list[Piece] = []
        for drain in (self._copying, self._writing):
            if drain:
                self.cpu += drain.cpu
                pieces = drain.result() or []
        return pieces

    def _prune(self, beat: Beat) -> None:
        if self._first:
            self._folder.prune(self._mark)

    def _exchange(self, pieces: list[Piece]) -> list[tuple[int, bytes]]:
        """This rank's record and those of the ranks whose bytes it has copied."""
        comm, draft, pairs = self._comm, self._draft, self._pairs
        sizes = dict(draft.sizes)
        mine = LocalRecord(draft.step, draft.state, draft.dtypes, sizes, pieces).encode()
        records = [(comm.rank, mine)]
        request = None if pairs.to is None else comm.isend(mine, pairs.to)
        records += [(rank, comm.recv(source=rank)) for rank in pairs.sources]
        if request is not None:
            request.wait()
        return records


def _cuts(memory: Bytes) -> list[Bytes]:
    return [memory[first : first + MESSAGE] for first in range(0, len(memory), MESSAGE)]
