"""A pool of CPU memory, so that a training step does not page-fault its activations afresh.

A fresh 8 MiB array costs 2048 page faults of about 0.25 us each, as much as the kernel that fills
it. The pool keeps every block it handed out and gives it out again once no array refers to it.

Layer: device. Knows nothing of kernels.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["ALIGNMENT", "Pool", "aligned_empty"]

ALIGNMENT = 64  # bytes: a cache line and an AVX-512 register
SMALL = 4096  # bytes: below a page malloc is quicker than the search
_FREE = 2  # references to a block nobody uses: the pool's list and getrefcount's argument


def aligned_empty(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` of uninitialized memory, aligned to `ALIGNMENT`, that the caller owns."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + nbytes]


class Pool:
    """Arrays whose memory is used again once they are garbage. Several threads may ask at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[NDArray[np.uint8]]] = {}
        self.reserved = 0  # bytes held by the pool, in use or not

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialized C-contiguous array; its memory is free when the last view of it dies."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALL:
            return np.empty(shape, dtype)
        with self._lock:  # from the look at a block to the first reference to it
            block = self._block(_size_class(nbytes))
        return np.ndarray(shape, dtype, block, -block.ctypes.data % ALIGNMENT)

    def _block(self, size: int) -> NDArray[np.uint8]:
        """A block of `size` bytes, and room to align it, that no array refers to.

        The block is the array that owns the memory: NumPy makes it the base of every view,
        also of views of views, so its reference count tells whether it is in use.
        """
        blocks = self._blocks.setdefault(size, [])
        for index in range(len(blocks)):
            if sys.getrefcount(blocks[index]) == _FREE:
                return blocks[index]
        block = np.empty(size + ALIGNMENT, np.uint8)
        blocks.append(block)
        self.reserved += block.nbytes
        return block


def _size_class(nbytes: int) -> int:
    """Round up to an eighth of the next power of two: at most 12.5 % is wasted."""
    step = max(1 << (nbytes.bit_length() - 4), 64)
    return -(-nbytes // step) * step
