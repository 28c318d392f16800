"""PowerSGD on a device: each matrix A as P Q', of few columns, which ranks add up as they are.

    p = left(a)           P = A Q           sum p over ranks
    q = right(a, p)       P orthonormal, Q = A' P          sum q over ranks
    finish(a, q, out)     out = P Q', with the summed Q; a <- a - P Q', with the rank's own

So over all ranks what was applied and what is left in `a`, which is the residual, add up to what
came in. Q is kept for the next step: each step is one of a power iteration. All P travel as one
array, and all Q. Elements of the range that are in no matrix are left alone: they go in full.

Layer: compress. Knows nothing of ranks and messages.

References:
    [VKJ19] T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD", NeurIPS 2019, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["Matrix", "PowerSGD"]

Array = Any  # of the device


class Matrix(NamedTuple):
    """Elements `start` up to `start + rows * cols` of a range."""

    start: int
    rows: int
    cols: int


class PowerSGD:
    """The matrices of one range, float32.

    The flags are those of `interface.Codec`; what travels are two arrays of floats instead of one
    payload. Of a matrix of at most `rank` rows or columns nothing is lost.

    Attributes:
        q: float32, flat: what a checkpoint keeps; the same on all ranks.
    """

    name = "powersgd"
    linear, fixed_size, unbiased = True, True, False

    def __init__(
        self, device: Device, matrices: Sequence[Matrix], rank: int, seed: int = 0
    ) -> None:
        """`seed`: of the first Q; the same on all ranks.

        Raises:
            UsageError: a rank below 1.
        """
        if rank < 1:
            raise UsageError(f"rank {rank}: PowerSGD needs at least 1")
        self._device, self._matrices = device, list(matrices)
        self._ranks = [min(rank, m.rows, m.cols) for m in self._matrices]
        rows = [m.rows * r for m, r in zip(self._matrices, self._ranks, strict=True)]
        cols = [m.cols * r for m, r in zip(self._matrices, self._ranks, strict=True)]
        self._p, self._own = (device.zeros(sum(n), np.float32) for n in (rows, cols))
        first = np.random.default_rng(seed).standard_normal(sum(cols)).astype(np.float32)
        self.q: Array = device.from_host(first)
        self._p_starts = [sum(rows[:i]) for i in range(len(rows))]
        self._q_starts = [sum(cols[:i]) for i in range(len(cols))]
        numbers = (self._p_starts, [m.rows for m in self._matrices], self._ranks)
        self._tables = [device.from_host(np.array(values, np.int64)) for values in numbers]
        largest = max((m.rows * m.cols for m in self._matrices), default=0)
        self._product = device.empty(largest, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of p and q."""
        return int(self._p.nbytes + self.q.nbytes)

    def left(self, a: Array) -> Array:
        """p: float32, flat, to be summed over ranks in place. `a`: the range, only read."""
        for i, matrix in enumerate(self._matrices):
            self._device.matmul(_view(a, matrix), self._q_of(self.q, i), self._p_of(i))
        return self._p

    def right(self, a: Array, p: Array) -> Array:
        """q: float32, flat, to be summed over ranks; `p`: the sum, made orthonormal here."""
        count = len(self._matrices)
        self._device.launch("orthonormalize", p, *self._tables, count, work=count)
        if p is not self._p:
            self._device.copy(self._p, p)
        for i, matrix in enumerate(self._matrices):
            out = self._q_of(self._own, i)
            self._device.matmul(_view(a, matrix).T, self._p_of(i), out)
        self._device.copy(self.q, self._own)
        return self.q

    def finish(self, a: Array, q: Array, out: Array) -> None:
        """Write what the sums are about to the matrices of `out`, and leave the rest in `a`."""
        if q is not self.q:
            self._device.copy(self.q, q)
        for i, matrix in enumerate(self._matrices):
            n = matrix.rows * matrix.cols
            mine = self._product[:n]
            shape = (matrix.rows, matrix.cols)
            self._device.matmul(self._p_of(i), self._q_of(self._own, i).T, mine.reshape(shape))
            target = a[matrix.start : matrix.start + n]
            self._device.launch("cast_add", mine, target, -1.0, n, work=n)
            self._device.matmul(self._p_of(i), self._q_of(self.q, i).T, _view(out, matrix))

    def _p_of(self, i: int) -> Array:
        rows, rank, start = self._matrices[i].rows, self._ranks[i], self._p_starts[i]
        return self._p[start : start + rows * rank].reshape(rows, rank)

    def _q_of(self, flat: Array, i: int) -> Array:
        cols, rank, start = self._matrices[i].cols, self._ranks[i], self._q_starts[i]
        return flat[start : start + cols * rank].reshape(cols, rank)


def _view(flat: Array, matrix: Matrix) -> Array:
    stop = matrix.start + matrix.rows * matrix.cols
    return flat[matrix.start : stop].reshape(matrix.rows, matrix.cols)
