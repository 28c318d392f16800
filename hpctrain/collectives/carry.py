"""How a device's arrays cross between ranks: given to MPI as they are, or by way of the host.

`Direct` is for host memory, and for GPU memory where the MPI library may be given it
(`hpctrain.mpi.gpu.decide`). `Staged` is for all other GPU memory: pieces are copied to pinned host
memory, and while MPI exchanges one piece the next is on its way to the host and the last one on its
way back. Both do the same to the array, bit for bit.

MPI, and other ranks that map this one's memory, know nothing of streams: what a stream has still to
do they do not wait for. So `settle` comes before they touch device memory, and nowhere else.

Layer: collectives. Is given a communicator and a device; knows nothing of who owns which part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.mpi import messages
from hpctrain.mpi.rounds import Idle

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["STAGE_BYTES", "Carrier", "Direct", "Staged", "settle"]

Array = Any  # of the device
Range = tuple[int, int]  # (start, stop) in elements
Round = Sequence[Range]  # one piece per rank
STAGE_BYTES = 4 << 20  # of one of the two host buffers in each direction


def settle(device: Device, idle: Idle | None = None) -> None:
    """Wait until all launched work is done: now MPI and other ranks may touch device memory.

    The one place where a step waits for a stream on their behalf. `idle`: called between two looks,
    and sleeps, where another thread of this rank computes.
    """
    if idle is None:
        device.synchronize()
        return
    event = device.record()
    while not event.done:
        idle(0.0)  # of kernels under way: they are short


class Carrier(Protocol):
    """The exchanges of flat arrays that a sliced reduction is made of. All are collective.

    A round is one piece, (start, stop) in elements, per rank of the communicator, the same on all
    ranks; pieces start at multiples of 32 bytes and hold at most `width` elements.
    """

    def exchange(
        self, array: Array, rounds: Sequence[Round]
    ) -> Iterator[tuple[int, Round, Sequence[Array]]]:
        """Give every rank its piece of this rank's array, and take what the others have for it.

        Yields per round which set of rows it is in (a small number), the pieces, and the rows:
        device arrays of `width` elements, row k from rank k; not this rank's own row. They are
        valid until the next round, for work that is launched before it.
        """

    def gather(self, array: Array, rounds: Sequence[Round]) -> None:
        """Complete the rounds' pieces of `array` on all ranks, of which each has its own."""

    def allreduce(self, array: Array, message_bytes: int) -> None:
        """Replace `array` by its sum over all ranks, in the MPI library's order."""


class Direct:
    """MPI reads and writes the device's arrays themselves."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        device: Device,
        dtype: np.dtype[Any],
        width: int,
        idle: Idle | None = None,
    ) -> None:
        self._comm, self._device, self._idle = comm, device, idle
        self._grain = messages.LINE // dtype.itemsize
        # A GPU's pool may hand out memory that MPI cannot register: take an allocation of its own.
        allocate = device.empty if device.name == "cpu" else device.shared
        self._received = allocate(comm.size * width, dtype)
        self._rows = [self._received[k * width : (k + 1) * width] for k in range(comm.size)]

    def exchange(
        self, array: Array, rounds: Sequence[Round]
    ) -> Iterator[tuple[int, Round, Sequence[Array]]]:
        """See `Carrier`. One synchronization per round: the rows must have been read."""
        for pieces in rounds:
            settle(self._device, self._idle)
            parts = lines(pieces, self._grain)
            messages.exchange(self._comm, array, parts, self._received, self._idle)
            yield 0, pieces, self._rows

    def gather(self, array: Array, rounds: Sequence[Round]) -> None:
        """See `Carrier`. One synchronization."""
        settle(self._device, self._idle)
        for pieces in rounds:
            parts = lines(pieces, self._grain)
            messages.gather_parts(self._comm, array, parts, None, self._idle)

    def allreduce(self, array: Array, message_bytes: int) -> None:
        """See `Carrier`. One synchronization."""
        settle(self._device)
        messages.allreduce(self._comm, array, message_bytes)


class Slot:
    """One of two pairs of host buffers, rows on the device, and what is under way between them."""

    def __init__(self, device: Device, dtype: np.dtype[Any], ranks: int, width: int) -> None:
        nbytes = ranks * width * dtype.itemsize
        self.sent: NDArray[Any] = device.staging(nbytes).view(dtype)
        self.received: NDArray[Any] = device.staging(nbytes).view(dtype)
        self.all_rows = device.empty(ranks * width, dtype)
        self.rows = [self.all_rows[k * width : (k + 1) * width] for k in range(ranks)]
        self.downloads: list[Any] = []
        self.uploads: list[Any] = []

    def arrived(self, idle: Idle | None) -> None:
        """Wait until what was asked for is in the host's buffer."""
        while self.downloads:
            self.downloads.pop().wait(idle)

    def left(self, idle: Idle | None) -> None:
        """Wait until the host's buffer is no longer read."""
        while self.uploads:
            self.uploads.pop().wait(idle)


