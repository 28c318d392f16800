"""elementwise.cu: the host target against NumPy, level against level, whole against split."""

from __future__ import annotations

import cases_flat  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

CASES = (
    *("fill", "scale", "add", "add_into", "relu_forward", "relu_backward"),
    *("add_bias", "from_bytes", "narrow", "add_widened", "round_mantissa"),
)
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split(*CASES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relu_of_special_values(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -1e-40, 1e-40], dtype)
    y = np.empty_like(x)
    device_for().launch("relu_forward", x, y, len(x), work=len(x))
    np.testing.assert_array_equal(y, [np.nan, np.inf, 0, 0, 0, x[5]])


def test_outputs_may_be_inputs():
    x = np.array([1, -2, 3], np.float32)
    device_for().launch("add", x, x, x, 3, work=3)
    np.testing.assert_array_equal(x, [2, -4, 6])
    device_for().launch("relu_forward", x, x, 3, work=3)
    np.testing.assert_array_equal(x, [2, 0, 6])
