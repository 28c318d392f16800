"""`hpctrain bench kernels --static`: what each kernel takes on a GPU, without a GPU.

NVRTC compiles every kernel for the GPUs asked for, with the options of a run, and its assembler
tells registers, spills and shared memory; occupancy follows from them and the launch's block.

Layer: cli. How kernels are compiled is in device/nvrtc.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import sched_getaffinity

from hpctrain.cli.bench import report, table
from hpctrain.device.launch import BLOCK
from hpctrain.device.nvrtc import ARCHITECTURES, Resources, compile_kernels
from hpctrain.device.occupancy import occupancy
from hpctrain.device.signatures import kernel_table
from hpctrain.errors import UsageError, nearest

__all__ = ["ENOUGH", "LESS", "Static", "measure", "run"]

ENOUGH = 0.5  # of a multiprocessor's threads: hides the latency of memory
# By kernel: less, for the GPUs and types named. The compiler keeps the 16 elements of a patch and
# their addresses in registers; each thread has 16 loads in flight, which makes up for the threads.
LESS: dict[str, tuple[float, str]] = {
    "winograd_input": (0.375, "float64: a patch of 16 and its addresses"),
    "winograd_weights": (0.375, "sm_70, not in float32: 9 taps and 16 addresses"),
    "winograd_weights_flipped": (0.25, "sm_70: 9 taps and 16 addresses"),
    "orthonormalize": (0.375, "a launch of few threads: a warp for each matrix"),
    "batch_averages": (0.375, "sm_70, float64: a launch of few threads"),
    "softmax_cross_entropy": (0.375, "sm_70, float64: the polynomials of exp and log"),
}


@dataclass(frozen=True)
class Static:
    """One kernel for one real type and one GPU."""

    architecture: str
    dtype: str
    resources: Resources
    occupancy: float


def measure(architectures: Iterable[str], dtypes: Iterable[str]) -> list[Static]:
    """Compile all kernels, as many files at once as there are cores; in the order of the files.

    Raises `KernelError` where NVRTC is missing, or a kernel does not compile without warnings.
    """
    files = sorted({kernel.file for kernel in kernel_table().values()})
    dtypes = list(dtypes)
    wanted = [(a, d, file) for a in architectures for d in dtypes for file in files]
    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
        made = list(pool.map(lambda one: compile_kernels((one[2], one[1]), one[0]), wanted))
    order = list(kernel_table())
    return [
        Static(architecture, dtype, kernel, occupancy(architecture, kernel, BLOCK))
        for (architecture, dtype, _), kernels in zip(wanted, made, strict=True)
        for kernel in sorted(kernels.values(), key=lambda kernel: order.index(kernel.kernel))
    ]


def run(args: argparse.Namespace) -> int:
    """Compile in this process and print."""
    for name in args.arch:
        if name not in ARCHITECTURES:
            hint = nearest(name, ARCHITECTURES)
            raise UsageError(f"--arch: kernels are compiled for no GPU {name!r}{hint}")
    rows = measure(args.arch, [args.dtype])
    rows = [row for row in rows if not args.only or row.resources.kernel in args.only]
    figures = {"block": BLOCK, "kernels": [_figures(row) for row in rows]}
    text = [f"# {args.dtype}, blocks of {BLOCK} threads", *table(*cells(rows), left=2)]
    report(args.json, figures, text)
    return 0


def _figures(row: Static) -> dict[str, object]:
    return {
        "architecture": row.architecture,
        "dtype": row.dtype,
        **asdict(row.resources),
        "occupancy": row.occupancy,
    }


def cells(rows: Sequence[Static]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table."""
    head = ["kernel", "GPU", "registers", "spills", "shared", "occupancy"]
    return head, [
        [
            row.resources.kernel,
            row.architecture,
            str(row.resources.registers),
            str(row.resources.spills),
            str(row.resources.shared),
            f"{row.occupancy:.0%}",
        ]
        for row in rows
    ]
