"""batch_norm.cu: statistics of groups, normalization and its gradient."""

from __future__ import annotations

import cases_batch_norm  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels

NAMES = (
    *("batch_moments", "batch_merge", "batch_averages", "batch_forward"),
    *("batch_sums", "batch_merge_sums", "batch_backward"),
)
test_matches_reference = matches_reference(*NAMES)
test_same_on_all_levels = same_on_all_levels(*NAMES)


def moments(x, chunk_rows=128):
    """Mean and biased variance of one group, (channels,)."""
    rows, channels = x.shape
    chunks = -(-rows // chunk_rows)
    offsets = np.array([0, rows])
    part_mean, squares = (np.empty((chunks, channels), x.dtype) for _ in range(2))
    mean, variance = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    numbers, tiles = (1, chunks, channels, chunk_rows), -(-channels // 32)
    device = device_for()
    device.launch("batch_moments", x, offsets, part_mean, squares, *numbers, work=chunks * tiles)
    args = [part_mean, squares, offsets, mean, variance, *numbers]
    device.launch("batch_merge", *args, work=tiles)
    return mean, variance


@pytest.mark.parametrize("shift", [0, 1e3, -1e5])
def test_variance_does_not_cancel_for_a_large_mean(shift):
    x = (shift + np.random.default_rng(0).standard_normal((5000, 40))).astype(np.float32)
    mean, variance = moments(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(variance, wide.var(axis=0), rtol=2e-3 if shift else 1e-5)


def test_equal_rows_have_no_variance():
    mean, variance = moments(np.full((1000, 33), 0.1, np.float32))
    np.testing.assert_allclose(mean, 0.1, rtol=1e-6)
    np.testing.assert_allclose(variance, 0, atol=1e-12)


def test_a_group_has_the_same_bits_alone_and_among_others():
    x = np.random.default_rng(0).standard_normal((900, 48)).astype(np.float32)
    both = np.empty((2, 4, 48), np.float32), np.empty((2, 4, 48), np.float32)
    alone = np.empty((1, 4, 48), np.float32), np.empty((1, 4, 48), np.float32)
    device = device_for()
    offsets = np.array([0, 400, 900])
    device.launch("batch_moments", x, offsets, *both, 2, 4, 48, 128, work=16)
    device.launch("batch_moments", x[400:], np.array([0, 500]), *alone, 1, 4, 48, 128, work=8)
    for one, other in zip(both, alone, strict=True):
        np.testing.assert_array_equal(one[1], other[0])
