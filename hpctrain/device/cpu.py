"""The CPU as a device: NumPy arrays, OpenBLAS products, kernels compiled by the host's compiler.

This interface is what `cuda` offers too; code above this layer is written once, for both.

Layer: device. Knows nothing of networks, ranks or files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.device import build
from hpctrain.device.interface import Event, Ticket, transfer_bytes
from hpctrain.device.launch import (
    CTYPES,
    DTYPES,
    Launchers,
    check_arguments,
    real_dtype,
    resolved,
)
from hpctrain.device.memory import Pool, aligned_empty
from hpctrain.device.products import check_precision, product
from hpctrain.device.signatures import Kernel
from hpctrain.errors import DeviceError, KernelError

__all__ = ["CpuDevice"]

Array = NDArray[Any]


HEADER = object.__basicsize__  # bytes before the first field of a Python object


def address(array: Array) -> int | None:
    """Where an array's memory is: the first field of NumPy's array object, by its binary interface.

    `array.ctypes.data` is the same and takes 1.4 us instead of 0.25; a convolution passes
    thousands of arrays to kernels in a step.
    """
    return ctypes.c_void_p.from_address(id(array) + HEADER).value


def slow_address(array: Array) -> int | None:
    """The same by NumPy's public interface, for a Python whose objects are laid out otherwise."""
    return int(array.ctypes.data)


_probe = np.empty(1)
if address(_probe) != slow_address(_probe):
    address = slow_address


class Done:
    """The ticket of a copy that is done, and an event after work that is."""

    done = True

    def wait(self, idle: Callable[[float], None] | None = None) -> None:
        """Nothing is left to wait for."""


