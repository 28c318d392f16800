"""Compiling and running kernel files for the SIMT simulator.

A library is one kernel file for one real type, with an entry for each of its kernels that takes
the arguments from 8-byte slots. The runtime that runs and watches launches is a library too.

Layer: device. Knows nothing of arrays but what simt_memory.py registered.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.device.build import REAL, cached, host_level
from hpctrain.device.signatures import Kernel, Parameter, kernels_of
from hpctrain.device.simt_memory import Memory, Region
from hpctrain.errors import KernelError

__all__ = ["TOUCH", "Counts", "Library", "Shape", "build_library", "library", "runtime"]

ORDERS = {"forward": 0, "reverse": 1}
REPORT = 1 << 14  # bytes
# struct Touch of simt_run.h
TOUCH = np.dtype(
    [("address", "u8"), ("thread", "u4"), ("pc", "u4"), ("bytes", "u4"), ("use", "i4")]
)

# -O1 keeps the kernel's own accesses; the sanitizers' calls are answered by cuda/simt.h, so their
# libraries are left out (-nodefaultlibs). Floating point as on the host target.
OPTIONS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-nodefaultlibs"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"),
    "-Werror=frame-larger-than=65536",  # bytes: the stack check of simt_run.h relies on it
    *("-fno-rtti", "-fno-threadsafe-statics", "-Wall", "-Wextra", "-DHPCTRAIN_SIMT"),
    *("-fsanitize=thread,bounds,integer-divide-by-zero", "-fsanitize-coverage=trace-pc"),
]
LIBRARIES = ["-Wl,-Bsymbolic-functions", "-lc", "-lm", "-lgcc"]
RUNTIME_OPTIONS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]

_one_launch = threading.Lock()  # the runtime runs one at a time


@dataclass(frozen=True)
class Shape:
    """How to launch: blocks, threads per block, the order of turns, and when to give up.

    `record`: how many accesses at most are recorded.
    """

    grid: int
    block: int
    order: str | int
    limit: int
    record: int = 0


@dataclass(frozen=True)
class Counts:
    """What a launch did: blocks, switches between threads, checked accesses to memory.

    `touches`: of dtype TOUCH, the accesses to arrays and shared memory in the order in which they
    were made, where recording was asked for.
    """

    grid: int
    switches: int
    accesses: int
    touches: NDArray[Any] | None = field(default=None, compare=False, repr=False)


class _Launch(ctypes.Structure):
    """struct Launch of simt_run.h."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("accesses", ctypes.c_uint64),
        ("touches", ctypes.c_void_p),
        ("touch_room", ctypes.c_uint64),
        ("touch_count", ctypes.c_uint64),
    ]


