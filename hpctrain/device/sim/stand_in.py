"""What `device/cuda.py` is given in place of CuPy: its names, on a simulated machine.

It holds what that file uses and nothing else, so that a use of more is noticed.

Layer: device. Names are CuPy's.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.device.products import Tiled, rounded
from hpctrain.device.sim import array as arrays
from hpctrain.device.sim import streams
from hpctrain.device.sim.kernels import RawModule
from hpctrain.device.sim.machine import Machine, Processor
from hpctrain.device.sim.memory import CUDARuntimeError
from hpctrain.device.sim.streams import current_stream

__all__ = ["StandIn"]

# Few, so that small launches already make threads loop, as large ones do on a GPU of 100.
MULTIPROCESSORS = 2


class StandIn:
    """The module `cupy`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.cuda = Cuda(machine)
        self._core = Core()

    def ndarray(
        self, shape: tuple[int, ...], dtype: DTypeLike, memptr: arrays.MemoryPointer
    ) -> arrays.ndarray:
        """An array in given memory."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return arrays.ndarray(memptr.bytes(nbytes).view(dtype).reshape(shape), memptr.mem)

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> arrays.ndarray:
        """An array of the pool; it holds NaN, and later what was freed."""
        processor = self._machine.current()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = processor.allocate(nbytes, current_stream(processor).queue)
        memory = arrays.PooledMemory(block, processor)
        return self.ndarray(shape, dtype, arrays.MemoryPointer(memory, 0))

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> arrays.ndarray:
        """The same, filled with zeros in the order of the current stream."""
        array = self.empty(shape, dtype)
        array.data.memset_async(0, array.nbytes)
        return array

    def asarray(self, a: NDArray[Any], order: str = "C") -> arrays.ndarray:
        """A copy on the device; the host array is read at once, as if through pinned memory."""
        host = np.array(a, order="C")
        array = self.empty(host.shape, host.dtype)
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes)
        return array

    def asnumpy(self, a: arrays.ndarray, order: str = "C") -> NDArray[Any]:
        """A copy on the host; waits for the work added to the current stream so far."""
        processor, host = a.mem.processor, np.empty(a.shape, a.dtype)
        processor.counts.copy_of("to host", a.nbytes)
        view = a._view
        queue = current_stream(processor).queue
        operation = processor.add(
            queue, "copy to host", lambda: np.copyto(host, view), [a.mem.span]
        )
        processor.wait(operation, "copy")
        return host

    def matmul(self, a: arrays.ndarray, b: arrays.ndarray, out: arrays.ndarray) -> arrays.ndarray:
        """out = a @ b; NumPy multiplies when its turn comes."""
        if a.dtype != out.dtype or b.dtype != out.dtype:
            raise TypeError(f"matmul of {a.dtype} and {b.dtype} into {out.dtype}")
        processor = self._machine.current()
        processor.counts.products += 1
        x, y, z = a._view, b._view, out._view
        spans = [array.mem.span for array in (a, b, out)]
        queue = current_stream(processor).queue
        precision = self._core._routines_linalg.precision
        processor.add(queue, "matmul", lambda: _multiply(x, y, z, precision), spans)
        return out

    def RawModule(self, code: str, options: Sequence[str]) -> RawModule:  # noqa: N802
        """Kernels from source."""
        return RawModule(self._machine, code, options)


class Products:
    """The module `cupy._core._routines_linalg`."""

    precision = "float32"

    def set_compute_type(self, dtype: DTypeLike, compute_type: int) -> None:
        """What products may round matrices of this dtype to: 1 nothing, 6 bfloat16, 7 TF32."""
        if dtype == np.float32:
            self.precision = {1: "float32", 6: "bf16", 7: "tf32"}[compute_type]


class Core:
    """The module `cupy._core`."""

    def __init__(self) -> None:
        self._routines_linalg = Products()


class Cuda:
    """The module `cupy.cuda`."""

    Memory: Any
    MemoryPointer = arrays.MemoryPointer

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.runtime = Runtime(machine)

        class Memory(arrays.Memory):
            """`cupy.cuda.Memory` on this machine's current device."""

            def __init__(self, size: int) -> None:
                super().__init__(size, machine.current())

        self.Memory = Memory

    def Device(self, device: int) -> Device:  # noqa: N802
        """A device by number."""
        return Device(self._machine, device)

    def Stream(self, non_blocking: bool = False) -> streams.Stream:  # noqa: N802
        """A new stream on the current device."""
        processor = self._machine.current()
        return streams.Stream(processor, processor.queue(blocking=not non_blocking))

    def Event(self, disable_timing: bool = False) -> streams.Event:  # noqa: N802
        """A new event."""
        return streams.Event(self._machine.current())

    def get_current_stream(self) -> streams.Stream:
        """This thread's current stream on the current device."""
        return current_stream(self._machine.current())

    def UnownedMemory(  # noqa: N802
        self, ptr: int, size: int, owner: Any, device_id: int
    ) -> arrays.UnownedMemory:
        """Memory that something else owns."""
        return arrays.UnownedMemory(ptr, size, owner, self._machine.processors[device_id])

    def alloc_pinned_memory(self, size: int) -> Any:
        """Pinned host memory, a buffer; pooled again, and overwritten, as soon as it is garbage."""
        block = self._machine.pin(size)
        buffer = _pinned_type(block.nbytes).from_address(block.address)
        weakref.finalize(buffer, self._machine.pinned.returned.append, block).atexit = False
        return buffer


