"""quantize.cu: encoded numbers and orthonormal columns, on the host target."""

from __future__ import annotations

import cases_quantize  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

CASES = (
    *("cast_encode", "cast_add", "int8_encode", "int8_add", "sign_encode", "sign_add"),
    "orthonormalize",
)
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split("cast_encode", "cast_add")


def orthonormal(p):
    rows, rank = p.shape
    numbers = [np.array([value], np.int64) for value in (0, rows, rank)]
    device_for().launch("orthonormalize", p, *numbers, 1, work=1)
    return p


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_columns_that_almost_depend_on_others(dtype, spread):
    """What rounding leaves of a dependent column is no direction: it becomes 0."""
    p = np.random.default_rng(1).standard_normal((2000, 3)).astype(dtype)
    p[:, 2] = p[:, 0] - 2 * p[:, 1] + dtype_of(dtype)(spread) * p[:, 2]
    gram = orthonormal(p).T @ p
    expected = np.diag([1, 1, 1 if spread else 0])
    np.testing.assert_allclose(gram, expected, atol=2e-5 if dtype == "float32" else 1e-12)


def dtype_of(name):
    return np.dtype(name).type


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e38])
def test_int8_of_very_small_and_large_numbers(size):
    x = np.array([1, -1, 0.5, 0], np.float32) * np.float32(size)
    q, scales = np.zeros(4, np.uint8), np.zeros(1, np.float32)
    device_for().launch("int8_encode", x, scales, q, 4, work=1)
    y = x.copy()
    device_for().launch("int8_add", scales, q, y, -1.0, 4, work=4)
    assert np.isfinite(y).all() and (np.abs(y) <= np.abs(x).max()).all()
