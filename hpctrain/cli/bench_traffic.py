"""`hpctrain bench kernels --traffic`: bytes that each kernel moves, beside the fewest possible.

Every kernel runs once on the SIMT simulator, with blocks and threads as on a GPU, at sizes small
enough for it. The fewest bytes are those of its inputs, read once, and its outputs, written once.
Two figures are set against them (device/simt_traffic.py): what crosses memory, which may be a tenth
more, and what is asked of the first cache, which is more where a kernel reads data again or
where lanes read far apart. Each kernel of which one of them is larger has its reason here.

Layer: cli. What is launched is in bench_launches and bench_images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hpctrain.cli.bench import report, table
from hpctrain.cli.bench_kernels import all_launches
from hpctrain.cli.bench_launches import Maker, Sizes
from hpctrain.device import simt
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.launch import launch_shape
from hpctrain.device.memory import ALIGNMENT, aligned_empty
from hpctrain.device.signatures import kernel_named
from hpctrain.device.simt_traffic import traffic

__all__ = ["ALLOWED", "REASONS", "Moved", "measure", "run"]

SMALL = Sizes(
    n=1 << 15, rows=128, cols=768, part=32, classes=(32, 1024), images=(4, 12, 12, 32),
    words=(256, 512, 64),
)  # fmt: skip
ROOM = 8 << 20  # accesses that are recorded at most
ALLOWED = 1.10  # times the fewest bytes

_AGAIN = "reads its rows again, from the cache"
_SKIPPED = "lanes that skip a read: counted as requests of their own"
_TRANSPOSED = "transposes the weights: lanes are a row apart"
_WINDOWS = "windows overlap: the same pixels again, from the cache"
_FEW = "few bytes: whole sectors, and again from the cache"
_SHARED = "a value that the lanes share is a request for each use"
# By kernel: the most that it may move and ask for, as multiples of the fewest bytes, and why.
REASONS: dict[str, tuple[float, float, str]] = {
    "batch_moments": (1.1, 2.1, "mean first, then squares: " + _AGAIN),
    "batch_averages": (1.1, 1.3, _SHARED),
    "batch_backward": (1.1, 1.5, "x is used twice: " + _AGAIN),
    "columns": (1.1, 1.8, _WINDOWS),
    "columns_backward": (1.1, 1.5, "adds in place, window by window, in the cache"),
    "weight_columns": (1.1, 4.6, _TRANSPOSED),
    "dropout": (1.1, 1.8, _SKIPPED),
    "add_bias": (1.1, 1.6, "the bias again for each row, from the cache"),
    "embedding_backward": (1.1, 1.4, _SHARED),
    "layer_norm_forward": (1.1, 3.1, "sum, then squares, then result: " + _AGAIN),
    "layer_norm_backward": (1.1, 2.5, "sums, then result: " + _AGAIN),
    "layer_norm_parameter_partials": (1.1, 1.4, _SHARED),
    "mean_squared_error": (1.1, 1.8, "loss, then gradient: " + _AGAIN),
    "max_pool_backward": (1.1, 2.2, _SKIPPED),
    "average_pool_backward": (1.1, 1.8, _WINDOWS),
    "select_histogram": (1.1, 4.5, "counts runs of equal digits, by atomics in the cache"),
    "select_digit": (1.1, 4.6, "one lane looks at all bins, then all lanes clear them"),
    "select_loosen": (2.1, 3.1, _FEW),
    "select_pack": (1.2, 3.1, "looks at each element's key, then takes it, from the cache"),
    "select_scan": (1.4, 3.8, _FEW),
    "topk_counts": (3.4, 5.8, _FEW),
    "topk_starts": (3.3, 4.9, _FEW),
    "int8_encode": (1.1, 2.0, "largest number, then all: " + _AGAIN),
    "sign_encode": (1.1, 9.0, "lanes read eight numbers each, side by side"),
    "sign_add": (1.1, 1.3, _SHARED),
    "orthonormalize": (1.1, 9.1, "each column along each before it, from the cache"),
    "softmax_cross_entropy": (1.1, 2.7, "maximum, sum, then gradient: " + _AGAIN),
    "winograd_weights": (1.1, 5.6, _TRANSPOSED),
    "winograd_input": (1.1, 1.6, "patches overlap: the same pixels again, from the cache"),
}


@dataclass(frozen=True)
class Moved:
    """Bytes of one launch: the fewest possible, those moved, those asked of the first cache."""

    kernel: str
    size: str
    fewest: int
    moved: int
    requested: int


def measure(dtype: str, names: Iterable[str] = ()) -> list[Moved]:
    """Run kernels on the simulator and count; all of them without `names`."""
    launches = all_launches()
    make = Maker(CpuDevice(), dtype, SMALL)
    rows = []
    for name in names or launches:
        launch = launches[name](make)
        grid, block = launch_shape(kernel_named(name).kind, launch.work, units=1)
        counts = simt.launch(
            name, *map(_aligned, launch.args), work=launch.work, block=block, grid=grid, record=ROOM
        )
        if counts.touches is not None:
            found = traffic(counts.touches, block)
            fewest = launch.bytes(name)
            rows.append(Moved(name, launch.size, fewest, found.moved, found.requested))
    return rows


def _aligned(value: Any) -> Any:
    """A small array as a GPU's memory pool places it; larger ones are aligned already."""
    if not isinstance(value, np.ndarray) or value.ctypes.data % ALIGNMENT == 0:
        return value
    copy = aligned_empty(value.nbytes).view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


def run(args: argparse.Namespace) -> int:
    """Count in this process and print."""
    simt.prepare([args.dtype])
    rows = measure(args.dtype, args.only)
    figures = {"dtype": args.dtype, "kernels": [asdict(row) for row in rows]}
    text = [
        f"# {args.dtype}, on the SIMT simulator, one multiprocessor",
        *table(*cells(rows), left=2),
    ]
    report(args.json, figures, text)
    return 0


def cells(rows: Iterable[Moved]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table."""
    head = ["kernel", "size", "fewest bytes", "moved", "requested", "why more"]
    return head, [
        [
            row.kernel,
            row.size,
            f"{row.fewest:,}",
            f"{row.moved / row.fewest:.2f}",
            f"{row.requested / row.fewest:.2f}",
            REASONS[row.kernel][2] if row.kernel in REASONS else "",
        ]
        for row in rows
    ]
