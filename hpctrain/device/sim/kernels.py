"""Kernels of simulated GPUs: `cupy.RawModule` and its functions.

A launch checks what a GPU would take on trust (the number and types of arguments, the shape of the
launch), and is then work in a stream. When that comes up, the kernel runs thread by thread on the
SIMT target, which watches every access, or compiled for the CPU, which gives the same bits some
hundred times as quickly. With "first" a kernel is watched the first time that it is launched with
arguments of these shapes, where they are small.

Layer: device. Names are CuPy's.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.device import build, simt, simt_library
from hpctrain.device.cpu import address
from hpctrain.device.launch import CTYPES, DTYPES, check_arguments, resolved
from hpctrain.device.signatures import Kernel, kernel_folder, kernels_of
from hpctrain.device.sim.array import ndarray
from hpctrain.device.sim.machine import Machine
from hpctrain.device.sim.memory import CUDARuntimeError
from hpctrain.device.sim.streams import current_stream
from hpctrain.errors import KernelError, nearest

__all__ = ["RawKernel", "RawModule"]

WARP, MOST_THREADS, MOST_BLOCKS = 32, 1024, 2**31 - 1
# Of a launch that is watched the first time: about 10 ms.
SMALL_BYTES, SMALL_THREADS = 1 << 17, 1 << 12
PEER_BYTES = 16 << 20  # of allocations behind a table of pointers, which are watched as wholes
REALS = {text: name for name, text in build.REAL.items()}


class RawModule:
    """The kernels of one source, compiled for one real type (-DREAL=...)."""

    def __init__(self, machine: Machine, code: str, options: Sequence[str]) -> None:
        self.machine, self.options = machine, options
        real = re.search(r"-DREAL=(\w+)", " ".join(options))
        if real is None or real[1] not in REALS:
            raise KernelError(f"the options {options} lack -DREAL=float or -DREAL=double")
        self.real = REALS[real[1]]
        self.path = _path_of(code)
        self.kernels = {kernel.name: kernel for kernel in kernels_of(self.path)}
        self._code: ctypes.CDLL | None = None

    def compile(self) -> None:
        """Compile for the CPU and, unless no launch is watched, for the SIMT target."""
        self.library()
        if self.machine.kernels != "host":
            simt_library.build_library(self.path, self.real)

    def get_function(self, name: str) -> RawKernel:
        """One of its kernels."""
        if name not in self.kernels:
            raise KernelError(
                f"{self.path.name} defines no kernel {name!r}{nearest(name, self.kernels)}"
            )
        return RawKernel(self, self.kernels[name])

    def library(self) -> ctypes.CDLL:
        """The source compiled for the CPU."""
        if self._code is None:
            level = build.host_level()
            name = f"{self.path.stem}-{build.REAL[self.real]}-host-{level}"
            text = self.path.read_text(encoding="utf-8")
            self._code = ctypes.CDLL(str(build.cached(name, build.options(self.real, level), text)))
        return self._code


class RawKernel:
    """A kernel that can be launched as `kernel(grid, block, arguments)`."""

    def __init__(self, module: RawModule, kernel: Kernel) -> None:
        self._module, self.kernel = module, kernel
        self._watched: set[Any] = set()
        self._types = [DTYPES[resolved(p.type, module.real)] for p in kernel.parameters]
        self._function: Callable[..., None] | None = None

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any]) -> None:
        """Launch on the current stream of the current device."""
        name, machine = self.kernel.name, self._module.machine
        processor = machine.current()
        threads = _threads(name, grid, block)
        arrays = [arg for arg in args if isinstance(arg, ndarray)]
        values = self._values(args)
        processor.counts.launches[name] += 1

        def run() -> None:
            if self._watch(values, grid[0] * threads):
                processor.counts.checked += 1
                self._run_watched(values, grid[0], threads)
            else:
                self._run(values)

        spans = {id(array.mem.span): array.mem.span for array in arrays}.values()
        processor.add(current_stream(processor).queue, f"kernel {name}", run, spans)

    def _values(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as a host kernel takes them: memory, numbers, None for a null pointer."""
        values: list[Any] = []
        for parameter, wanted, arg in zip(self.kernel.parameters, self._types, args, strict=False):
            if parameter.pointers:
                null = isinstance(arg, int | np.integer) and arg == 0
                if not null and not isinstance(arg, ndarray):
                    raise KernelError(
                        f"{self.kernel.name}: {parameter.name} is a pointer and was given {arg!r}, "
                        "neither an array of a simulated GPU nor 0"
                    )
                values.append(None if null else arg._view)
            else:
                given = "an array" if isinstance(arg, ndarray) else np.asarray(arg).dtype
                if given != wanted:
                    raise KernelError(
                        f"{self.kernel.name}: {parameter.name} is {wanted} by value and was given "
                        f"{given}, whose bytes a GPU would read as they are"
                    )
                values.append(np.asarray(arg).item())
        check_arguments(self.kernel, self._module.real, (*values, *args[len(values) :]))
        return values

    def _watch(self, values: Sequence[Any], threads: int) -> bool:
        """Whether this launch is to run on the SIMT target."""
        if self._module.machine.kernels != "first":
            return self._module.machine.kernels == "simt"
        shapes = tuple(v.shape if isinstance(v, np.ndarray) else None for v in values)
        nbytes = sum(v.nbytes for v in values if isinstance(v, np.ndarray))
        if shapes in self._watched or nbytes > SMALL_BYTES or threads > SMALL_THREADS:
            return False
        self._watched.add(shapes)
        return bool(sum(array.nbytes for array in self._peers(values)) <= PEER_BYTES)

    def _peers(self, values: Sequence[Any]) -> list[Any]:
        """The memory behind all tables of pointers, checked."""
        return [
            array
            for parameter, value in zip(self.kernel.parameters, values, strict=True)
            if parameter.pointers == 2 and value is not None
            for array in self._table(value)
        ]

    def _run(self, values: Sequence[Any]) -> None:
        if self._function is None:
            function = getattr(self._module.library(), self.kernel.name)
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p if p.pointers else CTYPES[str(dtype)]
                for p, dtype in zip(self.kernel.parameters, self._types, strict=True)
            ]
            self._function = function
        self._peers(values)
        self._function(*(address(v) if isinstance(v, np.ndarray) else v for v in values))

    def _run_watched(self, values: Sequence[Any], blocks: int, threads: int) -> None:
        order = self._module.machine.scheduler.order
        simt.launch(
            self.kernel.name,
            *(
                self._table(value) if p.pointers == 2 and value is not None else value
                for p, value in zip(self.kernel.parameters, values, strict=True)
            ),
            work=1,
            grid=blocks,
            block=threads,
            order={"early": "forward", "late": "reverse"}.get(order) or int(order),  # type: ignore[arg-type]
            source=self._module.path,
        )

    def _table(self, table: Any) -> list[Any]:
        """The memory behind a table of pointers, each up to the end of its allocation."""
        arrays, dtype = [], DTYPES[self._module.real]
        for pointer in table.tolist():
            span = self._module.machine.registry.find(pointer)
            if span is None:
                raise CUDARuntimeError(
                    f"cudaErrorIllegalAddress: kernel {self.kernel.name} was given a table with "
                    f"0x{pointer:x}, which is no device memory"
                )
            span.check(f"kernel {self.kernel.name}")
            offset = pointer - span.address
            count = (span.nbytes - offset) // dtype.itemsize
            arrays.append(np.ndarray((count,), dtype, span.bytes, offset))
        return arrays


def _threads(name: str, grid: tuple[int, ...], block: tuple[int, ...]) -> int:
    """Threads per block, checked: a kernel of this project takes whole warps along one dim."""
    threads, blocks = block[0], grid[0]
    if any(n != 1 for n in (*grid[1:], *block[1:])):
        raise KernelError(f"{name}: grid {grid} and block {block}; kernels here use one dim")
    if threads % WARP or not 0 < threads <= MOST_THREADS:
        raise KernelError(
            f"{name}: {threads} threads per block; it takes 32, 64, ... or {MOST_THREADS}"
        )
    if not 0 < blocks <= MOST_BLOCKS:
        raise CUDARuntimeError(f"cudaErrorInvalidConfiguration: {name}: {blocks} blocks")
    return threads


def _path_of(code: str) -> Path:
    """A file that holds the source: the one in cuda/, or one in the cache for other code."""
    for path in kernel_folder().glob("*.cu"):
        if path.read_text(encoding="utf-8") == code:
            return path
    folder = build.cache_folder() / "sources" / hashlib.sha256(code.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kernel.cu"
    path.write_text(code, encoding="utf-8")
    return path
