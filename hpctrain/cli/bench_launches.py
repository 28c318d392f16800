"""One launch of every kernel at a size of real networks, for `hpctrain bench kernels`.

`LAUNCHES` has an entry per kernel (bench_images has those on images): a function from a `Maker` of
arrays to a `Launch`. Which arrays are read and which are written follows from the kernel's
signature; a launch adds what that does not tell: arrays that are read *and* written, and traffic
that is not whole arrays.

Layer: cli. Given a device and a dtype; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.device.cpu import CpuDevice
from hpctrain.device.signatures import kernel_named

__all__ = ["LAUNCHES", "Launch", "Maker"]

Array = NDArray[Any]
N = 4 << 20  # elements of a flat array: 16 MiB of float32
ROWS, COLS = 4096, 768  # of a layer's activations
CLASSES = (1024, 8192)  # rows and classes of a loss
IMAGES = (64, 28, 28, 32)  # a batch of images, NHWC
WORDS, VOCABULARY, DIM = 16384, 32768, 256
PEERS = 4


@dataclass
class Launch:
    """Arguments as `Device.launch` takes them; a list stands for a table of peers' arrays.

    `updated`: array parameters that are read besides being written. `part`: bytes of an array that
    is not used whole, by parameter. `flops`: arithmetic, where it may be the limit.
    """

    size: str
    args: list[Any]
    work: int
    updated: tuple[str, ...] = ()
    part: dict[str, int] | None = None
    flops: int = 0

    def bytes(self, kernel: str) -> int:
        """Bytes that have to be read or written, each array once."""
        total = 0
        for parameter, value in zip(kernel_named(kernel).parameters, self.args, strict=True):
            if not parameter.pointers or value is None:
                continue
            arrays = value if isinstance(value, list) else [value]
            size = sum(array.nbytes for array in arrays)
            if self.part and parameter.name in self.part:
                size = self.part[parameter.name]
            total += size * (2 if parameter.name in self.updated else 1)
        return total


class Maker:
    """Makes arrays on a device: random numbers around 0, or counts."""

    def __init__(self, device: CpuDevice, dtype: str) -> None:
        self.device, self.dtype = device, np.dtype(dtype)
        self._random = np.random.default_rng(1).standard_normal(65521).astype(dtype)
        self._calls = 0

    def real(self, *shape: int) -> Array:
        """Numbers of the normal distribution, repeated after 65521 of them; others every time."""
        self._calls += 1
        return self._on_device(np.resize(np.roll(self._random, 7919 * self._calls), shape))

    def square(self, *shape: int) -> Array:
        """The squares of such numbers."""
        return self._on_device(np.resize(self._random**2, shape))

    def whole(self, high: int, n: int) -> Array:
        """int64 numbers in [0, high)."""
        return self._on_device(np.random.default_rng(2).integers(0, high, n))

    def empty(self, *shape: int, dtype: Any = None) -> Array:
        """An array to be written."""
        return self.device.zeros(shape, dtype or self.dtype)

    def _on_device(self, array: Array) -> Array:
        return self.device.from_host(array)


def _flat(*args: Any, updated: tuple[str, ...] = (), flops: int = 0) -> Launch:
    """A launch over the N elements of flat arrays."""
    return Launch("4 Mi", [*args, N], N, updated, flops=flops * N)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _tiles(channels: int) -> int:
    return -(-channels // 32)


def _adamw(m: Maker) -> Launch:
    p, g, mean, square = m.real(N), m.real(N), m.real(N), m.square(N)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1.1, 1.01, 0.5)
    return _flat(p, g, mean, square, *numbers, updated=("p", "m", "v"), flops=15)


def _sgd(m: Maker) -> Launch:
    p, g, v = m.real(N), m.real(N), m.real(N)
    return _flat(p, g, v, 1e-6, 0.9, 0.01, 0.5, 0, updated=("p", "v"), flops=8)


def _bytes(m: Maker) -> Launch:
    x = m.device.from_host(m.whole(256, N).astype(np.uint8))
    return _flat(x, m.empty(N), 1 / 255, -0.5)


def _rows(*args: Any, shape: tuple[int, int] = (ROWS, COLS), **more: Any) -> Launch:
    """A launch over the rows of a matrix."""
    return Launch(_text(shape), [*args], shape[0], **more)


def _layer_norm_forward(m: Maker) -> Launch:
    x, gamma, beta, y = m.real(ROWS, COLS), m.real(COLS), m.real(COLS), m.empty(ROWS, COLS)
    return _rows(x, gamma, beta, y, m.empty(ROWS), m.empty(ROWS), ROWS, COLS, 1e-5)


def _layer_norm_backward(m: Maker) -> Launch:
    x, gamma, mean, rstd = m.real(ROWS, COLS), m.real(COLS), m.real(ROWS), m.real(ROWS)
    return _rows(x, gamma, mean, rstd, m.real(ROWS, COLS), m.empty(ROWS, COLS), ROWS, COLS)


def _parts(*args: Any, height: int = 256) -> Launch:
    """A launch over pieces of `height` rows and 32 columns."""
    work = -(-ROWS // height) * _tiles(COLS)
    return Launch(_text((ROWS, COLS)), [*args, ROWS, COLS, height], work)


def _layer_norm_parameters(m: Maker) -> Launch:
    parts = -(-ROWS // 256)
    x, dy, mean, rstd = m.real(ROWS, COLS), m.real(ROWS, COLS), m.real(ROWS), m.real(ROWS)
    return _parts(x, mean, rstd, dy, m.empty(parts, COLS), m.empty(parts, COLS))


def _cross_entropy(m: Maker) -> Launch:
    rows, classes = CLASSES
    logits, labels = m.real(*CLASSES), m.whole(classes, rows)
    outputs = (m.empty(rows), m.empty(*CLASSES), m.empty(rows, dtype=np.uint8))
    return _rows(logits, labels, None, *outputs, rows, classes, -100, shape=CLASSES)


def _squared_error(m: Maker) -> Launch:
    y, target, dy = m.real(ROWS, COLS), m.real(ROWS, COLS), m.empty(ROWS, COLS)
    return _rows(y, target, None, m.empty(ROWS), dy, ROWS, COLS)


def _sum_peers(m: Maker) -> Launch:
    peers = [m.real(N) for _ in range(PEERS)]
    return Launch(f"{PEERS} x 4 Mi", [peers, PEERS, 0, m.empty(N), N], N)


def _embedding_forward(m: Maker) -> Launch:
    table, y = m.real(VOCABULARY, DIM), m.empty(WORDS, DIM)
    args = [table, m.whole(VOCABULARY, WORDS), y, WORDS, DIM]
    return Launch(f"{_text((WORDS, DIM))} of {VOCABULARY}", args, WORDS, part={"table": y.nbytes})


def _embedding_backward(m: Maker) -> Launch:
    ids = m.device.to_host(m.whole(VOCABULARY, WORDS))
    order = np.argsort(ids, kind="stable")
    unique, counts = np.unique(ids, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)])
    lists = [m.device.from_host(array.astype(np.int64)) for array in (order, starts, unique)]
    dy, dtable = m.real(WORDS, DIM), m.empty(VOCABULARY, DIM)
    touched = {"dtable": len(unique) * DIM * dy.itemsize}
    args = [dy, *lists, dtable, len(unique), DIM]
    size = f"{_text((WORDS, DIM))} of {VOCABULARY}"
    return Launch(size, args, len(unique) * _tiles(DIM), ("dtable",), touched)


LAUNCHES: dict[str, Callable[[Maker], Launch]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "fill": lambda m: _flat(m.empty(N), 1.5),
    "scale": lambda m: _flat(m.real(N), 1.0, updated=("y",)),
    "add": lambda m: _flat(m.real(N), m.real(N), m.empty(N)),
    "add_into": lambda m: _flat(m.empty(N), m.empty(N), updated=("y",)),
    "relu_forward": lambda m: _flat(m.real(N), m.empty(N)),
    "relu_backward": lambda m: _flat(m.real(N), m.real(N), m.empty(N)),
    "from_bytes": _bytes,
    "gelu_forward": lambda m: _flat(m.real(N), m.empty(N), flops=25),
    "gelu_backward": lambda m: _flat(m.real(N), m.real(N), m.empty(N), flops=35),
    "average_update": lambda m: _flat(m.real(N), m.real(N), 2.0, 0.1, updated=("y",)),
    "sum_peers": _sum_peers,
    "total_sum": lambda m: Launch("4 Mi", [m.real(N), m.empty(1), N], 1),
    "square_sum_partials": lambda m: Launch("4 Mi", [m.real(N), m.empty(N // 4096), N], N // 4096),
    "add_bias": lambda m: _rows(m.empty(ROWS, COLS), m.empty(COLS), ROWS, COLS, updated=("y",)),
    "column_sum": lambda m: Launch(
        _text((ROWS, COLS)), [m.real(ROWS, COLS), m.empty(COLS), ROWS, COLS], _tiles(COLS)
    ),
    "column_partials": lambda m: _parts(m.real(ROWS, COLS), m.empty(-(-ROWS // 256), COLS)),
    "layer_norm_forward": _layer_norm_forward,
    "layer_norm_backward": _layer_norm_backward,
    "layer_norm_parameter_partials": _layer_norm_parameters,
    "softmax_cross_entropy": _cross_entropy,
    "mean_squared_error": _squared_error,
    "embedding_forward": _embedding_forward,
    "embedding_backward": _embedding_backward,
}
