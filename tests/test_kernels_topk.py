"""topk.cu: entries as payloads and back, on the host target."""

from __future__ import annotations

import cases_topk  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split
from ml_dtypes import bfloat16

CASES = (
    *("topk_encode", "topk_counts", "topk_starts", "topk_add", "topk_mask"),
    *("keep_residual", "keep_momentum", "pieces_take", "pieces_put"),
)
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split("keep_residual", "keep_momentum")


def encoded(values, dtype):
    """Values as the payload has them."""
    k = values.size
    entries, offsets = np.zeros(k, dtype), np.zeros(k, np.uint16)
    indices = np.arange(k, dtype=np.int64)
    device_for().launch("topk_encode", values, indices, entries, offsets, k, work=k)
    return entries


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_what_rounding_leaves_is_exact(dtype):
    """Denormals and the largest numbers too: rounded + left = x, all of them finite."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(20_000).astype(np.float32)
    x *= np.exp2(rng.integers(-140, 28 if dtype is np.float16 else 127, x.size)).astype(np.float32)
    x[:4] = -0.0, 65520, -1e8, np.float32(2) ** -149
    if dtype is bfloat16:
        x[4:6] = np.finfo(np.float32).max, np.finfo(np.float32).min
    sent = encoded(x, dtype).astype(np.float32)
    left = x - sent
    assert np.isfinite(sent).all()
    np.testing.assert_array_equal(sent.astype(np.float64) + left, x.astype(np.float64))


def test_nan_stays_nan():
    assert np.isnan(encoded(np.array([np.nan], np.float32), np.float16)).all()


def test_entries_beyond_the_end_are_left_out():
    """A damaged payload must not write outside the array."""
    y, n = np.zeros(70_000, np.float32), 66_000
    offsets, starts = np.array([1, 60_000], np.uint16), np.array([0, 1, 2], np.int64)
    values = np.ones(2, np.float32)
    device_for().launch("topk_add", values, offsets, starts, y, 1.0, 2, 2, n, work=2)
    assert y[1] == 1 and y.sum() == 1
