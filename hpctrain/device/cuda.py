"""CUDA GPUs as a device, through CuPy: the interface of `cpu.CpuDevice`.

Only allocation, copies, views, `matmul` and launches of our own kernels are asked of CuPy: that is
what the simulated CUDA in `sim/` stands in for, so that this file is tested without a GPU. Kernels
are compiled by NVRTC and launched on the calling thread's current stream; copies to the host go on
a stream of their own. No method but `close` waits for all of the device.

Layer: device. Knows nothing of networks, ranks or files.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.device.build import gpu_options
from hpctrain.device.dtypes import FLOATS
from hpctrain.device.interface import Event, Ticket, transfer_bytes
from hpctrain.device.launch import (
    DTYPES,
    Launchers,
    check_arguments,
    launch_shape,
    real_dtype,
    resolved,
)
from hpctrain.device.products import check_precision
from hpctrain.device.signatures import Kernel, kernel_folder, kernel_table
from hpctrain.errors import DeviceError

__all__ = ["CudaDevice", "available"]

Array = Any  # cupy.ndarray
COMPUTE_TYPES = {"float32": 1, "bf16": 6, "tf32": 7}  # CuPy's COMPUTE_TYPE_DEFAULT, _BF16, _TF32
OPEN_TICKETS = 64  # kept until asked whether they are done
# cudaMalloc cuts smaller allocations out of one of this size, and an IPC handle opens all of it.
GRAIN = 2 << 20


def available() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    with contextlib.suppress(Exception):  # no driver, no device: CuPy's own exception types
        return int(cupy.cuda.runtime.getDeviceCount()) > 0
    return False


class CudaDevice:
    """One GPU: CuPy's memory pool, cuBLAS products, kernels on the current stream."""

    level = ""  # has no x86-64 level

    def __init__(self, local_rank: int = 0, cupy: Any = None, name: str = "cuda") -> None:
        """Takes visible GPU `local_rank`, counted round. `DeviceError` without CuPy or a GPU.

        `cupy`: what stands for CuPy, of a device called `name`; by default CuPy itself.
        """
        self.name = name
        self._cupy = cupy or _cupy()
        runtime = self._cupy.cuda.runtime
        try:
            self._device = self._cupy.cuda.Device(local_rank % runtime.getDeviceCount())
            self._device.use()
            self._units = int(self._device.attributes["MultiProcessorCount"])
            # The bus too: parts of one GPU differ in uuid, and CuPy ends a uuid at a zero byte.
            uuid = runtime.getDeviceProperties(self._device.id)["uuid"]
            self.uuid = f"GPU-{bytes(uuid).hex()}-{self._device.pci_bus_id}"
        except runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"no GPU can be used ({error}): check nvidia-smi and CUDA_VISIBLE_DEVICES, or use "
                "--set run.device=cpu"
            ) from None
        self._streams = threading.local()  # of each thread, made when it first needs them
        self._open: set[_Copy] = set()
        self._launchers = Launchers(self._launcher)
        self.launch_seconds = 0.0
        self.matmul_precision = "float32"
        self._modules: dict[tuple[str, str], Any] = {}

    @property
    def matmul_precision(self) -> str:
        """What cuBLAS may round float32 matrices to: "float32" (nothing), "tf32" or "bf16"."""
        return self._matmul_precision

    @matmul_precision.setter
    def matmul_precision(self, name: str) -> None:
        self._matmul_precision = check_precision(name)
        products = self._cupy._core._routines_linalg  # where CuPy keeps it, for the whole process
        products.set_compute_type(np.float32, COMPUTE_TYPES[name])

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """A C-contiguous array with undefined contents, from CuPy's pool."""
        return self._cupy.empty(shape, dtype)

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """A C-contiguous array of zeros."""
        return self._cupy.zeros(shape, dtype)

    def from_host(self, array: NDArray[Any]) -> Array:
        """A copy on the device of a host array, which may be changed at once."""
        return self._cupy.asarray(array, order="C")

    def to_host(self, array: Array) -> NDArray[Any]:
        """A copy on the host, made after all work launched on the current stream is done."""
        host: NDArray[Any] = self._cupy.asnumpy(array, order="C")
        return host

    def wrap(self, array: NDArray[Any]) -> Array:
        """Refused: host memory is not the device's."""
        raise DeviceError(f"the device {self.name} cannot use host memory in place; copy it")

    def copy(self, target: Array, source: Array) -> None:
        """Copy `source` to `target`, both on the device, of one shape and dtype."""
        if target.shape != source.shape or target.dtype != source.dtype:
            raise DeviceError(
                f"copy from {source.shape} of {source.dtype} to {target.shape} of {target.dtype}: "
                "shape and dtype must be equal"
            )
        target[...] = source

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b; see `CpuDevice.matmul`. cuBLAS adds up 16-bit numbers in float32."""
        return self._cupy.matmul(a, b, out=out)

    def peers(self, arrays: Sequence[Array]) -> Array:
        """The table of addresses that a `const real* const*` parameter takes.

        The caller keeps `arrays` alive for as long as the table is used.
        """
        return self.from_host(np.array([array.data.ptr for array in arrays], np.uint64))

    def synchronize(self) -> None:
        """Wait until all work launched on the current stream is done."""
        self._cupy.cuda.get_current_stream().synchronize()

    def use_own_stream(self) -> None:
        """See `CpuDevice.use_own_stream`. A thread also has to choose its GPU anew."""
        self._device.use()
        self._streams.own = stream = self._cupy.cuda.Stream(non_blocking=True)
        stream.use()

    def record(self) -> Event:
        """The point that this thread's current stream has reached."""
        return self._event(self._cupy.cuda.get_current_stream())

    def wait_event(self, event: Event) -> None:
        """What comes on this thread's current stream waits for the event; the host does not."""
        self._cupy.cuda.get_current_stream().wait_event(event)

    def staging(self, nbytes: int) -> NDArray[Any]:
        """Page-locked host memory, shape (nbytes,) of uint8; see `CpuDevice.staging`."""
        memory = self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
        return np.frombuffer(memory, np.uint8, nbytes)

    def download(self, array: Array, host: NDArray[Any]) -> Ticket:
        """Begin to copy `array` to `host`; see `CpuDevice.download`. On a stream for copies."""
        nbytes, stream = transfer_bytes(array, host), self._copy_stream()
        stream.wait_event(self._event(self._cupy.cuda.get_current_stream()))
        array.data.copy_to_host_async(host.ctypes.data, nbytes, stream)
        return self._ticket(stream, array, host)

    def upload(self, host: NDArray[Any], array: Array) -> Ticket:
        """Begin to copy `host` to `array`; see `CpuDevice.upload`. On the current stream."""
        stream = self._cupy.cuda.get_current_stream()
        array.data.copy_from_host_async(host.ctypes.data, transfer_bytes(array, host), stream)
        return self._ticket(stream, array, host)

    def _copy_stream(self) -> Any:
        if not hasattr(self._streams, "copies"):
            self._streams.copies = self._cupy.cuda.Stream(non_blocking=True)
        return self._streams.copies

    def _event(self, stream: Any) -> Event:
        event: Event = stream.record(self._cupy.cuda.Event(disable_timing=True))
        return event

    def _ticket(self, stream: Any, array: Array, host: NDArray[Any]) -> Ticket:
        """The memory of a copy is kept until it is done, also where nobody waits for it."""
        if len(self._open) >= OPEN_TICKETS:
            # Other threads may add to it meanwhile. The tickets hold the same set.
            self._open -= {copy for copy in tuple(self._open) if copy.event.done}
        ticket = _Copy(self._open, self._event(stream), array, host)
        self._open.add(ticket)
        return ticket

    def shared(self, n: int, dtype: DTypeLike) -> Array:
        """A flat array of zeros, allocated outside the pool; see `CpuDevice.shared`."""
        cuda, dtype = self._cupy.cuda, np.dtype(dtype)
        nbytes = -(-max(n * dtype.itemsize, 1) // GRAIN) * GRAIN
        array = self._cupy.ndarray((n,), dtype, cuda.MemoryPointer(cuda.Memory(nbytes), 0))
        array.data.memset_async(0, nbytes)
        self.synchronize()  # other processes are not in the order of this stream
        return array

    def export(self, array: Array) -> bytes:
        """A handle to an array made by `shared`; see `CpuDevice.export`."""
        memory = array.data.mem
        if not isinstance(memory, self._cupy.cuda.Memory) or array.data.ptr != memory.ptr:
            raise DeviceError("only whole arrays made by `shared` have handles, no parts of others")
        runtime = self._cupy.cuda.runtime
        try:
            return bytes(runtime.ipcGetMemHandle(memory.ptr))
        except runtime.CUDARuntimeError as error:
            raise DeviceError(f"GPU memory cannot be shared ({error}): use messages") from None

    def import_(self, handle: bytes, n: int, dtype: DTypeLike) -> Array:
        """The memory behind another process's handle; see `CpuDevice.import_`."""
        cuda, dtype = self._cupy.cuda, np.dtype(dtype)
        try:
            pointer = cuda.runtime.ipcOpenMemHandle(handle)
        except cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"another rank's GPU memory cannot be mapped ({error}); that takes GPUs that reach "
                "each other and that both ranks see (not one GPU per task by cgroup): use messages"
            ) from None
        memory = cuda.UnownedMemory(pointer, n * dtype.itemsize, None, self._device.id)
        return self._cupy.ndarray((n,), dtype, cuda.MemoryPointer(memory, 0))

    def close(self, array: Array) -> None:
        """Give back what `import_` mapped, once this device's work on it is done."""
        self._device.synchronize()
        self._cupy.cuda.runtime.ipcCloseMemHandle(array.data.mem.ptr)

    def prepare(self, dtypes: Iterable[str], node: Any = None) -> None:
        """Compile every kernel; the node's first rank first, so that CuPy's cache serves the rest.

        Collective over `node` if given.
        """
        dtypes = list(dtypes)
        self._check_dtypes(dtypes)
        failure: Exception | None = None
        if node is None or node.rank == 0:
            failure = self._compile(dtypes)
        if node is not None:
            text = node.bcast(None if failure is None else str(failure), root=0)
            if text is not None:
                raise DeviceError(f"the kernels do not compile on the node's first rank: {text}")
            failure = self._compile(dtypes) if node.rank else None
        if failure is not None:
            raise failure

    def _check_dtypes(self, dtypes: Sequence[str]) -> None:
        """`DeviceError` where CuPy has no arrays of a type: bfloat16 came with CuPy 14."""
        for dtype in dtypes:
            try:
                self._cupy.empty(0, FLOATS[dtype])
            except (TypeError, ValueError) as error:
                raise DeviceError(
                    f"this CuPy has no {dtype} ({error}): install CuPy 14 or later, or use "
                    "--set run.dtype=float16"
                ) from None

    def _compile(self, dtypes: Iterable[str]) -> Exception | None:
        try:
            for file in sorted({kernel.file for kernel in kernel_table().values()}):
                for dtype in dtypes:
                    self._module(file, dtype).compile()
        except Exception as error:  # CuPy's CompileException, or the stand-in's
            return error
        return None

    def launch(self, name: str, *args: Any, work: int) -> None:
        """Launch the kernel `name` over `work` elements or rows on the current stream."""
        if work <= 0:
            return
        begun = time.perf_counter()
        self._launchers.find(name, args)(*args, work=work)
        self.launch_seconds += time.perf_counter() - begun

    def _launcher(self, kernel: Kernel, args: tuple[Any, ...]) -> Callable[..., None]:
        real = real_dtype(kernel, args)
        function = self._module(kernel.file, real).get_function(kernel.name)
        scalars = [
            None if p.pointers else DTYPES[resolved(p.type, real)].type for p in kernel.parameters
        ]

        def launcher(*args: Any, work: int) -> None:
            check_arguments(kernel, real, args)
            raw = tuple(
                value if scalar is None and value is not None
                else np.uint64(0) if scalar is None  # a null pointer
                else scalar(value)
                for value, scalar in zip(args, scalars, strict=True)
            )  # fmt: skip
            blocks, threads = launch_shape(kernel.kind, work, self._units)
            function((blocks,), (threads,), raw)

        return launcher

    def _module(self, file: str, dtype: str) -> Any:
        if (file, dtype) not in self._modules:
            code = (kernel_folder() / f"{file}.cu").read_text(encoding="utf-8")
            self._modules[file, dtype] = self._cupy.RawModule(code=code, options=gpu_options(dtype))
        return self._modules[file, dtype]


class _Copy:
    """The ticket of a copy on a stream, and hold on its memory."""

    def __init__(self, copies: set[_Copy], event: Any, *memory: Any) -> None:
        self._copies, self.event, self._memory = copies, event, memory

    def wait(self, idle: Callable[[float], None] | None = None) -> None:
        """Block until the copy is done."""
        if idle is None:
            self.event.synchronize()
        else:
            while not self.event.done:
                idle(0.0)
        self._copies.discard(self)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"the device cuda needs CuPy ({error}): pip install 'hpctrain[cuda12x]' or "
            "'hpctrain[cuda13x]', by the driver's CUDA version, or use --set run.device=cpu"
        ) from None
    return cupy
