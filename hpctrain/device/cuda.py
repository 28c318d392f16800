"""CUDA GPUs as a device, through CuPy: the interface of `cpu.CpuDevice`.

Only allocation, copies, views, `matmul` and launches of our own kernels are asked of CuPy. Kernels
are compiled by NVRTC and launched on the current stream. Not yet run on hardware by the authors;
the kernels' arithmetic is that of the CPU, which is tested.

Layer: device. Knows nothing of networks, ranks or files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.device.build import REAL
from hpctrain.device.launch import DTYPES, check_arguments, real_dtype
from hpctrain.device.signatures import kernel_folder, kernel_named, kernel_table
from hpctrain.errors import DeviceError

__all__ = ["CudaDevice", "available"]

Array = Any  # cupy.ndarray
BLOCK = 256  # threads: 8 warps, a full SM of 2048 threads is 8 blocks
BLOCKS_PER_SM = 8


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

    name = "cuda"
    level = ""  # has no x86-64 level

    def __init__(self, local_rank: int = 0) -> None:
        """Takes visible GPU `local_rank`, counted round. `DeviceError` without CuPy or a GPU."""
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(
                f"the device cuda needs CuPy ({error}): pip install 'hpctrain[cuda12x]' or "
                "'hpctrain[cuda13x]', by the driver's CUDA version, or use --set run.device=cpu"
            ) from None
        self._cupy = cupy
        try:
            self._device = cupy.cuda.Device(local_rank % cupy.cuda.runtime.getDeviceCount())
            self._device.use()
            self._units = int(self._device.attributes["MultiProcessorCount"])
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"no GPU can be used ({error}): check nvidia-smi and CUDA_VISIBLE_DEVICES, or use "
                "--set run.device=cpu"
            ) from None
        self._launchers: dict[tuple[str, Any], Callable[..., None]] = {}
        self._modules: dict[tuple[str, str], Any] = {}

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """A C-contiguous array with undefined contents, from CuPy's pool."""
        return self._cupy.empty(shape, dtype)

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """A C-contiguous array of zeros."""
        return self._cupy.zeros(shape, dtype)

    def from_host(self, array: NDArray[Any]) -> Array:
        """A copy on the device of a host array."""
        return self._cupy.asarray(array, order="C")

    def to_host(self, array: Array) -> NDArray[Any]:
        """A copy on the host, made after all launched work is done."""
        host: NDArray[Any] = self._cupy.asnumpy(array, order="C")
        return host

    def wrap(self, array: NDArray[Any]) -> Array:
        """Refused: host memory is not the device's."""
        raise DeviceError("host memory cannot be used in place by the device cuda; copy it")

    def copy(self, target: Array, source: Array) -> None:
        """Copy `source` to `target`, both on the device, of one shape and dtype."""
        target[...] = source

    def matmul(self, a: Array, b: Array, out: Array) -> Array:
        """out = a @ b, of (stacks of) matrices; a and b may be transposed views."""
        return self._cupy.matmul(a, b, out=out)

    def peers(self, arrays: Sequence[Array]) -> Array:
        """The table of addresses that a `const real* const*` parameter takes."""
        return self.from_host(np.array([array.data.ptr for array in arrays], np.uint64))

    def synchronize(self) -> None:
        """Wait until all work launched on the current stream is done."""
        self._cupy.cuda.get_current_stream().synchronize()

    def prepare(self, dtypes: Iterable[str], node: Any = None) -> None:
        """Compile every kernel; the node's first rank first, so that CuPy's cache serves the rest.

        Collective over `node` if given.
        """
        if node is not None and node.rank > 0:
            node.Barrier()
        for dtype in dtypes:
            for file in {kernel.file for kernel in kernel_table().values()}:
                self._module(file, dtype)
        if node is not None and node.rank == 0:
            node.Barrier()

    def launch(self, name: str, *args: Any, work: int) -> None:
        """Launch the kernel `name` over `work` elements or rows on the current stream."""
        if work <= 0:
            return
        dtype = next((a.dtype for a in args if getattr(a, "dtype", None) in _FLOATS), None)
        launcher = self._launchers.get((name, dtype))
        if launcher is None:
            launcher = self._launchers[name, dtype] = self._launcher(name, args)
        launcher(*args, work=work)

    def _launcher(self, name: str, args: tuple[Any, ...]) -> Callable[..., None]:
        kernel = kernel_named(name)
        real = real_dtype(kernel, args)
        function = self._module(kernel.file, real).get_function(name)
        threads_per_item = 32 if kernel.kind == "ROWS" else 1
        scalars = [
            None if p.pointers else DTYPES[real if p.type == "real" else p.type].type
            for p in kernel.parameters
        ]

        def launcher(*args: Any, work: int) -> None:
            check_arguments(kernel, real, args)
            raw = tuple(
                value if scalar is None and value is not None
                else np.uint64(0) if scalar is None  # a null pointer
                else scalar(value)
                for value, scalar in zip(args, scalars, strict=True)
            )  # fmt: skip
            blocks = min(-(-work * threads_per_item // BLOCK), self._units * BLOCKS_PER_SM)
            function((blocks,), (BLOCK,), raw)

        return launcher

    def _module(self, file: str, dtype: str) -> Any:
        if (file, dtype) not in self._modules:
            folder = kernel_folder()
            self._modules[file, dtype] = self._cupy.RawModule(
                code=(folder / f"{file}.cu").read_text(encoding="utf-8"),
                options=("-std=c++17", f"-I{folder}", f"-DREAL={REAL[dtype]}"),
            )
        return self._modules[file, dtype]


_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
