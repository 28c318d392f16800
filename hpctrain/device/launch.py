"""Turning a launch from Python into the arguments of a compiled kernel.

Layer: device. Knows nothing of how a target runs a kernel.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from hpctrain.device.signatures import Kernel, Parameter
from hpctrain.errors import KernelError

__all__ = ["CTYPES", "DTYPES", "check_arguments", "real_dtype"]

REALS: dict[np.dtype[Any], str] = {np.dtype(np.float32): "float32", np.dtype(np.float64): "float64"}
CTYPES: dict[str, Any] = {
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "int32": ctypes.c_int32,
    "uint32": ctypes.c_uint32,
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
    "uint8": np.dtype(np.uint8),
    "double": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def real_dtype(kernel: Kernel, args: tuple[Any, ...]) -> str:
    """ "float32" or "float64": the dtype of the first array given for a `real` pointer."""
    for parameter, value in zip(kernel.parameters, args, strict=False):
        if parameter.type == "real" and parameter.pointers == 1 and value is not None:
            found = REALS.get(value.dtype)
            if found is None:
                raise KernelError(
                    f"{kernel.name}: {parameter.name} has dtype {value.dtype}; "
                    "kernels exist for float32 and float64"
                )
            return found
    raise KernelError(f"{kernel.name}: no array argument tells its real type")


def check_array(kernel: Kernel, parameter: Parameter, value: Any, real: str) -> None:
    """Refuse an array that the kernel would read wrongly."""
    name = "uint64" if parameter.pointers == 2 else parameter.type
    wanted = DTYPES[real if name == "real" else name]
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
