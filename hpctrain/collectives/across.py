"""The part of a sliced reduction that crosses nodes: messages within one column.

Layer: collectives. Is given the column's communicator and slices; knows nothing of how the
column was added up within each node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.mpi import messages

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["Across", "on_host", "to_device"]

Array = Any  # of the device
Range = tuple[int, int]
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
        dtype: np.dtype[Any],
        message_bytes: int | None = None,
    ) -> None:
        """Args:

        comm: the column's ranks, in node order.
        slices: (start, stop) in elements for every rank of `comm`, the same on all.
        message_bytes: most bytes in a message; default 16 MiB per round and rank.
        """
        wanted = message_bytes or max(ROUND_BYTES // comm.size, LEAST_BYTES)
        wanted = min(wanted, messages.MESSAGE_BYTES)
        longest = max(stop - start for start, stop in slices)
        self._grain = messages.LINE // dtype.itemsize
        grains = min(max(wanted // messages.LINE, 1), -(-longest // self._grain))
        self._comm, self._device, self._slices = comm, device, slices
        self._width = max(grains, 1) * self._grain
        self._rounds = -(-longest // self._width)
        self._received = np.empty((comm.size, self._width), dtype)

    def reduce(self, array: Array) -> None:
        """Replace this rank's slice of `array` by its sum over the column. Collective.

        Args:
            array: shape (padded n,) on the device; the other slices are only read.

        Added in node order, by one rank: no other order is possible for the same bits. With N
        nodes a rank sends and receives (N - 1) / N of the column, in N - 1 messages per round.
        """
        host = on_host(self._device, array)
        for pieces in self._pieces():
            messages.exchange(
                self._comm, host.view(np.uint8), self._lines(pieces), self._received.view(np.uint8)
            )
            start, stop = pieces[self._comm.rank]
            if start < stop:
                self._add(array[start:stop])

    def _add(self, mine: Array) -> None:
        rows = self._received
        if self._device.name != "cpu":
            rows = self._device.from_host(rows)
        parts = [mine if k == self._comm.rank else rows[k] for k in range(self._comm.size)]
        table = self._device.peers(parts)
        count = mine.shape[0]
        self._device.launch("sum_peers", table, len(parts), 0, mine, count, work=count)
        self._device.synchronize()  # the next round overwrites `received`

    def gather(self, array: Array) -> None:
        """Complete the column of `array`, of which each rank holds its slice. Collective.

        A rank receives (N - 1) / N of the column; messages per round: the MPI library's.
        """
        host = on_host(self._device, array)
        for pieces in self._pieces():
            messages.gather_parts(self._comm, host.view(np.uint8), self._lines(pieces))
        to_device(self._device, host, array)

    def _pieces(self) -> Iterator[list[Range]]:
        """Per round, the piece of every slice that moves; empty once a slice is done."""
        for turn in range(self._rounds):
            yield [
                (min(start + turn * self._width, stop), min(start + (turn + 1) * self._width, stop))
                for start, stop in self._slices
            ]

    def _lines(self, pieces: list[Range]) -> list[Range]:
        """Elements to lines of 64 bytes; the last line may be padding in part."""
        return [
            (start // self._grain, -(-stop // self._grain)) if start < stop else (0, 0)
            for start, stop in pieces
        ]


def on_host(device: Device, array: Array) -> NDArray[Any]:
    """What MPI may touch: the array itself on the CPU, else a host copy of finished work."""
    if device.name == "cpu":
        return array  # type: ignore[no-any-return]
    device.synchronize()
    return device.to_host(array)


def to_device(device: Device, host: NDArray[Any], array: Array) -> None:
    """Bring back into `array` what MPI put into its `on_host`."""
    if device.name != "cpu":
        device.copy(array, device.from_host(host))
