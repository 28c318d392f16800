"""`hpctrain doctor`: what a run would meet on this machine, before it is met.

Runs alone and under mpirun, where rank 0 prints one report for all ranks and values that differ
between them are listed with their ranks. It never ends in a traceback: a check that fails is a
line of the report. Exit code 1 where a line says [FAIL], else 0.

Layer: cli. The checks are in checks_machine, checks_files and checks_mpi; `--affinity`, `--vet` and
`--probe-gpu-mpi` are in affinity, vet and checks_gpu.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain import __version__
from hpctrain.cli.findings import Answer, Check, Finding, answer_of, lines, merge, worst

if TYPE_CHECKING:
    from hpctrain.cli.checks_mpi import Ranks

__all__ = ["add_parser"]

# The order of the report; the checks run in another one.
SECTIONS = (
    "Python",
    "MPI",
    "C++ compiler",
    "BLAS and threads",
    "GPU",
    "HDF5",
    "Shared memory",
    "Memory and folders",
)


def add_parser(subparsers: Any) -> None:
    """Register `hpctrain doctor`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="check Python, MPI, compiler, BLAS, GPU, HDF5, memory and folders",
        description=(
            "Check what a run needs, and say what to do about what is wrong. Start it as you would "
            "start a run: alone, or under mpirun or srun for one report on all ranks."
        ),
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs"),
        help="where runs are to be written (default: %(default)s)",
    )
    _add_instead(parser)
    parser.set_defaults(run=run)


def _add_instead(parser: argparse.ArgumentParser) -> None:
    """What is done in the place of the report, and its options."""
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--affinity",
        action="store_true",
        help="instead: which cores, NUMA node, GPU and threads each rank has",
    )
    instead.add_argument(
        "--vet",
        action="store_true",
        help="instead: how quick each node is beside the others, in at most 20 s; exit status 4 "
        "where one is an outlier",
    )
    parser.add_argument(
        "--bad-nodes",
        metavar="FILE",
        help="of --vet: add the hosts of outliers to FILE, which jobs/slurm/relaunch.sh reads",
    )
    instead.add_argument(
        "--probe-gpu-mpi",
        action="store_true",
        help="instead: try every MPI operation on GPU memory, each in a job of its own",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "sim"),
        default="cuda",
        help="of --probe-gpu-mpi: whose memory (default: %(default)s)",
    )
    parser.add_argument(
        "--probe-launch",
        metavar="COMMAND",
        help='of --probe-gpu-mpi: how two ranks are started (default: "mpirun -n 2"); across nodes '
        'for example "srun -N 2 -n 2"',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all checks on this rank, merge them on rank 0, print. Collective where MPI comes up."""
    if args.probe_gpu_mpi:
        from hpctrain.cli import checks_gpu

        return checks_gpu.run(args)
    if args.affinity:
        from hpctrain.cli import affinity

        return affinity.run(args)
    if args.vet:
        from hpctrain.cli import vet

        return vet.run(args)
    checks, answers, ranks = _examine(args.folder)
    world = ranks.world
    rows = [answers] if world is None else world.gather(answers, root=0)
    findings = _ordered(merge(checks, rows)) if rows is not None else []
    status = worst(findings)
    if world is not None:
        status = world.bcast(status, root=0)
    if rows is not None and ranks.speaks:
        size = 1 if world is None else world.size
        text = _json(findings, size) if args.json else _text(findings, size)
        print(text, flush=True)
    if ranks.topology is not None:
        ranks.topology.free()
    return 1 if status == "FAIL" else 0


def _examine(folder: Path) -> tuple[list[Check], list[Answer | None], Ranks]:
    """All checks with this rank's answers; those with MPI last, after all that start programs."""
    from hpctrain.cli import checks_files, checks_machine, checks_mpi
    from hpctrain.mpi.start import local_rank_from_environment

    local_rank = local_rank_from_environment() or 0
    checks = [*checks_machine.checks(local_rank), *checks_files.checks(folder)]
    answers = [answer_of(check) for check in checks]
    ranks = checks_mpi.Ranks()
    with_mpi = checks_mpi.checks(ranks)
    return [*checks, *with_mpi], [*answers, *map(answer_of, with_mpi)], ranks


def _ordered(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SECTIONS.index(finding.section))


def _json(findings: list[Finding], size: int) -> str:
    return json.dumps(
        {
            "hpctrain": __version__,
            "host": platform.node(),
            "ranks": size,
            "status": worst(findings),
            "findings": [finding.to_json() for finding in findings],
        },
        indent=2,
    )


def _text(findings: list[Finding], size: int) -> str:
    ranks = "1 rank" if size == 1 else f"{size} ranks, differences between them shown"
    title = f"hpctrain {__version__} doctor on {platform.node()}: {ranks}"
    return "\n".join([title, *lines(findings)])