class CpuDevice:
    """Arrays in host memory; one thread runs the kernels, BLAS as many as it is told."""

    name = "cpu"
    launch_seconds = 0.0
    uuid = ""  # of a GPU: it tells whether two ranks have the same one

    def __init__(self, level: str | None = None) -> None:
        """`level`: the x86-64 level kernels are compiled for; default this CPU's highest."""
        self.level = level or build.host_level()
        self.matmul_precision = "float32"
        self._pool = Pool()
        self._launchers = Launchers(self._launcher)
        self._libraries: dict[build.Library, ctypes.CDLL] = {}

    @property
    def matmul_precision(self) -> str:
        """What `matmul` rounds float32 matrices to: "float32" (nothing), "tf32" or "bf16"."""
        return self._matmul_precision

    @matmul_precision.setter
    def matmul_precision(self, name: str) -> None:
        self._matmul_precision = check_precision(name)

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """A C-contiguous array with undefined contents, in memory that is used again."""
        return self._pool.empty((shape,) if isinstance(shape, int) else tuple(shape), dtype)

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """A C-contiguous array of zeros."""
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def from_host(self, array: Array) -> Array:
        """A copy on the device of a host array."""
        result = self.empty(array.shape, array.dtype)
        np.copyto(result, array)
        return result

    def to_host(self, array: Array) -> Array:
        """A copy on the host that later kernels do not change."""
        return np.array(array, order="C")

    def wrap(self, array: Array) -> Array:
        """Host memory that the device can use in place, such as an MPI window."""
        return array

    def copy(self, target: Array, source: Array) -> None:
        """Copy `source` to `target`, both on the device, of one shape and dtype."""
        np.copyto(target, source, casting="no")

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b, of (stacks of) matrices of one dtype; a and b may be transposed views.

        16-bit numbers are multiplied and added up in float32; float32 ones in
        `matmul_precision`. See products.py.
        """
        if out.dtype.itemsize == 2 or (
            self.matmul_precision != "float32" and out.dtype == np.float32
        ):
            return product(self, a, b, out, self.matmul_precision)
        return np.matmul(a, b, out=out)

    def peers(self, arrays: Sequence[Array]) -> Array:
        """The table of addresses that a `const real* const*` parameter takes.

        The caller keeps `arrays` alive for as long as the table is used.
        """
        return np.array([array.ctypes.data for array in arrays], np.uint64)

    def synchronize(self) -> None:
        """Wait until all work that this thread launched is done; on the CPU it is."""

    def use_own_stream(self) -> None:
        """From now on this thread's work, until the thread ends, is in an order of its own.

        A GPU does it beside other threads' work, and waits for that only where `wait_event` says
        so; a thread that does not call this uses the default stream. On the CPU every thread's work
        is done when it is launched.
        """

    def record(self) -> Event:
        """The point that this thread's work has reached, for `wait_event` of any thread."""
        return Done()

    def wait_event(self, event: Event) -> None:
        """What this thread launches from now on comes after the event; the host does not wait."""

    def staging(self, nbytes: int) -> Array:
        """Host memory to copy through, shape (nbytes,) of uint8; page-locked where that matters.

        It is the caller's, to keep for the life of a run: page-locking is slow.
        """
        return aligned_empty(nbytes)

    def download(self, array: Array, host: Array) -> Ticket:
        """Begin to copy `array` to `host`, after the work that was launched so far.

        Both are C-contiguous and of one number of bytes; `host` is (a part of) `staging` memory.
        Until the ticket's `wait` returns, nothing may write to either, nor read `host`: launches
        that follow do not wait for the copy.
        """
        transfer_bytes(array, host)
        host.reshape(-1).view(np.uint8)[:] = array.reshape(-1).view(np.uint8)
        return Done()

    def upload(self, host: Array, array: Array) -> Ticket:
        """Begin to copy `host` to `array`; later launches see it, and earlier ones do not.

        As for `download`; until the ticket's `wait` returns `host` must not be written.
        """
        transfer_bytes(array, host)
        array.reshape(-1).view(np.uint8)[:] = host.reshape(-1).view(np.uint8)
        return Done()

    def shared(self, n: int, dtype: DTypeLike) -> Array:
        """A flat array of zeros that is an allocation of its own, for `export`."""
        return self.zeros(n, dtype)

    def export(self, array: Array) -> bytes:
        """A handle with which other processes of the node map an array made by `shared`.

        The array must outlive their use of it. `DeviceError` where it cannot be.
        """
        raise DeviceError("the CPU's arrays have no handles: share memory by a NodeWindow")

    def import_(self, handle: bytes, n: int, dtype: DTypeLike) -> Array:
        """The memory behind another process's handle, as a flat array of n elements.

        `DeviceError` where it cannot be mapped.
        """
        raise DeviceError("the CPU's arrays have no handles: share memory by a NodeWindow")

    def close(self, array: Array) -> None:
        """Give back what `import_` mapped; the array must not be used any more."""

    def prepare(self, dtypes: Iterable[str], node: Any = None) -> None:
        """Compile what the cache lacks on the node's first rank, then meet at a barrier.

        Collective over `node` (an MPI communicator of the ranks that share the cache) if given.
        """
        failure: KernelError | None = None
        if node is None or node.rank == 0:
            try:
                build.build_all(dtypes, self.level)
            except KernelError as error:
                failure = error
        if node is not None:
            failure = node.bcast(failure, root=0)
        if failure is not None:
            raise failure

    def launch(self, name: str, *args: Any, work: int) -> None:
        """Run the kernel `name` over `work` elements or rows.

        Arrays are given as they are, numbers as Python numbers, None for an absent array. Raises
        `KernelError` for an unknown kernel, a wrong number of arguments, or an array of another
        dtype or not C-contiguous.
        """
        if work <= 0:
            return
        self._launchers.find(name, args)(*args)

    def _launcher(self, kernel: Kernel, args: tuple[Any, ...]) -> Callable[..., None]:
        real = real_dtype(kernel, args)
        function = getattr(self._library((kernel.file, real)), kernel.name)
        function.restype = None
        function.argtypes = [
            ctypes.c_void_p if p.pointers else CTYPES[resolved(p.type, real)]
            for p in kernel.parameters
        ]
        wanted = [
            None if not p.pointers
            else np.dtype(np.uint64) if p.pointers == 2
            else DTYPES[resolved(p.type, real)]
            for p in kernel.parameters
        ]  # fmt: skip

        def launcher(*args: Any) -> None:
            raw = []
            if len(args) != len(wanted):
                check_arguments(kernel, real, args)
            for value, dtype in zip(args, wanted, strict=True):
                if dtype is None or value is None:
                    raw.append(value)
                    continue
                if value.dtype != dtype or not value.flags.c_contiguous:
                    check_arguments(kernel, real, args)
                raw.append(address(value))
            function(*raw)

        return launcher

    def _library(self, library: build.Library) -> ctypes.CDLL:
        if library not in self._libraries:
            self._libraries[library] = ctypes.CDLL(str(build.build(library, self.level)))
        return self._libraries[library]
