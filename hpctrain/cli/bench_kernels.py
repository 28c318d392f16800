"""`hpctrain bench kernels`: every kernel on the CPU, beside a memory copy of as many bytes.

A kernel that moves b bytes is compared with a copy of b / 2 bytes, which reads b / 2 and writes as
many: 1.00 means as quick as memory allows (above it, where writes are few). Where PyTorch is
installed in the Python that runs this, operations follow beside PyTorch's with one thread. All of
it is one thread's work, so what counts is CPU time: on an idle machine that is the time on the
clock, and on a busy one it leaves out what other programs took.

Layer: cli. What is launched is in bench_launches, what is compared in bench_torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from hpctrain.cli.bench import cpu_name, report, table
from hpctrain.cli.bench_compress import compress_launches
from hpctrain.cli.bench_images import image_launches
from hpctrain.cli.bench_launches import LAUNCHES, Launch, Maker
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.signatures import kernel_table

__all__ = ["all_launches", "run", "timed"]

SHORTEST = 1e-3  # seconds: what takes less is repeated within a round


def run(args: argparse.Namespace) -> int:
    """Measure in this process and print."""
    launches = all_launches()
    device = CpuDevice()
    device.prepare([args.dtype])
    make = Maker(device, args.dtype)
    with threadpoolctl.threadpool_limits(1, "blas"):
        kernels = [
            measure(device, name, launches[name](make), args.repeat)
            for name in args.only or launches
        ]
        operations = _operations(device, args)
    header = {"cpu": cpu_name(), "level": device.level, "dtype": args.dtype, "threads": 1}
    figures = header | {"kernels": kernels, "operations": operations}
    text = [f"# {header['cpu']}, {device.level}, {args.dtype}, one thread, CPU time"]
    report(args.json, figures, [*text, *_kernel_lines(kernels), *_operation_lines(operations)])
    return 0


def all_launches() -> dict[str, Callable[[Maker], Launch]]:
    """For every kernel a function that makes its launch, in the order of the kernel files.

    All kernels are there, which a test holds; one that is being written may be missing.
    """
    known = LAUNCHES | image_launches() | compress_launches()
    return {name: known[name] for name in kernel_table() if name in known}


def measure(device: CpuDevice, name: str, launch: Launch, rounds: int) -> dict[str, Any]:
    """Figures of one kernel: a row of the table."""
    nbytes = launch.bytes(name)
    half = max(nbytes // 2, 1)
    source, target = np.ones(half, np.uint8), np.ones(half, np.uint8)
    seconds = timed([_launcher(device, name, launch), lambda: np.copyto(target, source)], rounds)
    median, copy = np.median(seconds, axis=0)
    return {
        "kernel": name,
        "size": launch.size,
        "seconds": float(median),
        "bytes": nbytes,
        "bytes_per_second": float(nbytes / median),
        "copy_bytes_per_second": float(nbytes / copy),
        "of_copy": float(np.median(seconds[:, 1] / seconds[:, 0])),
        "flops_per_second": float(launch.flops / median),
    }


def _launcher(device: CpuDevice, name: str, launch: Launch) -> Callable[[], None]:
    """A function that launches the kernel; tables of peers are made once."""
    args = [device.peers(value) if isinstance(value, list) else value for value in launch.args]

    def launcher() -> None:
        device.launch(name, *args, work=launch.work)

    return launcher


def timed(contenders: Sequence[Callable[[], object]], rounds: int) -> NDArray[np.float64]:
    """Seconds of one call, (rounds, contenders): in every round each contender in turn."""
    loops = []
    for contender in contenders:
        contender()  # compiles, loads, touches memory
        begun = time.process_time()
        contender()
        once = max(time.process_time() - begun, 1e-7)
        loops.append(max(round(SHORTEST / once), 1))
    seconds = np.empty((rounds, len(contenders)))
    for row in seconds:
        for index, (contender, count) in enumerate(zip(contenders, loops, strict=True)):
            begun = time.process_time()
            for _ in range(count):
                contender()
            row[index] = (time.process_time() - begun) / count
    return seconds


def _operations(device: CpuDevice, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures beside PyTorch; none where it is not installed or single kernels were asked for."""
    if args.only or importlib.util.find_spec("torch") is None:
        return []
    from hpctrain.cli import bench_torch

    rows = []
    for operation in bench_torch.operations(device, args.dtype):
        seconds = timed([operation.ours, operation.theirs], args.repeat)
        ours, theirs = np.median(seconds, axis=0)
        rows.append(
            {
                "operation": operation.name,
                "size": operation.size,
                "seconds": float(ours),
                "torch_seconds": float(theirs),
                "of_torch": float(np.median(seconds[:, 1] / seconds[:, 0])),
                "difference": operation.difference(),
            }
        )
    return rows


def _kernel_lines(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            row["kernel"],
            row["size"],
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['bytes_per_second'] / 1e9:.2f}",
            f"{row['copy_bytes_per_second'] / 1e9:.2f}",
            f"{row['of_copy']:.2f}",
            f"{row['flops_per_second'] / 1e9:.1f}" if row["flops_per_second"] else "-",
        ]
        for row in found
    ]
    head = ["kernel", "size", "time ms", "GB/s", "copy GB/s", "x copy", "GFLOP/s"]
    return table(head, rows, left=2)


def _operation_lines(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = [
        [
            row["operation"],
            row["size"],
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['torch_seconds'] * 1e3:.3f}",
            f"{row['of_torch']:.2f}",
            f"{row['difference']:.1e}",
        ]
        for row in found
    ]
    head = ["operation", "size", "time ms", "PyTorch ms", "x PyTorch", "difference"]
    note = "# x PyTorch: times as fast; difference: of the results, relative to the largest"
    return ["", note, *table(head, rows, left=2)]
