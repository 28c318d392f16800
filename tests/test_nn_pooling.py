"""Pooling: against the reference and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import reference_images as reference
from gradient_check import check_gradients, gradients

from hpctrain.errors import UsageError
from hpctrain.nn.pooling import average_pool, max_pool

CASES = [
    ((2, 6, 4, 3), 2, None, 0),
    ((2, 7, 8, 3), (3, 3), 2, 1),
    ((2, 5, 6, 2), (2, 3), (1, 2), (1, 2)),
    ((3, 5, 4, 17), (5, 4), None, 0),
    ((0, 4, 4, 3), 2, None, 0),
]


def values(shape):
    """Numbers that are at least 0.01 apart, so that no small step changes which one is largest."""
    n = int(np.prod(shape))
    return (np.random.default_rng(0).permutation(n) * 0.01 - n / 200).reshape(shape)


def twice(value):
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize("shape, kernel, stride, padding", CASES)
def test_matches_the_reference(shape, kernel, stride, padding):
    x = values(shape)
    geometry = twice(kernel), twice(kernel if stride is None else stride), twice(padding)
    for pool, expected in (
        (max_pool, reference.max_pool(x, geometry)[0]),
        (average_pool, reference.average_pool(x, geometry)),
    ):
        y, _, _ = gradients(lambda t, v, f=pool: f(t, v, kernel, stride, padding), [x])
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", [max_pool, average_pool])
@pytest.mark.parametrize("shape, kernel, stride, padding", CASES)
def test_gradients(pool, shape, kernel, stride, padding):
    check_gradients(lambda tape, x: pool(tape, x, kernel, stride, padding), values(shape))


@pytest.mark.parametrize("pool", [max_pool, average_pool])
def test_windows_without_a_pixel_are_refused(pool):
    with pytest.raises(UsageError, match="padding 2 must be less than the kernel 2"):
        gradients(lambda tape, x: pool(tape, x, 2, 2, 2), [np.zeros((1, 4, 4, 1))])
    with pytest.raises(UsageError, match="does not fit"):
        gradients(lambda tape, x: pool(tape, x, 5), [np.zeros((1, 4, 4, 1))])
    with pytest.raises(UsageError, match="must be"):
        gradients(lambda tape, x: pool(tape, x, 2), [np.zeros((4, 4, 1))])
