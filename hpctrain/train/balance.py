"""Which ranks keep the others waiting: their time by phase against that of the rank in the middle.

    compute   in a step, outside MPI
    data      waiting for a batch
    saving    standing still for checkpoints
    messages  inside MPI: what differs is waiting for slower ranks, so it makes nobody slow

Every rank adds up its own seconds. Now and then rank 0 asks, by a number in the step's own
all-reduce, and at the end, and the sums are gathered. In synchronous training all ranks take as
long as the slowest; the difference to it is spent inside MPI.

Layer: train. Knows nothing of how a step is done.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.train.folder import RunFolder
    from hpctrain.train.progress import Progress

__all__ = ["PHASES", "Balance", "Slow", "slowest"]

PHASES = ("compute", "data", "saving")
FIRST, EVERY = 60.0, 300.0  # seconds until the first question, and between two
SHOWN = 3  # ranks that are named
RANKS = 1024  # of larger runs only the median and the worst ranks are recorded
WORTH = 0.1  # of the time of the rank in the middle: less is not worth a line


@dataclass(frozen=True)
class Slow:
    """A rank that takes longer than the rank in the middle, by `extra` seconds a step."""

    rank: int
    host: str
    phase: str  # of PHASES: the one with the most of it
    extra: float
    ratio: float  # of its time to that of the rank in the middle


class Balance:
    """Adds up this rank's seconds; `first_rank`: this rank asks."""

    def __init__(self, comm: MPI.Intracomm, first_rank: bool) -> None:
        self._comm, self._first = comm, first_rank
        self._seconds = [0.0] * (len(PHASES) + 1)
        self._steps = 0
        self._next = time.monotonic() + FIRST

    def wants(self) -> float:
        """1 where it is time to compare, to be added up over the ranks."""
        return float(self._first and time.monotonic() >= self._next)

    def count(self, compute: float, data: float, saving: float, messages: float = 0.0) -> None:
        """The seconds of a step."""
        for index, seconds in enumerate((compute, data, saving, messages)):
            self._seconds[index] += seconds
        self._steps += 1

    def finish(self, step: int, folder: RunFolder) -> None:
        """Compare what was not compared yet, for the record alone. Collective."""
        self.agree(1.0, step, folder, None)

    def agree(self, asked: float, step: int, folder: RunFolder, progress: Progress | None) -> None:
        """Compare where rank 0 has asked: a record, and a line where it is worth one. Collective.

        `asked`: the sum of what ranks want.
        """
        if not asked or not self._steps:
            return
        steps, mine = self._steps, (platform.node(), self._seconds)
        self._seconds, self._steps = [0.0] * (len(PHASES) + 1), 0
        self._next = time.monotonic() + EVERY
        told = self._comm.gather(mine)
        if told is None:
            return
        hosts, sums = [host for host, _ in told], [each for _, each in told]
        seconds = [each[: len(PHASES)] for each in sums]
        slow = slowest(hosts, seconds, steps)
        each_rank = {"hosts": hosts, "seconds": [[round(s, 4) for s in each] for each in sums]}
        middle = {p: median(each[i] for each in seconds) / steps for i, p in enumerate(PHASES)}
        folder.record(
            "balance",
            step=step,
            steps=steps,
            median={phase: round(value, 6) for phase, value in middle.items()},
            slowest=[_rounded(asdict(each)) for each in slow],
            **(each_rank if len(hosts) <= RANKS else {}),
        )
        if slow and progress is not None:
            progress.message(f"slow: {', '.join(map(_text, slow))}; see docs/stop-resume.md")


def slowest(hosts: Sequence[str], seconds: Sequence[Sequence[float]], steps: int) -> list[Slow]:
    """The ranks that are slower than the rank in the middle by what is worth saying, worst first.

    Args:
        hosts: of every rank.
        seconds: of every rank, by phase.
        steps: in which they were spent.
    """
    totals = [sum(each) for each in seconds]
    middle = median(totals)
    phases = [median(each[index] for each in seconds) for index in range(len(PHASES))]
    found = []
    for rank in sorted(range(len(totals)), key=lambda rank: -totals[rank])[:SHOWN]:
        extra = totals[rank] - middle
        if extra <= WORTH * middle or middle <= 0:
            break
        beyond = [mine - usual for mine, usual in zip(seconds[rank], phases, strict=True)]
        phase = PHASES[beyond.index(max(beyond))]
        found.append(Slow(rank, hosts[rank], phase, extra / steps, totals[rank] / middle))
    return found


def _text(slow: Slow) -> str:
    return (
        f"rank {slow.rank} ({slow.host}) takes {slow.ratio:.2f} times as long as most, "
        f"{slow.extra:.3g} s a step more, in {slow.phase}"
    )


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(v, 6) if isinstance(v, float) else v for key, v in values.items()}
