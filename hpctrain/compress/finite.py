"""Whether all numbers of a device's array are finite, from sums that are quick to make and to copy.

Layer: compress. Knows nothing of ranks and messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["square_sums"]

Array = Any  # of the device: float32
PART = 4096  # elements whose squares one warp adds up; as in cuda/sums.cu


def square_sums(device: Device, x: Array) -> Array:
    """Sums of the squares of each 4096 elements of x, shape (n,): finite only if all of them are.

    Nor are they where numbers are about 1e17 or larger: then no norm of the gradient is finite
    either. 1 / 4096 of x's bytes.
    """
    n = x.shape[0]
    parts = -(-n // PART)
    sums = device.empty(parts, np.float32)
    device.launch("square_sum_partials", x, sums, n, work=parts)
    return sums
