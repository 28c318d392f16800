"""How a device's payloads get to other ranks: as they lie in its memory, or by way of the host.

    Transport   the CPU's: sent from where they are, used where they arrived
    Staged      a GPU's: copied to pinned host memory, which MPI is given, and back
    Direct      a GPU's where the MPI library may be given its memory (`hpctrain.mpi.gpu.decide`)

Only what is sent crosses between device and host. The host waits once per exchange, for the
payloads that MPI is about to read; what arrives is used in the order of the stream. All three give
the same bytes.

Layer: compress. Is given bytes of a device; knows of payloads only that they begin with a header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.carry import settle
from hpctrain.collectives.opaque import Exchange
from hpctrain.compress.header import HEADER_BYTES
from hpctrain.mpi.rounds import Idle

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device
    from hpctrain.device.interface import Ticket

__all__ = ["Direct", "Staged", "Transport", "transport_for"]

Array = Any  # of the device
LINE = 64  # bytes: payloads side by side in one buffer start at multiples of it
DENSE_BYTES = 16 << 20  # of all ranks' parts of a dense sum that is made in rounds


class Transport:
    """Exchanges of bytes in a device's memory; here, of the host's.

    Attributes:
        rank, size: of the communicator. device: whose arrays these are.
        host: exchanges of what is in host memory on any device, as small numbers are.
        round_bytes: the most that arrays as long as the gradient bring to one exchange; None: they
            need not be cut.
    """

    round_bytes: int | None = None

    def __init__(self, device: Device, comm: MPI.Intracomm, idle: Idle | None = None) -> None:
        """Not collective. `idle`: see `hpctrain.mpi.rounds`."""
        self.device, self.rank, self.size = device, comm.rank, comm.size
        self._idle = idle
        self.host = self._wire = Exchange(comm, idle=idle)
        self._arrived: list[Any] = []

    @property
    def sent(self) -> int:
        """Bytes of this rank's messages since the beginning."""
        return sum(exchange.sent for exchange in {self.host, self._wire})

    @property
    def received(self) -> int:
        """Bytes of messages to this rank since the beginning."""
        return sum(exchange.received for exchange in {self.host, self._wire})

    def all_to_all(self, payloads: Sequence[Array], bounds: Sequence[int]) -> list[Array]:
        """See `Exchange.all_to_all`; of the device, valid for work launched before the next one."""
        self._arrived = self._wire.all_to_all(payloads, bounds)
        return self._arrived

    def all_gather(self, payload: Array, bounds: Sequence[int]) -> list[Array]:
        """See `Exchange.all_gather`; of the device, valid for work launched before the next one."""
        self._arrived = self._wire.all_gather(payload, bounds)
        return self._arrived

    def head(self, rank: int) -> bytes:
        """The first 64 bytes that came last from another rank."""
        head: bytes = self._arrived[rank][:HEADER_BYTES].tobytes()
        return head

    def fetch(self, array: Array) -> NDArray[np.uint8]:
        """The bytes of a flat array on the host, once they are made; valid until the next call."""
        data: NDArray[np.uint8] = array.view(np.uint8)
        return data

    def place(self, data: NDArray[np.uint8]) -> Array:
        """Bytes of the host on the device."""
        return data


