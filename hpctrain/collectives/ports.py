"""One end of a message: from the device's array to the bytes that MPI is given, and back.

On the way may lie a conversion to 16 bits by our kernels (wires "bfloat16" and "float16"), a codec
of the caller's (opaque payloads), and host memory where MPI is not given the device's.

Layer: collectives. Knows nothing of partners and rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.schedule import Wire
from hpctrain.device.dtypes import FLOATS, is_short, wide_dtype
from hpctrain.errors import UsageError
from hpctrain.mpi.rounds import Idle

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["BFLOAT16", "FLOAT16", "Codec", "Port", "message_array"]

Array = Any  # of the device
Bytes = NDArray[np.uint8]

BFLOAT16 = Wire("bfloat16", 2)
FLOAT16 = Wire("float16", 2)


class Codec(Protocol):
    """What turns elements into an opaque payload and back. Both work on host memory."""

    def encode(self, values: NDArray[Any], payload: Bytes) -> int:
        """Write at most the wire's bound of bytes; returns how many. `values` is only read."""

    def decode(self, payload: Bytes, values: NDArray[Any]) -> None:
        """Set all of `values` from what was written."""


class Port:
    """The elements of one message, and the bytes that stand for them.

    `leave` fills the bytes before a send and returns them, `room` is where a receive puts them,
    `arrive` sets the elements from the first bytes of it.
    """

    def __init__(
        self,
        device: Device,
        view: Array,
        wire: Wire | None,
        codec: Codec | None,
        staged: bool,
        idle: Idle | None = None,
    ) -> None:
        """`view`: shape (count,), of the buffer or scratch memory.

        `staged`: MPI is given pinned host memory. Else it is given the device's: whoever posts a
        message waits for the device's work before. `idle`: called between two looks at a copy.
        """
        self._device, self._view, self._codec = device, view, codec
        self._part = view  # what crosses, on the device
        self._ticket: Any = None
        self._idle = idle
        if wire is not None and codec is None:
            self._part = message_array(device, view.shape[0], short_dtype(wire, view.dtype), staged)
        self._host = self._part  # where MPI, or a codec, finds it
        if staged or (codec is not None and device.name != "cpu"):
            self._host = device.staging(self._part.nbytes).view(self._part.dtype)
        self._bytes: Array = self._host.view(np.uint8)
        if codec is not None and wire is not None:
            self._bytes = device.staging(wire.nbytes(view.shape[0]))

    def start(self) -> None:
        """Begin to bring the elements to the host."""
        if self._part is not self._view:
            narrow(self._device, self._view, self._part)
        if self._host is not self._part:
            self._finish()
            self._ticket = self._device.download(self._part, self._host)

    def leave(self) -> Array:
        """After `start`: the bytes to send; valid until the next `start`."""
        self._finish()
        if self._codec is None:
            return self._bytes
        return self._bytes[: self._codec.encode(self._host, self._bytes)]

    def room(self) -> Array:
        """Where to receive; nothing on its way to the device is still read from there."""
        self._finish()
        return self._bytes

    def arrive(self, nbytes: int) -> None:
        """The elements become what the first `nbytes` received say."""
        if self._codec is not None:
            self._codec.decode(self._bytes[:nbytes], self._host)
        if self._host is not self._part:
            self._ticket = self._device.upload(self._host, self._part)
        if self._part is not self._view:
            widen(self._device, self._part, self._view)

    def round_trip(self) -> None:
        """Give the sender's elements the bits that a receiver gets."""
        if self._codec is not None:
            self.start()
            self.arrive(self.leave().nbytes)
        elif self._part is not self._view:
            narrow(self._device, self._view, self._part)
            widen(self._device, self._part, self._view)

    def _finish(self) -> None:
        if self._ticket is not None:
            self._ticket.wait(self._idle)
            self._ticket = None


def message_array(device: Device, count: int, dtype: np.dtype[Any], staged: bool) -> Array:
    """An array for messages; where MPI is given a GPU's memory, outside the GPU's pool."""
    if staged or device.name == "cpu":
        return device.empty(count, dtype)
    return device.shared(count, dtype)


def short_dtype(wire: Wire, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The 16-bit type of a wire without a codec."""
    short = FLOATS.get(wire.name)
    if short is None or not is_short(short):
        raise UsageError(
            f"no codec for the wire {wire.name!r}: give the interpreter one, or use bfloat16 or "
            "float16"
        )
    if wide_dtype(short) != dtype:
        raise UsageError(f"the wire {wire.name!r} carries float32; the buffer is {dtype}")
    return short


def narrow(device: Device, view: Array, part: Array) -> None:
    """part <- view, rounded to nearest even."""
    device.launch("narrow", view, part, view.shape[0], work=view.shape[0])


def widen(device: Device, part: Array, view: Array) -> None:
    """view <- 0 + part: exact, but that -0 becomes 0, alike on all ranks."""
    count = view.shape[0]
    device.launch("fill", view, 0.0, count, work=count)
    device.launch("add_widened", part, view, count, work=count)