class Device:
    """A simulated GPU."""

    def __init__(self, machine: Machine, number: int) -> None:
        if not 0 <= number < len(machine.processors):
            raise CUDARuntimeError(f"cudaErrorInvalidDevice: there is no device {number}")
        self._machine, self.id = machine, number
        self.attributes = {"MultiProcessorCount": MULTIPROCESSORS}
        self.pci_bus_id = f"0000:{number:02X}:00.0"

    def use(self) -> None:
        """Make it this thread's current device."""
        self._machine.thread.processor = self._processor()

    def synchronize(self) -> None:
        """The host waits for all streams of the device."""
        self._processor().wait_for_all()

    def _processor(self) -> Processor:
        return self._machine.processors[self.id]


class Runtime:
    """The module `cupy.cuda.runtime`."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def getDeviceCount(self) -> int:  # noqa: N802
        """How many devices there are."""
        self._machine.current()  # an error where there is none, as CUDA's
        return len(self._machine.processors)

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        """What is known of a device."""
        return {"uuid": self._machine.processors[device].uuid}

    def ipcGetMemHandle(self, devPtr: int) -> bytes:  # noqa: N802, N803
        """The handle of an allocation outside the pool."""
        return self._machine.registry.export(devPtr)

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        """Map another process's allocation; its address here."""
        return self._machine.registry.open(handle, self._machine.current().index).address

    def ipcCloseMemHandle(self, devPtr: int) -> None:  # noqa: N802, N803
        """Unmap it. A use afterwards is an error."""
        self._machine.registry.close(devPtr)


def _multiply(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any], precision: str) -> None:
    """out = a @ b; of 16-bit numbers with float32 sums, as cuBLAS does it, overflowing alike."""
    if out.dtype.itemsize > 2 and (precision == "float32" or out.dtype != np.float32):
        np.matmul(a, b, out=out)
        return

    def widen(x: NDArray[Any]) -> NDArray[Any]:
        return rounded(x, precision) if x.dtype == np.float32 else x.astype(np.float32)

    Tiled(widen, lambda wide, place: np.copyto(place, wide, casting="unsafe"), np.empty).product(
        a, b, out
    )


@functools.cache
def _pinned_type(nbytes: int) -> Any:
    """A type of buffers that can be watched for becoming garbage."""
    return type("PinnedMemoryPointer", (ctypes.c_uint8 * nbytes,), {})
