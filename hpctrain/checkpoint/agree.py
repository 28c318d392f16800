"""What all ranks do together, so that a failure on one is the same failure on all.

An exception that one rank raises between two collectives is a hang on the others. Every piece of
work that can fail therefore runs in one of the two functions here, which end in one exchange.

Layer: checkpoint. Is given a communicator and the work; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hpctrain.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["on_every_rank", "on_rank_zero"]

T = TypeVar("T")


def on_every_rank(comm: MPI.Intracomm, doing: str, work: Callable[[], T]) -> T:
    """This rank's `work()`. Collective.

    Where it fails on any rank, all raise the same `CheckpointError`: `doing`, then the first
    failing rank's reason, and how many other ranks failed.
    """
    result, cause = _attempt(work)
    reasons = comm.allgather(cause and _reason(cause, comm.rank))
    failed = [reason for reason in reasons if reason]
    if failed:
        others = len(failed) - 1
        more = f" ({others} other rank{'s' * (others > 1)} failed too)" if others else ""
        raise CheckpointError(f"{doing}: {failed[0]}{more}") from cause
    return result  # type: ignore[return-value]


def on_rank_zero(comm: MPI.Intracomm, doing: str, work: Callable[[], T]) -> T:
    """Rank 0's `work()`, on every rank; where it fails, all raise the same error. Collective."""
    result, cause = _attempt(work) if comm.rank == 0 else (None, None)
    shared: tuple[T, str | None] = comm.bcast((result, cause and _reason(cause, 0)))
    if shared[1]:
        raise CheckpointError(f"{doing}: {shared[1]}") from cause
    return shared[0]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # also MemoryError or a device's error: the others must not wait
        return None, error


def _reason(error: Exception, rank: int) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if not isinstance(error, OSError):
        return f"rank {rank}: {type(error).__name__}: {error}"
    name = f"{Path(error.filename).name}: " if error.filename else ""
    hint = ""
    if rank and isinstance(error, FileNotFoundError):
        hint = "; the folder must lie on a file system that all ranks share"
    return f"rank {rank}: {name}{error.strerror or error}{hint}"
