"""Pooling: the maximum or the average of every window of an image.

Images are (N, H, W, C); a window's pixels outside the image do not count, in the average neither.

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

from typing import Any

from hpctrain.autograd import Tape, Variable
from hpctrain.errors import UsageError
from hpctrain.nn.convolution import output_size, pair

__all__ = ["average_pool", "max_pool"]

Array = Any
Size = int | tuple[int, int]


def max_pool(
    tape: Tape, x: Variable, kernel: Size, stride: Size | None = None, padding: Size = 0
) -> Variable:
    """y[n, oh, ow, c] = the largest x[n, h, w, c] of the window; its gradient goes to that pixel.

    Args:
        x: (N, H, W, C).
        kernel: pixels of a window, one number or (vertical, horizontal), as the others.
        stride: between windows; default: kernel.
        padding: pixels around the image, fewer than the kernel's.

    Returns:
        (N, OH, OW, C), OH = (H + 2 padding - kernel) // stride + 1.
    """
    device = tape.device
    shape, numbers = _windows("max_pool", x, kernel, stride, padding)
    y = device.empty(shape, x.value.dtype)
    argmax = device.empty(shape, "int32")
    y_lines, x_lines, tiles = _lines(x.shape, shape)
    device.launch("max_pool_forward", x.value, y, argmax, y_lines, *numbers, work=y_lines * tiles)

    def gradient(dy: Array, out: Array) -> None:
        device.launch("max_pool_backward", dy, argmax, out, x_lines, *numbers, work=x_lines * tiles)

    return tape.record(y, (x,), lambda dy: tape.accumulate(x, lambda out: gradient(dy, out)))


def average_pool(
    tape: Tape, x: Variable, kernel: Size, stride: Size | None = None, padding: Size = 0
) -> Variable:
    """y[n, oh, ow, c] = the mean of x[n, h, w, c] over the window's pixels inside the image.

    Arguments and shapes as for `max_pool`; a kernel of the image's size averages all of it.
    """
    device = tape.device
    shape, numbers = _windows("average_pool", x, kernel, stride, padding)
    y = device.empty(shape, x.value.dtype)
    y_lines, x_lines, tiles = _lines(x.shape, shape)
    device.launch("average_pool_forward", x.value, y, y_lines, *numbers, work=y_lines * tiles)

    def gradient(dy: Array, out: Array) -> None:
        device.launch("average_pool_backward", dy, out, x_lines, *numbers, work=x_lines * tiles)

    return tape.record(y, (x,), lambda dy: tape.accumulate(x, lambda out: gradient(dy, out)))


def _windows(
    name: str, x: Variable, kernel: Size, stride: Size | None, padding: Size
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The output's shape, and the numbers that the kernels take last."""
    if len(x.shape) != 4:
        raise UsageError(f"{name}: x {x.shape} must be (images, height, width, channels)")
    images, *size, channels = x.shape
    kernels, pads = pair(kernel), pair(padding)
    strides = pair(kernel if stride is None else stride)
    out = []
    for extent, k, s, p in zip(size, kernels, strides, pads, strict=True):
        if p >= k:
            raise UsageError(
                f"{name}: padding {p} must be less than the kernel {k}, or a window holds no pixel"
            )
        out.append(output_size(extent, k, s, p, name))
    return (images, *out, channels), (*size, channels, *out, *kernels, *strides, *pads)


def _lines(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, int, int]:
    """Lines of pixels of y and of x, and tiles of channels."""
    return y[0] * y[1], x[0] * x[1], -(-x[3] // 32)
