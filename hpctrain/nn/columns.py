"""Convolution as a product with columns of images, in tiles that stay in the cache.

A tile is a run of output lines (rows of pixels) of the batch. Its columns fit a core's L2 cache, so
the product reads them from there and no column matrix of an image or a batch is ever in memory.
With stride 1 the columns of dy serve both gradients: the input's is a convolution of dy with the
flipped filters, and the filters' is the product of the same columns with x.

Legend: N images of (H, W) pixels with C channels, K filters of (I, J) taps, output pixels (OH, OW).

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpctrain.autograd import Tape, Variable
from hpctrain.device import Device
from hpctrain.device.dtypes import is_short, wide_dtype
from hpctrain.nn.tiles import Buffer, Sum, runs, zero

__all__ = ["Columns"]

Array = Any


@dataclass(frozen=True, slots=True)
class Columns:
    """A convolution as a product with the column matrix of images, (N OH OW, I J C), in tiles."""

    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def window(self) -> int:
        """Elements of a row of the column matrix."""
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def copies_nothing(self) -> bool:
        """Whether the column matrix is the images as they are."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the column kernels take last."""
        return (
            self.height, self.width, self.channels, self.out_height, self.out_width,
            *self.kernel, *self.stride, *self.padding,
        )  # fmt: skip

    def runs(self, device: Device, images: int, beside: int, itemsize: int) -> Iterator[slice]:
        """Output lines of the whole batch, in tiles.

        `beside`: elements per output pixel besides the columns that should stay in the cache.
        """
        line_bytes = self.out_width * (self.window + beside) * itemsize
        return runs(device, images * self.out_height, line_bytes)

    def tiles(
        self, device: Device, x: Array, images: int, beside: int
    ) -> Iterator[tuple[slice, Array]]:
        """(rows of the column matrix, their columns); the columns are valid until the next ones."""
        if self.copies_nothing:
            if images:
                yield slice(0, x.size // self.channels), x.reshape(-1, self.channels)
            return
        buffer = Buffer(device, x.dtype)
        for lines in self.runs(device, images, beside, x.dtype.itemsize):
            rows = slice(lines.start * self.out_width, lines.stop * self.out_width)
            cols = buffer.array(rows.stop - rows.start, self.window)
            self.columns(device, x, lines, cols)
            yield rows, cols

    def columns(self, device: Device, x: Array, lines: slice, cols: Array) -> None:
        """Write the columns of some output lines of x into `cols`."""
        count = lines.stop - lines.start
        device.launch(
            "columns", x, cols, lines.start, count, *self.numbers, work=count * self.kernel[0]
        )

    def touched(self, lines: slice) -> slice:
        """Lines of the image that output lines gather from; of several images, all lines."""
        image, last = lines.start // self.out_height, (lines.stop - 1) // self.out_height
        if image != last:
            return slice(image * self.height, (last + 1) * self.height)
        first = (lines.start - image * self.out_height) * self.stride[0] - self.padding[0]
        end = (lines.stop - 1 - image * self.out_height) * self.stride[0] - self.padding[0]
        end += self.kernel[0]
        begin = image * self.height
        return slice(begin + max(first, 0), begin + min(end, self.height))

    def forward(
        self, device: Device, x: Array, weight: Array, bias: Array | None, y: Array
    ) -> None:
        """y = x * weight + bias; y (N, OH, OW, K)."""
        filters = weight.shape[0]
        taps = device.empty((self.window, filters), y.dtype)
        device.launch("weight_columns", weight, taps, filters, self.window, work=self.window)
        y_rows = y.reshape(-1, filters)
        for rows, cols in self.tiles(device, x, y.shape[0], filters):
            device.matmul(cols, taps, y_rows[rows])
            if bias is not None:
                count = rows.stop - rows.start
                device.launch("add_bias", y_rows[rows], bias, count, filters, work=count)

    def backward(self, tape: Tape, x: Variable, weight: Variable, dy: Array) -> None:
        """Contribute to the gradients of x and weight."""
        if x.needs_grad and self.stride == (1, 1):
            self._both_gradients(tape, x, weight, dy)
            return
        device = tape.device
        tape.accumulate(weight, lambda out: self._weight_gradient(device, x.value, dy, out))
        tape.accumulate(x, lambda out: self._input_gradient(device, weight.value, dy, out))

    def _both_gradients(self, tape: Tape, x: Variable, weight: Variable, dy: Array) -> None:
        """Stride 1: dx[tile] = columns(dy) flipped w, flipped dw = sum columns(dy)^T x[tile]."""
        device, dtype = tape.device, dy.dtype
        filters, (height, width) = weight.shape[0], self.kernel
        back = Columns(
            self.out_height, self.out_width, filters, self.height, self.width, self.kernel,
            (1, 1), (height - 1 - self.padding[0], width - 1 - self.padding[1]),
        )  # fmt: skip
        flipped = device.empty((back.window, self.channels), dtype)
        numbers = (filters, height * width, self.channels)
        work = filters * height * width
        device.launch("weight_flip", weight.value, flipped, *numbers, work=work)
        dweight = Sum(device, device.empty(flipped.shape, dtype))
        x_rows = x.value.reshape(-1, self.channels)

        def compute(out: Array) -> None:
            out_rows = out.reshape(-1, self.channels)
            for rows, cols in back.tiles(device, dy, x.shape[0], 2 * self.channels):
                device.matmul(cols, flipped, out_rows[rows])
                if weight.needs_grad:
                    dweight.add(cols.T, x_rows[rows])

        def turn(out: Array) -> None:
            device.launch("weight_flip_back", dweight.finish(), out, *numbers, work=work)

        tape.accumulate(x, compute)
        tape.accumulate(weight, turn)

    def _weight_gradient(self, device: Device, x: Array, dy: Array, out: Array) -> None:
        """dw = sum over tiles of dy[tile]^T columns(x)."""
        filters = dy.shape[3]
        dy_rows = dy.reshape(-1, filters)
        total = Sum(device, out.reshape(filters, self.window))
        for rows, cols in self.tiles(device, x, x.shape[0], filters):
            total.add(dy_rows[rows].T, cols)
        total.finish()

    def _input_gradient(self, device: Device, weight: Array, dy: Array, out: Array) -> None:
        """Any stride: every pixel of x sums what dy[tile] w has for it, tile by tile."""
        filters = dy.shape[3]
        dy_rows, taps = dy.reshape(-1, filters), weight.reshape(filters, self.window)
        buffer = Buffer(device, dy.dtype)
        total = device.empty(out.shape, wide_dtype(dy.dtype)) if is_short(dy.dtype) else out
        zero(device, total)
        for lines in self.runs(device, dy.shape[0], filters, dy.dtype.itemsize):
            rows = slice(lines.start * self.out_width, lines.stop * self.out_width)
            count = rows.stop - rows.start
            cols = buffer.array(count, self.window)
            device.matmul(dy_rows[rows], taps, cols)
            touched = self.touched(lines)
            pixels = (touched.stop - touched.start) * self.width
            device.launch(
                "columns_backward", cols, total, rows.start, count, touched.start * self.width,
                pixels, *self.numbers, work=pixels,
            )  # fmt: skip
        if total is not out:
            device.launch("narrow", total, out, out.size, work=out.size)
