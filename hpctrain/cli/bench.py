"""`hpctrain bench`: how quick this machine is at what training does, each beside a limit.

    bench allreduce    adding up gradients over ranks, beside MPI_Allreduce and a memory copy
    bench kernels      the kernels on the CPU, beside a memory copy, and PyTorch where installed;
                       without running them: --static, what they take on a GPU, and --traffic, the
                       bytes they move
    bench scaling      a run file on several numbers of ranks: throughput, efficiency, phases

Times are medians of rounds in which everything that is compared runs in turn, and ratios are
medians of the rounds' ratios: noise of the machine meets both sides alike.

Layer: cli. What is measured is in bench_allreduce, bench_kernels, bench_static, bench_traffic,
bench_scaling.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpctrain.cli.common import add_gpu_mpi, add_run_file
from hpctrain.errors import UsageError, nearest

__all__ = ["add_parser", "cpu_name", "report", "table"]

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_parser(subparsers: Any) -> None:
    """Register `hpctrain bench` and what it can measure."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure all-reduce (under mpirun), kernels and scaling on this machine",
        description="Measure what training is made of, beside a memory copy of as many bytes.",
    )
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    allreduce = _allreduce_parser(kinds)
    kernels = _kernels_parser(kinds)
    _scaling_parser(kinds)
    for kind, function, repeat in ((allreduce, _allreduce, 15), (kernels, _kernels, 9)):
        kind.add_argument("--dtype", choices=("float32", "float64"), default="float32")
        kind.add_argument(
            "--repeat", type=_count, default=repeat, help="rounds (default: %(default)s)"
        )
        _add_json(kind)
        kind.set_defaults(run=function)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures to FILE as JSON; - for the terminal"
    )


def _kernels_parser(kinds: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        "kernels",
        help="every kernel on the CPU, in one process",
        description=(
            "Time every kernel at a size of real networks, beside a memory copy that moves as many "
            "bytes, and operations beside PyTorch with one thread where it is installed."
        ),
    )
    parser.add_argument(
        "--only", type=_names, default=(), metavar="NAME,...", help="only these kernels"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--static",
        action="store_true",
        help="instead: compile for GPUs; registers, spills, shared memory and occupancy",
    )
    instead.add_argument(
        "--traffic",
        action="store_true",
        help="instead: count the bytes that kernels move, on the SIMT simulator",
    )
    parser.add_argument(
        "--arch",
        type=_names,
        default=("sm_90",),
        metavar="sm_NN,...",
        help="the GPUs of --static (default: sm_90)",
    )
    return parser


def _allreduce_parser(kinds: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        "allreduce",
        help="adding up gradients over all ranks; start it under mpirun or srun",
        description=(
            "Time the sum over ranks: by MPI_Allreduce in place and not in place, and by the "
            "sliced reduction of training (reduce, then gather; the update between the two is not "
            "counted). Every element of every round is compared with the exact sum."
        ),
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default="4K,64K,1M,16M,64M",
        help="bytes per rank, with K, M, G for powers of 1024 (default: %(default)s)",
    )
    parser.add_argument(
        "--algorithm",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="also schedules: ring, direct, rabenseifner, doubling, leader, two-level, torus, "
        "three-level, or all; or auto, what --choices says",
    )
    _add_network(parser)
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "sim"), default="cpu", help="default: %(default)s"
    )
    add_gpu_mpi(parser)
    return parser


def _scaling_parser(kinds: Any) -> None:
    parser: argparse.ArgumentParser = kinds.add_parser(
        "scaling",
        help="a training run on several numbers of ranks; starts mpirun or srun itself",
        description=(
            "Train a few steps of RUN.toml on each number of ranks, with its global batch (strong "
            "scaling) and with that batch times the ranks (weak scaling), and show samples per "
            "second, efficiency against the fewest ranks, and time by phase. Start it without "
            "mpirun; in a batch job, in the job script."
        ),
    )
    add_run_file(parser)
    add = parser.add_argument
    add("--ranks", type=_counts, default="1,2,4", metavar="N,...", help="default: %(default)s")
    add("--kind", choices=("both", "strong", "weak"), default="both", help="default: %(default)s")
    add("--steps", type=_count, default=60, help="of each run (default: %(default)s)")
    add("--repeat", type=_count, default=3, help="runs, of which the median counts (default: 3)")
    add(
        "--launch",
        metavar="COMMAND",
        help='how {n} ranks are started, such as "srun -n {n}" or "mpirun -n {n} --map-by node" '
        "(default: srun in a Slurm job, else the mpirun that doctor shows)",
    )
    add(
        "--folder",
        default="runs/scaling",
        help="where the runs go, on a file system of all nodes (default: %(default)s)",
    )
    add("--plot", metavar="FILE", help="draw throughput over ranks and time by phase, as SVG")
    _add_json(parser)
    parser.set_defaults(run=_scaling)


def _scaling(args: argparse.Namespace) -> int:
    from hpctrain.cli import bench_scaling

    return bench_scaling.run(args)


def _add_network(parser: argparse.ArgumentParser) -> None:
    """What is about a model of the network, and the plot."""
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--fit", metavar="FILE", help="instead: measure this network and save it as TOML"
    )
    instead.add_argument(
        "--predict",
        metavar="FILE",
        help="instead: what the network in FILE predicts for each algorithm, beside measured times",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the bus bandwidth over the size, as SVG"
    )
    parser.add_argument(
        "--choices",
        metavar="FILE",
        help="with --predict: add the algorithm picked for each size to FILE; with --algorithm "
        "auto: take it from there",
    )


def _allreduce(args: argparse.Namespace) -> int:
    from hpctrain.cli import bench_allreduce, bench_fit

    return bench_fit.run(args) if args.fit or args.predict else bench_allreduce.run(args)


def _kernels(args: argparse.Namespace) -> int:
    from hpctrain.cli import bench_kernels, bench_static, bench_traffic
    from hpctrain.device.signatures import kernel_table

    for name in args.only:
        if name not in kernel_table():
            raise UsageError(f"--only: no kernel is called {name!r}{nearest(name, kernel_table())}")
    if args.static:
        return bench_static.run(args)
    if args.traffic:
        return bench_traffic.run(args)
    return bench_kernels.run(args)


def _sizes(text: str) -> list[int]:
    """Bytes of "4K,1M,64M"."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", part.strip(), re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a size: write sizes such as 4K,1M,64M (powers of 1024)"
            )
        sizes.append(int(match[1]) * UNITS[match[2].upper()])
    return sizes


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: 1 or more")
    return int(text)


def cpu_name() -> str:
    """The CPU's model, as /proc/cpuinfo has it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else "unknown CPU"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of aligned columns; the first `left` columns are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return [line(head), *(line(row) for row in rows)]


def report(target: str | None, figures: dict[str, Any], text: Sequence[str]) -> None:
    """Print the tables, write the figures to a file; with "-" print the figures only.

    Raises `UsageError` where the file cannot be written.
    """
    document = json.dumps(figures, indent=2)
    if target == "-":
        sys.stdout.write(document + "\n")
        return
    sys.stdout.write("\n".join(text) + "\n")
    if target is not None:
        try:
            Path(target).write_text(document + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write --json {target}: {error.strerror}") from None
