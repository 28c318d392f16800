"""The part of a sliced reduction that crosses nodes: messages within one column.

Layer: collectives. Is given the column's communicator and slices; knows nothing of how the
column was added up within each node, nor of how arrays get to MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.carry import STAGE_BYTES, Carrier, Direct, Range, Staged
from hpctrain.mpi import messages

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["Across", "carrier"]

Array = Any  # of the device
# Received in one round, by default: small enough to be still in the cache when it is added up.
ROUND_BYTES = 16 << 20
LEAST_BYTES = 64 << 10  # of one message, where there are very many nodes


class Across:
    """Reduce-scatter and all-gather of a column that is cut into one slice per node.

    Long slices go in rounds: every round moves a piece of every slice, at most `message_bytes`.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        slices: Sequence[Range],
        device: Device,
        gradients: Array,
        parameters: Array,
        sums: Array,
        gpu_mpi: bool = False,
        message_bytes: int | None = None,
    ) -> None:
        """Args:

        comm: the column's ranks, in node order.
        slices: (start, stop) in elements for every rank of `comm`, the same on all.
        gradients, parameters: shape (padded n,) on the device.
        sums: this rank's slice of the gradients, or an array of its length in float32 where they
            are bfloat16 or float16: what `reduce` writes.
        gpu_mpi: whether the arrays of a GPU are given to MPI as they are.
        message_bytes: most bytes in a message; default 16 MiB per round and rank, or 4 MiB where
            each round goes through the host.
        """
        self._comm, self._device = comm, device
        self._gradients, self._parameters, self._sums = gradients, parameters, sums
        self._first = slices[comm.rank][0]
        self._short = sums.dtype != gradients.dtype
        longest = max(stop - start for start, stop in slices)
        self._carrier, width = carrier(
            comm, device, gradients.dtype, longest, gpu_mpi, message_bytes
        )
        self._rounds = [
            [(min(start + at, stop), min(start + at + width, stop)) for start, stop in slices]
            for at in range(0, longest, width)
        ]
        self._tables: dict[tuple[int, int], tuple[Array, Array]] = {}

    def reduce(self) -> None:
        """Write the sum over the column of this rank's slice into `sums`. Collective.

        The slices are only read. Added in node order, by one rank: no other order is possible
        for the same bits. With N nodes a rank sends and receives (N - 1) / N of the column, in
        N - 1 messages per round.
        """
        for which, pieces, rows in self._carrier.exchange(self._gradients, self._rounds):
            start, stop = pieces[self._comm.rank]
            if start < stop:
                first, table = self._table(which, start, rows)
                count = stop - start
                total = self._sums[start - self._first : stop - self._first]
                if self._short:
                    self._device.launch(
                        "sum_widened", first[:count], table, self._comm.size - 1, 0, total, count,
                        work=count,
                    )  # fmt: skip
                else:
                    self._device.launch(
                        "sum_peers", table, self._comm.size, 0, total, count, work=count
                    )

    def gather(self) -> None:
        """Complete the column of the parameters, of which each rank holds its slice. Collective.

        A rank receives (N - 1) / N of the column; messages per round: the MPI library's.
        """
        self._carrier.gather(self._parameters, self._rounds)

    def _table(self, which: int, start: int, rows: Sequence[Array]) -> tuple[Array, Array]:
        """The first row, and a table of all, or in 16 bits of the others; made in the first step.

        The own gradients take the place of this rank's row.

        All that they point to lives as long as this object.
        """
        if (which, start) not in self._tables:
            parts = list(rows)
            parts[self._comm.rank] = self._gradients[start:]
            table = self._device.peers(parts[1:] if self._short else parts)
            self._tables[which, start] = parts[0], table
        return self._tables[which, start]


def carrier(
    comm: MPI.Intracomm,
    device: Device,
    dtype: np.dtype[Any],
    longest: int,
    gpu_mpi: bool,
    message_bytes: int | None,
) -> tuple[Carrier, int]:
    """What carries pieces of at most `width` elements for slices of up to `longest`; and `width`.

    `width` is a multiple of 64 bytes, at least one.
    """
    staged = device.name != "cpu" and not gpu_mpi
    each = (STAGE_BYTES if staged else ROUND_BYTES) // comm.size
    wanted = min(message_bytes or max(each, LEAST_BYTES), messages.MESSAGE_BYTES)
    grain = messages.LINE // dtype.itemsize
    grains = min(max(wanted // messages.LINE, 1), -(-longest // grain))
    width = max(grains, 1) * grain
    return (Staged if staged else Direct)(comm, device, dtype, width), width
