"""Selection: exact, deterministic, on every device; the same whatever it guesses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from kernel_checks import device_for
from plain_codecs import select as plain_select
from simulated import open_sim

from hpctrain.compress.select import GUESSES, Selector
from hpctrain.device import simt
from hpctrain.errors import UsageError


def oracle(x, k):
    """The same by sorting; NaN first."""
    size = np.where(np.isnan(x), np.inf, np.abs(x))
    return np.sort(np.lexsort((np.arange(x.size), ~np.isnan(x), -size))[:k])


def check(device, x, k, guess="sample", calls=1):
    selector = Selector(device, x.size, x.dtype, guess)
    for _ in range(calls):
        values, indices = selector.select(device.from_host(x), k)
        found = device.to_host(indices)
        np.testing.assert_array_equal(found, oracle(x, k))
        assert device.to_host(values).tobytes() == x[found].tobytes()


def random(n, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(n).astype(dtype)


def special(name, n):
    """Arrays that break a guess, or an assumption."""
    x = random(n)
    if name == "equal":
        x[:] = -2.5
    elif name == "zeros":
        x[:] = 0
        x[::2] = -0.0
    elif name == "few":
        x[np.arange(n) % 997 > 0] = 0
    elif name == "one part":  # far more of one tile than has a slot
        x[n // 3 : n // 3 + 5000] *= 1e6
    elif name == "denormal":
        x *= np.float32(1e-40)
    elif name == "infinite":
        x[[7, n // 2, n - 1]] = np.nan, -np.inf, np.inf
    elif name == "coarse":
        x = np.round(x)
    elif name == "rows":  # a pattern with the sample's stride
        x[np.arange(n) % 64 == 0] = 9
    return x


NAMES = ("plain", "equal", "zeros", "few", "one part", "denormal", "infinite", "coarse", "rows")


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 100, 2001])
def test_it_selects_what_sorting_does(name, k, guess):
    check(device_for(), special(name, 150_001), k, guess, calls=2)


@pytest.mark.parametrize("n, k", [(0, 0), (1, 0), (1, 1), (4097, 4097), (5000, 4999), (9001, 1200)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_none_all_and_almost_all(n, k, dtype):
    check(device_for(), random(n, dtype=dtype), k)


@settings(max_examples=60, deadline=None)
@given(
    some.lists(some.floats(width=32), max_size=300),
    some.integers(0, 300),
    some.sampled_from([np.float32, np.float64]),
)
def test_any_numbers(numbers, k, dtype):
    x = np.array(numbers, dtype)
    check(device_for(), x, min(k, x.size))


def test_a_kept_threshold_follows_other_data():
    """Larger, smaller, and of another kind; another k between."""
    device, n = device_for(), 100_000
    selector = Selector(device, n, guess="last")
    calls = [(1, 50), (1, 50), (100, 50), (1e-3, 50), (1, 200), (1, 200)]
    for step, (scale, k) in enumerate(calls):
        x = random(n, step) * np.float32(scale)
        np.testing.assert_array_equal(selector.select(x, k)[1], oracle(x, k))


@pytest.mark.parametrize("order", ["late", "early", "3"])
def test_it_needs_no_waiting_on_a_gpu(order):
    """Whatever the order in which CUDA may do the launches."""
    for name in ("plain", "few"):
        check(open_sim(order), special(name, 60_000), 300)


class Threads:
    """A device whose kernels run on the simulator, thread by thread."""

    def __init__(self, block, order):
        self._shape = {"block": block, "order": order}

    def from_host(self, array):
        return array.copy()

    to_host = from_host

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    zeros = empty

    def launch(self, name, *args, work):
        simt.launch(name, *args, work=work, **self._shape)


@pytest.mark.parametrize("block, order", [(32, "forward"), (128, 5)])
@pytest.mark.parametrize("name", ["coarse", "few"])
def test_all_of_it_thread_by_thread(name, block, order):
    check(Threads(block, order), special(name, 13_000), 200)


def test_indices_beyond_2_to_the_24():
    n = (1 << 24) + 5000
    x = np.zeros(n, np.float32)
    at = np.array([3, (1 << 24) - 1, (1 << 24) + 1, (1 << 24) + 3, n - 1])
    x[at] = 1, -2, 3, -4, 5
    np.testing.assert_array_equal(Selector(device_for(), n).select(x, 5)[1], at)


def test_it_agrees_with_the_plain_one():
    x = special("coarse", 50_000)
    values, indices = Selector(device_for(), x.size).select(x, 700)
    plain = plain_select(x, 700)
    np.testing.assert_array_equal(indices, plain.indices)
    np.testing.assert_array_equal(values, plain.values)


@pytest.mark.parametrize(
    "n, dtype, guess, k, says",
    [
        (8, "float16", "sample", 1, "no selection from float16"),
        (8, "float32", "lucky", 1, "guess 'lucky': it is one of none, sample, last"),
        (8, "float32", "sample", 9, "k = 9: of 8 elements 0 to 8"),
        (9, "float32", "sample", 1, r"takes \(9,\) of float32, not \(8,\)"),
        (8, "float64", "sample", 1, "of float64, not"),
    ],
)
def test_what_cannot_be_selected(n, dtype, guess, k, says):
    with pytest.raises(UsageError, match=says):
        Selector(device_for(), n, dtype, guess).select(np.ones(8, np.float32), k)
