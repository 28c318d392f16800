"""Cases for convolution.cu and pooling.cu. A size is (images, (H, W), channels, geometry)."""

from __future__ import annotations

import numpy as np
import reference_images as reference
from kernel_cases import Case, case, normal
from reference_images import output_size

# (kernel, stride, padding), each (vertical, horizontal)
SAME = ((3, 3), (1, 1), (1, 1))
HALVES = ((2, 2), (2, 2), (0, 0))
OVERLAP = ((3, 3), (2, 2), (1, 1))
UNEVEN = ((2, 3), (3, 2), (1, 2))
WHOLE = ((5, 4), (5, 4), (0, 0))
POINT = ((1, 1), (2, 2), (0, 0))
GEOMETRIES = (
    (0, (4, 4), 2, SAME),
    (1, (1, 1), 1, SAME),
    (2, (5, 4), 3, SAME),
    (2, (5, 4), 11, SAME),
    (3, (6, 5), 16, HALVES),
    (2, (7, 8), 33, OVERLAP),
    (1, (6, 7), 70, UNEVEN),
    (2, (5, 4), 32, WHOLE),
    (2, (5, 6), 7, POINT),
)


def numbers(size, channels, geometry):
    """What kernels take last."""
    kernel, stride, padding = geometry
    return [*size, channels, *output_size(size, geometry), *kernel, *stride, *padding]


def tiles(channels):
    """Tiles of channels."""
    return -(-channels // 32)


@case(*GEOMETRIES)
def columns(rng, dtype, parameters):
    images, size, channels, geometry = parameters
    x = normal(rng, dtype, images, *size, channels)
    out_height, out_width = output_size(size, geometry)
    lines, kernel = images * out_height, geometry[0]
    first, rows = lines // 3, lines - lines // 3  # the last two thirds of the column matrix
    window = kernel[0] * kernel[1] * channels
    expected = reference.columns(x, geometry).reshape(lines, out_width, window)[first:]
    args = [x, np.zeros_like(expected), first, rows, *numbers(size, channels, geometry)]
    return Case("columns", args, rows * kernel[0], {1: expected}, error=0, whole=None)


@case(*GEOMETRIES)
def columns_backward(rng, dtype, parameters):
    images, size, channels, geometry = parameters
    before = normal(rng, dtype, images, *size, channels)
    cols = normal(rng, dtype, *reference.columns(before, geometry).shape)
    expected = reference.columns_backward(cols, before, geometry)
    rows = int(np.prod(cols.shape[:3]))
    pixels = images * size[0] * size[1]
    args = [cols, before, 0, rows, 0, pixels, *numbers(size, channels, geometry)]
    return Case("columns_backward", args, pixels, {1: expected}, error=0, whole=None)


FILTERS = ((1, 1, 1, 1), (5, 3, 3, 2), (33, 2, 3, 40), (4, 1, 1, 7))


@case(*FILTERS)
def weight_columns(rng, dtype, shape):
    w = normal(rng, dtype, *shape)
    filters, window = shape[0], int(np.prod(shape[1:]))
    expected = w.reshape(filters, window).T.copy()
    args = [w, np.zeros_like(expected), filters, window]
    return Case("weight_columns", args, window, {1: expected}, error=0, whole=None)


@case(*FILTERS)
def weight_flip(rng, dtype, shape):
    w = normal(rng, dtype, *shape)
    filters, height, width, channels = shape
    expected = w[:, ::-1, ::-1].transpose(1, 2, 0, 3).copy()
    args = [w, np.zeros_like(expected), filters, height * width, channels]
    return Case("weight_flip", args, filters * height * width, {1: expected}, error=0, whole=None)


@case(*FILTERS)
def weight_flip_back(rng, dtype, shape):
    flip = weight_flip(rng, dtype, shape)
    w, _, *sizes = flip.args
    args = [flip.expected[1], np.zeros_like(w), *sizes]
    return Case("weight_flip_back", args, flip.work, {1: w}, error=0, whole=None)


@case(*GEOMETRIES)
def max_pool_forward(rng, dtype, parameters):
    images, size, channels, geometry = parameters
    x = np.round(4 * normal(rng, dtype, images, *size, channels)) / 4  # so that some are equal
    y, argmax = reference.max_pool(x, geometry)
    lines = images * y.shape[1]
    args = [x, np.zeros_like(y), np.zeros_like(argmax), lines, *numbers(size, channels, geometry)]
    work = lines * tiles(channels)
    return Case("max_pool_forward", args, work, {1: y, 2: argmax}, error=0, whole=None)


@case(*GEOMETRIES)
def max_pool_backward(rng, dtype, parameters):
    images, size, channels, geometry = parameters
    x = normal(rng, dtype, images, *size, channels)
    y, argmax = reference.max_pool(x, geometry)
    dy = normal(rng, dtype, *y.shape)
    expected = reference.max_pool_backward(dy, argmax, size)
    lines = images * size[0]
    args = [dy, argmax, np.zeros_like(x), lines, *numbers(size, channels, geometry)]
    work = lines * tiles(channels)
    return Case("max_pool_backward", args, work, {2: expected}, error=0, whole=None)


@case(*GEOMETRIES)
def average_pool_forward(rng, dtype, parameters):
    images, size, channels, geometry = parameters
    x = normal(rng, dtype, images, *size, channels)
    expected = reference.average_pool(x, geometry)
    lines = images * expected.shape[1]
    args = [x, np.zeros_like(expected), lines, *numbers(size, channels, geometry)]
    return Case("average_pool_forward", args, lines * tiles(channels), {1: expected}, whole=None)


@case(*GEOMETRIES)
def average_pool_backward(rng, dtype, parameters):
    images, size, channels, geometry = parameters
    dy = normal(rng, dtype, images, *output_size(size, geometry), channels)
    expected = reference.average_pool_backward(dy, size, geometry)
    lines = images * size[0]
    args = [dy, np.zeros_like(expected), lines, *numbers(size, channels, geometry)]
    return Case("average_pool_backward", args, lines * tiles(channels), {1: expected}, whole=None)