class Staged(Transport):
    """By way of pinned memory."""

    round_bytes = DENSE_BYTES

    def __init__(self, device: Device, comm: MPI.Intracomm, idle: Idle | None = None) -> None:
        super().__init__(device, comm, idle)
        self._wire = Exchange(comm, idle=idle, allocate=device.staging)
        self._out, self._fetched = device.staging(0), device.staging(0)
        self._rooms: list[Array] = [device.empty(0, np.uint8)] * comm.size
        self._uploads: list[Ticket] = []

    def all_to_all(self, payloads: Sequence[Array], bounds: Sequence[int]) -> list[Array]:
        """See `Transport`."""
        wanted = [payload[:0] if k == self.rank else payload for k, payload in enumerate(payloads)]
        self._arrived = self._wire.all_to_all(self._downloaded(wanted), bounds)
        return self._uploaded(payloads[self.rank])

    def all_gather(self, payload: Array, bounds: Sequence[int]) -> list[Array]:
        """See `Transport`."""
        [mine] = self._downloaded([payload if self.size > 1 else payload[:0]])
        self._arrived = self._wire.all_gather(mine, bounds)
        return self._uploaded(payload)

    def fetch(self, array: Array) -> NDArray[np.uint8]:
        """See `Transport`."""
        if self._fetched.nbytes < array.nbytes:
            self._fetched = self.device.staging(array.nbytes)
        host = self._fetched[: array.nbytes]
        if array.nbytes:
            self.device.download(array, host).wait(self._idle)
        return host

    def place(self, data: NDArray[np.uint8]) -> Array:
        """See `Transport`."""
        return self.device.from_host(data)

    def _downloaded(self, payloads: Sequence[Array]) -> list[NDArray[np.uint8]]:
        """The payloads in pinned memory, once they are there; what was there before is sent."""
        places = _places(payloads)
        if self._out.nbytes < places[-1]:
            self._out = self.device.staging(places[-1])
        hosts = [
            self._out[at : at + payload.nbytes]
            for at, payload in zip(places, payloads, strict=False)
        ]
        tickets = [
            self.device.download(payload, host)
            for payload, host in zip(payloads, hosts, strict=True)
            if payload.nbytes
        ]
        for ticket in [*tickets, *self._uploads]:  # what came is no longer read, too
            ticket.wait(self._idle)
        self._uploads = []
        return hosts

    def _uploaded(self, own: Array) -> list[Array]:
        """What has arrived, on its way to the device; this rank's own payload as it is."""
        found = []
        for rank, host in enumerate(self._arrived):
            if rank == self.rank:
                found.append(own)
                continue
            if self._rooms[rank].nbytes < host.nbytes:
                self._rooms[rank] = self.device.empty(host.nbytes, np.uint8)
            room = self._rooms[rank][: host.nbytes]
            if host.nbytes:
                self._uploads.append(self.device.upload(host, room))
            found.append(room)
        return found


class Direct(Staged):
    """MPI reads and writes the device's memory, in allocations of its own.

    A GPU's pool may hand out memory that MPI cannot register, so payloads are copied on the device.
    """

    def __init__(self, device: Device, comm: MPI.Intracomm, idle: Idle | None = None) -> None:
        super().__init__(device, comm, idle)

        def allocate(nbytes: int) -> Array:
            return device.shared(nbytes, np.uint8)

        self._wire = Exchange(comm, idle=idle, allocate=allocate)
        self._leaving = device.shared(0, np.uint8)
        self._heads: list[bytes] = []

    def all_to_all(self, payloads: Sequence[Array], bounds: Sequence[int]) -> list[Array]:
        """See `Transport`."""
        wanted = [payload[:0] if k == self.rank else payload for k, payload in enumerate(payloads)]
        self._arrived = self._wire.all_to_all(self._moved(wanted), bounds)
        return self._found(payloads[self.rank])

    def all_gather(self, payload: Array, bounds: Sequence[int]) -> list[Array]:
        """See `Transport`."""
        [mine] = self._moved([payload])
        self._arrived = self._wire.all_gather(mine, bounds)
        return self._found(payload)

    def head(self, rank: int) -> bytes:
        """See `Transport`. Those of all ranks are copied at once, when the first is asked for."""
        if not self._heads:
            heads = self.device.staging(HEADER_BYTES * self.size).reshape(self.size, HEADER_BYTES)
            tickets = [
                self.device.download(data[:HEADER_BYTES], heads[k])
                for k, data in enumerate(self._arrived)
                if k != self.rank and data.nbytes >= HEADER_BYTES
            ]
            for ticket in tickets:
                ticket.wait(self._idle)
            self._heads = [head.tobytes() for head in heads]
        return self._heads[rank]

    def _moved(self, payloads: Sequence[Array]) -> list[Array]:
        """Copies that MPI may read, once the device has made them and reads nothing that came."""
        places = _places(payloads)
        if self._leaving.nbytes < places[-1]:
            self._leaving = self.device.shared(places[-1], np.uint8)
        moved = [
            self._leaving[at : at + payload.nbytes]
            for at, payload in zip(places, payloads, strict=False)
        ]
        for copy, payload in zip(moved, payloads, strict=True):
            if payload.nbytes:
                self.device.copy(copy, payload)
        settle(self.device, self._idle)
        return moved

    def _found(self, own: Array) -> list[Array]:
        self._heads = []
        self._arrived[self.rank] = own
        return self._arrived


def _places(payloads: Sequence[Array]) -> list[int]:
    """Where each payload begins in a buffer of all, and where the last one ends."""
    places = [0]
    for payload in payloads:
        places.append(places[-1] + -(-payload.nbytes // LINE) * LINE)
    return places


def transport_for(
    device: Device, comm: MPI.Intracomm, gpu_mpi: bool = False, idle: Idle | None = None
) -> Transport:
    """What carries the device's payloads; `gpu_mpi`: whether MPI is given a GPU's memory."""
    kind = Transport if device.name == "cpu" else Direct if gpu_mpi else Staged
    return kind(device, comm, idle)
