"""Work of several ranks that fails on all of them if it fails on one.

Layer: data. Is given a communicator or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from hpctrain.errors import DataError, HpctrainError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["agreed"]

T = TypeVar("T")


def agreed(
    comm: MPI.Intracomm | None, task: str, work: Callable[[], T], only_first: bool = False
) -> T | None:
    """What `work()` returns on this rank; if it fails on any rank, an error on every rank.

    Collective if `comm` is given. With `only_first` rank 0 alone works and the others get None.
    An `OSError` becomes a `DataError` that begins "cannot <task>". A rank that did not fail itself
    raises a `DataError` with the first failing rank's words.
    """
    result: T | None = None
    failure: HpctrainError | None = None
    if comm is None or comm.rank == 0 or not only_first:
        try:
            result = work()
        except HpctrainError as error:
            failure = error
        except OSError as error:
            failure = DataError(f"cannot {task}: {error}")
    if comm is not None and comm.size > 1:
        from hpctrain.mpi.agree import first_problem

        found = first_problem(comm, str(failure) if failure else "")
        if found and failure is None:
            failure = DataError(found)
    if failure is not None:
        raise failure
    return result
