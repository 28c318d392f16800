"""The kernels that exist and their parameters, read from the sources in cuda/.

The source is the only place where a kernel's parameters are written down; launching from Python,
compiling for the GPU and the SIMT simulator all take them from here.

Layer: device. Knows nothing of arrays, compilers or targets.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import KernelError, nearest

__all__ = ["Kernel", "Parameter", "kernel_folder", "kernel_named", "kernel_table", "kernels_of"]

SCALARS = {"real", "wide", "int64", "uint64", "int32", "uint32", "uint16", "uint8", "double"}
_DEFINITION = re.compile(r"^(ELEMENTS|ROWS)_KERNEL\s+(\w+)\s*\(([^)]*)\)", re.MULTILINE)
_PARAMETER = re.compile(r"^(const )?(\w+)((?: ?\*(?: ?const ?\*)?)?)\s*(?:__restrict__)?\s*(\w+)$")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: `type` of a scalar; `pointers` is 0 (by value), 1 (array) or 2 (table)."""

    name: str
    type: str
    pointers: int
    constant: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: `kind` is "ELEMENTS" or "ROWS", `file` the stem of its source in cuda/."""

    name: str
    file: str
    kind: str
    parameters: tuple[Parameter, ...]


def kernel_folder() -> Path:
    """The folder of the kernel sources: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "kernels", package.parent / "cuda"):
        if (folder / "kernel.h").is_file():
            return folder
    raise KernelError(
        f"the kernel sources are missing: neither {package / 'kernels'} nor "
        f"{package.parent / 'cuda'} holds kernel.h; install hpctrain again"
    )


@functools.cache
def kernel_table() -> dict[str, Kernel]:
    """All kernels by name."""
    table: dict[str, Kernel] = {}
    for path in sorted(kernel_folder().glob("*.cu")):
        for kernel in kernels_of(path):
            if (other := table.get(kernel.name)) is not None:
                raise KernelError(f"kernel {kernel.name} is defined in {other.file}.cu and {path}")
            table[kernel.name] = kernel
    return table


def kernels_of(path: Path) -> list[Kernel]:
    """The kernels that one source file defines."""
    kernels = []
    for kind, name, text in _DEFINITION.findall(path.read_text(encoding="utf-8")):
        parameters = tuple(_parameter(part, name, path) for part in text.split(","))
        kernels.append(Kernel(name, path.stem, kind, parameters))
    return kernels


def kernel_named(name: str) -> Kernel:
    """The kernel called `name`; a `KernelError` with the nearest name where there is none."""
    try:
        return kernel_table()[name]
    except KeyError:
        hint = nearest(name, kernel_table())
        raise KernelError(f"no kernel is called {name!r}{hint}") from None


def _parameter(text: str, kernel: str, path: Path) -> Parameter:
    match = _PARAMETER.match(" ".join(text.split()))
    if not match or match[2] not in SCALARS:
        raise KernelError(
            f"{path.name}: kernel {kernel} has the parameter {text.strip()!r}; write a value of, "
            f"a pointer to, or a `const T* const*` table of: {', '.join(sorted(SCALARS))}"
        )
    if match[2] == "real" and not match[3]:
        raise KernelError(
            f"{path.name}: kernel {kernel} takes {text.strip()!r} by value; numbers are passed as "
            "`wide`, since a 16-bit `real` cannot be"
        )
    return Parameter(match[4], match[2], match[3].count("*"), bool(match[1]))
