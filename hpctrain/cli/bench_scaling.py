"""`hpctrain bench scaling`: one training run on several numbers of ranks, as a table and a plot.

Strong scaling keeps the global batch of the run file; weak scaling multiplies it by the ranks.
Every figure is of `hpctrain train` itself, started by the machine's launcher and read back from
metrics.jsonl: there is no second loop that could be quicker than the one users get.

Layer: cli. Starts no MPI in this process. What the figures mean is in bench_scaling_figures.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.errors import HpctrainError, UsageError
from hpctrain.mpi.start import SIZES

if TYPE_CHECKING:
    from hpctrain.cli.bench_scaling_figures import Figures

__all__ = ["Setting", "launch_command", "plan", "run"]

KINDS = ("strong", "weak")
# What takes time beside steps is left out, but for the checkpoint at the end of every run.
PLAIN = (
    'data.test=""',
    "checkpoint.every_epochs=0",
    "checkpoint.every_steps=0",
    "checkpoint.local_every_steps=0",
    'checkpoint.local=""',
    "log.evaluate_every_epochs=0",
    'stop.after=""',
)


@dataclass(frozen=True)
class Setting:
    """One number of ranks with one global batch; it may count for both kinds of scaling."""

    ranks: int
    batch: int
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its runs' folders."""
        return f"ranks{self.ranks}-batch{self.batch}"

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{' and '.join(self.kinds)} scaling on {ranks} (batch {self.batch})"


def run(args: argparse.Namespace) -> int:
    """Run everything in turn, `--repeat` times; 1 where a run failed, else 0."""
    from hpctrain.cli import bench_scaling_figures, bench_scaling_plot
    from hpctrain.cli.bench import cpu_name, report
    from hpctrain.config import resolve

    refuse_ranks()
    config = resolve(args.run_file, args.overrides).config
    launch_command(args.launch, 1)
    settings = plan(args.ranks, config.batch.size, args.kind)
    found: dict[Setting, list[Figures]] = {setting: [] for setting in settings}
    failures: dict[Setting, str] = {}
    for round_number in range(args.repeat):
        for setting in (s for s in settings if s not in failures):
            try:
                found[setting].append(_one(args, setting, round_number))
            except HpctrainError as error:
                failures[setting] = str(error)
            told = failures.get(setting) or f"{found[setting][-1].seconds * 1e3:.2f} ms a step"
            print(f"{setting}: {told}", file=sys.stderr, flush=True)
    good = {setting: found[setting] for setting in settings if setting not in failures}
    rows = bench_scaling_figures.rows_of(good)
    notes = bench_scaling_figures.notes_of(rows, config.batch.microbatch, cpu_name())
    text = bench_scaling_figures.text_of(rows, args.steps, args.repeat, notes)
    figures = {
        "run_file": str(args.run_file),
        "overrides": args.overrides,
        "steps": args.steps,
        "repeat": args.repeat,
        "cpu": cpu_name(),
        "rows": [row.to_json() for row in rows],
        "notes": notes,
        "failures": [{"setting": str(s), "why": why} for s, why in failures.items()],
    }
    failed = [f"FAILED: {setting}: {why}" for setting, why in failures.items()]
    report(args.json, figures, [*text, *failed])
    if args.plot and rows:
        bench_scaling_plot.write_plot(args.plot, rows, Path(args.run_file).stem)
    return 1 if failures else 0


def refuse_ranks() -> None:
    """Raise `UsageError` in a rank of an MPI job: jobs cannot be started from there."""
    named = next((name for name in SIZES if name in os.environ), None)
    if named is None and "SLURM_STEP_ID" in os.environ:  # srun itself, not a batch script
        named = "SLURM_STEP_ID"
    if named is not None:
        raise UsageError(
            f"bench scaling starts MPI jobs itself, and this is a rank of one ({named}="
            f"{os.environ[named]}); start it without mpirun or srun, in the batch script, and say "
            "by --launch how ranks are started"
        )


def plan(ranks: Sequence[int], batch: int, kind: str) -> list[Setting]:
    """What is to be run: `kind` is "strong", "weak" or "both"; what both need is run once."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for name in KINDS:
        if kind in (name, "both"):
            for count in sorted(set(ranks)):
                size = batch if name == "strong" else batch * count
                kinds.setdefault((count, size), []).append(name)
    return [Setting(count, size, tuple(names)) for (count, size), names in kinds.items()]


def launch_command(template: str | None, ranks: int) -> list[str]:
    """What starts `ranks` ranks; the program and its arguments are to follow.

    `template`: a command with {n} for the number; default srun inside a Slurm job, else the mpirun
    of this Python's MPI or of PATH, as `hpctrain doctor` shows it. Raises `UsageError` for none.
    """
    if template is not None:
        if "{n}" not in template:
            raise UsageError(
                f"--launch {template!r} has no {{n}} in the place of the number of ranks; write "
                'it as in --launch "srun -n {n}"'
            )
        return [part.replace("{n}", str(ranks)) for part in shlex.split(template)]
    if "SLURM_JOB_ID" in os.environ and (srun := shutil.which("srun")):
        return [srun, "-n", str(ranks)]
    from hpctrain.cli.checks_mpi import find_launcher

    if (program := find_launcher()) is None:
        raise UsageError(
            "there is no mpirun beside Python or in PATH; say how ranks are started, for example "
            '--launch "srun -n {n}"'
        )
    return [program, "-n", str(ranks)]


def _one(args: argparse.Namespace, setting: Setting, round_number: int) -> Figures:
    """One run, and its figures. Raises `HpctrainError` where it failed, with what it said."""
    from hpctrain.cli.bench_scaling_figures import figures_of
    from hpctrain.train.report import read_run

    folder = Path(args.folder) / f"{setting.name}-{round_number + 1}"
    command = [*launch_command(args.launch, setting.ranks), *_program(args, setting, folder)]
    output = folder.with_suffix(".txt")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(command[0]),
                check=False,
            )
    except OSError as error:
        raise UsageError(
            f"cannot run {command[0]} or write {output}: {error.strerror}; see --launch, --folder"
        ) from None
    if done.returncode:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = next((line for line in said if "error" in line.lower()), said[-1] if said else "")
        raise HpctrainError(
            f"exit status {done.returncode}: {told.strip()} (all of it is in {output}; the command "
            f"was: {shlex.join(command)})"
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return figures_of(read_run(folder), setting.ranks)


def _program(args: argparse.Namespace, setting: Setting, folder: Path) -> list[str]:
    settings = [
        *args.overrides,
        *PLAIN,
        f"batch.size={setting.batch}",
        f"run.steps={args.steps}",
        f'run.folder="{folder}"',
    ]
    program = [sys.executable, "-m", "hpctrain", "train", str(args.run_file), "--overwrite"]
    return [*program, *(part for text in settings for part in ("--set", text))]


def _environment(program: str) -> dict[str, str]:
    from hpctrain.cli.checks_mpi import path_with

    return dict(os.environ) | {"PATH": path_with(program)}
