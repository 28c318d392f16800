"""Matrix products on the CPU that BLAS does not offer: of 16-bit numbers, and in lower precision.

Matrices of bfloat16 and float16 are widened and multiplied in float32, and the product is rounded
once: what the matrix units of a GPU do. (NumPy's own product of float16 runs at 0.3 GFLOP/s.) In
the precisions "tf32" and "bf16" float32 matrices are rounded to 10 and 7 bits of mantissa first, so
that a run on the CPU shows what these precisions of a GPU will do to it.

Layer: device. Is given a device's memory and kernels; knows nothing of networks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import DeviceError, nearest

if TYPE_CHECKING:
    from hpctrain.device.interface import Device

__all__ = ["MANTISSA", "check_precision", "product", "rounded"]

Array = NDArray[Any]
MANTISSA = {"float32": 23, "tf32": 10, "bf16": 7}  # bits that a product in float32 reads


def check_precision(name: str) -> str:
    """`name`, if it is a precision of products; else a `DeviceError`."""
    if name not in MANTISSA:
        raise DeviceError(
            f"no matmul precision is called {name!r}{nearest(name, MANTISSA)}; there are "
            f"{', '.join(MANTISSA)}"
        )
    return name


def product(device: Device, a: Array, b: Array, out: Array, precision: str) -> Array:
    """out = a @ b of 16-bit matrices, or of float32 matrices in the precision `precision`.

    `out` has the dtype of a and b and is C-contiguous.
    """
    a, b = _operand(device, a, precision), _operand(device, b, precision)
    if out.dtype == a.dtype:
        return np.matmul(a, b, out=out)
    wide = device.empty(out.shape, a.dtype)
    with np.errstate(all="ignore"):  # float16 overflows now and then, and training sees to it
        np.matmul(a, b, out=wide)
    device.launch("narrow", wide, out, out.size, work=out.size)
    return out


def rounded(x: Array, precision: str) -> Array:
    """float32 numbers as a product in this precision reads them; for what stands for cuBLAS."""
    drop = np.uint32(MANTISSA["float32"] - MANTISSA[precision])
    if drop == 0 or x.dtype != np.float32:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32)
    half = np.uint32((1 << (int(drop) - 1)) - 1)
    kept = ((bits + half + ((bits >> drop) & np.uint32(1))) >> drop) << drop
    return np.where(np.isnan(x), x, kept.view(np.float32))


def _operand(device: Device, x: Array, precision: str) -> Array:
    """x in float32 and rounded; of a transposed view a transposed view."""
    turned = not x.flags.c_contiguous
    flat = np.ascontiguousarray(x.swapaxes(-1, -2) if turned else x)
    wide: Array = device.empty(flat.shape, np.float32)
    if flat.dtype.itemsize == 2:
        device.launch("sum_widened", flat, None, 0, 0, wide, flat.size, work=flat.size)
    else:
        bits = MANTISSA[precision]
        device.launch("round_mantissa", flat, wide, bits, flat.size, work=flat.size)
    return wide.swapaxes(-1, -2) if turned else wide
