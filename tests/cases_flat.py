"""Cases for kernels on flat arrays: elementwise.cu, gelu.cu, sgd.cu, adamw.cu."""

from __future__ import annotations

import numpy as np
import reference
from kernel_cases import Case, case, normal

ROWS_COLS = ((0, 5), (1, 1), (3, 31), (7, 33), (5, 1000), (64, 96))


@case()
def fill(rng, dtype, n):
    return Case("fill", [normal(rng, dtype, n), 1.5, n], n, {0: np.full(n, 1.5, dtype)}, error=0)


@case()
def scale(rng, dtype, n):
    y, a = normal(rng, dtype, n), float(dtype.type(0.3))
    return Case("scale", [y, a, n], n, {0: dtype.type(a) * y}, error=0)


@case()
def add(rng, dtype, n):
    x, y = normal(rng, dtype, n), normal(rng, dtype, n)
    return Case("add", [x, y, np.zeros_like(x), n], n, {2: x + y}, error=0)


@case()
def add_into(rng, dtype, n):
    y, x = normal(rng, dtype, n), normal(rng, dtype, n)
    return Case("add_into", [y, x, n], n, {0: y + x}, error=0)


@case()
def relu_forward(rng, dtype, n):
    x = normal(rng, dtype, n)
    x[::7] = np.nan
    x[1::7] = 0
    return Case("relu_forward", [x, np.ones_like(x), n], n, {1: reference.relu(x)}, error=0)


@case()
def relu_backward(rng, dtype, n):
    y, dy = reference.relu(normal(rng, dtype, n)), normal(rng, dtype, n)
    dx = np.where(y > 0, dy, dtype.type(0))
    return Case("relu_backward", [y, dy, np.ones_like(y), n], n, {2: dx}, error=0)


@case(*ROWS_COLS)
def add_bias(rng, dtype, shape):
    y, b = normal(rng, dtype, *shape), normal(rng, dtype, shape[1])
    return Case("add_bias", [y, b, *shape], shape[0], {0: y + b}, error=0, whole=("b",))


@case()
def from_bytes(rng, dtype, n):
    x = rng.integers(0, 256, n, np.uint8)
    a, b = dtype.type(1 / 255), dtype.type(-0.5)
    args = [x, np.zeros(n, dtype), float(a), float(b), n]
    return Case("from_bytes", args, n, {1: a * x.astype(dtype) + b}, error=0)


@case()
def narrow(rng, dtype, n):
    x = normal(rng, dtype, n)
    return Case("narrow", [x, np.zeros_like(x), n], n, {1: x}, error=0)


@case()
def add_widened(rng, dtype, n):
    x, y = normal(rng, dtype, n), normal(rng, dtype, n)
    return Case("add_widened", [x, y, n], n, {1: y + x}, error=0)


@case()
def round_mantissa(rng, dtype, n):
    """Exact ties, infinities and NaN included."""
    x = normal(rng, dtype, n)
    x[::5] = 1 + np.arange(len(x[::5])) % 8 / 16  # halves of a unit of 3 bits
    x[3::11], x[4::11] = np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(x)
        expected = np.where(np.isfinite(x), np.ldexp(np.rint(mantissa * 16) / 16, exponent), x)
    return Case("round_mantissa", [x, np.zeros_like(x), 3, n], n, {1: expected}, error=0)


@case()
def gelu_forward(rng, dtype, n):
    x = 3 * normal(rng, dtype, n)
    return Case("gelu_forward", [x, np.zeros_like(x), n], n, {1: reference.gelu(x)})


@case()
def gelu_backward(rng, dtype, n):
    x, dy = 2 * normal(rng, dtype, n), normal(rng, dtype, n)
    expected = {2: reference.gelu_gradient(x, dy)}
    return Case("gelu_backward", [x, dy, np.zeros_like(x), n], n, expected)


def _sgd(rng, dtype, n, momentum, nesterov):
    p, g, v = (normal(rng, dtype, n) for _ in range(3))
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01, "scale": 0.3}
    new_p, new_v = reference.sgd(p, g, v, nesterov=nesterov, **options)
    if momentum:
        args, expected = [p, g, v, *options.values(), nesterov, n], {0: new_p, 2: new_v}
    else:
        args, expected = [p, g, None, *options.values(), nesterov, n], {0: new_p}
    return Case("sgd", args, n, expected)


@case()
def sgd_plain(rng, dtype, n):
    return _sgd(rng, dtype, n, momentum=0.0, nesterov=0)


@case()
def sgd_momentum(rng, dtype, n):
    return _sgd(rng, dtype, n, momentum=0.9, nesterov=0)


@case()
def sgd_nesterov(rng, dtype, n):
    return _sgd(rng, dtype, n, momentum=0.9, nesterov=1)


@case()
def adamw(rng, dtype, n):
    p, g, m = (normal(rng, dtype, n) for _ in range(3))
    v = normal(rng, dtype, n) ** 2
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    step, scale = 3, 0.25
    correction = [1 / (1 - options["beta1"] ** step), 1 / (1 - options["beta2"] ** step)]
    expected = reference.adamw(p, g, m, v, step=step, scale=scale, **options)
    args = [p, g, m, v, *options.values(), *correction, scale, n]
    return Case("adamw", args, n, {0: expected[0], 2: expected[1], 3: expected[2]})
