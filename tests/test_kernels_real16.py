"""real16.h: conversions bit by bit, and every kernel in bfloat16 and float16.

The cases are those of float32 with inputs that 16 bits hold exactly. A kernel computes in float32,
so its 16-bit outputs are what float32 gives, rounded once.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import CASES
from kernel_checks import DTYPES16, compare, device_for, launch, levels, same_bits
from test_simt import Simulated

from hpctrain.device import simt
from hpctrain.device.dtypes import FLOATS
from hpctrain.device.signatures import kernel_table, kernels_of
from hpctrain.errors import KernelError

for path in sorted(Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(path.stem)

LAUNCHES = ((32, 1), (128, "reverse"))  # blocks and orders for the simulator


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Everything compiled at once, not a file at a time."""
    device_for().prepare(DTYPES16)
    simt.prepare(DTYPES16)


def narrowed(x, dtype, device=None):
    y = np.empty(x.shape, FLOATS[dtype])
    (device or device_for()).launch("narrow", x, y, x.size, work=x.size)
    return y


def widened(x):
    y = np.empty(x.shape, np.float32)
    device_for().launch("sum_widened", x, None, 0, 0, y, x.size, work=x.size)
    return y


def equal(found, expected):
    """The same bits, or NaN both."""
    both_nan = np.isnan(found) & np.isnan(expected)
    unsigned = f"u{found.itemsize}"
    assert (both_nan | (found.view(unsigned) == expected.view(unsigned))).all()


def floats():
    """float32 numbers of all sizes, and around every boundary between two 16-bit numbers."""
    bits = np.arange(0, 2**32, 4999, np.uint64).astype(np.uint32)
    ties = np.concatenate([np.arange(0, 2**32, 1 << shift, np.uint64) for shift in (15, 12)])
    near = np.concatenate([ties - 1, ties, ties + 1]).astype(np.uint32)[::7]
    return np.concatenate([bits, near]).view(np.float32)


@pytest.mark.parametrize("dtype", DTYPES16)
def test_every_16_bit_number_is_widened_exactly(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(FLOATS[dtype])
    equal(widened(every), every.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES16)
def test_float32_is_rounded_to_nearest_ties_to_even(dtype):
    x = floats()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(FLOATS[dtype])
    found = narrowed(x, dtype)
    nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    assert (found.view(np.uint16)[~nan] == expected.view(np.uint16)[~nan]).all()


@pytest.mark.parametrize("dtype", DTYPES16)
def test_same_rounding_on_all_targets(dtype):
    x = np.concatenate([floats()[::9973], np.float32([np.nan, np.inf, 65519.9, 65520, 1e-8, 3e-8])])
    host, simulated = narrowed(x, dtype), narrowed(x, dtype, Simulated(64, 1))
    equal(host.astype(np.float32), simulated.astype(np.float32))
    for level in levels():
        equal(narrowed(x, dtype, device_for(level)).astype(np.float32), host.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize("name", sorted(CASES))
def test_kernels_match_float32_and_the_simulator(name, dtype):
    for size in CASES[name].sizes:
        case = CASES[name].build(dtype, size)
        host = launch(device_for(), case)
        compare(case, host)
        for block, order in LAUNCHES:
            outputs = launch(Simulated(block, order), case)
            same_bits(host, outputs, f"{name} {size}: host and {block} threads, {order}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize("name", sorted(CASES))
def test_kernels_give_the_same_bits_on_all_levels(name, dtype):
    for size in CASES[name].sizes:
        case = CASES[name].build(dtype, size)
        first, *others = (launch(device_for(level), case) for level in levels())
        for other in others:
            same_bits(first, other, f"{name} {size} on {levels()}")


@pytest.mark.parametrize("name", ["add", "gelu_forward"])
def test_a_wrong_rounding_would_be_seen(name):
    """One unit in the last place, in one element."""
    case = CASES[name].build("bfloat16", 33)
    outputs = launch(device_for(), case)
    [found] = outputs.values()
    found.view(np.uint16)[found.argmax()] += 1
    with pytest.raises(AssertionError):
        compare(case, outputs)


@pytest.mark.parametrize("dtype", DTYPES16)
def test_the_simulator_watches_copies_of_16_bit_numbers(tmp_path, dtype):
    source = tmp_path / "copies.cu"
    source.write_text(
        '#include "kernel.h"\n'
        "ELEMENTS_KERNEL past(const real* x, real* y, int64 n)"
        "{ GRID_STRIDE(i, n + 1) y[i] = x[0]; }\n"
        "ELEMENTS_KERNEL racy(const real* x, real* y, int64 n)"
        "{ GRID_STRIDE(i, n) y[0] = x[i]; }\n"
    )
    x, y = np.zeros(64, FLOATS[dtype]), np.zeros(64, FLOATS[dtype])
    with pytest.raises(KernelError, match=r"out of bounds.*writes y\[64\]"):
        simt.launch("past", x, y, 64, work=64, source=source)
    with pytest.raises(KernelError, match=r"race.*writes y\[0\]"):
        simt.launch("racy", x, y, 64, work=64, source=source)


def test_numbers_are_not_passed_as_real(tmp_path):
    source = tmp_path / "value.cu"
    source.write_text("ELEMENTS_KERNEL k(real* y, real a, int64 n)\n")
    with pytest.raises(KernelError, match=r"takes 'real a' by value; numbers are passed as `wide`"):
        kernels_of(source)


def test_statistics_are_wide():
    """Kernels that keep a sum or a statistic keep it in float32."""
    for kernel, names in {
        "layer_norm_forward": {"mean", "rstd"},
        "batch_moments": {"mean", "squares"},
        "softmax_cross_entropy": {"loss", "weights"},
        "column_partials": {"part"},
        "columns_backward": {"dx"},
    }.items():
        types = {p.name: p.type for p in kernel_table()[kernel].parameters}
        assert {name for name in names if types[name] == "wide"} == names


def test_wide_arrays_are_checked():
    x = np.zeros(4, np.float16)
    with pytest.raises(KernelError, match="x has dtype float16, the kernel needs float32"):
        device_for().launch("narrow", x, x.copy(), 4, work=4)
    with pytest.raises(KernelError, match="p has dtype float16, the kernel needs float32"):
        numbers = (0.1, 0.9, 0.0, 1.0, 0)
        device_for().launch("sgd", x, x, x, *numbers, 4, work=4)
