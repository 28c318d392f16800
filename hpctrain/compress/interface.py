"""What a codec and a memory are. `topk.TopK` and `memory.Residual` are the ones to read first.

    x = memory.compensate(g)              what was not sent so far, and the new gradient
    payload = codec.compress(x, step)     this is what travels
    codec.add_into(other, total)          for the payload of each rank, in rank order
    memory.update(payload, rejected)      after the exchange: what was not sent stays in the memory

The update comes last and gets what the exchange rejected, so that over all ranks what was applied
and what is kept add up to what came in. A codec and its memory belong to one range of a layout and
keep their arrays from step to step; all arrays are the device's.

Layer: compress. Imports no codec, and knows nothing of ranks and messages.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hpctrain.compress.header import HEADER_BYTES, Header
from hpctrain.device.dtypes import dtype_named
from hpctrain.errors import DeviceError, HpctrainError, UsageError

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.nn.layout import Layout

__all__ = [
    "Codec",
    "Extent",
    "Memory",
    "Payload",
    "SparseCodec",
    "extent_of",
    "pack",
    "require",
    "unpack",
    "values_of",
]

Array = Any  # of the device


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements `start` up to `stop` of a flat array laid out by a layout with this fingerprint."""

    start: int
    stop: int
    layout: int = 0

    @property
    def n(self) -> int:
        return self.stop - self.start


def extent_of(layout: Layout, start: int, stop: int) -> Extent:
    """The range [start, stop) of a layout; layouts of other names or shapes have another one."""
    tensors = [(entry.name, entry.shape, entry.offset) for entry in layout.entries]
    return Extent(start, stop, zlib.crc32(repr(tensors).encode()))


@dataclass(frozen=True, slots=True)
class Payload:
    """What travels. `data`: uint8, shape (header.nbytes,); its first 64 bytes are the header."""

    header: Header
    data: Array

    @property
    def nbytes(self) -> int:
        return self.header.nbytes


class Codec(Protocol):
    """Makes payloads of one range, and adds them up.

    Attributes:
        name: as in the header.
        extent: the range.
        linear: the values of payloads made with the same context may be added up, and what the sum
            says is the sum of what they say.
        fixed_size: a payload's bytes are known without its data.
        unbiased: what payloads say is x on average over steps; else it needs a memory.
        contraction: d in |x - C(x)|^2 <= (1 - d) |x|^2; None where no d > 0 holds, so that a
            residual would grow.
        nbytes: bytes of the next payload.
    """

    name: str
    extent: Extent
    linear: bool
    fixed_size: bool
    unbiased: bool

    @property
    def contraction(self) -> float | None: ...

    @property
    def nbytes(self) -> int: ...

    def compress(self, x: Array, step: int) -> Payload:
        """The payload of x, shape (n,), only read. It is the codec's memory until the next call."""

    def received(self, data: Array, step: int, head: bytes | None = None) -> Payload:
        """Another rank's bytes as a payload, of which only the header was checked.

        `head`: the first 64 of them, where they are on the host; else this waits for the device.
        Raises `HpctrainError` where the codec would have made another one.
        """

    def add_into(self, payload: Payload, total: Array, factor: float = 1.0) -> None:
        """total <- total + factor * what the payload says; shape (n,), of x's dtype."""


class SparseCodec(Codec, Protocol):
    """A codec that sends some elements, each as it is or rounded."""

    def mask(self, payload: Payload, left: Array, u: Array) -> None:
        """Set `u` to 0 where an element was sent and not taken back: where `left` is at most
        half of it. What was sent as 0 was not sent. Shapes (n,)."""


class Memory(Protocol):
    """What was not sent yet, of one codec's range.

    `compensate` changes nothing that lasts: a step that is given up after it (a gradient that is
    not finite on some rank) leaves the memory as it was, unless `update` is called.
    """

    def compensate(self, g: Array) -> Array:
        """What to compress: g and what is kept. g, shape (n,), is only read.

        Elements that would not be finite are left out. The result is the memory's, until `update`.
        """

    def update(self, sent: Payload, rejected: Payload | None = None) -> None:
        """Keep what was not sent, and of what was sent what came back."""

    def flush(self, g: Array) -> None:
        """g <- g + what is kept, which is 0 afterwards: for a step that is sent in full."""

    def arrays(self) -> dict[str, Array]:
        """What a checkpoint keeps, by name: shape (n,), of the device. Not copied."""

    def load(self, arrays: dict[str, Array]) -> None:
        """Go on from what `arrays` of a memory of the same range gave."""


def require(codec: Any, flag: str, why: str) -> None:
    """Refuse a codec without a flag that what is made of it needs.

    Raises:
        UsageError: naming the codec, the flag, and why.
    """
    if not getattr(codec, flag):
        raise UsageError(f"{codec.name} is not {flag}: {why}")


def values_of(device: Device, name: str) -> np.dtype[Any]:
    """The type of values under way called `name`, if the device has arrays of it.

    Raises:
        DeviceError: it has none: bfloat16 came with CuPy 14.
    """
    dtype = dtype_named(name)
    try:
        device.empty(0, dtype)
    except (TypeError, ValueError) as error:
        raise DeviceError(
            f"values cannot travel as {name} from device {device.name!r}, which has no arrays of "
            f"it ({error}): install CuPy 14 or later, or use float16 or float32"
        ) from None
    return dtype


def pack(device: Device, header: Header, data: Array) -> Payload:
    """A payload in `data`, the rest of which is written already or will be."""
    head = np.frombuffer(header.encode(), np.uint8)
    device.copy(data[:HEADER_BYTES], device.from_host(head))
    return Payload(header, data)


def unpack(device: Device, data: Array, expected: Header, head: bytes | None = None) -> Payload:
    """Bytes that came as a payload, if it is the one expected; `head`: see `Codec.received`."""
    if data.dtype != np.uint8 or data.shape != (expected.nbytes,):
        raise HpctrainError(
            f"{data.shape} of {data.dtype} came where a payload of {expected.nbytes} bytes was "
            "expected: all ranks must have the same run file, layout and density"
        )
    if head is None:
        head = device.to_host(data[:HEADER_BYTES]).tobytes()
    header = Header.decode(head)
    header.require(expected)
    return Payload(header, data)
