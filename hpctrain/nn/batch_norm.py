"""Batch normalization over groups of samples: each microbatch, or the whole step on all ranks.

Statistics of a microbatch do not depend on which rank computes it, nor on what else is in that
rank's batch, so a run does not depend on the number of ranks. With `whole_step` they are those of
all samples of the step, for two small all-reduces forward and one backward.

Legend: N samples, P pixels of each (all dims between), C channels, G groups, rows = N P.

Layer: nn. Knows nothing of ranks and optimizers; other ranks only through the tape's all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.device import Device
from hpctrain.device.dtypes import wide_dtype
from hpctrain.errors import UsageError
from hpctrain.nn.module import Statistic
from hpctrain.nn.operations import sum_rows

__all__ = ["batch_norm"]

Array = Any
CHUNK_ROWS = 128  # rows that are summed in one go; their sums are merged in order


class _Rows:
    """Rows of an array (N, ..., C) in groups, and launches over chunks of them."""

    def __init__(self, device: Device, x: Array, groups: NDArray[np.int64]) -> None:
        self.device, self.dtype, self.wide = device, x.dtype, wide_dtype(x.dtype)
        self.channels = x.shape[-1]
        self.total = x.size // max(self.channels, 1)
        pixels = self.total // x.shape[0] if x.shape[0] else 0
        offsets = np.asarray(groups, np.int64) * pixels
        self.groups = len(offsets) - 1
        self.chunks = max(-(-int(np.diff(offsets).max(initial=0)) // CHUNK_ROWS), 1)
        self.tiles = -(-self.channels // 32)
        self.offsets = device.from_host(offsets)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """What the kernels over chunks take after their arrays."""
        return self.groups, self.chunks, self.channels, CHUNK_ROWS

    def empty(self, chunks: int = 1) -> Array:
        """An array for results of groups, or of their chunks."""
        return self.device.empty((self.groups * chunks, self.channels), self.wide)

    def launch(self, name: str, *args: Any) -> None:
        """Run a kernel over all chunks."""
        self.device.launch(name, *args, work=self.groups * self.chunks * self.tiles)

    def moments(self, x: Array) -> tuple[Array, Array]:
        """Mean and biased variance of every group, (G, C)."""
        chunk_mean, squares = self.empty(self.chunks), self.empty(self.chunks)
        self.launch("batch_moments", x, self.offsets, chunk_mean, squares, *self.numbers)
        mean, variance = self.empty(), self.empty()
        self.device.launch(
            "batch_merge", chunk_mean, squares, self.offsets, mean, variance, *self.numbers,
            work=self.groups * self.tiles,
        )  # fmt: skip
        return mean, variance

    def merge(self, part: Array) -> Array:
        """The sum of a group's chunks, (G, C)."""
        total = self.empty()
        self.device.launch(
            "batch_merge_sums", part, total, self.groups, self.chunks, self.channels,
            work=self.groups * self.tiles,
        )  # fmt: skip
        return total


def batch_norm(
    tape: Tape,
    x: Variable,
    gamma: Variable,
    beta: Variable,
    mean: Statistic,
    variance: Statistic,
    *,
    epsilon: float = 1e-5,
    whole_step: bool = False,
    relu: bool = False,
    shortcut: Variable | None = None,
) -> Variable:
    """y = gamma (x - m) / sqrt(v + epsilon) + beta, then + shortcut, then ReLU, where asked for.

    In training m and v are the mean and the biased variance of each microbatch in `tape.groups`, or
    with `whole_step` of the samples of all ranks (collective: every rank calls it, in the same
    order, forward and backward, also with an empty batch). Without training: the running
    averages `mean.value` and `variance.value`.

    Training writes this rank's share of the running statistics into `mean.sum` and `variance.sum`
    where they exist: means and unbiased variances, weighted by rows. A microbatch of one row has
    no unbiased variance and weighs nothing in the second.

    Args:
        x: (N, ..., C); shortcut: the same shape.
        gamma, beta: (C,).
    """
    _check(x, gamma, beta, shortcut)
    one_group = whole_step or not tape.training or tape.groups is None
    groups = np.array([0, x.shape[0]]) if one_group else tape.groups
    assert groups is not None
    rows = _Rows(tape.device, x.value, groups)
    count = 0  # of rows behind the statistics; 0: as many as the group has
    if not tape.training:
        moments = mean.value, variance.value
    elif whole_step:
        moments, count = _step_moments(tape, rows, x.value, mean, variance)
    else:
        moments = rows.moments(x.value)
        _write_averages(rows, moments, mean, variance)
    norm = _Norm(tape, rows, x, gamma, beta, shortcut, moments, count, epsilon, int(relu))
    inputs = (x, gamma, beta) if shortcut is None else (x, gamma, beta, shortcut)
    reduce = _add_over_ranks if whole_step else _keep
    return tape.record(norm.forward(), inputs, lambda dy: norm.backward(dy, reduce))


