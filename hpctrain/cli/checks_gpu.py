"""`hpctrain doctor --probe-gpu-mpi`: may this MPI library be given GPU memory? By trying it.

Every MPI operation that a run does on GPU memory is tried, small and large, in jobs of two ranks of
their own: a library without GPU support crashes or hangs, and takes only its job with it. The exit
code is 0 where --gpu-mpi on is recommended, else 1.

Layer: cli. Starts no MPI in this process; a job's program is probe_rank.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import DeviceError, UsageError
from hpctrain.mpi import probe
from hpctrain.mpi.start import SIZES

__all__ = ["Row", "recommendation", "refuse_ranks", "run", "try_all"]

PROGRAM = (sys.executable, "-m", "hpctrain.cli.probe_rank")
SMALL = 1 << 10  # bytes per rank
LARGE = {"cuda": 64 << 20, "sim": 4 << 20}
LIMIT = 90.0  # seconds for one job


@dataclass(frozen=True)
class Row:
    """What one job showed."""

    operation: str
    nbytes: int
    verdict: probe.Verdict

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        named = {"operation": self.operation, "bytes": self.nbytes, "verdict": self.verdict.word}
        return named | {"detail": self.verdict.detail} | self.verdict.facts


def run(args: argparse.Namespace) -> int:
    """Try everything, print a table and what follows from it; 0 where GPU memory may be given."""
    refuse_ranks(os.environ)
    launch = shlex.split(args.probe_launch) if args.probe_launch else _launch()
    sizes = (SMALL, LARGE[args.device])
    begun = _start([*launch, *PROGRAM], args.device, LIMIT)
    rows = try_all([*launch, *PROGRAM], args.device, sizes, LIMIT)
    on, advice = recommendation(rows, args.device)
    if args.json:
        document = {"device": args.device, "recommended": "on" if on else "off", **begun}
        print(json.dumps(document | {"operations": [row.to_json() for row in rows]}, indent=2))
    else:
        print("\n".join([*_heading(begun, launch, args.device), *_table(rows), "", advice]))
    return 0 if on else 1


def refuse_ranks(environment: Mapping[str, str]) -> None:
    """Raise `UsageError` in a rank of an MPI job: jobs cannot be started from there."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        raise UsageError(
            "--probe-gpu-mpi starts MPI jobs, and MPI runs in this process already; run "
            "`hpctrain doctor --probe-gpu-mpi` in a process of its own"
        )
    for name in SIZES:
        value = environment.get(name, "")
        if value and (value != "1" or name.startswith("OMPI_")):
            raise UsageError(
                f"--probe-gpu-mpi starts MPI jobs itself, and this is a rank of one ({name}="
                f"{value}); start it without mpirun or srun, and say by --probe-launch how ranks "
                "are started"
            )


def _launch() -> list[str]:
    from hpctrain.cli.checks_mpi import find_launcher

    program = find_launcher()
    if program is None:
        raise UsageError(
            "there is no mpirun beside Python or in PATH; say how ranks are started, for example "
            '--probe-launch "srun -n 2"'
        )
    return [program, "-n", "2"]


def _start(command: Sequence[str], device: str, limit: float) -> dict[str, Any]:
    """What a job that does nothing reports. Raises `DeviceError` where even that does not work."""
    verdict = _try(command, "start", 0, device, limit)
    if verdict.word != "right":
        raise DeviceError(
            f"a job that only opens the device {device} and starts MPI ends in a {verdict.word} "
            f"({verdict.detail}); see `hpctrain doctor`, and try: "
            f"{shlex.join([*command, 'start', '0', device])}"
        )
    if verdict.facts["ranks"] < 2:
        raise UsageError(
            f"`{shlex.join(command)}` starts 1 rank; say by --probe-launch how two are started"
        )
    return verdict.facts


def try_all(command: Sequence[str], device: str, sizes: Sequence[int], limit: float) -> list[Row]:
    """A row for every operation and size; an operation that hung is not tried again.

    `command`: what starts a job; operation, bytes and device are appended.
    """
    rows: list[Row] = []
    for name in probe.OPERATIONS:
        for nbytes in sizes:
            verdict = _try(command, name, nbytes, device, limit)
            rows.append(Row(name, nbytes, verdict))
            if verdict.word == "hang":
                break
    return rows


def _try(
    command: Sequence[str], name: str, nbytes: int, device: str, limit: float
) -> probe.Verdict:
    try:
        outcome = probe.run_job([*command, name, str(nbytes), device], limit)
    except OSError as error:
        raise UsageError(f"cannot start {command[0]}: {error.strerror or error}") from None
    return probe.classify(outcome, judge_speed=nbytes > SMALL and device != "sim")


def recommendation(rows: Sequence[Row], device: str) -> tuple[bool, str]:
    """Whether GPU memory may be given to MPI, and the sentence that says so."""
    bad = [row for row in rows if row.verdict.word not in ("right", "slow")]
    slow = [row for row in rows if row.verdict.word == "slow"]
    if bad:
        worst = bad[0]
        return False, (
            f"Recommended: --gpu-mpi off ({worst.operation} of {_size(worst.nbytes)}: "
            f"{worst.verdict.word}, {worst.verdict.detail})"
        )
    if slow:
        return False, (
            "Recommended: --gpu-mpi off (right everywhere, but "
            f"{slow[0].operation} of {_size(slow[0].nbytes)} takes {slow[0].verdict.detail})"
        )
    if device == "sim":
        return True, (
            "Recommended for the simulated device: --gpu-mpi on. Its memory is the host's, so this "
            "says nothing of a GPU."
        )
    return True, "Recommended: --gpu-mpi on, or HPCTRAIN_GPU_MPI=on, for this MPI library here"


def _heading(begun: Mapping[str, Any], launch: Sequence[str], device: str) -> list[str]:
    auto = "on" if begun["auto"] else "off"
    return [
        f"MPI operations on memory of the device {device}, {begun['ranks']} ranks by "
        f"`{shlex.join([Path(launch[0]).name, *launch[1:]])}`, {begun['library']}",
        f"--gpu-mpi auto decides: {auto} ({begun['reason']})",
        "",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    from hpctrain.cli.bench import table

    head = ["operation", "bytes", "verdict", "direct ms", "through host ms"]
    cells = [
        [
            row.operation,
            _size(row.nbytes),
            ": ".join(filter(None, (row.verdict.word, row.verdict.detail))),
            _milliseconds(row.verdict.facts.get("direct")),
            _milliseconds(row.verdict.facts.get("staged")),
        ]
        for row in rows
    ]
    return table(head, cells, left=3)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
