"""gelu.cu: against the tanh formula, in the tails and at special values."""

from __future__ import annotations

import math

import cases_flat  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

CASES = ("gelu_forward", "gelu_backward")
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split(*CASES)


def gelu(x):
    y = np.empty_like(x)
    device_for().launch("gelu_forward", x, y, x.size, work=x.size)
    return y


def gelu_gradient(x):
    dx = np.empty_like(x)
    device_for().launch("gelu_backward", x, np.ones_like(x), dx, x.size, work=x.size)
    return dx


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_from_zero(dtype):
    huge = float(np.finfo(dtype).max)
    x = np.array([-huge, -1e10, -50, 0, 50, 1e10, huge], dtype)
    np.testing.assert_array_equal(gelu(x), np.where(x > 0, x, 0))
    np.testing.assert_allclose(gelu_gradient(x), [0, 0, 0, 0.5, 1, 1, 1], atol=1e-30)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_infinity(dtype):
    x = np.array([np.nan, np.inf], dtype)
    np.testing.assert_array_equal(gelu(x), x)
    np.testing.assert_array_equal(gelu_gradient(x), [np.nan, 1])


def test_negative_tail_keeps_its_relative_precision():
    x = np.array([-3.0, -5.0, -8.0])
    u = [math.sqrt(2 / math.pi) * (t + 0.044715 * t**3) for t in x]
    expected = [t / (1 + math.exp(-2 * v)) for t, v in zip(x, u, strict=True)]
    np.testing.assert_allclose(gelu(x), expected, rtol=1e-13)
    np.testing.assert_allclose(gelu(x.astype(np.float32)), expected, rtol=2e-5)
