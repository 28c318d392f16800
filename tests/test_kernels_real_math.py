"""cuda/real_math.h: errors in units in the last place, special values, vector code, levels."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
from kernel_checks import levels

from hpctrain.device.build import compiler, host_level, options
from hpctrain.device.signatures import kernel_folder

FUNCTIONS = {"exp": np.exp, "log": np.log, "tanh": np.tanh}
SOURCE = '#include "kernel.h"\n' + "".join(
    f"ELEMENTS_KERNEL apply_{name}(const real* x, real* y, int64 n)"
    f"{{ GRID_STRIDE(i, n) y[i] = real_{name}(x[i]); }}\n"
    for name in FUNCTIONS
)
ULP = {"exp": 1.1, "log": 0.9, "tanh": 2.7}  # as real_math.h says


def compile_functions(folder, dtype, level, *more):
    """The functions as a library; what the compiler said."""
    path = folder / f"functions-{dtype}-{level}.so"
    command = [compiler(), *options(dtype, level), *more, f"-I{kernel_folder()}"]
    command += ["-x", "c++", "-", "-o", str(path)]
    run = subprocess.run(command, input=SOURCE, capture_output=True, text=True, check=True)
    return ctypes.CDLL(str(path)), run.stderr


@pytest.fixture(scope="module")
def apply(tmp_path_factory):
    """apply(name, x, level): the function of that name on an array."""
    folder, libraries = tmp_path_factory.mktemp("real_math"), {}

    def call(name, x, level=None):
        key = str(x.dtype), level or host_level()
        if key not in libraries:
            libraries[key], _ = compile_functions(folder, *key)
        function = getattr(libraries[key], f"apply_{name}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        y = np.empty_like(x)
        function(x.ctypes.data, y.ctypes.data, x.size)
        return y

    return call


def every_float(step, first=0):
    """Every step-th of all float32 numbers, by bit pattern."""
    return np.arange(first, 2**32, step, np.uint64).astype(np.uint32).view(np.float32)


def arguments(dtype, count=100_000):
    """Arguments of all sizes, and more of them where the functions change."""
    rng = np.random.default_rng(3)
    if dtype == "float32":
        return every_float(4099)
    bits = rng.integers(0, 2**64, count, np.uint64, endpoint=False).view(np.float64)
    near = [rng.uniform(-b, b, count) for b in (0.01, 0.4, 1.5, 25, 750)]
    return np.concatenate([bits, *near, 1 + rng.uniform(-0.3, 0.5, count)])


def ulps(found, x, exact):
    """Largest error where the exact result is finite; what is not finite must be equal."""
    dtype = found.dtype
    with np.errstate(all="ignore"):
        wider = np.float64 if dtype == np.float32 else np.longdouble
        wanted = exact(x.astype(wider))
        rounded = wanted.astype(dtype)
    finite = np.isfinite(rounded) & np.isfinite(found)
    np.testing.assert_array_equal(found[~finite], rounded[~finite])
    unit = np.spacing(np.abs(rounded[finite])).astype(wider)
    return float((np.abs(found[finite].astype(wider) - wanted[finite]) / unit).max(initial=0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_ulps(apply, name, dtype):
    x = arguments(dtype)
    assert ulps(apply(name, x), x, FUNCTIONS[name]) <= ULP[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_for_many_floats(apply, name):
    for first in range(0, 17 * 64, 17):
        x = every_float(17 * 64, first)
        assert ulps(apply(name, x), x, FUNCTIONS[name]) <= ULP[name]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(apply, dtype):
    info = np.finfo(dtype)
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, info.max, -info.max], dtype)
    nan, inf = np.nan, np.inf
    np.testing.assert_array_equal(apply("exp", x), [nan, inf, 0, 1, 1, inf, 0])
    np.testing.assert_array_equal(apply("tanh", x), [nan, 1, -1, 0, 0, 1, -1])
    log_max = np.log(x[5])
    np.testing.assert_array_equal(apply("log", x), [nan, inf, nan, -inf, -inf, log_max, nan])
    assert np.signbit(apply("tanh", x)[4])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_below_the_smallest_normal_number(apply, dtype):
    """Nothing is flushed to zero, and what is tiny is not lost."""
    tiny = np.finfo(dtype).smallest_subnormal
    x = tiny * np.array([1, 2, 1000], dtype)
    np.testing.assert_array_equal(apply("tanh", x), x)
    np.testing.assert_allclose(apply("log", x), np.log(x), rtol=4 * np.finfo(dtype).eps)
    edge = np.log(np.array([tiny], np.longdouble) * 3).astype(dtype)
    assert 0 < apply("exp", edge)[0] < np.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits_on_all_levels(apply, name, dtype):
    if len(levels()) < 2:
        pytest.skip("needs a CPU of level x86-64-v4")
    x = arguments(dtype, 1000)
    first, second = (apply(name, x, level) for level in levels())
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loops_become_vector_code(tmp_path, dtype):
    """A loop that stays scalar is 10 times as slow, and nothing else would show it."""
    if "x86-64-v3" not in levels() or "g++" not in str(compiler()):
        pytest.skip("reads the report of g++ for x86-64-v3")
    report = "-fopt-info-vec-optimized"
    _, said = compile_functions(tmp_path, dtype, "x86-64-v3", report)
    lines = {line.split(":")[1] for line in said.splitlines() if "loop vectorized using 32" in line}
    assert lines >= {"2", "3", "4"}
