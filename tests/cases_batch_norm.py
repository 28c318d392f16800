"""Cases for batch_norm.cu. A size is (groups' first rows and the end, channels, chunk rows)."""

from __future__ import annotations

import numpy as np
import reference_images as reference
from kernel_cases import Case, case, normal

EPSILON = 1e-5
SIZES = (
    ((0, 0), 3, 4),
    ((0, 1), 1, 4),
    ((0, 5, 5, 18), 16, 4),
    ((0, 9, 10), 32, 3),
    ((0, 40, 77), 45, 16),
    ((0, 12), 100, 5),
)


class Batch:
    """Rows in groups, chunked, with everything the kernels take."""

    def __init__(self, rng, dtype, parameters):
        groups, self.channels, self.chunk_rows = parameters
        self.offsets = np.array(groups, np.int64)
        self.groups = len(groups) - 1
        self.chunks = max(-(-int(np.diff(groups).max()) // self.chunk_rows), 1)
        self.tiles = -(-self.channels // 32)
        self.x = normal(rng, dtype, groups[-1], self.channels) + dtype.type(2)
        self.dy = normal(rng, dtype, *self.x.shape)
        self.shortcut = normal(rng, dtype, *self.x.shape)
        self.gamma, self.beta = normal(rng, dtype, self.channels), normal(rng, dtype, self.channels)
        wide = [part.astype(np.float64) for part in self.parts(self.x)]
        none = np.zeros(self.channels)
        self.mean = np.stack([p.mean(axis=0) if len(p) else none for p in wide]).astype(dtype)
        self.variance = np.stack([p.var(axis=0) if len(p) else none for p in wide]).astype(dtype)
        self.numbers = [self.groups, self.chunks, self.channels, self.chunk_rows]
        self.known = [self.mean, self.variance, self.gamma, self.beta, self.offsets]
        self.work = self.groups * self.chunks * self.tiles

    def parts(self, array):
        """The groups' rows."""
        return [array[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def chunked(self, function, array):
        """(groups, chunks, channels): function of each chunk's rows, 0 where it has none."""
        result = np.zeros((self.groups, self.chunks, self.channels))
        for g, part in enumerate(self.parts(array)):
            for q in range(self.chunks):
                chunk = part[q * self.chunk_rows : (q + 1) * self.chunk_rows]
                result[g, q] = function(chunk.astype(np.float64)) if len(chunk) else 0
        return result.astype(array.dtype)

    def output(self, relu, shortcut):
        """y by the reference."""
        plus = self.shortcut if shortcut else None
        affine = self.gamma, self.beta
        return reference.batch_norm(self.x, self.offsets, *affine, EPSILON, relu, plus)


def moments_of(batch):
    """Chunks' means and sums of squares about them."""
    mean = batch.chunked(lambda rows: rows.mean(axis=0), batch.x)
    squares = batch.chunked(lambda rows: ((rows - rows.mean(axis=0)) ** 2).sum(axis=0), batch.x)
    return mean, squares


@case(*SIZES)
def batch_moments(rng, dtype, parameters):
    batch = Batch(rng, dtype, parameters)
    mean, squares = moments_of(batch)
    args = [batch.x, batch.offsets, np.ones_like(mean), np.ones_like(squares), *batch.numbers]
    return Case("batch_moments", args, batch.work, {2: mean, 3: squares}, error=8, whole=None)


@case(*SIZES)
def batch_merge(rng, dtype, parameters):
    batch = Batch(rng, dtype, parameters)
    args = [*moments_of(batch), batch.offsets, np.ones_like(batch.mean), np.ones_like(batch.mean)]
    expected = {3: batch.mean, 4: batch.variance}
    work = batch.groups * batch.tiles
    return Case("batch_merge", [*args, *batch.numbers], work, expected, error=16, whole=None)


@case(*SIZES)
def batch_averages(rng, dtype, parameters):
    batch = Batch(rng, dtype, parameters)
    mean_sum, variance_sum = np.zeros(batch.channels + 1), np.zeros(batch.channels + 1)
    for g, part in enumerate(batch.parts(batch.x)):
        rows = len(part)
        mean_sum += rows * np.append(batch.mean[g], 1)
        if rows > 1:
            variance_sum += rows * np.append(batch.variance[g] * np.float64(rows) / (rows - 1), 1)
    expected = {3: mean_sum.astype(dtype), 4: variance_sum.astype(dtype)}
    outputs = [np.ones_like(expected[3]), np.ones_like(expected[3])]
    args = [batch.mean, batch.variance, batch.offsets, *outputs, batch.groups, batch.channels]
    return Case("batch_averages", args, batch.tiles, expected, error=8, whole=None)


@case(*((*size, relu, shortcut) for size in SIZES for relu in (0, 1) for shortcut in (0, 1)))
def batch_forward(rng, dtype, parameters):
    *size, relu, shortcut = parameters
    batch = Batch(rng, dtype, size)
    plus = batch.shortcut if shortcut else None
    y = batch.output(relu, shortcut).astype(dtype)
    args = [batch.x, plus, *batch.known, np.ones_like(y), *batch.numbers, EPSILON, relu]
    return Case("batch_forward", args, batch.work, {7: y}, error=200, whole=None)


@case(*((*size, relu, shortcut) for size in SIZES for relu in (0, 1) for shortcut in (0, 1)))
def batch_sums(rng, dtype, parameters):
    *size, relu, shortcut = parameters
    batch = Batch(rng, dtype, size)
    plus = batch.shortcut if shortcut else None
    dz = batch.dy * (batch.output(relu, shortcut) > 0) if relu else batch.dy
    ones, zeros = np.ones(batch.channels), np.zeros(batch.channels)
    xhat = reference.batch_norm(batch.x, batch.offsets, ones, zeros, EPSILON)
    sums = [batch.chunked(lambda rows: rows.sum(axis=0), a.astype(dtype)) for a in (dz, dz * xhat)]
    outputs = [np.ones_like(total) for total in sums]
    args = [batch.x, plus, batch.dy, *batch.known, *outputs, *batch.numbers, EPSILON, relu]
    expected = {8: sums[0], 9: sums[1]}
    return Case("batch_sums", args, batch.work, expected, error=300, whole=None)


@case(*SIZES)
def batch_merge_sums(rng, dtype, parameters):
    batch = Batch(rng, dtype, parameters)
    part = normal(rng, dtype, batch.groups, batch.chunks, batch.channels)
    expected = np.zeros_like(batch.mean)
    for q in range(batch.chunks):
        expected += part[:, q]
    args = [part, np.ones_like(expected), *batch.numbers[:3]]
    work = batch.groups * batch.tiles
    return Case("batch_merge_sums", args, work, {1: expected}, error=0, whole=None)


@case(*((*size, relu, shortcut) for size in SIZES for relu in (0, 1) for shortcut in (0, 1)))
def batch_backward(rng, dtype, parameters):
    *size, relu, shortcut = parameters
    batch = Batch(rng, dtype, size)
    plus = batch.shortcut if shortcut else None
    dz = batch.dy * (batch.output(relu, shortcut) > 0) if relu else batch.dy
    dx, _, _ = reference.batch_norm_backward(batch.x, dz, batch.offsets, batch.gamma, EPSILON)
    ones, zeros = np.ones(batch.channels), np.zeros(batch.channels)
    xhat = reference.batch_norm(batch.x, batch.offsets, ones, zeros, EPSILON)
    sums = [
        np.stack([part.sum(axis=0) for part in batch.parts(array)]).astype(dtype)
        for array in (dz, dz * xhat)
    ]
    dplus = np.ones_like(batch.x) if shortcut else None
    args = [batch.x, plus, batch.dy, *batch.known, *sums, np.ones_like(batch.x), dplus]
    args += [*batch.numbers, 0, EPSILON, relu]
    expected = {10: dx.astype(dtype)} | ({11: dz.astype(dtype)} if shortcut else {})
    return Case("batch_backward", args, batch.work, expected, error=300, whole=None)
