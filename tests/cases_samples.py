"""Cases for dropout.cu and embedding.cu."""

from __future__ import annotations

import numpy as np
import reference_images as reference
from kernel_cases import Case, case, normal

KEYS = np.array([0, 1, 2**40 + 7, -3], np.int64)


@case(*((0, 5, 0.5), (1, 1, 0.5), (4, 31, 1.0), (4, 128, 0.25), (3, 200, 0.9), (2, 517, 1e-9)))
def dropout(rng, dtype, size):
    samples, per_sample, keep = size
    x = normal(rng, dtype, samples, per_sample)
    seed = 0x9E3779B97F4A7C15
    mask = reference.dropout_mask(KEYS[:samples], per_sample, keep, seed)
    expected = np.where(mask, x * dtype.type(1 / keep), 0).astype(dtype)
    args = [x, np.ones_like(x), KEYS[:samples], samples, per_sample, keep, seed]
    work = samples * -(-per_sample // 128)
    return Case("dropout", args, work, {1: expected}, error=0, whole=None)


@case((0, 1, 1), (1, 1, 1), (33, 7, 5), (50, 40, 9), (9, 100, 1000))
def embedding_forward(rng, dtype, size):
    n, dim, vocabulary = size
    table = normal(rng, dtype, vocabulary, dim)
    ids = rng.integers(vocabulary, size=n)
    args = [table, ids, np.ones((n, dim), dtype), n, dim]
    return Case("embedding_forward", args, n, {2: table[ids]}, error=0, whole=("table",))


@case((0, 1, 1), (1, 1, 1), (33, 7, 5), (50, 40, 9), (9, 100, 1000))
def embedding_backward(rng, dtype, size):
    n, dim, vocabulary = size
    ids = rng.integers(vocabulary, size=n)
    dy, table = normal(rng, dtype, n, dim), normal(rng, dtype, vocabulary, dim)
    unique, starts = np.unique(np.sort(ids), return_index=True)
    order = np.argsort(ids, kind="stable")
    args = [dy, order, np.append(starts, n), unique, table, unique.size, dim]
    work = unique.size * -(-dim // 32)
    expected = {4: reference.embedding_backward(dy, ids, table)}
    return Case("embedding_backward", args, work, expected, error=0, whole=None)
