"""Plain messages on arrays: what the collectives need from MPI, with no limit on the size.

MPI counts in 32-bit integers (Open MPI refuses more), so long buffers go in several messages, and
buffers that hold many ranks' parts are counted in lines of 32 bytes.

An array is one of NumPy, or of a GPU where the MPI library may be given its memory; then the caller
has waited for the work that writes or reads it (nothing here does).

Layer: mpi. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import UsageError
from hpctrain.mpi.rounds import Idle, finish, nap

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["LINE", "MESSAGE_BYTES", "allreduce", "allreduce_sum", "exchange", "gather_parts"]

LINE = 32  # bytes: half of what slices are cut at, for those that cross in half as many bits
IN_ORDER = 1 << 20  # bytes: a millisecond at 1 GB/s
MESSAGE_BYTES = 1 << 30  # of one message: far below 2^31 elements of any type

PART = 13  # tag
Array = Any  # numpy.ndarray, or an array of a GPU
Part = tuple[int, int]  # (first line, last line + 1)
SUMMABLE = "fdilqILQ"  # dtype.char of the types that MPI_SUM has on every MPI library


def allreduce(comm: MPI.Intracomm, array: Array, message_bytes: int = MESSAGE_BYTES) -> None:
    """Replace `array` by its sum over all ranks, by MPI_Allreduce. Collective.

    `array`: shape (n,), contiguous, same n and dtype on all ranks. The order of additions is the
    MPI library's. Bytes per rank: about 2 (P - 1) / P of the array, depending on the library.

    Raises:
        UsageError: a dtype that MPI cannot add, above all 16-bit floats: few libraries have them,
            and some add their bytes.
    """
    from mpi4py import MPI

    if array.dtype.char not in SUMMABLE:
        raise UsageError(
            f"MPI_SUM cannot add {array.dtype}: every MPI library adds float32, float64 and whole "
            "numbers of 32 or 64 bits, nothing else; convert the array, or send it as bytes and "
            "add it by a kernel"
        )
    count = max(message_bytes // array.itemsize, 1)
    for start in range(0, array.size, count):
        comm.Allreduce(MPI.IN_PLACE, array[start : start + count])


def allreduce_sum(comm: MPI.Intracomm, values: NDArray[np.float64]) -> None:
    """Replace the contiguous float64 `values` by their sums over all ranks. Collective.

    Up to `IN_ORDER` bytes from all ranks together are gathered and added in rank order: the same
    bits on all ranks and on every run, which the MPI_Allreduce that more bytes go through does not
    promise. Gathering receives P n values, MPI_Allreduce about 2 n. Whoever comes early sleeps, see
    `rounds.nap`.
    """
    if comm.size == 1 or values.size == 0:
        return
    if values.nbytes * comm.size > IN_ORDER:
        allreduce(comm, values.reshape(-1))
        return
    rows = np.empty((comm.size, values.size))
    finish(comm, [comm.Iallgather(values, rows)], nap, name="Allgather")
    values.reshape(-1)[:] = np.add.accumulate(rows, axis=0)[-1]


def exchange(
    comm: MPI.Intracomm,
    array: Array,
    parts: Sequence[Part],
    received: Array,
    idle: Idle | None = None,
) -> None:
    """Send `parts[k]` of `array` to rank k; put rank k's part for this one into row k. Collective.

    Args:
        array: contiguous, of any dtype, a multiple of 32 bytes; only read.
        parts: one per rank, the same on all ranks: lines of `array`, not overlapping.
        received: contiguous, P rows, each of a multiple of 32 bytes and with room for this rank's
            part; overwritten. This rank's own row is left alone.
        idle: see `rounds`; None: wait in MPI.

    One message to and from each other rank; a rank sends all parts but its own.
    """
    width = received.nbytes // comm.size // LINE
    first, last = parts[comm.rank]
    line, others = _line(), [k for k in range(comm.size) if k != comm.rank]
    requests = []
    for k in others:  # sends first: see `rounds.InFlight`
        start, stop = parts[k]
        if start < stop:
            requests.append(comm.Isend([array, (stop - start, start), line], k, PART))
    if first < last:
        requests += [
            comm.Irecv([received, (last - first, width * k), line], k, PART) for k in others
        ]
    finish(comm, requests, idle)


def gather_parts(
    comm: MPI.Intracomm,
    array: Array,
    parts: Sequence[Part],
    own: Array | None = None,
    idle: Idle | None = None,
) -> None:
    """Complete `array` on all ranks, of which rank k holds the lines `parts[k]`. Collective.

    `array`, `parts`, `idle`: as for `exchange`. Each rank receives all parts but its own, which it
    has in its place in `array`, or at the start of `own`, and sends to everyone.
    """
    line, requests = _line(), []
    first, last = parts[comm.rank]
    if first < last:  # sends first: see `rounds.InFlight`
        mine = [array, (last - first, first), line] if own is None else [own, last - first, line]
        requests += [comm.Isend(mine, k, PART) for k in range(comm.size) if k != comm.rank]
    for k in range(comm.size):
        start, stop = parts[k]
        if k != comm.rank and start < stop:
            requests.append(comm.Irecv([array, (stop - start, start), line], k, PART))
    finish(comm, requests, idle)


@functools.cache
def _line() -> MPI.Datatype:
    from mpi4py import MPI

    return MPI.BYTE.Create_contiguous(LINE).Commit()
