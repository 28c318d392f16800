"""Launches of kernels as data: what to launch, on what, and what must come out.

A case is a function `name(rng, dtype, size) -> Case`, registered under its name by `@case(sizes)`.
The checks in kernel_checks.py run every case on every target: host against reference, x86-64-v3
against v4, split launches, SIMT. The cases themselves are in cases_<family>.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.device.signatures import kernel_named

Array = NDArray[Any]
SIZES = (0, 1, 31, 33, 1000, 5000)  # elements of a flat array: none, one, about a warp, more


@dataclass
class Case:
    """One launch.

    `args` as `Device.launch` takes them, arrays on the host; a list of arrays stands for a table of
    peers. `expected` maps the index of each output in `args` to what the reference computes, or
    to None where only the targets are compared. `error` is the distance allowed from the reference,
    in units of the dtype's epsilon times the largest expected value (at least 1); 0 asks for equal
    bits.

    For split launches `whole` names array parameters that every part gets whole, or is None when
    the launch cannot be split. All other arrays are cut along their first axis, which has `work`
    entries, as has the parameter `n` or `rows`.
    """

    kernel: str
    args: list[Any]
    work: int
    expected: Mapping[int, Array | None]
    error: float = 4
    whole: tuple[str, ...] | None = ()


CaseFunction = Callable[[np.random.Generator, np.dtype[Any], Any], Case]


@dataclass(frozen=True)
class Family:
    """A registered case function and the sizes it is run with, smallest first."""

    make: CaseFunction
    sizes: tuple[Any, ...] = field(default=SIZES)

    def build(self, dtype: DTypeLike, size: Any) -> Case:
        """The case for `dtype` and `size`, with random inputs that depend on both."""
        dtype = np.dtype(dtype)
        seed = zlib.crc32(f"{self.make.__name__} {dtype} {size}".encode())
        if dtype.itemsize > 2:
            return self.make(np.random.default_rng(seed), dtype, size)
        single = self.make(Coarse(np.random.PCG64(seed)), np.dtype(np.float32), size)
        return narrowed(single, dtype)


class Coarse(np.random.Generator):
    """Random numbers of few digits: they, their doubles and triples are exact in 16 bits."""

    def standard_normal(self, size: Any = None) -> Any:
        """Multiples of 1/16 in [-4, 4], about normal."""
        return np.clip(np.round(super().standard_normal(size) * 16) / 16, -4, 4)


def narrowed(case: Case, dtype: np.dtype[Any]) -> Case:
    """The case with its arrays of `real` in 16 bits and, as everything is computed in float32, what
    float32 computes as what is expected."""

    def narrow(value: Any) -> Any:
        return [narrow(one) for one in value] if isinstance(value, list) else value.astype(dtype)

    args = list(case.args)
    parameters = kernel_named(case.kernel).parameters
    for index, (parameter, value) in enumerate(zip(parameters, args, strict=True)):
        if parameter.type != "real" or value is None:
            continue
        args[index] = narrow(value)
        before, after = (v if isinstance(v, list) else [v] for v in (value, args[index]))
        exact = [
            np.array_equal(a, b.astype(a.dtype), equal_nan=True)
            for a, b in zip(before, after, strict=True)
        ]
        if parameter.constant and not all(exact):
            raise ValueError(f"{case.kernel}: {parameter.name} is not exact in {dtype}")
    return Case(case.kernel, args, case.work, case.expected, case.error, case.whole)


CASES: dict[str, Family] = {}


def case(*sizes: Any) -> Callable[[CaseFunction], CaseFunction]:
    """Register a case function under its name, for `sizes` or for SIZES."""

    def register(make: CaseFunction) -> CaseFunction:
        name = make.__name__
        if name in CASES:
            raise ValueError(f"two cases are called {name}")
        CASES[name] = Family(make, sizes or SIZES)
        return make

    return register


def normal(rng: np.random.Generator, dtype: np.dtype[Any], *shape: int) -> Array:
    """Random numbers of the normal distribution."""
    return rng.standard_normal(shape).astype(dtype)