class Library:
    """One kernel file for one real type, loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._code = ctypes.CDLL(str(path))
        begin, end = ctypes.c_void_p(), ctypes.c_void_p()
        hooks = ctypes.c_void_p(runtime().simt_hooks())
        self._code.simt_attach(hooks, ctypes.byref(begin), ctypes.byref(end))
        self._lines: dict[str, str] = {}  # of places in the code
        self._cells: list[ctypes.Array[ctypes.c_char]] = []  # that watch shared memory
        self._shared = self._shared_memory(begin.value or 0, end.value or 0)

    def run(self, kernel: Kernel, memory: Memory, shape: Shape) -> tuple[Counts, str]:
        """Run a launch; what it did and what was found, a line each."""
        all_regions = [*memory.regions, *self._shared]
        regions = (Region * len(all_regions))(*all_regions)
        touches = np.empty(shape.record, TOUCH)
        launch = _Launch(
            entry=ctypes.cast(self._code[f"simt_entry_{kernel.name}"], ctypes.c_void_p).value,
            arguments=ctypes.addressof(memory.slots),
            regions=ctypes.addressof(regions),
            region_count=len(regions),
            grid=shape.grid,
            block=shape.block,
            order=2 if isinstance(shape.order, int) else ORDERS[shape.order],
            seed=shape.order % (1 << 64) if isinstance(shape.order, int) else 0,
            limit=shape.limit,
            touches=touches.ctypes.data,
            touch_room=touches.size,
        )
        report = ctypes.create_string_buffer(REPORT)
        with _one_launch:
            found = runtime().simt_launch(ctypes.byref(launch), report, ctypes.c_uint64(REPORT))
        if found < 0:
            raise KernelError(f"no memory for the stacks of {shape.block} threads")
        if 0 < shape.record < launch.touch_count:
            raise KernelError(
                f"{kernel.name}: {launch.touch_count} accesses are to be recorded, record= allows "
                f"{shape.record}"
            )
        recorded = touches[: launch.touch_count] if shape.record else None
        counts = Counts(shape.grid, launch.switches, launch.accesses, recorded)
        text = report.value.decode(errors="replace").rstrip()
        return counts, re.sub(r"\{pc:(\w+)\}", lambda match: self._line(match[1]), text)

    def _shared_memory(self, begin: int, end: int) -> list[Region]:
        """The file's __shared__ variables; without `nm` all of them as one."""
        symbols = [line.split() for line in self._tool("nm", "-C", "-S", "--defined-only")]
        named = [(int(s[0], 16), int(s[1], 16), s[3]) for s in symbols if len(s) == 4]
        start = next((int(s[0], 16) for s in symbols if s[-1] == "__start_simt_shared"), None)
        if start is None:
            variables = [(begin, end - begin, "shared memory")] if end > begin else []
        else:
            variables = [
                (address + begin - start, size, name.rpartition("::")[2])
                for address, size, name in named
                if start <= address < start + end - begin and size
            ]
        regions = []
        for address, size, name in variables:
            cells = ctypes.create_string_buffer(size * runtime().simt_cell_bytes())
            self._cells.append(cells)
            at = ctypes.addressof(cells)
            regions.append(Region(address, size, 0, 1, at, name.encode(), True, True))
        return regions

    def _line(self, pc: str) -> str:
        """Where in the source a place in the code is, as " (file.cu:line)" if that can be told."""
        if pc not in self._lines:
            output = self._tool("addr2line", "-i", "-s", f"0x{pc}", "-e")
            lines = [line.split()[0] for line in output if ":" in line]
            in_kernel = [line for line in lines if line.partition(":")[0].endswith(".cu")]
            self._lines[pc] = f" ({[*in_kernel, *lines, f'0x{pc}'][0]})"
        return self._lines[pc]

    def _tool(self, name: str, *options: str) -> list[str]:
        """What a tool of the binutils prints about this library; nothing without the tool."""
        program = shutil.which(name)
        if program is None:
            return []
        command = [program, *options, str(self._path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()


def library(path: Path, real: str) -> Library:
    """The library of a kernel file, compiled if need be; loaded once for each text of the file."""
    return _loaded(path, path.read_text(encoding="utf-8"), real)


@functools.cache
def _loaded(path: Path, text: str, real: str) -> Library:
    return Library(build_library(path, real))


@functools.cache
def runtime() -> ctypes.CDLL:
    """The library that runs and watches launches."""
    text = '#include "simt_runtime.h"\n'
    runtime = ctypes.CDLL(str(cached("simt", RUNTIME_OPTIONS, text, simt=True)))
    runtime.simt_hooks.restype = ctypes.c_void_p
    runtime.simt_cell_bytes.restype = ctypes.c_int64
    runtime.simt_launch.restype = ctypes.c_int64
    return runtime


def build_library(path: Path, real: str) -> Path:
    """Compile a kernel file, with an entry for each kernel that takes its arguments from slots."""
    lines = [f'# 1 "{path.name}"', path.read_text(encoding="utf-8"), '# 1 "entries"']
    for kernel in kernels_of(path):
        values = [
            f"simt_argument<{_spelled(parameter)}>(slots + {index})"
            for index, parameter in enumerate(kernel.parameters)
        ]
        lines.append(
            f'extern "C" SIMT_PLAIN __global__ void simt_entry_{kernel.name}'
            f"(const unsigned long long* slots) {{ {kernel.name}({', '.join(values)}); }}"
        )
    command = [*OPTIONS, f"-march={_level()}", f"-DREAL={REAL[real]}", *LIBRARIES]
    name = f"{path.stem}-{REAL[real]}-simt-{_level()}"
    return cached(name, command, "\n".join(lines), simt=True)


def _spelled(parameter: Parameter) -> str:
    """A parameter's type in C++."""
    const = "const " if parameter.constant else ""
    return const + parameter.type + {0: "", 1: "*", 2: "* const*"}[parameter.pointers]


def _level() -> str:
    """The level kernels are compiled for: v3, where fma is an instruction, on CPUs that have it."""
    return "x86-64-v3" if host_level() == "x86-64-v4" else host_level()
