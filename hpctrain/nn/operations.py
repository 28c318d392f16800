"""Operations on variables that need no more than a product and a few kernels.

Each computes its output and records how to differentiate it. Legend: N samples, C features, K
outputs; `...` any number of leading dims, flattened to rows.

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

import math
from typing import Any

from hpctrain.autograd import Tape, Variable
from hpctrain.device import Device
from hpctrain.device.dtypes import wide_dtype
from hpctrain.errors import UsageError

__all__ = ["add", "gelu", "layer_norm", "linear", "relu", "reshape", "sum_rows"]

Array = Any
ROWS_PER_PART = 256  # rows a warp adds up in one go; then the parts are added in order


def sum_rows(device: Device, x: Array, out: Array) -> None:
    """out[c] = sum of x[:, c]; x of shape (rows, cols), C-contiguous. 0 where there are no rows.

    x has the dtype of `out`, or its wide dtype.
    """
    rows, cols = x.shape
    parts = -(-rows // ROWS_PER_PART)
    tiles = -(-cols // 32)
    if parts <= 1:
        name = "column_sum" if x.dtype == out.dtype else "column_merge"
        device.launch(name, x, out, rows, cols, work=tiles)
        return
    partial = device.empty((parts, cols), wide_dtype(x.dtype))
    device.launch("column_partials", x, partial, rows, cols, ROWS_PER_PART, work=parts * tiles)
    device.launch("column_merge", partial, out, parts, cols, work=tiles)


def linear(tape: Tape, x: Variable, weight: Variable, bias: Variable | None = None) -> Variable:
    """y = x W^T + b.  x: (..., C), weight: (K, C), bias: (K,), y: (..., K)."""
    outputs, features = weight.shape
    if x.shape[-1] != features:
        raise UsageError(
            f"linear: x has {x.shape[-1]} features, the weight {weight.shape} needs {features}"
        )
    device = tape.device
    x_rows = x.value.reshape(-1, features)
    y = device.empty((x_rows.shape[0], outputs), x.value.dtype)
    device.matmul(x_rows, weight.value.T, y)
    if bias is not None:
        device.launch("add_bias", y, bias.value, *y.shape, work=y.shape[0])

    def backward(dy: Array) -> None:
        dy_rows = dy.reshape(-1, outputs)
        tape.accumulate(weight, lambda out: device.matmul(dy_rows.T, x_rows, out))
        if bias is not None:
            tape.accumulate(bias, lambda out: sum_rows(device, dy_rows, out))
        tape.accumulate(
            x, lambda out: device.matmul(dy_rows, weight.value, out.reshape(-1, features))
        )

    inputs = (x, weight) if bias is None else (x, weight, bias)
    return tape.record(y.reshape(*x.shape[:-1], outputs), inputs, backward)


def relu(tape: Tape, x: Variable) -> Variable:
    """y = max(x, 0), elementwise."""
    device, n = tape.device, x.value.size
    y = device.empty(x.shape, x.value.dtype)
    device.launch("relu_forward", x.value, y, n, work=n)

    def backward(dy: Array) -> None:
        tape.accumulate(x, lambda out: device.launch("relu_backward", y, dy, out, n, work=n))

    return tape.record(y, (x,), backward)


def gelu(tape: Tape, x: Variable) -> Variable:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), elementwise.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", arXiv 1606.08415.
    """
    device, n = tape.device, x.value.size
    y = device.empty(x.shape, x.value.dtype)
    device.launch("gelu_forward", x.value, y, n, work=n)

    def backward(dy: Array) -> None:
        tape.accumulate(x, lambda out: device.launch("gelu_backward", x.value, dy, out, n, work=n))

    return tape.record(y, (x,), backward)


def add(tape: Tape, x: Variable, y: Variable) -> Variable:
    """z = x + y, of one shape."""
    if x.shape != y.shape:
        raise UsageError(
            f"add: the shapes differ, {x.shape} and {y.shape}; reshape one of them first"
        )
    device, n = tape.device, x.value.size
    z = device.empty(x.shape, x.value.dtype)
    device.launch("add", x.value, y.value, z, n, work=n)

    def backward(dz: Array) -> None:
        tape.pass_on(x, dz)
        tape.pass_on(y, dz)

    return tape.record(z, (x, y), backward)


def reshape(tape: Tape, x: Variable, shape: tuple[int, ...]) -> Variable:
    """The same elements in another shape; shares the memory of x."""
    if math.prod(shape) != x.value.size:
        raise UsageError(f"reshape: {x.shape} does not hold the elements of {shape}")

    def backward(dy: Array) -> None:
        tape.pass_on(x, dy.reshape(x.shape))

    return tape.record(x.value.reshape(shape), (x,), backward)


def layer_norm(
    tape: Tape, x: Variable, gamma: Variable, beta: Variable, epsilon: float = 1e-5
) -> Variable:
    """y = gamma (x - mean) / sqrt(variance + epsilon) + beta over the last dim of x.

    Source: Ba, Kiros and Hinton, "Layer normalization", arXiv 1607.06450.
    """
    device, dtype = tape.device, x.value.dtype
    cols = x.shape[-1]
    rows = x.value.size // cols
    y = device.empty(x.shape, dtype)
    wide = wide_dtype(dtype)
    mean, rstd = device.empty(rows, wide), device.empty(rows, wide)
    device.launch(
        "layer_norm_forward", x.value, gamma.value, beta.value, y, mean, rstd, rows, cols, epsilon,
        work=rows,
    )  # fmt: skip

    def backward(dy: Array) -> None:
        parts = max(-(-rows // ROWS_PER_PART), 1)
        dgamma, dbeta = device.zeros((parts, cols), wide), device.zeros((parts, cols), wide)
        tiles = -(-cols // 32)
        device.launch(
            "layer_norm_parameter_partials", x.value, mean, rstd, dy, dgamma, dbeta, rows, cols,
            ROWS_PER_PART, work=parts * tiles if rows else 0,
        )  # fmt: skip
        tape.accumulate(gamma, lambda out: sum_rows(device, dgamma, out))
        tape.accumulate(beta, lambda out: sum_rows(device, dbeta, out))
        tape.accumulate(
            x,
            lambda out: device.launch(
                "layer_norm_backward", x.value, gamma.value, mean, rstd, dy, out, rows, cols,
                work=rows,
            ),
        )  # fmt: skip

    return tape.record(y, (x, gamma, beta), backward)
