"""Cases for quantize.cu."""

from __future__ import annotations

import numpy as np
from kernel_cases import SIZES, Case, case, normal

MATRICES = (((1, 1),), ((5, 2), (300, 4)), ((33, 1), (2, 2), (64, 3)))


def blocks(n, size):
    return -(-n // size)


def rows_of(x, size):
    """x in blocks, the last filled up with zeros."""
    full = np.zeros(blocks(x.size, size) * size, x.dtype)
    full[: x.size] = x
    return full.reshape(-1, size)


@case()
def cast_encode(rng, dtype, n):
    x = normal(rng, dtype, n)
    return Case("cast_encode", [x, np.zeros_like(x), n], n, {1: x}, error=0)


@case()
def cast_add(rng, dtype, n):
    x, y = normal(rng, dtype, n), normal(rng, dtype, n)
    expected = {1: y - dtype.type(0.5) * x}
    return Case("cast_add", [x, y, -0.5, n], n, expected, error=0)


@case(*SIZES)
def int8_encode(rng, dtype, n):
    x = normal(rng, dtype, n)
    x[1024:1536] = 0  # a block of zeros
    scales = np.abs(rows_of(x, 512)).max(axis=1, initial=0) / dtype.type(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, 1 / scales, 0).astype(dtype)
    q = np.rint(rows_of(x, 512) * inverse[:, None]).astype(np.int8).ravel()[:n].view(np.uint8)
    args = [x, np.zeros_like(scales), np.zeros_like(q), n]
    return Case("int8_encode", args, scales.size, {1: scales, 2: q}, 0, None)


@case(*SIZES)
def int8_add(rng, dtype, n):
    scales, y = normal(rng, dtype, blocks(n, 512)), normal(rng, dtype, n)
    q = rng.integers(-127, 128, n).astype(np.int8)
    expected = y - np.repeat(scales, 512)[:n] * q.astype(dtype)
    args = [scales, q.view(np.uint8), y, -1.0, n]
    return Case("int8_add", args, scales.size, {2: expected}, 0, None)


@case(*SIZES)
def sign_encode(rng, dtype, n):
    x = normal(rng, dtype, n)
    x[::9], x[3::9] = 0.0, -0.0
    counts = np.minimum(n - np.arange(blocks(n, 2048)) * 2048, 2048)
    scales = (np.abs(rows_of(x, 2048)).sum(axis=1, dtype=float) / counts).astype(dtype)
    bits = np.packbits(x < 0)
    args = [x, np.zeros_like(scales), np.zeros_like(bits), n]
    return Case("sign_encode", args, scales.size, {1: scales, 2: bits}, 8, None)


@case(*SIZES)
def sign_add(rng, dtype, n):
    scales, y, x = normal(rng, dtype, blocks(n, 2048)), normal(rng, dtype, n), normal(rng, dtype, n)
    each = np.repeat(scales, 2048)[:n]
    expected = y + dtype.type(0.25) * np.where(x < 0, -each, each)
    args = [scales, np.packbits(x < 0), y, 0.25, n]
    return Case("sign_add", args, scales.size, {2: expected}, 0, None)


@case(*MATRICES)
def orthonormalize(rng, dtype, shapes):
    """The columns of Q of a QR decomposition, with R's diagonal positive."""
    matrices = [normal(rng, dtype, *shape) for shape in shapes]
    matrices[-1][:, -1] = 0 if len(shapes) > 1 else matrices[-1][:, -1]
    expected = []
    for matrix in matrices:
        q, r = np.linalg.qr(matrix.astype(np.float64))
        signs = np.sign(np.diag(r)) * (np.abs(matrix).sum(axis=0) > 0)
        expected.append((q * signs).astype(dtype).ravel())
    sizes = np.array([matrix.size for matrix in matrices])
    rows, ranks = np.array(shapes, np.int64).T.copy()
    p = np.concatenate([matrix.ravel() for matrix in matrices])
    args = [p, (np.cumsum(sizes) - sizes).astype(np.int64), rows, ranks, len(shapes)]
    return Case("orthonormalize", args, len(shapes), {0: np.concatenate(expected)}, 200, None)
