"""What a rank does with MPI, as notes: which call, the how-manieth, since when.

Layer: mpi. Does not import mpi4py, so that notes can be read where MPI must not start; see
`hpctrain.mpi.watched` for who writes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Log", "Note", "compact", "expand"]

# Told of a call that is over: its name, group and number as in `Log`, what is known of its buffers
# and partners, and when it began and ended.
Note = Callable[[str, str, int, Mapping[str, Any] | None, float, float], None]


class Log:
    """What a thread of this rank last did with MPI. Written by that thread, read by any.

    Attributes:
        inside: the call that the thread is in: its name; "" outside.
        group, number: of the newest collective: which ranks, and the how-manieth of that group.
        counts: collectives entered so far, by group; of all threads.
        seconds: time spent inside so far.
        branches: the logs of other threads.
        note: who is told of every call that is over; see `tell`.
        carried: what the call under way sends or receives, where somebody is told.
    """

    def __init__(self) -> None:
        self.inside = self.last = self.group = ""
        self.number = 0
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self.branches: list[Log] = []
        self.note: Note | None = None
        self.carried: Mapping[str, Any] | None = None
        self._events = 0
        self._since = 0.0

    @property
    def events(self) -> int:
        """Grows with every call that begins or ends, in any thread, and with `alive`."""
        return self._events + sum(branch.events for branch in self.branches)

    @property
    def all_seconds(self) -> float:
        """Time spent inside so far, by all threads together."""
        return self.seconds + sum(branch.seconds for branch in self.branches)

    def branch(self) -> Log:
        """The log of another thread, whose communicators are its own."""
        log = Log()
        log.counts, log.note = self.counts, self.note
        self.branches.append(log)
        return log

    def tell(self, note: Note | None) -> None:
        """Tell `note` of the calls of all threads from now on, or nobody."""
        for log in (self, *self.branches):
            log.note = note

    def current(self) -> Log:
        """The log of the thread that is inside a call; this one where several are, or none is."""
        return next((log for log in (self, *self.branches) if log.inside), self)

    def enter(self, name: str, group: str) -> None:
        """A call begins; `group` is "" for a message between two ranks."""
        self.group = group
        if group:
            self.number = self.counts[group] = self.counts.get(group, 0) + 1
        self.inside = self.last = name
        self._events += 1
        self._since = time.perf_counter()

    def alive(self) -> None:
        """The rank gets on, without a call."""
        self._events += 1

    def leave(self) -> None:
        """It ends."""
        now = time.perf_counter()
        self.seconds += now - self._since
        if self.note is not None:
            self.note(self.inside, self.group, self.number, self.carried, self._since, now)
            self.carried = None
        self.inside = ""
        self._events += 1


def compact(ranks: Iterable[int]) -> str:
    """Rank numbers in a few characters: "0-3,6"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def expand(text: str) -> list[int]:
    """The inverse of `compact`; what follows a space is left out."""
    ranks: list[int] = []
    for run in text.split()[0].split(","):
        first, _, last = run.partition("-")
        ranks += range(int(first), int(last or first) + 1)
    return ranks
