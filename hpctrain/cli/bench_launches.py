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

__all__ = ["LAUNCHES", "SIZES", "Launch", "Maker", "Sizes"]

Array = NDArray[Any]
PEERS = 4


@dataclass(frozen=True)
class Sizes:
    """What a kernel is launched on; by default the sizes of real networks."""

    n: int = 4 << 20  # elements of a flat array: 16 MiB of float32
    rows: int = 4096  # of a layer's activations
    cols: int = 768
    part: int = 256  # rows of a part of column sums
    classes: tuple[int, int] = (1024, 8192)  # rows and classes of a loss
    images: tuple[int, int, int, int] = (64, 28, 28, 32)  # a batch, NHWC
    words: tuple[int, int, int] = (16384, 32768, 256)  # words, vocabulary, dim


SIZES = Sizes()


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
    """Makes arrays of the given sizes on a device: random numbers around 0, or counts."""

    def __init__(self, device: CpuDevice, dtype: str, sizes: Sizes = SIZES) -> None:
        self.device, self.dtype, self.sizes = device, np.dtype(dtype), sizes
        self.n, self.rows, self.cols, self.part = sizes.n, sizes.rows, sizes.cols, sizes.part
        self.shape, self.classes = (sizes.rows, sizes.cols), sizes.classes
        self.parts = -(-sizes.rows // sizes.part)
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


def _flat(m: Maker, *args: Any, updated: tuple[str, ...] = (), flops: int = 0) -> Launch:
    """A launch over the elements of flat arrays."""
    return Launch(_count(m.n), [*args, m.n], m.n, updated, flops=flops * m.n)


def _count(n: int) -> str:
    return f"{n >> 20} Mi" if n >= 1 << 20 else str(n)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _tiles(channels: int) -> int:
    return -(-channels // 32)


def _adamw(m: Maker) -> Launch:
    p, g, mean, square = m.real(m.n), m.real(m.n), m.real(m.n), m.square(m.n)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1.1, 1.01, 0.5)
    return _flat(m, p, g, mean, square, *numbers, updated=("p", "m", "v"), flops=15)


def _sgd(m: Maker) -> Launch:
    p, g, v = m.real(m.n), m.real(m.n), m.real(m.n)
    return _flat(m, p, g, v, 1e-6, 0.9, 0.01, 0.5, 0, updated=("p", "v"), flops=8)


def _bytes(m: Maker) -> Launch:
    x = m.device.from_host(m.whole(256, m.n).astype(np.uint8))
    return _flat(m, x, m.empty(m.n), 1 / 255, -0.5)


def _rows(m: Maker, *args: Any, shape: tuple[int, int] | None = None, **more: Any) -> Launch:
    """A launch over the rows of a matrix."""
    shape = shape or m.shape
    return Launch(_text(shape), [*args], shape[0], **more)


def _layer_norm_forward(m: Maker) -> Launch:
    x, gamma, beta, y = m.real(*m.shape), m.real(m.cols), m.real(m.cols), m.empty(*m.shape)
    return _rows(m, x, gamma, beta, y, m.empty(m.rows), m.empty(m.rows), *m.shape, 1e-5)


def _layer_norm_backward(m: Maker) -> Launch:
    x, gamma, mean, rstd = m.real(*m.shape), m.real(m.cols), m.real(m.rows), m.real(m.rows)
    return _rows(m, x, gamma, mean, rstd, m.real(*m.shape), m.empty(*m.shape), *m.shape)


def _parts(m: Maker, *args: Any) -> Launch:
    """A launch over parts of the rows of a matrix, 32 columns at a time."""
    return Launch(_text(m.shape), [*args, *m.shape, m.part], m.parts * _tiles(m.cols))


def _layer_norm_parameters(m: Maker) -> Launch:
    x, dy, mean, rstd = m.real(*m.shape), m.real(*m.shape), m.real(m.rows), m.real(m.rows)
    return _parts(m, x, mean, rstd, dy, m.empty(m.parts, m.cols), m.empty(m.parts, m.cols))


def _cross_entropy(m: Maker) -> Launch:
    rows, classes = m.classes
    logits, labels = m.real(*m.classes), m.whole(classes, rows)
    outputs = (m.empty(rows), m.empty(*m.classes), m.empty(rows, dtype=np.uint8))
    return _rows(m, logits, labels, None, *outputs, rows, classes, -100, 1.0, shape=m.classes)


def _squared_error(m: Maker) -> Launch:
    y, target, dy = m.real(*m.shape), m.real(*m.shape), m.empty(*m.shape)
    return _rows(m, y, target, None, m.empty(m.rows), dy, *m.shape, 1.0)


def _sum_peers(m: Maker) -> Launch:
    peers = [m.real(m.n) for _ in range(PEERS)]
    return Launch(f"{PEERS} x {_count(m.n)}", [peers, PEERS, 0, m.empty(m.n), m.n], m.n)


def _sum_widened(m: Maker) -> Launch:
    first, *others = (m.real(m.n) for _ in range(PEERS))
    args = [first, others, len(others), 0, m.empty(m.n), m.n]
    return Launch(f"{PEERS} x {_count(m.n)}", args, m.n)


def _embedding_forward(m: Maker) -> Launch:
    words, vocabulary, dim = m.sizes.words
    table, y = m.real(vocabulary, dim), m.empty(words, dim)
    args = [table, m.whole(vocabulary, words), y, words, dim]
    return Launch(f"{_text((words, dim))} of {vocabulary}", args, words, part={"table": y.nbytes})


def _embedding_backward(m: Maker) -> Launch:
    words, vocabulary, dim = m.sizes.words
    ids = m.device.to_host(m.whole(vocabulary, words))
    order = np.argsort(ids, kind="stable")
    unique, counts = np.unique(ids, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)])
    lists = [m.device.from_host(array.astype(np.int64)) for array in (order, starts, unique)]
    dy, dtable = m.real(words, dim), m.empty(vocabulary, dim)
    touched = {"dtable": len(unique) * dim * dy.itemsize}
    args = [dy, *lists, dtable, len(unique), dim]
    size = f"{_text((words, dim))} of {vocabulary}"
    return Launch(size, args, len(unique) * _tiles(dim), ("dtable",), touched)


