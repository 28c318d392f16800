"""Cases for winograd.cu. A size is (images, (H, W), channels, padding)."""

from __future__ import annotations

import numpy as np
import reference_images as reference
from kernel_cases import Case, case, normal

IMAGES = (
    (0, (4, 4), 3, (1, 1)),
    (1, (1, 1), 1, (1, 1)),
    (2, (6, 4), 5, (1, 1)),
    (3, (5, 7), 16, (0, 2)),
    (2, (7, 6), 33, (1, 1)),
    (1, (8, 8), 40, (3, 0)),
)
FILTERS = ((1, 1), (5, 2), (33, 40), (16, 7))


def grid_of(size, padding):
    """(output size, tiles) of 3 x 3 taps."""
    out = [n + 2 * p - 2 for n, p in zip(size, padding, strict=True)]
    return out, [-(-n // 2) for n in out]


def part(expected):
    """The last two thirds of (16, tiles, channels): (first tile, tiles, contiguous copy)."""
    first = expected.shape[1] // 3
    return first, expected.shape[1] - first, np.ascontiguousarray(expected[:, first:])


@case(*FILTERS)
def winograd_weights(rng, dtype, shape):
    filters, channels = shape
    w = normal(rng, dtype, filters, 3, 3, channels)
    u = reference.both_sides(reference.G, w.transpose(1, 2, 3, 0)).astype(dtype)
    expected = u.reshape(16, channels, filters)
    args = [w, np.zeros_like(expected), filters, channels]
    work = -(-channels // 32) * -(-filters // 16)
    return Case("winograd_weights", args, work, {1: expected}, whole=None)


@case(*FILTERS)
def winograd_weights_flipped(rng, dtype, shape):
    filters, channels = shape
    w = normal(rng, dtype, filters, 3, 3, channels)
    flipped = w[:, ::-1, ::-1].transpose(1, 2, 0, 3)
    u = reference.both_sides(reference.G, flipped).astype(dtype)
    expected = u.reshape(16, filters, channels)
    args = [w, np.zeros_like(expected), filters, channels]
    return Case("winograd_weights_flipped", args, filters, {1: expected}, whole=None)


@case(*FILTERS)
def winograd_weights_backward(rng, dtype, shape):
    filters, channels = shape
    du = normal(rng, dtype, 16, filters, channels)
    dw = reference.both_sides(reference.G.T, du.reshape(4, 4, filters, channels))
    expected = np.ascontiguousarray(dw.transpose(2, 0, 1, 3)).astype(dtype)
    args = [du, np.zeros_like(expected), filters, channels]
    return Case("winograd_weights_backward", args, filters, {1: expected}, error=8, whole=None)


@case(*IMAGES)
def winograd_input(rng, dtype, parameters):
    images, size, channels, padding = parameters
    x = normal(rng, dtype, images, *size, channels)
    _, grid = grid_of(size, padding)
    v = reference.both_sides(reference.B, reference.patches(x, 4, 2, grid, padding)).astype(dtype)
    first, tiles, expected = part(v.reshape(16, images * grid[0] * grid[1], channels))
    args = [x, np.ones_like(expected), first, tiles, *size, channels, *grid, *padding]
    return Case("winograd_input", args, tiles, {1: expected}, whole=None)


@case(*((*images, bias) for images in IMAGES for bias in (0, 1)))
def winograd_output(rng, dtype, parameters):
    images, size, filters, padding, with_bias = parameters
    out, grid = grid_of(size, padding)
    tiles = images * grid[0] * grid[1]
    m = normal(rng, dtype, 16, tiles, filters)
    bias = normal(rng, dtype, filters) if with_bias else None
    blocks = reference.both_sides(reference.A, m.reshape(4, 4, images, *grid, filters))
    y = blocks.transpose(2, 3, 0, 4, 1, 5).reshape(images, 2 * grid[0], 2 * grid[1], filters)
    y = y[:, : out[0], : out[1]] + (bias if with_bias else 0)
    expected = np.ascontiguousarray(y).astype(dtype)
    args = [m, bias, np.zeros_like(expected), 0, tiles, *out, filters, *grid]
    return Case("winograd_output", args, tiles, {2: expected}, error=8, whole=None)


@case(*IMAGES)
def winograd_output_backward(rng, dtype, parameters):
    images, size, filters, padding = parameters
    out, grid = grid_of(size, padding)
    dy = normal(rng, dtype, images, *out, filters)
    dm = reference.both_sides(reference.A.T, reference.patches(dy, 2, 2, grid, (0, 0)))
    dm = dm.astype(dtype).reshape(16, images * grid[0] * grid[1], filters)
    first, tiles, expected = part(dm)
    args = [dy, np.ones_like(expected), first, tiles, *out, filters, *grid]
    return Case("winograd_output_backward", args, tiles, {1: expected}, whole=None)
