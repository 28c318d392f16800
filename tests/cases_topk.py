"""Cases for topk.cu."""

from __future__ import annotations

import numpy as np
from kernel_cases import Case, case, normal

SIZES = ((0, 0), (1, 1), (1000, 33), (70_000, 200), (200_000, 900))
BLOCK = 65536


def entries(rng, n, k):
    """k indices below n, and how many lie in each block."""
    indices = np.sort(rng.choice(n, k, replace=False)).astype(np.int64)
    counts = np.bincount(indices // BLOCK, minlength=-(-n // BLOCK)).astype(np.uint32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return indices, counts, starts


def offsets_of(indices):
    return (indices % BLOCK).astype(np.uint16)


@case(*SIZES)
def topk_encode(rng, dtype, size):
    n, k = size
    indices, _, _ = entries(rng, n, k)
    values = normal(rng, dtype, k)
    args = [values, indices, np.zeros_like(values), np.zeros(k, np.uint16), k]
    expected = {2: values, 3: offsets_of(indices)}
    return Case("topk_encode", args, k, expected, error=0)


@case(*SIZES)
def topk_counts(rng, dtype, size):
    n, k = size
    indices, counts, _ = entries(rng, n, k)
    args = [indices, np.zeros_like(counts), k, counts.size]
    return Case("topk_counts", args, counts.size, {1: counts}, 0, None)


@case(*SIZES, (3_000_000, 5000))
def topk_starts(rng, dtype, size):
    n, k = size
    _, counts, starts = entries(rng, n, k)
    args = [counts, np.ones_like(starts), counts.size]
    return Case("topk_starts", args, 1, {1: starts}, 0, None)


@case(*SIZES)
def topk_add(rng, dtype, size):
    n, k = size
    indices, counts, starts = entries(rng, n, k)
    values, y = normal(rng, dtype, k), normal(rng, dtype, n)
    expected = y.copy()
    expected[indices] -= values
    args = [values, offsets_of(indices), starts, y, -1.0, k, counts.size, n]
    return Case("topk_add", args, k, {3: expected}, 0, None)


@case(*SIZES)
def topk_mask(rng, dtype, size):
    """A third was taken back; half of what was sent is left of one, and one was sent as 0."""
    n, k = size
    indices, counts, starts = entries(rng, n, k)
    values, u, left = normal(rng, dtype, k), normal(rng, dtype, n), normal(rng, dtype, n)
    left[indices] = 0
    left[indices[::3]] = values[::3]
    left[indices[:1]] = values[:1] / 2
    values[1:2] = 0
    expected, sent = u.copy(), np.abs(values)
    expected[indices[(sent > 0) & (2 * np.abs(left[indices]) <= sent)]] = 0
    args = [values, offsets_of(indices), starts, left, u, k, counts.size, n]
    return Case("topk_mask", args, k, {4: expected}, 0, None)


def unlike(rng, dtype, n):
    """Numbers, infinities and NaN among them."""
    x = normal(rng, dtype, n)
    x[5::17], x[6::17], x[7::17] = np.nan, np.inf, -np.inf
    return x


@case()
def keep_residual(rng, dtype, n):
    residual, g = normal(rng, dtype, n), unlike(rng, dtype, n)
    total = residual + g
    expected = np.where(np.isfinite(total), total, residual)
    return Case("keep_residual", [residual, g, np.zeros_like(g), n], n, {2: expected}, error=0)


@case()
def keep_momentum(rng, dtype, n):
    residual, g, u = normal(rng, dtype, n), unlike(rng, dtype, n), normal(rng, dtype, n)
    mine = dtype.type(0.5) * u + g
    total, fine = residual + mine, np.isfinite(mine)
    expected = {2: np.where(fine, mine, u), 3: np.where(fine, total, residual)}
    args = [residual, g, u, np.zeros_like(g), 0.5, n]
    return Case("keep_momentum", args, n, expected, error=0)


PIECES = ((0, 0), (9, 1), (1000, 5), (70_000, 90))


def pieces(rng, dtype, size):
    """Some elements of n in pieces of odd lengths, one of them empty: x, tables, and which."""
    n, count = size
    ends = np.sort(rng.choice(n + 1, 2 * count, replace=False)).astype(np.int64)
    begins, stops = ends[::2].copy(), ends[1::2]
    stops[:1] = begins[:1]
    starts = np.concatenate([[0], np.cumsum(stops - begins)]).astype(np.int64)
    spans = [np.arange(a, b) for a, b in zip(begins, stops, strict=True)]
    chosen = np.concatenate([np.zeros(0, np.int64), *spans])
    return normal(rng, dtype, n), begins, starts, chosen


@case(*PIECES)
def pieces_take(rng, dtype, size):
    x, begins, starts, chosen = pieces(rng, dtype, size)
    left = x.copy()
    left[chosen] = 0
    args = [x, begins, starts, np.zeros(chosen.size, dtype), begins.size]
    return Case("pieces_take", args, begins.size, {0: left, 3: x[chosen]}, 0, None)


@case(*PIECES)
def pieces_put(rng, dtype, size):
    """Numbers to their places; with an odd number of pieces, zeros."""
    x, begins, starts, chosen = pieces(rng, dtype, size)
    y = None if begins.size % 2 else normal(rng, dtype, chosen.size)
    expected = x.copy()
    expected[chosen] = 0 if y is None else y
    args = [y, begins, starts, x, begins.size]
    return Case("pieces_put", args, begins.size, {3: expected}, 0, None)
