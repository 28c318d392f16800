"""Turning a launch from Python into the arguments of a compiled kernel.

Layer: device. Knows nothing of how a target runs a kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from hpctrain.device.dtypes import FLOATS, WIDE
from hpctrain.device.signatures import Kernel, Parameter, kernel_named
from hpctrain.errors import KernelError

__all__ = [
    "BLOCK",
    "CTYPES",
    "DTYPES",
    "Launchers",
    "check_arguments",
    "check_array",
    "launch_shape",
    "real_dtype",
    "resolved",
]

BLOCK = 256  # threads: 8 warps; 8 blocks fill an SM of 2048 threads
BLOCKS_PER_SM = 8
WARP = 32

Launcher = Callable[..., None]
CTYPES: dict[str, Any] = {
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "int32": ctypes.c_int32,
    "uint32": ctypes.c_uint32,
    "uint16": ctypes.c_uint16,
    "uint8": ctypes.c_uint8,
    "double": ctypes.c_double,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}
DTYPES: dict[str, np.dtype[Any]] = {
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
    "int32": np.dtype(np.int32),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "double": np.dtype(np.float64),
    **FLOATS,
}
REALS: dict[np.dtype[Any], str] = {dtype: name for name, dtype in FLOATS.items()}


def telling(kernel: Kernel) -> tuple[int, ...]:
    """Positions of the arguments that tell a launch's real type.

    Arrays of `real`; of a kernel that has none, arrays of `wide`.
    """
    for kind in ("real", "wide"):
        found = [p.type == kind and p.pointers == 1 for p in kernel.parameters]
        if any(found):
            return tuple(index for index, tells in enumerate(found) if tells)
    return ()


def real_dtype(kernel: Kernel, args: tuple[Any, ...]) -> str:
    """The real type of a launch, such as "float32": the dtype of the first array that tells it.

    A kernel without arrays of `real` or `wide` is the same for all types; then it is "float32".
    """
    positions = telling(kernel)
    if not positions:
        return "float32"
    for index in positions:
        value = args[index] if index < len(args) else None
        if value is not None:
            found = REALS.get(value.dtype)
            if found is None:
                raise KernelError(
                    f"{kernel.name}: {kernel.parameters[index].name} has dtype {value.dtype}; "
                    f"kernels exist for {', '.join(WIDE)}"
                )
            return found
    raise KernelError(f"{kernel.name}: no array argument tells its real type")


class Launchers:
    """What a device prepared for each kernel and real type, made when it is first asked for."""

    def __init__(self, make: Callable[[Kernel, tuple[Any, ...]], Launcher]) -> None:
        self._make = make
        self._known: dict[str, tuple[tuple[int, ...], dict[Any, Launcher]]] = {}

    def find(self, name: str, args: tuple[Any, ...]) -> Launcher:
        """The launcher of the kernel `name` for arrays such as `args`."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = (telling(kernel_named(name)), {})
        positions, launchers = known
        dtype = None
        for index in positions:
            if index < len(args) and args[index] is not None:
                dtype = args[index].dtype
                break
        launcher = launchers.get(dtype)
        if launcher is None:
            launcher = launchers[dtype] = self._make(kernel_named(name), args)
        return launcher


def resolved(name: str, real: str) -> str:
    """The type behind a parameter's: "real" and "wide" by the launch's real type."""
    return real if name == "real" else WIDE[real] if name == "wide" else name


def check_array(kernel: Kernel, parameter: Parameter, value: Any, real: str) -> None:
    """Refuse an array that the kernel would read wrongly."""
    name = "uint64" if parameter.pointers == 2 else resolved(parameter.type, real)
    wanted = DTYPES[name]
    if value.dtype != wanted:
        raise KernelError(
            f"{kernel.name}: {parameter.name} has dtype {value.dtype}, the kernel needs {wanted}"
        )
    if not value.flags.c_contiguous:
        raise KernelError(
            f"{kernel.name}: {parameter.name} of shape {value.shape} is not C-contiguous; copy it "
            "to a contiguous array first"
        )


def check_arguments(kernel: Kernel, real: str, args: tuple[Any, ...]) -> None:
    """Refuse a wrong number of arguments, and arrays that the kernel would read wrongly."""
    if len(args) != len(kernel.parameters):
        raise KernelError(
            f"{kernel.name} takes {len(kernel.parameters)} arguments "
            f"({', '.join(p.name for p in kernel.parameters)}), not {len(args)}"
        )
    for parameter, value in zip(kernel.parameters, args, strict=True):
        if parameter.pointers and value is not None:
            check_array(kernel, parameter, value, real)


def launch_shape(kind: str, work: int, units: int) -> tuple[int, int]:
    """Blocks and threads per block of a launch on a GPU of `units` multiprocessors.

    An element takes a thread, a row (kind "ROWS") a warp; beyond what the GPU runs at once, threads
    take several in turn. So blocks are never more than 8 per multiprocessor, however large `work`
    is, and the limit of 2^31 - 1 blocks is out of reach.
    """
    per_block = BLOCK // WARP if kind == "ROWS" else BLOCK
    return max(1, min(-(-work // per_block), units * BLOCKS_PER_SM)), BLOCK
