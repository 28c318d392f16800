"""Compiling kernels for GPUs that are not here, by NVRTC, NVIDIA's runtime compiler.

On a GPU CuPy calls NVRTC; here it is called directly, with the same options. Its PyPI wheels
(`nvidia-cuda-nvrtc`, CUDA 13, and `nvidia-cuda-nvrtc-cu12`) need no driver and no toolkit, so the
check that every kernel compiles for every GPU runs anywhere. Warnings are errors. The assembler's
report of registers, spills and shared memory is kept beside the machine code.

Layer: device. Knows nothing of arrays and launches.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.device.build import Library, cache_folder, gpu_options
from hpctrain.device.signatures import kernel_folder
from hpctrain.errors import KernelError

__all__ = ["ARCHITECTURES", "Compiler", "Resources", "compile_kernels", "compiler_for"]

# The GPUs that kernels are compiled for: Volta, Turing, Ampere, Hopper, Blackwell of data centres
# and of desktops. CUDA 13 has dropped the first.
ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "sm_120")

# What CuPy's RawModule adds to the options it is given. With -ftz float32 numbers below the
# smallest normal one are zero on the GPU; on the CPU they are not.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

# (package of the wheel, folder and file in it), the newest first
WHEELS = (("nvidia", "cu13/lib/libnvrtc.so.13"), ("nvidia", "cuda_nvrtc/lib/libnvrtc.so.12"))
SYSTEM = ("libnvrtc.so.13", "libnvrtc.so.12")
CUBIN = 190  # the machine in a cubin's ELF header
_OLD_GPU = "Architectures prior to"  # NVRTC 12.9 announces the end of sm_70: not about our code
_ENTRY = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes "
    r"spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on a multiprocessor: registers per thread, bytes of the rest."""

    kernel: str
    registers: int
    spills: int  # bytes stored to and loaded from memory for want of registers
    stack: int  # bytes of local memory per thread, spills among them
    shared: int  # bytes of shared memory per block


class Compiler:
    """One version of NVRTC. Compiles in several threads at once."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._nvrtc = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        self.architectures = [f"sm_{number}" for number in numbers]

    def compile(self, text: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
        """The cubin of a source text, and the assembler's report.

        Raises `KernelError` with the compiler's messages; a warning counts as an error.
        """
        program = ctypes.c_void_p()
        create = (text.encode(), name.encode(), 0, None, None)
        self._call("nvrtcCreateProgram", ctypes.byref(program), *create)
        try:
            raw = [option.encode() for option in (*options, "--ptxas-options=-v")]
            array = (ctypes.c_char_p * len(raw))(*raw)
            failed = self._nvrtc.nvrtcCompileProgram(program, len(raw), array)
            log = self._output(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            wrong = [line for line in log.splitlines() if _is_warning(line)]
            if failed or wrong:
                shown = log if failed else "\n".join(wrong)
                raise KernelError(f"NVRTC {self.version} refuses {name} {options[0]}:\n{shown}")
            return self._output(program, "CUBIN"), log
        finally:
            self._nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, program: ctypes.c_void_p, kind: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *args: object) -> None:
        if status := getattr(self._nvrtc, function)(*args):
            text = self._nvrtc.nvrtcGetErrorString(status).decode()
            raise KernelError(f"{function} of NVRTC failed: {text}")


def _is_warning(line: str) -> bool:
    return bool(re.search(r"\bwarning\b", line, re.IGNORECASE)) and _OLD_GPU not in line


@functools.cache
def compilers() -> tuple[Compiler, ...]:
    """The versions of NVRTC that are here, newest first: from wheels, else the system's."""
    found = []
    for package, file in WHEELS:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / file).is_file():
                found.append(Compiler(ctypes.CDLL(str(path))))
    for name in () if found else SYSTEM:
        try:
            found.append(Compiler(ctypes.CDLL(name)))
        except OSError:
            continue
    return tuple(found)


def compiler_for(architecture: str) -> Compiler:
    """The newest NVRTC that knows an architecture such as "sm_90"; `KernelError` without one."""
    for compiler in compilers():
        if architecture in compiler.architectures:
            return compiler
    here = ", ".join(f"{c.version[0]}.{c.version[1]}" for c in compilers()) or "none"
    raise KernelError(
        f"no NVRTC for {architecture} (there is: {here}): pip install nvidia-cuda-nvrtc, or "
        "nvidia-cuda-nvrtc-cu12 for sm_70"
    )


def compile_kernels(library: Library, architecture: str) -> dict[str, Resources]:
    """Compile one kernel file for a real type and a GPU; what each of its kernels takes.

    The cubin and the assembler's report are kept in the cache. Raises `KernelError` without an
    NVRTC for the GPU, and where the file does not compile without warnings.
    """
    file, dtype = library
    compiler = compiler_for(architecture)
    text = (kernel_folder() / f"{file}.cu").read_text(encoding="utf-8")
    options = (f"-arch={architecture}", *gpu_options(dtype), *CUPY_OPTIONS)
    content = hashlib.sha256("\0".join([str(compiler.version), *options, text]).encode())
    name = f"{file}-{dtype}-{architecture}-{content.hexdigest()[:20]}"
    report, cubin = cache_folder() / f"{name}.txt", cache_folder() / f"{name}.cubin"
    if not report.exists():
        code, log = compiler.compile(text, f"{file}.cu", options)
        _keep(cubin, code)
        _keep(report, log.encode())
    return resources(report.read_text(encoding="utf-8"))


def resources(log: str) -> dict[str, Resources]:
    """What the assembler's report says of each kernel, by name."""
    found = {}
    for entry in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", entry["more"])
        spills = int(entry["stores"]) + int(entry["loads"])
        found[entry["name"]] = Resources(
            entry["name"], int(entry["registers"]), spills, int(entry["stack"]),
            int(shared[1]) if shared else 0,
        )  # fmt: skip
    return found


def _keep(path: Path, content: bytes) -> None:
    """Write a file of the cache: aside, then renamed, so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".build-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(aside).replace(path)
