"""By how much the clocks of ranks differ, with a bound on the error.

Rank 0 asks, a rank answers with its clock. The answer was read between the question and its
arrival, so its clock is ahead of rank 0's by what it says less the middle of the two, to within
half of the time between. Of many questions to a rank the one with the quickest answer counts. The
bound holds for any network, however different its two directions are.

Layer: mpi. Knows nothing of what the clocks are for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Ahead", "measure"]

QUESTIONS = 30  # to each rank: 0.1 ms to 1 ms in all
TAG = 14


class Ahead(NamedTuple):
    """A rank's clock (`time.perf_counter`), in seconds: at `at` it was `by` ahead of rank 0's, to
    within `error`."""

    at: float
    by: float
    error: float


def measure(comm: MPI.Intracomm) -> Ahead:
    """This rank's clock against that of rank 0. Collective.

    One rank after the other is asked: `QUESTIONS` messages there and back each.
    """
    if comm.rank:
        answer = np.empty(1)
        for _ in range(QUESTIONS):
            comm.Recv(answer, 0, TAG)
            answer[0] = time.perf_counter()
            comm.Send(answer, 0, TAG)
        return Ahead(*comm.scatter(None))
    found = [Ahead(time.perf_counter(), 0.0, 0.0)]
    found += [_ask(comm, rank) for rank in range(1, comm.size)]
    return Ahead(*comm.scatter([tuple(each) for each in found]))


def _ask(comm: MPI.Intracomm, rank: int) -> Ahead:
    best, question, answer = Ahead(0.0, 0.0, np.inf), np.zeros(1), np.empty(1)
    for _ in range(QUESTIONS):
        begun = time.perf_counter()
        comm.Send(question, rank, TAG)
        comm.Recv(answer, rank, TAG)
        half = (time.perf_counter() - begun) / 2
        if half < best.error:
            best = Ahead(float(answer[0]), float(answer[0]) - begun - half, half)
    return best
