"""Checks that hold for every kernel, applied to the cases of kernel_cases.py.

A test file has one line for each check:

    test_matches_reference = matches_reference("gelu_forward", "gelu_backward")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_cases import CASES, Case
from ml_dtypes import bfloat16

from hpctrain.device.build import LEVELS, host_level
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.signatures import kernel_named

DTYPES = ("float32", "float64")
DTYPES16 = ("bfloat16", "float16")
FENCE = 16  # elements behind an output that a kernel must leave alone
_devices: dict[str, CpuDevice] = {}


def device_for(level: str | None = None) -> CpuDevice:
    """The CPU device for a level, the highest by default; opened once."""
    level = level or host_level()
    return _devices.setdefault(level, CpuDevice(level))


def levels() -> list[str]:
    """The levels with fma that this CPU can run, highest first."""
    names = list(LEVELS)[: list(LEVELS).index("x86-64-v3") + 1]
    return names[names.index(host_level()) :] if host_level() in names else []


def launch(device: Any, case: Case) -> dict[int, Any]:
    """Run the case on fresh copies of its arrays; the outputs by argument index.

    Each output lies in front of a fence of NaN or 85s, which must survive.
    """
    args, fences, keep = [], [], []
    for index, value in enumerate(case.args):
        if isinstance(value, list):
            keep.append([device.from_host(array) for array in value])
            args.append(device.peers(keep[-1]))
        elif not isinstance(value, np.ndarray):
            args.append(value)
        elif index in case.expected:
            output, fence = fenced(device, value)
            args.append(output)
            fences.append(fence)
        else:
            args.append(device.from_host(value))
    before = [fence.tobytes() for fence in fences]
    device.launch(case.kernel, *args, work=case.work)
    device.synchronize()
    assert before == [fence.tobytes() for fence in fences], "wrote behind an output"
    return {index: device.to_host(args[index]) for index in case.expected}


def is_float(array: Any) -> bool:
    """Whether it holds floating-point numbers; to NumPy bfloat16 is of kind V."""
    return array.dtype.kind == "f" or array.dtype == bfloat16


def fenced(device: Any, value: Any) -> tuple[Any, Any]:
    """A copy of an array in device memory, and the elements that lie behind it."""
    flat = np.full(value.size + FENCE, 85, value.dtype)
    if is_float(value):
        flat[:] = np.nan
    flat[: value.size] = value.ravel()
    memory = device.from_host(flat)
    return memory[: value.size].reshape(value.shape), memory[value.size :]


def compare(case: Case, outputs: dict[int, Any]) -> None:
    """Hold outputs against the case's reference."""
    for index, expected in case.expected.items():
        if expected is None:
            continue
        name = f"{case.kernel}: {kernel_named(case.kernel).parameters[index].name}"
        found = outputs[index]
        assert found.shape == expected.shape, name
        if found.dtype.itemsize == 2 and found.dtype != expected.dtype:
            compare16(found, expected, case.error, name)
            continue
        if case.error == 0 or not is_float(found):
            np.testing.assert_array_equal(found, expected, err_msg=name)
            continue
        finite = np.abs(expected[np.isfinite(expected)])
        scale = max(1.0, float(finite.max(initial=0)))
        allowed = case.error * float(np.finfo(found.dtype).eps) * scale
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed, err_msg=name)


def compare16(found: Any, expected: Any, error: float, name: str) -> None:
    """Hold a 16-bit output against float32: as rounded from it, or from within `error` of it."""
    if error == 0:
        found, expected = found.astype(np.float32), expected.astype(found.dtype).astype(np.float32)
        np.testing.assert_array_equal(found, expected, err_msg=name)
        return
    half_unit = np.spacing(np.abs(expected).astype(found.dtype)).astype(np.float64) / 2
    scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
    allowed = half_unit + error * float(np.finfo(np.float32).eps) * scale
    distance = np.abs(found.astype(np.float64) - expected)
    assert (distance <= allowed).all(), f"{name}: {(distance - allowed).max()} too far"


def parts(case: Case, cuts: list[int]) -> list[Case]:
    """The case as several launches over work[0:a], work[a:b], ..."""
    parameters = kernel_named(case.kernel).parameters
    result = []
    for first, last in zip([0, *cuts], [*cuts, case.work], strict=True):
        args = list(case.args)
        for index, parameter in enumerate(parameters):
            if isinstance(args[index], np.ndarray) and parameter.name not in (case.whole or ()):
                assert args[index].shape[0] == case.work, parameter.name
                args[index] = args[index][first:last]
            elif parameter.name in ("n", "rows") and not parameter.pointers:
                args[index] = last - first
        result.append(Case(case.kernel, args, last - first, case.expected))
    return result


def same_bits(first: dict[int, Any], second: dict[int, Any], what: str) -> None:
    """Outputs of two runs are the same bits (any NaN equals any other)."""
    for index, one in first.items():
        other = second[index]
        if one.dtype.itemsize == 2:
            one, other = one.astype(np.float32), other.astype(np.float32)  # exact
        np.testing.assert_array_equal(one, other, err_msg=what)
        if one.dtype.kind == "f":
            zeros = one == 0
            signs = np.signbit(one[zeros]), np.signbit(other[zeros])
            np.testing.assert_array_equal(*signs, err_msg=f"{what}: signs of zeros")


def _over(names: tuple[str, ...], check: Callable[[Any, str, Any], None]) -> Any:
    params = [
        pytest.param(CASES[name], dtype, size, id=f"{name}-{dtype}-{size}".replace(" ", ""))
        for name in names
        for dtype in DTYPES
        for size in CASES[name].sizes
    ]
    return pytest.mark.parametrize("family, dtype, size", params)(check)


def matches_reference(*names: str) -> Any:
    """A test: the host target computes what the reference computes."""

    def check(family: Any, dtype: str, size: Any) -> None:
        case = family.build(dtype, size)
        compare(case, launch(device_for(), case))

    return _over(names, check)


def same_on_all_levels(*names: str) -> Any:
    """A test: the same bits when compiled for x86-64-v3 and for v4."""

    def check(family: Any, dtype: str, size: Any) -> None:
        if len(levels()) < 2:
            pytest.skip("needs a CPU of level x86-64-v4")
        case = family.build(dtype, size)
        first, *others = (launch(device_for(level), case) for level in levels())
        for other in others:
            same_bits(first, other, f"{case.kernel} on {levels()}")

    return _over(names, check)


def same_when_split(*names: str) -> Any:
    """A test: one launch and several over parts of the work give the same bits."""

    def check(family: Any, dtype: str, size: Any) -> None:
        case = family.build(dtype, size)
        if case.whole is None:
            pytest.skip("this kernel's work cannot be split")
        cuts = sorted({case.work // 3, min(case.work, case.work // 3 + 1), case.work * 7 // 8})
        outputs = [launch(device_for(), part) for part in parts(case, cuts)]
        joined = {index: np.concatenate([part[index] for part in outputs]) for index in outputs[0]}
        same_bits(launch(device_for(), case), joined, f"{case.kernel} split at {cuts}")

    return _over(names, check)
