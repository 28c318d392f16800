"""Floating-point types: what a network is stored in, and what it is computed in.

The passes of a network may store activations, weights and gradients in 16 bits, bfloat16 or
float16. Everything is computed in the *wide* type of these, float32, which statistics, losses,
master weights and optimizer state are also stored in. The wide type of float32 and float64 is the
type itself.

Layer: device. Knows nothing of arrays.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

__all__ = ["FLOATS", "WIDE", "dtype_named", "is_short", "wide_dtype"]

WIDE = {"float32": "float32", "float64": "float64", "bfloat16": "float32", "float16": "float32"}
FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),  # NumPy has none of its own
    "float16": np.dtype(np.float16),
}


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of a run file's name for it, such as "bfloat16"."""
    return FLOATS[name]


def wide_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """What numbers of this floating-point type are computed in."""
    return FLOATS[WIDE[np.dtype(dtype).name]]


def is_short(dtype: DTypeLike) -> bool:
    """Whether it is bfloat16 or float16."""
    return np.dtype(dtype).itemsize == 2
