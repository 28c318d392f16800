"""The part of a sliced reduction that crosses nodes, by an algorithm that is data.

`Across` sends every other node a message; where there are very many nodes fewer messages are
quicker. Here a column is reduced and gathered by schedules of its ranks, one per node, which
`verifier` checks and `cost` prices like any other, and `interpreter` runs.

Order of additions: that of the algorithm, see `algorithms_flat`: of "halving" a tree of pairs of
nodes, of "ring" round the ring. The same bits on all ranks and every run with as many nodes, and
other bits than with "direct", which adds in node order.

Layer: collectives. Is given a column; knows nothing of how it was added up within each node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.algorithms import Level, all_gather, reduce_scatter
from hpctrain.collectives.between import Column
from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.interpreter import Interpreter
from hpctrain.collectives.ports import BFLOAT16, FLOAT16, message_array
from hpctrain.collectives.schedule import Schedule
from hpctrain.device.dtypes import is_short
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Scheduled", "schedules"]

Array = Any  # of the device
SEGMENT_BYTES = 4 << 20  # of a message, at most, by default
WIRES = {"bfloat16": BFLOAT16, "float16": FLOAT16}


@dataclass(frozen=True)
class Ranks:
    """The ranks of a column, for an interpreter."""

    comm: MPI.Intracomm

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size


def schedules(
    algorithm: str, size: int, n: int, dtype: np.dtype[Any], wire: str, segment_bytes: int
) -> tuple[Schedule, Schedule]:
    """The reduce-scatter and the all-gather of a column of `n` elements on `size` nodes.

    Sums are of float32 (float64 of gradients of float64), and cut where the gradients are: 16-bit
    ones every 32 elements. Parameters cross as they are: of 16 bits two at a time, as one of 4
    bytes. With M nodes a rank sends (M - 1) / M of the column each way.
    """
    nodes, short = tuple(range(size)), is_short(dtype)
    carried = WIRES.get(dtype.name if short else wire)
    each = max(dtype.itemsize, 4)
    scatter = reduce_scatter(
        nodes, n, each, (Level(algorithm, wire=carried),),
        name=algorithm, segment_bytes=segment_bytes, grain=GRAIN * each // dtype.itemsize,
    )  # fmt: skip
    gather = all_gather(
        nodes, -(-n * dtype.itemsize // each), each, (Level(algorithm),),
        name=algorithm, segment_bytes=segment_bytes,
    )  # fmt: skip
    return scatter, gather


class Scheduled:
    """Reduce-scatter and all-gather of a column by one of `algorithms.ACROSS`; see `Between`.

    With a wire, or 16-bit gradients, what a message carries is rounded to 16 bits: with "halving" a
    sum of nodes up to lg M times, with "ring" up to M - 1 times. Additions are in float32.
    """

    def __init__(self, column: Column, algorithm: str, wire: str = "same") -> None:
        """`wire`: see `Dense`. Raises `UsageError` where a wire is for other gradients."""
        self._column, self._device = column, column.device
        dtype, (start, stop) = column.gradients.dtype, column.span
        if wire != "same" and dtype != np.float32:
            raise UsageError(
                f'the wire "{wire}" is for gradients of float32; these are {dtype}: use '
                'wire = "same"'
            )
        n, ranks = stop - start, Ranks(column.comm)
        scatter, gather = schedules(
            algorithm, ranks.size, n, dtype, wire, column.message_bytes or SEGMENT_BYTES
        )
        first, last = column.slices[ranks.rank]
        self._own = slice(first - start, last - start)
        self._buffer = column.gradients[start:stop]
        if is_short(dtype):
            staged = column.device.name != "cpu" and not column.gpu_mpi
            self._buffer = message_array(column.device, n, np.dtype(np.float32), staged)
        parameters = column.parameters[start : start + gather.n * gather.itemsize // dtype.itemsize]
        self._scatter, self._gather = (
            Interpreter(ranks, column.device, made, array, gpu_mpi=column.gpu_mpi, idle=column.idle)
            for made, array in (
                (scatter, self._buffer),
                (gather, parameters.view(self._buffer.dtype)),
            )
        )

    def reduce(self) -> None:
        """Write the sum over the column of this rank's slice into `sums`. Collective.

        The column's gradients are undefined afterwards.
        """
        column, (start, stop) = self._column, self._column.span
        if self._buffer.dtype != column.gradients.dtype:
            own, n = column.gradients[start:stop], stop - start
            self._device.launch("sum_widened", own, None, 0, 0, self._buffer, n, work=n)
        self._scatter.run()
        if self._own.start < self._own.stop:
            self._device.copy(column.sums, self._buffer[self._own])

    def gather(self) -> None:
        """Complete the column of the parameters, of which each rank holds its slice. Collective."""
        self._gather.run()
