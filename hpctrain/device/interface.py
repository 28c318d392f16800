"""What the layers above ask of a device. `cpu.CpuDevice` documents each method.

Layer: device. Imports no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from numpy.typing import DTypeLike, NDArray

from hpctrain.errors import DeviceError

__all__ = ["Device", "Event", "Ticket", "transfer_bytes"]

Array = Any  # numpy.ndarray, or cupy.ndarray on a GPU


class Event(Protocol):
    """A point in the work that was launched on a stream."""

    @property
    def done(self) -> bool:
        """Whether all work before it is done."""


class Ticket(Protocol):
    """A copy between host and device that was asked for and may still be going on."""

    def wait(self, idle: Callable[[float], None] | None = None) -> None:
        """Block until the copy is done; then both sides are the caller's again.

        `idle`: called between two looks at it, and sleeps: the wait then takes no core.
        """


class Device(Protocol):
    """Arrays, memory, products and kernels of one processor."""

    name: str
    level: str
    launch_seconds: float  # spent by the host on launching; 0 where a launch is the work itself
    uuid: str
    matmul_precision: str  # of float32 products: "float32", "tf32" or "bf16"

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array: ...
    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array: ...
    def from_host(self, array: NDArray[Any]) -> Array: ...
    def to_host(self, array: Array) -> NDArray[Any]: ...
    def wrap(self, array: NDArray[Any]) -> Array: ...
    def copy(self, target: Array, source: Array) -> None: ...
    def matmul(self, a: Array, b: Array, out: Array) -> Array: ...
    def peers(self, arrays: Sequence[Array]) -> Array: ...
    def synchronize(self) -> None: ...
    def use_own_stream(self) -> None: ...
    def record(self) -> Event: ...
    def wait_event(self, event: Event) -> None: ...
    def prepare(self, dtypes: Iterable[str], node: Any = None) -> None: ...
    def launch(self, name: str, *args: Any, work: int) -> None: ...
    def staging(self, nbytes: int) -> NDArray[Any]: ...
    def download(self, array: Array, host: NDArray[Any]) -> Ticket: ...
    def upload(self, host: NDArray[Any], array: Array) -> Ticket: ...
    def shared(self, n: int, dtype: DTypeLike) -> Array: ...
    def export(self, array: Array) -> bytes: ...
    def import_(self, handle: bytes, n: int, dtype: DTypeLike) -> Array: ...
    def close(self, array: Array) -> None: ...


def transfer_bytes(array: Array, host: NDArray[Any]) -> int:
    """Bytes of a copy between `array` and `host`; a `DeviceError` where it is not one stretch."""
    if array.nbytes != host.nbytes:
        raise DeviceError(
            f"a copy between {array.nbytes:,} bytes on the device and {host.nbytes:,} on the host: "
            "take a part of the longer one"
        )
    if not (array.flags.c_contiguous and host.flags.c_contiguous):
        raise DeviceError("only C-contiguous arrays are copied between device and host at once")
    return int(host.nbytes)
