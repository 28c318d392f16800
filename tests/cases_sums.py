"""Cases for sums.cu."""

from __future__ import annotations

import numpy as np
import reference
from kernel_cases import Case, case, normal

SHAPES = ((1, 1, 4), (5, 31, 2), (9, 33, 4), (100, 70, 32), (67, 1100, 16))


def tiles(count: int, size: int = 32) -> int:
    """Pieces of `size` that `count` is cut into."""
    return -(-count // size)


@case(*SHAPES)
def column_partials(rng, dtype, size):
    rows, cols, rows_per_part = size
    x = normal(rng, dtype, rows, cols)
    part = np.zeros((tiles(rows, rows_per_part), cols), dtype)
    expected = [
        reference.column_sum(x[r : r + rows_per_part]) for r in range(0, rows, rows_per_part)
    ]
    args = [x, part, rows, cols, rows_per_part]
    work = len(part) * tiles(cols)
    return Case("column_partials", args, work, {1: np.stack(expected)}, error=0, whole=None)


@case(*SHAPES)
def column_sum(rng, dtype, size):
    rows, cols, _ = size
    x = normal(rng, dtype, rows, cols)
    args = [x, np.zeros(cols, dtype), rows, cols]
    expected = {1: reference.column_sum(x)}
    return Case("column_sum", args, tiles(cols), expected, error=0, whole=None)


@case(*SHAPES)
def column_merge(rng, dtype, size):
    rows, cols, _ = size
    part = normal(rng, dtype, rows, cols)
    args = [part, np.zeros(cols, dtype), rows, cols]
    expected = {1: reference.column_sum(part)}
    return Case("column_merge", args, tiles(cols), expected, error=0, whole=None)


@case(0, 1, 33, 4096, 4097, 10_000)
def square_sum_partials(rng, dtype, n):
    x = normal(rng, dtype, n)
    sums = [np.sum(x[i : i + 4096].astype(np.float64) ** 2) for i in range(0, n, 4096)]
    args = [x, np.zeros(len(sums), dtype), n]
    expected = {1: np.array(sums, dtype)}
    return Case("square_sum_partials", args, len(sums), expected, error=16, whole=None)


@case(*((count, n) for count in (1, 2, 3, 4, 5, 6, 7, 8, 11) for n in (1, 33, 2500)))
def sum_peers(rng, dtype, size):
    count, n = size
    offset = 5
    peers = [normal(rng, dtype, offset + n + 3) for _ in range(count)]
    expected = reference.sum_in_order([peer[offset : offset + n] for peer in peers])
    args = [peers, count, offset, np.zeros(n, dtype), n]
    return Case("sum_peers", args, n, {3: expected}, error=0, whole=None)


@case(*((count, n) for count in (1, 2, 3, 8, 11) for n in (1, 33, 2500)))
def sum_widened(rng, dtype, size):
    count, n = size
    offset = 5
    first, *others = [normal(rng, dtype, offset + n + 3) for _ in range(count)]
    first = first[:n].copy()
    expected = reference.sum_in_order([first, *(peer[offset : offset + n] for peer in others)])
    args = [first, others, count - 1, offset, np.zeros(n, dtype), n]
    return Case("sum_widened", args, n, {4: expected}, error=0, whole=None)


@case()
def average_update(rng, dtype, n):
    y, total = normal(rng, dtype, n), normal(rng, dtype, n)
    weight, momentum = 7.0, float(dtype.type(0.1))
    expected = y + dtype.type(momentum) * (total / dtype.type(weight) - y)
    args = [y, total, weight, momentum, n]
    return Case("average_update", args, n, {0: expected}, error=0)
