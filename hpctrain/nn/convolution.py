"""Convolution of images: checks, and the choice of how to compute it.

Small taps on many channels: `winograd`. Everything else, and 16-bit numbers, whose rounding the
transforms of Winograd's would amplify: `columns`. Both work in tiles that stay in
the cache, with no column matrix of an image or a batch in memory.

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

from typing import Any

from hpctrain.autograd import Tape, Variable
from hpctrain.device.dtypes import is_short
from hpctrain.errors import UsageError
from hpctrain.nn.columns import Columns
from hpctrain.nn.operations import sum_rows
from hpctrain.nn.winograd import Winograd

__all__ = ["conv2d", "output_size", "pair"]

Array = Any


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(value, value) for a number, a pair as it is: (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else value


def output_size(size: int, kernel: int, stride: int, padding: int, name: str) -> int:
    """Output pixels along one dim. Raises `UsageError` where the kernel does not fit."""
    if kernel < 1 or stride < 1 or padding < 0:
        raise UsageError(
            f"{name}: kernel {kernel} and stride {stride} must be at least 1 and padding {padding} "
            "at least 0"
        )
    if size + 2 * padding < kernel:
        raise UsageError(
            f"{name}: a kernel of {kernel} pixels does not fit {size} pixels with padding "
            f"{padding}; use a smaller kernel or more padding"
        )
    return (size + 2 * padding - kernel) // stride + 1


def conv2d(
    tape: Tape,
    x: Variable,
    weight: Variable,
    bias: Variable | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> Variable:
    """Cross-correlation with zero padding, as networks call convolution.

    Args:
        x: (N, H, W, C). N may be 0.
        weight: (K, I, J, C).
        bias: (K,) or None.
        stride, padding: pixels, one number or (vertical, horizontal).

    Returns:
        (N, OH, OW, K), OH = (H + 2 padding - I) // stride + 1.
    """
    method = _method(x, weight, pair(stride), pair(padding))
    device, filters = tape.device, weight.shape[0]
    y = device.empty((x.shape[0], method.out_height, method.out_width, filters), x.value.dtype)
    method.forward(device, x.value, weight.value, None if bias is None else bias.value, y)

    def backward(dy: Array) -> None:
        if bias is not None:
            tape.accumulate(bias, lambda out: sum_rows(device, dy.reshape(-1, filters), out))
        method.backward(tape, x, weight, dy)

    inputs = (x, weight) if bias is None else (x, weight, bias)
    return tape.record(y, inputs, backward)


def _method(
    x: Variable, weight: Variable, stride: tuple[int, int], padding: tuple[int, int]
) -> Columns | Winograd:
    """The quicker of the two ways, with the geometry of these shapes."""
    if len(x.shape) != 4 or len(weight.shape) != 4 or x.shape[3] != weight.shape[3]:
        raise UsageError(
            f"conv2d: x {x.shape} must be (images, height, width, channels) and the weight "
            f"{weight.shape} (filters, kernel height, kernel width, the same channels)"
        )
    _, height, width, channels = x.shape
    filters, kernel = weight.shape[0], (weight.shape[1], weight.shape[2])
    out_height, out_width = (
        output_size(size, k, s, p, "conv2d")
        for size, k, s, p in zip((height, width), kernel, stride, padding, strict=True)
    )
    if kernel == (3, 3) and stride == (1, 1) and not is_short(x.value.dtype):
        winograd = Winograd(height, width, channels, out_height, out_width, filters, padding)
        if winograd.pays:
            return winograd
    return Columns(height, width, channels, out_height, out_width, kernel, stride, padding)
