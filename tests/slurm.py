"""A Slurm to test with: tools/slurm-cluster, jobs from the shipped scripts, and how they end.

Knows nothing of what the tests assert.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launching import ROOT

__all__ = ["PROGRAMS", "Slurm", "edited", "ledger", "missing"]

TOOL = ROOT / "tools" / "slurm-cluster"
STATE = Path("/run/hpctrain-slurm-")  # and the process; munge refuses folders that are not open
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")
SETTLED = 6.0  # seconds after which what a requeued job has left is gone; Slurm waits for 120
END = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# For the Open MPI of PyPI, over the links of the nodes; binding is none of its business here.
MPI = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_coll": "^han",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "PMIX_MCA_psec": "native",
    "OPENBLAS_NUM_THREADS": "1",
}


def missing() -> str:
    """Why there can be no Slurm here, or ""."""
    if os.geteuid() != 0:
        return "a Slurm with nodes of its own takes root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: slurm-wlm, libpmix-dev, iproute2)"
    if not list(Path("/usr/lib").glob("*/slurm-wlm/mpi_pmix*.so")):
        return "Slurm has no PMIx plugin (Debian: slurm-wlm-basic-plugins)"
    if not list(Path("/usr/lib").glob("**/libpmix.so*")):
        return "Slurm's PMIx plugin finds no libpmix (Debian: libpmix-dev)"
    if not (Path(sys.executable).parent / "ompi_info").exists():
        return "the MPI beside this Python is not Open MPI, which srun --mpi=pmix starts"
    return ""


class Slurm:
    """A cluster of nodes n0, n1, ...; commands run on n0, in the folder of the jobs."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self._state = Path(f"{STATE}{os.getpid()}")
        self._nodes = nodes
        mpi_home = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        left_out = ("OMPI_", "PRTE_", "SLURM_", "SBATCH_", "PMIX_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        self._environment = kept | MPI | mpi_home | {"SLURM_CLUSTER": str(self._state)}
        self._environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"

    def __enter__(self) -> Slurm:
        for old in STATE.parent.glob(f"{STATE.name}*"):  # of tests that were killed
            if not Path("/proc", old.name.removeprefix(STATE.name)).exists():
                self._tool("down", state=old)
        done = self._tool("up", str(self._nodes))
        if done.returncode:
            raise RuntimeError(f"no cluster: {done.stdout}")
        return self

    def __exit__(self, *_: object) -> None:
        self._tool("down")

    def _tool(self, *words: str, state: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(TOOL), *words],
            cwd=self.folder,
            env=self._environment | ({"SLURM_CLUSTER": str(state)} if state else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )

    def do(self, *words: str, check: bool = True) -> str:
        """Run a command on n0; what it said. RuntimeError where it fails and this matters."""
        done = self._tool("do", *words)
        if done.returncode and check:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}")
        return done.stdout

    def running(self, *words: str) -> subprocess.Popen[str]:
        """Start a command on n0 and leave it running."""
        return subprocess.Popen(
            [str(TOOL), "do", *words],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_node(self, number: int) -> None:
        self._tool("kill", str(number))

    def submit(self, *words: str) -> str:
        """Run a command that submits a job; the job's number."""
        found = re.search(r"Submitted batch job (\d+)", self.do(*words))
        assert found
        return found[1]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, Reason, ..."""
        text = self.do("scontrol", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def end(self, number: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job has ended for good; what is known of it then.

        One that was requeued need not wait for two minutes.
        """
        pending = 0.0
        for _ in until(seconds, lambda: f"job {number}: {self.job(number)}"):
            now = self.job(number)
            if now["JobState"] in END:
                return now
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                pending = pending or time.monotonic()
                if time.monotonic() - pending > SETTLED:
                    self.do("scontrol", "update", f"jobid={number}", "StartTime=now")
                    pending = 0.0
            else:
                pending = 0.0
        raise AssertionError("unreachable")

    def wait(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Until something is so."""
        for _ in until(seconds, lambda: f"{condition}"):
            if condition():
                return

    def ranks(self, run: Path) -> list[int]:
        """Processes of the ranks of a run, by its folder in their command lines."""
        return processes("python", f"run.folder={run}")

    def launchers(self, run: Path) -> list[int]:
        """Processes of the srun of a run; the first is the one that was called."""
        return processes("srun", f"run.folder={run}")


def processes(program: str, word: str) -> list[int]:
    """Processes of a program with a word in their command line, the oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if word in words and Path(words[0]).name == program:
                started = (entry / "stat").read_text().rpartition(")")[2].split()[19]
                found.append((int(started), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def until(seconds: float, what: Callable[[], str]) -> Iterator[None]:
    """Go round, twice a second, until broken out of; AssertionError where it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:g} s: {what()}")


def edited(script: str, path: Path, changes: dict[str, str]) -> Path:
    """A script of jobs/ as a user edits it: lines that begin so go on so; "-" drops the line."""
    lines = []
    for line in (ROOT / "jobs" / script).read_text(encoding="utf-8").splitlines():
        start = next((start for start in changes if line.startswith(start)), None)
        if start is None:
            lines.append(line)
        elif changes[start] != "-":
            lines.append(start + changes[start])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ledger(folder: Path) -> dict[int, list[int]]:
    """Samples that all ranks together took in each step, sorted, of all the parts of a run."""
    taken: dict[int, list[int]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            step, samples = json.loads(line)
            taken.setdefault(step, []).extend(samples)
    return {step: sorted(samples) for step, samples in taken.items()}
