"""Arrays in simulated device memory: what `device/cuda.py` and its callers use of CuPy's.

Python cannot see what is in them: there is no arithmetic, no conversion and no buffer, only views,
copies that go through a stream, and the two protocols by which MPI libraries find the memory.

Layer: device. Names are CuPy's.
"""

from __future__ import annotations

import ctypes
from types import EllipsisType
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.device.sim.machine import Processor
from hpctrain.device.sim.memory import Block, CUDARuntimeError, Span
from hpctrain.device.sim.streams import Stream, current_stream

__all__ = ["Memory", "MemoryPointer", "PooledMemory", "UnownedMemory", "ndarray"]

CUDA, BFLOAT = 2, 4  # kDLCUDA, kDLBfloat: GPU memory and bfloat16 in DLPack
# Where these are in what a "dltensor" capsule points to: pointer, device, number of dims, type.
DEVICE_TYPE, TYPE_CODE = 8, 20

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class BaseMemory:
    """A stretch of device memory. `ptr`, `size` in bytes, `device_id`."""

    def __init__(self, span: Span, ptr: int, size: int, processor: Processor) -> None:
        self.span, self.ptr, self.size, self.processor = span, ptr, size, processor
        self.device_id = processor.index


class PooledMemory(BaseMemory):
    """A block of the pool; back there, and free for its stream to use, as soon as it is garbage."""

    def __init__(self, block: Block, processor: Processor) -> None:
        super().__init__(block.span, block.address, block.nbytes, processor)
        self._block = block

    def __del__(self) -> None:
        self.processor.pool.returned.append(self._block)


class Memory(BaseMemory):
    """An allocation of its own, outside the pool; freed when it is garbage."""

    def __init__(self, size: int, processor: Processor) -> None:
        span = processor.allocate_alone(max(size, 1))
        super().__init__(span, span.address, size, processor)

    def __del__(self) -> None:
        if hasattr(self, "span"):
            self.processor.freed.append(self.span)


class UnownedMemory(BaseMemory):
    """Memory that something else owns."""

    def __init__(self, ptr: int, size: int, owner: Any, processor: Processor) -> None:
        span = processor.machine.registry.find(ptr)
        if span is None or ptr + size > span.address + span.nbytes:
            raise CUDARuntimeError(f"cudaErrorInvalidValue: no {size} bytes at 0x{ptr:x}")
        super().__init__(span, ptr, size, processor)
        self._owner = owner


