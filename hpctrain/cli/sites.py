"""Site files, and the job scripts of jobs/ with their EDIT block filled in.

A script in jobs/ works as it is once it is edited; here the same lines are edited by program, so
there is one text of each script. Scripts are found in the package, or beside it in a checkout.

Layer: cli. Knows the lines of the EDIT blocks, and nothing of what runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from hpctrain.errors import UsageError, nearest

__all__ = ["Site", "filled", "read_site"]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
LAUNCHERS = {"slurm": "srun", "pbs": "mpiexec", "lsf": "jsrun", "flux": "flux"}
WARNING = 300  # seconds before the end for USR1, at most: a short job is not to begin with it
SETUP = "# EDIT: module load ..."
BESIDE = Path(__file__).resolve().parents[2]


class Site(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job script needs to know of a cluster. "": the line is left out."""

    scheduler: Literal["slurm", "pbs", "lsf", "flux"]
    launcher: str = ""  # name of the script; "": the scheduler's usual one
    account: str = ""
    partition: str = ""  # or queue
    time: str = "4h"
    ranks_per_node: Positive = 4
    gpus_per_node: Count = 4
    cores_per_rank: Positive = 8
    python: str = "python"
    setup: tuple[str, ...] = ()  # shell lines before the start: modules, environment


def read_site(path: Path | None, options: argparse.Namespace) -> Site:
    """The site file's values, and the command line's where given. Raises `UsageError`."""
    named = path or os.environ.get("HPCTRAIN_SITE")
    default = Path("~/.config/hpctrain/site.toml").expanduser()
    values: dict[str, object] = {}
    if named or default.is_file():
        file = Path(named or default).expanduser()
        try:
            values = msgspec.toml.decode(file.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read the site file {file}: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise UsageError(f"{file} is not valid TOML: {error}") from None
        _check_keys(values, file)
    for key in ("scheduler", "launcher", "time"):
        if getattr(options, key) is not None:
            values[key] = getattr(options, key)
    if "scheduler" not in values:
        raise UsageError("which scheduler? Give --scheduler, or write a site file (docs/jobs.md)")
    try:
        return msgspec.convert(values, Site)
    except msgspec.ValidationError as error:
        raise UsageError(f"the site file: {error}") from None


def _check_keys(values: dict[str, object], file: Path) -> None:
    known = Site.__struct_fields__
    for key in values:
        if key not in known:
            raise UsageError(
                f"{file}: there is no key {key}{nearest(key, known)}; there are {', '.join(known)}"
            )


def filled(site: Site, run_file: Path, folder: Path, script: Path, nodes: int) -> str:
    """The text of the site's job script for a run. Raises `UsageError`.

    Args:
        folder: the run's folder.
        script: where the text will lie, for scripts that submit themselves again.
        nodes: nodes that run; relaunch.sh asks for one more.
    """
    from hpctrain.train.stop import seconds_of

    if nodes < 1:
        raise UsageError(f"--nodes is {nodes}; a job needs at least 1")
    minutes = int(seconds_of(site.time, "time") // 60)
    if minutes < 1:
        raise UsageError(f"time is {site.time!r}; a job needs at least a minute")
    changes = _settings(site, run_file, folder, script, nodes, minutes)
    changes |= _directives(site, nodes, minutes, run_file.stem)
    lines: list[str] = []
    for line in _template(site).splitlines():
        start = next((start for start in changes if line.startswith(start)), None)
        if line == SETUP:
            lines += site.setup
        elif start is None:
            lines.append(line)
        elif (value := changes[start]) is not None:
            lines.append(start + value)
    return "\n".join(lines) + "\n"


def _template(site: Site) -> str:
    name = site.launcher or LAUNCHERS[site.scheduler]
    places = [root / "jobs" / site.scheduler for root in (BESIDE / "hpctrain", BESIDE)]
    folder = next((place for place in places if place.is_dir()), places[0])
    known = sorted(path.stem for path in folder.glob("*.sh"))
    if name not in known:
        raise UsageError(
            f"there is no job script {name!r} for {site.scheduler}{nearest(name, known)}; "
            f"there are {', '.join(known) or f'none in {folder}'}"
        )
    return (folder / f"{name}.sh").read_text(encoding="utf-8")


def _settings(
    site: Site, run_file: Path, folder: Path, script: Path, nodes: int, minutes: int
) -> dict[str, str | None]:
    """Beginnings of the lines with shell variables, and what follows them."""
    per_rank = -(-site.gpus_per_node // site.ranks_per_node)
    gpus = per_rank if site.scheduler == "flux" else site.gpus_per_node
    return {
        "run=": shlex.quote(str(run_file)),
        "folder=": shlex.quote(str(folder)),
        "python=": shlex.quote(site.python),
        "script=": shlex.quote(str(script)),
        "minutes=": str(minutes),
        "nodes=": str(nodes),
        "per_node=": str(site.ranks_per_node),
        "cores=": str(site.cores_per_rank),
        "gpus=": str(gpus),
    }


def _directives(site: Site, nodes: int, minutes: int, name: str) -> dict[str, str | None]:
    """Beginnings of the lines for the scheduler, and what follows them; None: no such line."""
    account, partition = site.account or None, site.partition or None
    gpus = site.gpus_per_node
    warning = min(WARNING, minutes * 60 // 4)
    if site.scheduler == "slurm":
        return {
            "#SBATCH --account=": account,
            "#SBATCH --partition=": partition,
            "#SBATCH --nodes=": str(nodes + (site.launcher == "relaunch")),
            "#SBATCH --ntasks-per-node=": str(site.ranks_per_node),
            "#SBATCH --gpus-per-node=": str(gpus) if gpus else None,
            "#SBATCH --gpu-bind=": "none" if gpus else None,
            "#SBATCH --cpus-per-task=": str(site.cores_per_rank),
            "#SBATCH --time=": str(minutes),
            "#SBATCH --job-name=": name,
            "#SBATCH --signal=USR1@": str(warning),
            "#SBATCH --signal=B:USR1@": str(warning),
        }
    if site.scheduler == "pbs":
        cores = site.ranks_per_node * site.cores_per_rank
        chunk = f"{nodes}:ncpus={cores}:mpiprocs={site.ranks_per_node}"
        return {
            "#PBS -A ": account,
            "#PBS -q ": partition,
            "#PBS -l select=": chunk + (f":ngpus={gpus}" if gpus else ""),
            "#PBS -l walltime=": f"{minutes // 60:02d}:{minutes % 60:02d}:00",
            "#PBS -N ": name,
        }
    if site.scheduler == "lsf":
        return {
            "#BSUB -P ": account,
            "#BSUB -q ": partition,
            "#BSUB -nnodes ": str(nodes),
            "#BSUB -W ": str(minutes),
            "#BSUB -J ": name,
        }
    return {
        "# flux: --bank=": account,
        "# flux: --queue=": partition,
        "# flux: --nodes=": str(nodes),
        "# flux: --time-limit=": f"{minutes}m",
        "# flux: --job-name=": name,
        "# flux: --signal=SIGUSR1@": f"{warning}s",
    }
