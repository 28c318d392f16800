"""Products of 16-bit matrices, and in lower precision: tile by tile, in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from hpctrain.device import products
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.dtypes import FLOATS

SHAPES = [
    # of a, of b: one tile, several in each direction, narrow ones, stacks, nothing
    ((5, 7), (7, 3)),
    ((300, 400), (400, 200)),
    ((9, 400), (400, 300)),
    ((500, 300), (300, 9)),
    ((3, 30, 20), (3, 20, 40)),
    ((7, 200, 90), (7, 90, 100)),
    ((7, 200, 90), (90, 100)),
    ((2, 3, 100, 90), (2, 1, 90, 100)),
    ((0, 7), (7, 3)),
    ((5, 0), (0, 3)),
    ((0, 200, 90), (0, 90, 100)),
]


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in (("TILE", 1 << 12), ("DEPTH", 50), ("NARROW", 16)):
        monkeypatch.setattr(products, name, value)


def whole_numbers(shape, dtype, turned):
    """Of few digits: products and sums are exact, in whatever order they are added."""
    rng = np.random.default_rng(len(shape))
    stored = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
    array = rng.integers(-1, 2, stored).astype(np.float32).astype(FLOATS[dtype])
    return array.swapaxes(-1, -2) if turned else array


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_tiles_make_up_the_product(small_tiles, left, right, dtype, turned):
    device = CpuDevice()
    device.matmul_precision = "tf32"
    a, b = (whole_numbers(s, dtype, t) for s, t in zip((left, right), turned, strict=True))
    expected = np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(FLOATS[dtype])
    out = device.empty(expected.shape, FLOATS[dtype])
    assert device.matmul(a, b, out) is out
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("left", "right"), [((300, 2000), (2000, 300)), ((10, 900), (900, 900)), ((40, 99, 99),) * 2]
)
@pytest.mark.parametrize("turned", [False, True])
def test_memory_is_bounded(small_tiles, left, right, turned):
    """Two factors and their copies, the product and sums; the pool keeps a block for each size."""
    device = CpuDevice()
    a, b = whole_numbers(left, "bfloat16", turned), whole_numbers(right, "bfloat16", turned)
    out = np.empty((*left[:-1], right[-1]), a.dtype)
    device.matmul(a, b, out)  # loads the kernels
    device = CpuDevice()
    tracemalloc.start()
    device.matmul(a, b, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    limit = 16 * 4 * products.TILE
    assert peak < limit < 4 * (a.size + b.size + out.size)
