"""Initial values: a pure function of (seed, parameter name).

The numbers come from a counter-based generator whose raw stream NumPy guarantees (NEP 19), and are
turned into floats here, so every rank, machine and version starts from the same bits.

Layer: nn. Knows nothing of layers and stores.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["key_of", "uniform"]


def key_of(*parts: object) -> int:
    """A 128-bit key that depends on all of `parts`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> NDArray[np.float64]:
    """Uniform numbers in [-bound, bound), float64, from the key (seed, name)."""
    n = math.prod(shape)
    raw = np.random.Philox(key=key_of("init", seed, name)).random_raw(n)
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    values: NDArray[np.float64] = (2 * unit - 1) * bound
    return values.reshape(shape)