class MemoryPointer:
    """A place in device memory: `mem` and an offset in bytes."""

    def __init__(self, mem: BaseMemory, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def bytes(self, nbytes: int) -> NDArray[np.uint8]:
        """The memory that begins here; for the simulator's own operations only."""
        start = self.ptr - self.mem.span.address
        if nbytes > self.mem.span.nbytes - start:
            raise CUDARuntimeError(f"cudaErrorInvalidValue: no {nbytes} bytes at 0x{self.ptr:x}")
        return self.mem.span.bytes[start : start + nbytes]

    def copy_to_host_async(self, mem: int, size: int, stream: Stream | None = None) -> None:
        """Copy to the host address `mem`; blocks unless that is pinned memory."""
        stream, pinned = self._transfer(mem, size, "to host", stream)
        source, target = self.bytes(size), _host(mem, size)
        operation = self._add(stream, "copy to host", lambda: np.copyto(target, source), pinned)
        if pinned is None:
            self.mem.processor.wait(operation, "copy")

    def copy_from_host_async(self, mem: int, size: int, stream: Stream | None = None) -> None:
        """Copy from the host address `mem`; reads it at once unless that is pinned memory."""
        stream, pinned = self._transfer(mem, size, "to device", stream)
        target, source = self.bytes(size), _host(mem, size)
        if pinned is None:
            source = source.copy()
        self._add(stream, "copy from host", lambda: np.copyto(target, source), pinned)

    def memset_async(self, value: int, size: int, stream: Stream | None = None) -> None:
        """Fill with a byte."""
        processor, target = self.mem.processor, self.bytes(size)
        processor.counts.copy_of("on device", size)
        self._add(stream or current_stream(processor), "memset", lambda: target.fill(value))

    def _add(self, stream: Stream, what: str, run: Any, other: Span | None = None) -> Any:
        spans = [self.mem.span] if other is None else [self.mem.span, other]
        return self.mem.processor.add(stream.queue, what, run, spans)

    def _transfer(
        self, mem: int, size: int, direction: str, stream: Stream | None
    ) -> tuple[Stream, Span | None]:
        """The stream of a copy, and the span of the host memory if it is pinned."""
        processor = self.mem.processor
        processor.counts.copy_of(direction, size)
        span = processor.machine.registry.find(mem)
        return stream or current_stream(processor), span


class ndarray:
    """An array on a simulated GPU. `_view` is its memory, for the simulator's own operations."""

    __slots__ = ("__weakref__", "_view", "mem")
    __array_ufunc__ = None

    def __init__(self, view: NDArray[Any], mem: BaseMemory) -> None:
        self._view, self.mem = view, mem

    @property
    def data(self) -> MemoryPointer:
        """Where its first element is."""
        return MemoryPointer(self.mem, self._view.ctypes.data - self.mem.ptr)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._view.dtype

    @property
    def size(self) -> int:
        return self._view.size

    @property
    def ndim(self) -> int:
        return self._view.ndim

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    @property
    def itemsize(self) -> int:
        return self._view.itemsize

    @property
    def flags(self) -> Any:
        return self._view.flags

    @property
    def T(self) -> ndarray:  # noqa: N802
        return ndarray(self._view.T, self.mem)

    def __len__(self) -> int:
        return len(self._view)

    def transpose(self, *axes: Any) -> ndarray:
        """A view with its dims in another order."""
        return ndarray(self._view.transpose(*axes), self.mem)

    def view(self, dtype: DTypeLike) -> ndarray:
        """The same memory read as another dtype."""
        return ndarray(self._view.view(dtype), self.mem)

    def reshape(self, *shape: Any) -> ndarray:
        """A view of another shape; where that takes a copy, a `ValueError`."""
        view = self._view.reshape(*shape)
        if view.size and not np.may_share_memory(view, self._view):
            raise ValueError(f"shape {self.shape}, not contiguous, to {shape} takes a copy")
        return ndarray(view, self.mem)

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._view[_basic(key)], self.mem)

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self[key]
        processor = self.mem.processor
        spans = [self.mem.span]
        source: Any = value
        if isinstance(value, ndarray):
            source = value._view
            spans.append(value.mem.span)
            np.broadcast_shapes(target.shape, source.shape)
        elif not isinstance(value, int | float | np.generic):
            raise TypeError(f"Unsupported type {type(value)}: copy it to the device first")
        view = target._view
        processor.counts.copy_of("on device", view.nbytes)
        stream = current_stream(processor)
        processor.add(stream.queue, "copy", lambda: view.__setitem__(..., source), spans)

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed: a simulated GPU's memory is out "
            "of the host's reach; copy it with device.to_host()"
        )

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} cannot work on an array of a simulated GPU")

    def __bool__(self) -> bool:
        raise TypeError("the truth of an array on a GPU: copy it to the host first")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self._view.__array_interface__)
        interface["version"] = 3
        interface["stream"] = 1  # the legacy default stream
        return interface

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CUDA, self.mem.device_id)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """A capsule that says where the memory is and keeps it; NumPy makes it for host memory."""
        bfloat = self._view.dtype.itemsize == 2 and self._view.dtype.kind == "V"
        view = self._view.view(np.uint16) if bfloat else self._view
        capsule = np.asarray(_Exposed(view, self)).__dlpack__()
        address = cast(int, _pointer_of(capsule, b"dltensor"))
        if bfloat:
            ctypes.c_uint8.from_address(address + TYPE_CODE).value = BFLOAT
        device = (ctypes.c_int32 * 2).from_address(address + DEVICE_TYPE)
        device[0], device[1] = self.__dlpack_device__()
        return capsule


class _Exposed:
    """What a NumPy array takes its memory from, to keep the array on the device alive."""

    def __init__(self, view: NDArray[Any], array: ndarray) -> None:
        self._array = array
        self.__array_interface__ = view.__array_interface__


def _basic(key: Any) -> tuple[Any, ...]:
    """A key of slices and numbers, so that the result is always a view and never a copy."""
    keys = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(k, int | np.integer | slice | EllipsisType) or k is None for k in keys):
        raise TypeError(f"arrays on a simulated GPU are cut by slices and numbers, not by {key!r}")
    return keys if Ellipsis in keys else (*keys, ...)


def _host(address: int, nbytes: int) -> NDArray[np.uint8]:
    if nbytes == 0:
        return np.empty(0, np.uint8)
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(raw, np.uint8)
