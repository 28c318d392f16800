"""layer_norm.cu: forward, backward and the partial sums of the parameters' gradients."""

from __future__ import annotations

import cases_rows  # noqa: F401  (registers the cases)
import numpy as np
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

ROWS = ("layer_norm_forward", "layer_norm_backward")
test_matches_reference = matches_reference(*ROWS, "layer_norm_parameter_partials")
test_same_on_all_levels = same_on_all_levels(*ROWS, "layer_norm_parameter_partials")
test_same_when_split = same_when_split(*ROWS)


def forward(x, y):
    rows, cols = x.shape
    ones, zeros = np.ones(cols, x.dtype), np.zeros(cols, x.dtype)
    mean, rstd = np.empty(rows, x.dtype), np.empty(rows, x.dtype)
    args = [x, ones, zeros, y, mean, rstd, rows, cols, 1e-5]
    device_for().launch("layer_norm_forward", *args, work=rows)
    return mean, rstd


def test_variance_does_not_cancel_for_a_large_mean():
    x = 1000 + np.random.default_rng(0).standard_normal((4, 768)).astype(np.float32)
    y = np.empty_like(x)
    forward(x, y)
    t = x.astype(np.float64)
    expected = (t - t.mean(axis=1, keepdims=True)) / t.std(axis=1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_constant_rows_give_zero():
    x = np.full((3, 50), 7, np.float32)
    y = np.empty_like(x)
    mean, _ = forward(x, y)
    np.testing.assert_array_equal(mean, 7)
    np.testing.assert_array_equal(y, 0)


def test_in_place_gives_the_same():
    x = np.random.default_rng(0).standard_normal((6, 77))
    y = np.empty_like(x)
    forward(x, y)
    forward(x, x)
    np.testing.assert_array_equal(x, y)


def test_a_nan_spoils_its_row_only():
    x = np.random.default_rng(0).standard_normal((3, 40))
    x[1, 5] = np.nan
    y = np.empty_like(x)
    forward(x, y)
    np.testing.assert_array_equal(np.isnan(y).all(axis=1), [False, True, False])
    assert np.isfinite(y[[0, 2]]).all()