class Staged:
    """Device memory goes to and from MPI through pinned host memory, in two alternating slots."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        device: Device,
        dtype: np.dtype[Any],
        width: int,
        idle: Idle | None = None,
    ) -> None:
        self._comm, self._device, self._width, self._idle = comm, device, width, idle
        self._grain = messages.LINE // dtype.itemsize
        self._slots = [Slot(device, dtype, comm.size, width) for _ in range(2)]

    def exchange(
        self, array: Array, rounds: Sequence[Round]
    ) -> Iterator[tuple[int, Round, Sequence[Array]]]:
        """See `Carrier`. No synchronization: the host waits for single copies."""
        size, rank, width = self._comm.size, self._comm.rank, self._width
        others = [k for k in range(size) if k != rank]
        for turn, pieces, slot in self._turns(array, rounds, others):
            slot.left(self._idle)
            rows = lines(self._in_rows(pieces), self._grain)
            messages.exchange(self._comm, slot.sent, rows, slot.received, self._idle)
            start, stop = pieces[rank]
            for first, last in ((0, rank), (rank + 1, size)):  # rows before and after this rank's
                part = slice(first * width, last * width)
                if start < stop and first < last:
                    self._upload(slot, slot.received[part], slot.all_rows[part])
            yield turn % 2, pieces, slot.rows

    def gather(self, array: Array, rounds: Sequence[Round]) -> None:
        """See `Carrier`. No synchronization."""
        rank = self._comm.rank
        own = rank * self._width
        for _, pieces, slot in self._turns(array, rounds, [rank]):
            slot.left(self._idle)
            rows = self._in_rows(pieces)
            parts = lines(rows, self._grain)
            messages.gather_parts(self._comm, slot.received, parts, slot.sent[own:], self._idle)
            for k, ((start, stop), (first, last)) in enumerate(zip(pieces, rows, strict=True)):
                if k != rank and start < stop:
                    self._upload(slot, slot.received[first:last], array[start:stop])

    def allreduce(self, array: Array, message_bytes: int) -> None:
        """See `Carrier`. No synchronization."""
        chunk = self._width * self._comm.size
        rounds = [
            [(start, min(start + chunk, array.shape[0]))]
            for start in range(0, array.shape[0], chunk)
        ]
        for _, [(start, stop)], slot in self._turns(array, rounds, [0]):
            slot.left(self._idle)
            total = slot.received[: stop - start]
            np.copyto(total, slot.sent[: stop - start])
            messages.allreduce(self._comm, total, message_bytes)
            self._upload(slot, total, array[start:stop])

    def _turns(
        self, array: Array, rounds: Sequence[Round], ranks: Sequence[int]
    ) -> Iterator[tuple[int, Round, Slot]]:
        """Each round with its slot, once the pieces for `ranks` are in it, the next on their way.

        The piece for rank k lies at the start of row k of `sent`.
        """
        self._download(array, rounds, 0, ranks)
        for turn, pieces in enumerate(rounds):
            slot = self._slots[turn % 2]
            slot.arrived(self._idle)
            self._download(array, rounds, turn + 1, ranks)
            yield turn, pieces, slot

    def _download(
        self, array: Array, rounds: Sequence[Round], turn: int, ranks: Sequence[int]
    ) -> None:
        if turn >= len(rounds):
            return
        slot = self._slots[turn % 2]
        for k in ranks:
            start, stop = rounds[turn][k]
            if start < stop:
                host = slot.sent[k * self._width :][: stop - start]
                slot.downloads.append(self._device.download(array[start:stop], host))

    def _upload(self, slot: Slot, host: NDArray[Any], array: Array) -> None:
        slot.uploads.append(self._device.upload(host, array))

    def _in_rows(self, pieces: Round) -> list[Range]:
        """Where the pieces lie in a host buffer: each at the start of its row."""
        return [
            (k * self._width, k * self._width + stop - start)
            for k, (start, stop) in enumerate(pieces)
        ]


def lines(pieces: Round, grain: int) -> list[Range]:
    """Elements to lines of 32 bytes; the last line may be padding in part."""
    return [(a // grain, -(-b // grain)) if a < b else (0, 0) for a, b in pieces]