@dataclass(frozen=True, slots=True)
class _Norm:
    """A normalization with known statistics: everything both directions need."""

    tape: Tape
    rows: _Rows
    x: Variable
    gamma: Variable
    beta: Variable
    shortcut: Variable | None
    moments: tuple[Array, Array]
    count: int
    epsilon: float
    relu: int

    def launch(self, name: str, before: tuple[Array, ...], after: tuple[Any, ...]) -> None:
        """Run a kernel: x, shortcut, `before`, what is known of the affine map, `after`."""
        plus = None if self.shortcut is None else self.shortcut.value
        known = (*self.moments, self.gamma.value, self.beta.value, self.rows.offsets)
        self.rows.launch(name, self.x.value, plus, *before, *known, *after, self.epsilon, self.relu)

    def empty(self) -> Array:
        """An array like x."""
        return self.tape.device.empty(self.x.shape, self.rows.dtype)

    def forward(self) -> Array:
        """y, of x's shape."""
        y = self.empty()
        self.launch("batch_forward", (), (y, *self.rows.numbers))
        return y

    def backward(self, dy: Array, reduce: Callable[..., tuple[Array, Array]]) -> None:
        """Contribute to all inputs; `reduce` adds the two sums (G, C) over ranks, if need be."""
        rows, tape = self.rows, self.tape
        parts = rows.empty(rows.chunks), rows.empty(rows.chunks)
        self.launch("batch_sums", (dy,), (*parts, *rows.numbers))
        sums = rows.merge(parts[0]), rows.merge(parts[1])
        tape.accumulate(self.beta, lambda out: sum_rows(tape.device, sums[0], out))
        tape.accumulate(self.gamma, lambda out: sum_rows(tape.device, sums[1], out))
        sums_dx = reduce(tape, *sums)
        masked = self.relu and self.shortcut is not None and self.shortcut.needs_grad
        dz = self.empty() if masked else None

        def gradient(out: Array) -> None:
            self.launch("batch_backward", (dy,), (*sums_dx, out, dz, *rows.numbers, self.count))

        tape.accumulate(self.x, gradient)
        if masked and not self.x.needs_grad:
            gradient(self.empty())
        if self.shortcut is not None:
            tape.pass_on(self.shortcut, dy if dz is None else dz)


def _check(x: Variable, gamma: Variable, beta: Variable, shortcut: Variable | None) -> None:
    if gamma.shape != x.shape[-1:] or beta.shape != x.shape[-1:]:
        raise UsageError(
            f"batch_norm: x {x.shape} has {x.shape[-1]} channels, gamma {gamma.shape} and beta "
            f"{beta.shape} need one value for each"
        )
    if shortcut is not None and shortcut.shape != x.shape:
        raise UsageError(f"batch_norm: the shortcut is {shortcut.shape}, x is {x.shape}")


def _write_averages(
    rows: _Rows, moments: tuple[Array, Array], mean: Statistic, variance: Statistic
) -> None:
    """This rank's weighted sums over microbatches."""
    if mean.sum is not None:
        rows.device.launch(
            "batch_averages", *moments, rows.offsets, mean.sum, variance.sum, rows.groups,
            rows.channels, work=rows.tiles,
        )  # fmt: skip


def _step_moments(
    tape: Tape, rows: _Rows, x: Array, mean: Statistic, variance: Statistic
) -> tuple[tuple[Array, Array], int]:
    """Mean and biased variance over all ranks, (1, C), and their number of rows; collective.

    First the mean, then squares about it, so that nothing cancels.
    """
    device, channels = tape.device, rows.channels
    local_mean, local_variance = (
        device.to_host(array).astype(np.float64).reshape(channels) for array in rows.moments(x)
    )
    sums = np.append(rows.total * local_mean, rows.total)
    tape.all_reduce(sums)
    count = int(sums[-1])
    step_mean = sums[:-1] / max(count, 1)
    squares = rows.total * (local_variance + (local_mean - step_mean) ** 2)
    tape.all_reduce(squares)
    if mean.sum is not None:
        unbiased = squares / max(count - 1, 1)
        weight = rows.total if count > 1 else 0
        _write(device, mean.sum, np.append(rows.total * step_mean, rows.total))
        _write(device, variance.sum, np.append(weight * unbiased, weight))
    first, second = (
        device.from_host(array.astype(rows.wide)) for array in (step_mean, squares / max(count, 1))
    )
    return (first, second), count


def _write(device: Device, target: Array, values: NDArray[np.float64]) -> None:
    device.copy(target, device.from_host(values.astype(target.dtype)))


def _add_over_ranks(tape: Tape, *arrays: Array) -> tuple[Array, Array]:
    """The two arrays (1, C), summed over ranks; collective."""
    device = tape.device
    both = np.stack([device.to_host(array) for array in arrays]).astype(np.float64)
    tape.all_reduce(both)
    first, second = (device.from_host(array.astype(arrays[0].dtype)) for array in both)
    return first, second


def _keep(_: Tape, *arrays: Array) -> tuple[Array, Array]:
    first, second = arrays
    return first, second
