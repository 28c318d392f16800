"""Work that one rank does for all, so that its failure is the same failure on all ranks.

Layer: mpi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from hpctrain.errors import HpctrainError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["on_first_rank"]

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
