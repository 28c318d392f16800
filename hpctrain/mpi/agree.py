"""Work that one rank does for all, and failures of one rank that all must know of.

Layer: mpi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from hpctrain.errors import HpctrainError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["first_problem", "on_first_rank"]

T = TypeVar("T")


def on_first_rank(comm: MPI.Intracomm, work: Callable[[], T]) -> T:
    """What `work()` returns on rank 0, on every rank; where it fails, all raise. Collective.

    Result and error are pickled. An `OSError`, such as a folder that cannot be written, becomes a
    `UsageError`.
    """
    result: T | None = None
    failure: HpctrainError | None = None
    if comm.rank == 0:
        try:
            result = work()
        except HpctrainError as error:
            failure = error
        except OSError as error:
            failure = UsageError(f"{error.filename}: {error.strerror or error}")
    result, failure = comm.bcast((result, failure))
    if failure is not None:
        raise failure
    return result


def first_problem(comm: MPI.Intracomm, problem: str) -> str:
    """The problem of the first rank that has one, on all ranks; "" if none has. Collective."""
    from mpi4py import MPI

    first = comm.allreduce(comm.rank if problem else comm.size, MPI.MIN)
    if first == comm.size:
        return ""
    return f"rank {first}: {comm.bcast(problem, root=first)}"