LAUNCHES: dict[str, Callable[[Maker], Launch]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "fill": lambda m: _flat(m, m.empty(m.n), 1.5),
    "scale": lambda m: _flat(m, m.real(m.n), 1.0, updated=("y",)),
    "add": lambda m: _flat(m, m.real(m.n), m.real(m.n), m.empty(m.n)),
    "add_into": lambda m: _flat(m, m.empty(m.n), m.empty(m.n), updated=("y",)),
    "relu_forward": lambda m: _flat(m, m.real(m.n), m.empty(m.n)),
    "relu_backward": lambda m: _flat(m, m.real(m.n), m.real(m.n), m.empty(m.n)),
    "from_bytes": _bytes,
    "add_widened": lambda m: _flat(m, m.real(m.n), m.empty(m.n), updated=("y",)),
    "narrow": lambda m: _flat(m, m.real(m.n), m.empty(m.n)),
    "round_mantissa": lambda m: _flat(m, m.real(m.n), m.empty(m.n), 10),
    "gelu_forward": lambda m: _flat(m, m.real(m.n), m.empty(m.n), flops=25),
    "gelu_backward": lambda m: _flat(m, m.real(m.n), m.real(m.n), m.empty(m.n), flops=35),
    "average_update": lambda m: _flat(m, m.real(m.n), m.real(m.n), 2.0, 0.1, updated=("y",)),
    "sum_peers": _sum_peers,
    "sum_widened": _sum_widened,
    "square_sum_partials": lambda m: Launch(
        _count(m.n), [m.real(m.n), m.empty(m.n // 4096), m.n], m.n // 4096
    ),
    "add_bias": lambda m: _rows(m, m.empty(*m.shape), m.empty(m.cols), *m.shape, updated=("y",)),
    "column_sum": lambda m: Launch(
        _text(m.shape), [m.real(*m.shape), m.empty(m.cols), *m.shape], _tiles(m.cols)
    ),
    "column_merge": lambda m: Launch(
        _text((m.parts, m.cols)),
        [m.real(m.parts, m.cols), m.empty(m.cols), m.parts, m.cols],
        _tiles(m.cols),
    ),
    "column_partials": lambda m: _parts(m, m.real(*m.shape), m.empty(m.parts, m.cols)),
    "layer_norm_forward": _layer_norm_forward,
    "layer_norm_backward": _layer_norm_backward,
    "layer_norm_parameter_partials": _layer_norm_parameters,
    "softmax_cross_entropy": _cross_entropy,
    "mean_squared_error": _squared_error,
    "embedding_forward": _embedding_forward,
    "embedding_backward": _embedding_backward,
}
