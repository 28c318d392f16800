"""What can be learned about GPU support of the MPI library in this process.

mpi4py has none of these questions, so they are asked by ctypes. All of them are harmless to a
library without GPU support: nothing here hands it a GPU's address.

Layer: mpi. Judges nothing; see gpu.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Facts", "facts"]

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
CUDA = 0  # MPIX_GPU_SUPPORT_CUDA of MPICH


@dataclass(frozen=True)
class Facts:
    """What can be known of the MPI library: what `evidence` judges.

    Attributes:
        library: what MPI_Get_library_version says.
        query: what MPIX_Query_cuda_support answers; None where there is no such function.
        gpu_query: the same of MPIX_GPU_query_support for CUDA.
        kinds: the world communicator's mpi_memory_alloc_kinds; "" if there are none.
        built_in: whether ompi_info says that CUDA support was built in; None if it says nothing.
        loaded: names of the shared libraries in this process.
    """

    library: str
    query: bool | None = None
    gpu_query: bool | None = None
    kinds: str = ""
    built_in: bool | None = None
    loaded: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)

    def ordered(self, *names: str) -> str:
        """The first of these variables that is set to a "yes", as NAME=value; else ""."""
        return next((f"{n}={v}" for n in names if (v := self._value(n)) in ON), "")

    def forbidden(self, *names: str) -> str:
        """The first of these variables that is set to a "no", as NAME=value; else ""."""
        return next((f"{n}={v}" for n in names if (v := self._value(n)) in OFF), "")

    def _value(self, name: str) -> str:
        return self.environment.get(name, "").strip().lower()


def facts() -> Facts:
    """What this process's MPI library says of itself. Starts MPI; not collective."""
    from mpi4py import MPI

    text = MPI.Get_library_version().replace("\0", "").strip()
    loaded = _loaded()
    libraries = [MPI.__file__, *(path for path in loaded if Path(path).name.startswith("libmpi"))]
    query = _ask(libraries, "MPIX_Query_cuda_support")
    built_in = _ompi_info(libraries) if "Open MPI" in text and query is None else None
    return Facts(
        library=text,
        query=query,
        gpu_query=_ask_mpich(libraries),
        kinds=_memory_kinds(),
        built_in=built_in,
        loaded=frozenset(Path(path).name for path in loaded),
        environment=dict(os.environ),
    )


def _loaded() -> list[str]:
    """Paths of the shared libraries that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = (line.split(maxsplit=5)[5] for line in lines if ".so" in line)
    return list(dict.fromkeys(paths))


def _symbol(libraries: list[str], name: str) -> Any:
    """The function `name`; looked for in a library and in those it was linked with."""
    for path in libraries:
        try:
            found = getattr(ctypes.CDLL(path), name, None)
        except OSError:
            continue
        if found is not None:
            return found
    return None


def _ask(libraries: list[str], name: str) -> bool | None:
    function = _symbol(libraries, name)
    if function is None:
        return None
    function.argtypes, function.restype = (), ctypes.c_int
    return bool(function() == 1)


def _ask_mpich(libraries: list[str]) -> bool | None:
    function = _symbol(libraries, "MPIX_GPU_query_support")
    if function is None:
        return None
    function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int
    answer = ctypes.c_int(0)
    return function(CUDA, ctypes.byref(answer)) == 0 and answer.value == 1


def _memory_kinds() -> str:
    from mpi4py import MPI

    info = MPI.COMM_WORLD.Get_info()
    try:
        return info.Get("mpi_memory_alloc_kinds") or ""
    finally:
        info.Free()


def _ompi_info(libraries: list[str]) -> bool | None:
    """What the ompi_info beside the MPI library, else that in PATH, says of CUDA support."""
    beside = (Path(path).resolve().parents[1] / "bin" / "ompi_info" for path in libraries)
    program = next((str(p) for p in beside if p.exists()), None) or shutil.which("ompi_info")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--parsable", "--all"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "built_with_cuda_support:value:" not in done.stdout:
        return None
    return "built_with_cuda_support:value:true" in done.stdout
