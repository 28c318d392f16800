"""The part of a sliced reduction that crosses nodes: messages within one column.

Layer: collectives. Is given a column and its communicator; knows nothing of how the column was
added up within each node, nor of how arrays get to MPI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.between import Between, Column
from hpctrain.collectives.carry import STAGE_BYTES, Carrier, Direct, Staged
from hpctrain.collectives.cut import Range
from hpctrain.collectives.scheduled import Scheduled
from hpctrain.device.dtypes import FLOATS
from hpctrain.errors import UsageError
from hpctrain.mpi import messages
from hpctrain.mpi.rounds import Idle

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["Across", "Dense", "carrier"]

Array = Any  # of the device
# Received in one round, by default: small enough to be still in the cache when it is added up.
ROUND_BYTES = 16 << 20
LEAST_BYTES = 64 << 10  # of one message, where there are very many nodes


@dataclass(frozen=True)
class Dense:
    """Sums of all numbers: makes an `Across` or a `Scheduled` of every column.

    Attributes:
        wire: what the nodes' sums are rounded to before they cross: "same" (nothing), "bfloat16" or
            "float16", of float32 gradients only. They are added in float32.
        algorithms: for each bucket a name in `algorithms.ACROSS`; one that is not there: "direct".
            The same on all ranks.
    """

    wire: str = "same"
    algorithms: Mapping[Range, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return False

    def __call__(self, column: Column) -> Between:
        algorithm = self.algorithms.get(column.bucket, "direct")
        if algorithm == "direct":
            return Across(column, self.wire)
        return Scheduled(column, algorithm, self.wire)


class Across:
    """Reduce-scatter and all-gather of a column that is cut into one slice per node.

    Long slices go in rounds: every round moves a piece of every slice, at most `message_bytes`: by
    default 16 MiB per round and rank, or 4 MiB where each round goes through the host.
    """

    def __init__(self, column: Column, wire: str = "same") -> None:
        """`wire`: see `Dense`. Raises `UsageError` where the gradients are not float32."""
        self._column, self._comm, self._device = column, column.comm, column.device
        # What crosses, and the place in the flat arrays of its first element.
        self._sent, self._begin = column.gradients, 0
        if wire != "same":
            self._sent, self._begin = self._room(wire), column.span[0]
        self._short = column.sums.dtype != self._sent.dtype
        slices = [(start - self._begin, stop - self._begin) for start, stop in column.slices]
        self._first = slices[self._comm.rank][0]
        self._sending, self._reduction = self._plan(self._sent.dtype, slices)
        self._carrier, self._rounds = self._sending, self._reduction
        if wire != "same":
            self._carrier, self._rounds = self._plan(column.gradients.dtype, column.slices)
        self._tables: dict[tuple[int, int], tuple[Array, Array]] = {}

    def _room(self, wire: str) -> Array:
        """An array for the column's numbers in 16 bits, to whole lines of 32 bytes."""
        column = self._column
        if column.gradients.dtype != np.float32:
            raise UsageError(
                f'the wire "{wire}" is for gradients of float32; these are '
                f'{column.gradients.dtype}: use wire = "same"'
            )
        start, stop = column.span
        grain = messages.LINE // FLOATS[wire].itemsize
        return self._device.shared(-(-(stop - start) // grain) * grain, FLOATS[wire])

    def _plan(
        self, dtype: np.dtype[Any], slices: Sequence[Range]
    ) -> tuple[Carrier, list[list[Range]]]:
        """What carries numbers of `dtype`, and the pieces of `slices` that go in each round."""
        column, longest = self._column, max(stop - start for start, stop in slices)
        found, width = carrier(
            self._comm,
            self._device,
            dtype,
            longest,
            column.gpu_mpi,
            column.message_bytes,
            column.idle,
        )
        return found, [
            [(min(start + at, stop), min(start + at + width, stop)) for start, stop in slices]
            for at in range(0, longest, width)
        ]

    def reduce(self) -> None:
        """Write the sum over the column of this rank's slice into `sums`. Collective.

        The slices are only read. Added in node order, by one rank: no other order is possible
        for the same bits. With N nodes a rank sends and receives (N - 1) / N of the column, in
        N - 1 messages per round.
        """
        if self._sent is not self._column.gradients:
            start, stop = self._column.span
            node_sums, count = self._column.gradients[start:stop], stop - start
            self._device.launch("narrow", node_sums, self._sent[:count], count, work=count)
        size = self._comm.size
        for which, pieces, rows in self._sending.exchange(self._sent, self._reduction):
            start, stop = pieces[self._comm.rank]
            if start == stop:
                continue
            first, table = self._table(which, start, rows)
            count = stop - start
            total = self._column.sums[start - self._first : stop - self._first]
            if self._short:
                self._device.launch(
                    "sum_widened", first[:count], table, size - 1, 0, total, count, work=count
                )
            else:
                self._device.launch("sum_peers", table, size, 0, total, count, work=count)

    def gather(self) -> None:
        """Complete the column of the parameters, of which each rank holds its slice. Collective.

        A rank receives (N - 1) / N of the column; N - 1 messages per round.
        """
        self._carrier.gather(self._column.parameters, self._rounds)

    def _table(self, which: int, start: int, rows: Sequence[Array]) -> tuple[Array, Array]:
        """The first row, and a table of all, or in 16 bits of the others; made in the first step.

        What this rank itself sends takes the place of this rank's row.

        All that they point to lives as long as this object.
        """
        if (which, start) not in self._tables:
            parts = list(rows)
            parts[self._comm.rank] = self._sent[start:]
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
    idle: Idle | None = None,
) -> tuple[Carrier, int]:
    """What carries pieces of at most `width` elements for slices of up to `longest`; and `width`.

    `width` is a multiple of 32 bytes, at least one.
    """
    staged = device.name != "cpu" and not gpu_mpi
    each = (STAGE_BYTES if staged else ROUND_BYTES) // comm.size
    wanted = min(message_bytes or max(each, LEAST_BYTES), messages.MESSAGE_BYTES)
    grain = messages.LINE // dtype.itemsize
    grains = min(max(wanted // messages.LINE, 1), -(-longest // grain))
    width = max(grains, 1) * grain
    return (Staged if staged else Direct)(comm, device, dtype, width, idle), width
