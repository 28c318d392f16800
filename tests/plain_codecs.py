"""Selection and block codecs in plain NumPy: the references beside our kernels.

    select   the k largest absolute values, exactly; of equal ones the lowest indices
    Cast     bfloat16 or float16, 2 bytes per element
    Int8     whole numbers from -127 to 127, and a scale for each 512 elements
    Sign     one bit per element, and the mean absolute value of each 2048 elements

A codec's payload has a size that follows from the number of elements. Decoding gives the same bits
on every rank.

Knows nothing of residuals and ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.compress.entries import Entries
from hpctrain.device.dtypes import dtype_named

__all__ = ["BlockCodec", "Cast", "Int8", "Sign", "select"]

Bytes = NDArray[np.uint8]
Values = NDArray[np.float32]
STRIDE = 97  # of the sample that a first threshold is taken from: odd, to miss patterns
MAGNITUDE = np.uint32(0x7FFFFFFF)


def select(x: Values, k: int) -> Entries:
    """The `k` largest absolute values of `x`, ascending by index; of equal ones the lowest indices.

    A threshold from a sample, at twice the budget, leaves few candidates, among which the exact one
    is found; where it leaves fewer than k, all are candidates. NaN counts as above infinity.
    """
    k = min(k, x.size)
    if k == 0:
        return Entries(np.empty(0, np.int64), np.empty(0, np.float32))
    bits = x.view(np.uint32) & MAGNITUDE
    candidates = np.arange(x.size) if k * 8 > x.size else _candidates(bits, k)
    keys = bits[candidates]
    threshold = np.partition(keys, keys.size - k)[keys.size - k]
    above = keys > threshold
    ties = np.flatnonzero(keys == threshold)[: k - int(np.count_nonzero(above))]
    above[ties] = True
    chosen = candidates[above].astype(np.int64)
    return Entries(chosen, x[chosen])


def _candidates(bits: NDArray[np.uint32], k: int) -> NDArray[np.intp]:
    """Indices of at least `k` elements among which the `k` largest are."""
    sample = bits[::STRIDE]
    rank = min(max(2 * k // STRIDE, 16), sample.size)
    threshold = np.partition(sample, sample.size - rank)[sample.size - rank]
    found = np.flatnonzero(bits >= threshold)
    return found if found.size >= k else np.arange(bits.size)


class BlockCodec(Protocol):
    """float32 numbers as a payload of fixed size, each near where it was."""

    name: str

    def nbytes(self, n: int) -> int:
        """Bytes of the payload of `n` numbers."""

    def encode(self, x: Values) -> Bytes:
        """The payload of `x`, shape (n,), only read."""

    def decode(self, payload: Bytes, out: Values) -> None:
        """Set `out`, shape (n,), to what the payload says."""


class Cast:
    """Numbers of 16 bits, rounded to nearest even."""

    def __init__(self, name: str) -> None:
        """`name`: "bfloat16" or "float16"."""
        self.name = {"bfloat16": "bf16", "float16": "fp16"}[name]
        self._dtype = dtype_named(name)

    def nbytes(self, n: int) -> int:
        """See `BlockCodec`."""
        return 2 * n

    def encode(self, x: Values) -> Bytes:
        """See `BlockCodec`."""
        return x.astype(self._dtype).view(np.uint8)

    def decode(self, payload: Bytes, out: Values) -> None:
        """See `BlockCodec`."""
        out[:] = payload.view(self._dtype)


class Int8:
    """q = round(127 x / m), m the largest absolute value of a block; then x is about m q / 127.

    What is left of x, x - scale q, is a float32 exactly. A block of zeros has scale 0.
    """

    name = "int8"
    block = 512

    def nbytes(self, n: int) -> int:
        """See `BlockCodec`."""
        return n + 4 * -(-n // self.block)

    def encode(self, x: Values) -> Bytes:
        """See `BlockCodec`."""
        rows = _rows(x, self.block)
        scales = np.abs(rows).max(axis=1) / np.float32(127) if x.size else rows[:, :0].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.where(scales > 0, np.float32(1) / scales, 0).astype(np.float32)
            scaled = np.rint(np.nan_to_num(rows * inverse[:, None]))
        q = np.clip(scaled, -127, 127).astype(np.int8).reshape(-1)[: x.size]
        return np.concatenate([scales.astype("<f4").view(np.uint8), q.view(np.uint8)])

    def decode(self, payload: Bytes, out: Values) -> None:
        """See `BlockCodec`."""
        blocks = -(-out.size // self.block)
        scales = payload[: 4 * blocks].copy().view("<f4")
        whole = out.size // self.block * self.block
        q = payload[4 * blocks :].view(np.int8)
        shape = (-1, self.block)
        np.multiply(
            q[:whole].reshape(shape), scales[: whole // self.block, None],
            out=out[:whole].reshape(shape), casting="unsafe", dtype=np.float32,
        )  # fmt: skip
        if whole < out.size:
            out[whole:] = q[whole:] * scales[-1]


class Sign:
    """The sign of each element, + for 0, times the mean absolute value of its block."""

    name = "sign"
    block = 2048

    def nbytes(self, n: int) -> int:
        """See `BlockCodec`."""
        return -(-n // 8) + 4 * -(-n // self.block)

    def encode(self, x: Values) -> Bytes:
        """See `BlockCodec`."""
        blocks = -(-x.size // self.block)
        starts = np.arange(blocks) * self.block
        sums = np.add.reduceat(np.abs(x), starts) if blocks else np.zeros(0, np.float32)
        counts = np.minimum(x.size - starts, self.block)
        scales = (sums / counts).astype("<f4")
        return np.concatenate([scales.view(np.uint8), np.packbits(x < 0)])

    def decode(self, payload: Bytes, out: Values) -> None:
        """See `BlockCodec`."""
        blocks = -(-out.size // self.block)
        scales = payload[: 4 * blocks].copy().view("<f4")
        negative = np.unpackbits(payload[4 * blocks :], count=out.size)
        each = np.repeat(scales, self.block)[: out.size]
        np.copyto(out, each)
        np.negative(out, out=out, where=negative.view(np.bool_))


def _rows(x: Values, block: int) -> NDArray[Any]:
    """`x` in rows of `block`, the last one filled up with zeros."""
    if x.size % block == 0:
        return x.reshape(-1, block)
    padded = np.zeros(-(-x.size // block) * block, np.float32)
    padded[: x.size] = x
    return padded.reshape(-1, block)
