"""Launches of the kernels on images, taken from the operations that use them.

These kernels have many arguments that follow from sizes, paddings and tiles, and `nn` computes
them. So the operation runs once on a device that keeps its launches, and the one that moves most
bytes is what `hpctrain bench kernels` repeats.

Layer: cli. Given a device and a dtype; knows nothing of time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from hpctrain.autograd import Tape, Variable
from hpctrain.cli.bench_launches import Launch, Maker
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.signatures import kernel_named, kernel_table
from hpctrain.nn.batch_norm import batch_norm
from hpctrain.nn.convolution import conv2d
from hpctrain.nn.dropout import dropout
from hpctrain.nn.module import Statistic
from hpctrain.nn.pooling import average_pool, max_pool

__all__ = ["image_launches"]

Operation = Callable[[Tape, Variable, Maker], Variable]
FILTERS = 64
MICROBATCHES = 4

# Kernels that work on a tile of the images: which array, and how many bytes of it.
TILES: dict[str, tuple[str, Callable[[dict[str, Any]], int]]] = {
    "columns": ("x", lambda given: given["cols"].nbytes // (given["kernel_h"] * given["kernel_w"])),
    "columns_backward": ("dx", lambda given: given["pixels"] * given["dx"].strides[2]),
    "winograd_input": ("x", lambda given: given["v"].nbytes // 4),
    "winograd_output": ("y", lambda given: given["m"].nbytes // 4),
    "winograd_output_backward": ("dy", lambda given: given["dm"].nbytes // 4),
}


class Recorder(CpuDevice):
    """A CPU that keeps the launches of one kernel, with their arrays."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.launches: list[tuple[list[Any], int]] = []

    def launch(self, name: str, *args: Any, work: int) -> None:
        """See `CpuDevice.launch`."""
        if name == self.kernel:
            self.launches.append((list(args), work))
        super().launch(name, *args, work=work)


def image_launches() -> dict[str, Callable[[Maker], Launch]]:
    """A function for every kernel in the files of `OPERATIONS`, by name."""
    return {
        kernel.name: functools.partial(_recorded, kernel.name)
        for kernel in kernel_table().values()
        if kernel.file in OPERATIONS
    }


def _recorded(name: str, make: Maker) -> Launch:
    """The largest launch of a kernel in a forward and backward pass of its operation."""
    device = Recorder(name)
    shape = make.sizes.images
    images = shape[0]
    groups = np.linspace(0, images, MICROBATCHES + 1, dtype=np.int64)
    for operation in OPERATIONS[kernel_named(name).file]:
        tape = Tape(device, samples=np.arange(images), groups=groups)
        output = operation(tape, Variable(make.real(*shape), needs_grad=True), make)
        output.grad = make.real(*output.shape)
        tape.backward()
    found = [_launch(name, shape, args, work) for args, work in device.launches]
    if not found:
        raise LookupError(f"no operation in bench_images launches the kernel {name}: add one")
    return max(found, key=lambda launch: launch.bytes(name))


def _launch(name: str, shape: tuple[int, ...], args: list[Any], work: int) -> Launch:
    parameters = [parameter.name for parameter in kernel_named(name).parameters]
    given = dict(zip(parameters, args, strict=True))
    part = {}
    if name in TILES:
        parameter, size = TILES[name]
        part[parameter] = size(given)
    updated = ("dx",) if name == "columns_backward" else ()
    return Launch(" x ".join(map(str, shape)), args, work, updated, part)


def _parameter(array: Any) -> Variable:
    return Variable(array, needs_grad=True)


def _convolution(kernel: int, stride: int, tape: Tape, x: Variable, make: Maker) -> Variable:
    weight = _parameter(make.real(FILTERS, kernel, kernel, x.shape[-1]))
    return conv2d(tape, x, weight, stride=stride, padding=kernel // 2)


def _batch_norm(tape: Tape, x: Variable, make: Maker) -> Variable:
    channels = x.shape[-1]
    statistics = [Statistic((channels,), constant, momentum=0.1) for constant in (0.0, 1.0)]
    for statistic in statistics:
        statistic.value, statistic.sum = make.empty(channels), make.empty(channels + 1)
    scales = _parameter(make.real(channels)), _parameter(make.real(channels))
    return batch_norm(tape, x, *scales, *statistics)


# Which of its ways a convolution goes depends on the sizes: here are some of each.
CONVOLUTIONS: list[Operation] = [
    functools.partial(_convolution, *sizes) for sizes in ((3, 1), (5, 1), (3, 2))
]
# By kernel file: operations that launch all of its kernels.
OPERATIONS: dict[str, list[Operation]] = {
    "convolution": CONVOLUTIONS,
    "winograd": CONVOLUTIONS,
    "batch_norm": [_batch_norm],
    "pooling": [
        lambda tape, x, make: max_pool(tape, x, 2),
        lambda tape, x, make: average_pool(tape, x, 2),
    ],
    "dropout": [lambda tape, x, make: dropout(tape, x, 0.1)],
}
