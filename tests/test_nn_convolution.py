"""conv2d: against the reference, finite differences, and itself in other tiles."""

from __future__ import annotations

import numpy as np
import pytest
import reference_images as reference
from gradient_check import check_gradients, gradients

from hpctrain.errors import UsageError
from hpctrain.nn import tiles
from hpctrain.nn.columns import Columns
from hpctrain.nn.convolution import conv2d
from hpctrain.nn.winograd import Winograd

# images, (H, W), channels, filters, kernel, stride, padding
CASES = [
    (2, (5, 6), 3, 4, (3, 3), (1, 1), (1, 1)),
    (3, (5, 4), 4, 2, (1, 1), (1, 1), (0, 0)),
    (2, (6, 5), 2, 3, (1, 1), (2, 2), (0, 0)),
    (2, (7, 6), 3, 2, (3, 2), (2, 1), (1, 0)),
    (2, (6, 6), 2, 2, (2, 2), (1, 1), (3, 4)),  # more padding than the kernel has pixels
    (1, (5, 5), 33, 3, (5, 5), (3, 3), (2, 2)),
    (2, (6, 5), 17, 16, (3, 3), (1, 1), (1, 1)),  # from here on Winograd's way
    (3, (4, 7), 16, 33, (3, 3), (1, 1), (2, 0)),
    (1, (9, 6), 16, 16, (3, 3), (1, 1), (0, 3)),
    (0, (4, 4), 2, 3, (3, 3), (1, 1), (1, 1)),
    (0, (4, 4), 2, 3, (3, 3), (2, 2), (1, 1)),
    (0, (4, 4), 16, 16, (3, 3), (1, 1), (1, 1)),
]
WINOGRAD = (6, 7, 8, 11)


def inputs(case, dtype=np.float64):
    images, size, channels, filters, kernel, *_ = case
    rng = np.random.default_rng(0)
    shapes = (images, *size, channels), (filters, *kernel, channels), (filters,)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def operation(case):
    *_, stride, padding = case
    return lambda tape, x, w, b=None: conv2d(tape, x, w, b, stride=stride, padding=padding)


@pytest.fixture(params=[1 << 20, 4000], ids=["one tile", "many tiles"])
def tile_bytes(request, monkeypatch):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", request.param)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matches_the_reference(case, dtype, tile_bytes):
    x, w, b = inputs(case, dtype)
    y, _, _ = gradients(operation(case), [x, w, b], wanted=[False] * 3)
    wide = [array.astype(np.float64) for array in (x, w, b)]
    expected = reference.conv2d(*wide[:2], case[4:]) + wide[2]
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, atol=200 * np.finfo(dtype).eps)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, tile_bytes):
    check_gradients(operation(case), *inputs(case))


@pytest.mark.parametrize("case", CASES[:4] + CASES[6:7])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradients_of_one_input_only(case, wanted, tile_bytes):
    check_gradients(operation(case), *inputs(case)[:2], wanted=wanted)


@pytest.mark.parametrize("case", CASES[9:])
def test_an_empty_batch_gives_gradients_of_zero(case):
    y, _, (dx, dw, db) = gradients(operation(case), inputs(case))
    assert y.size == 0 and dx.size == 0
    assert not dw.any() and not db.any()


def test_the_cases_cover_both_ways(monkeypatch):
    ways = []
    for way in (Columns, Winograd):
        forward = way.forward
        monkeypatch.setattr(
            way, "forward", lambda s, *a, f=forward, w=way: (ways.append(w), f(s, *a))
        )
    for case in CASES:
        gradients(operation(case), inputs(case), wanted=[False] * 3)
    assert [i for i, way in enumerate(ways) if way is Winograd] == list(WINOGRAD)


@pytest.mark.parametrize("case", [CASES[0], CASES[6]])
def test_the_output_does_not_depend_on_the_rest_of_the_batch(case):
    """The same bits for an image alone and among others, in exact arithmetic."""
    case = (6, *case[1:])
    x, w, _ = (array.round() for array in inputs(case, np.float32))
    all_y, _, _ = gradients(operation(case), [x, w], wanted=[False] * 2)
    one_y, _, _ = gradients(operation(case), [x[3:4].copy(), w], wanted=[False] * 2)
    np.testing.assert_array_equal(all_y[3:4], one_y)


def test_columns_of_a_batch_are_never_in_memory(monkeypatch):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 1 << 16)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 14, 14, 7)).astype(np.float32)
    w = rng.standard_normal((8, 3, 3, 7)).astype(np.float32)
    rows = []
    launch = Columns.columns

    def watch(self, device, images, lines, cols):
        rows.append(len(cols))
        launch(self, device, images, lines, cols)

    monkeypatch.setattr(Columns, "columns", watch)
    gradients(operation((*CASES[0][:5], (1, 1), (1, 1))), [x, w])
    assert len(rows) > 20 and max(rows) * 63 * 4 <= 1 << 16


@pytest.mark.parametrize(
    "x, w, options, message",
    [
        ((1, 4, 4), (1, 3, 3, 1), {}, "must be"),
        ((1, 4, 4, 2), (1, 3, 3, 1), {}, "same channels"),
        ((1, 2, 4, 1), (1, 3, 3, 1), {}, "does not fit"),
        ((1, 4, 4, 1), (1, 3, 3, 1), {"stride": 0}, "stride 0"),
        ((1, 4, 4, 1), (1, 3, 3, 1), {"padding": -1}, "padding -1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, w, options, message):
    with pytest.raises(UsageError, match=message):
        gradients(lambda tape, *v: conv2d(tape, *v, **options), [np.zeros(x), np.zeros(w)])
