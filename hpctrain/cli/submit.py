"""`hpctrain submit`: fill in a job script for a run file, show it, hand it to the scheduler.

What a site needs (account, partition, modules) comes from a site file, written once:

    scheduler = "slurm"
    account = "abc123"
    partition = "gpu"
    setup = ["module load gcc openmpi", "source ~/hpctrain/bin/activate"]

Layer: cli. Starts the scheduler's own command; nothing of the package calls a scheduler otherwise.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpctrain.cli.sites import Site

__all__ = ["add_parser"]

EPILOG = """
examples:
  hpctrain submit run.toml --scheduler slurm --nodes 2 --dry-run
  hpctrain submit run.toml --nodes 4 --site ~/site.toml --time 12h

The script is kept as job.sh in the run folder. docs/jobs.md has the keys of a site file.
"""
SUBMIT = {"slurm": ["sbatch"], "pbs": ["qsub"], "lsf": ["bsub"], "flux": ["flux", "batch"]}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "submit",
        help="write a job script for a run file and submit it",
        description="Fill in a job script for a run file, show it, and submit it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_file", metavar="RUN.toml", help="what to train; see jobs/runs/")
    parser.add_argument("--scheduler", choices=SUBMIT, help="default: the site file's")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--time", metavar="TIME", help="time limit, such as 4h or 1d12h")
    parser.add_argument(
        "--launcher",
        metavar="NAME",
        help="which script of the scheduler's: for slurm srun, mpirun, cray, chain or relaunch",
    )
    parser.add_argument(
        "--site",
        type=Path,
        metavar="FILE",
        help="the site file; default: $HPCTRAIN_SITE, else ~/.config/hpctrain/site.toml if there",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the script")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write, show and submit; the exit status of the scheduler's command."""
    from hpctrain.cli.sites import filled, read_site
    from hpctrain.config import resolve

    site = read_site(arguments.site, arguments)
    folder = Path(resolve(arguments.run_file).config.run.folder)
    script = folder / "job.sh"
    text = filled(site, Path(arguments.run_file), folder, script, arguments.nodes)
    print(text, flush=True)
    if arguments.dry_run:
        return 0
    return submitted(site, script, text)


def submitted(site: Site, script: Path, text: str) -> int:
    """Write the script and hand it to the scheduler, whose words and status are passed on."""
    from hpctrain.errors import UsageError

    command = SUBMIT[site.scheduler]
    if shutil.which(command[0]) is None:
        raise UsageError(
            f"{command[0]} is not in PATH, so nothing was submitted: run this on a login node of "
            "the cluster, or only show the script (--dry-run)"
        )
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    if site.scheduler == "lsf":  # it reads the script, with its #BSUB lines, from standard input
        with script.open("rb") as file:
            code = subprocess.run(command, stdin=file, check=False).returncode
    else:
        command = [*command, str(script)]
        code = subprocess.run(command, check=False).returncode
    said = f"submitted by: {shlex.join(command)}" if code == 0 else f"{command[0]} refused {script}"
    print(said, file=sys.stdout if code == 0 else sys.stderr, flush=True)
    return code
