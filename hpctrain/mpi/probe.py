"""The MPI operations that are done on GPU memory, each ready to be tried, and in child jobs.

Whether an MPI library handles GPU memory shows only when it is tried, and where it does not the
process crashes or hangs. So each try is a job of its own, started by the launcher, with a time
limit; this process only reads what the job printed.

    right   the result in GPU memory is that of the same operation in host memory
    slow    right, but it takes more than twice as long as going through pinned host memory
    wrong   another result
    crash   the job ended without a result
    hang    it did not end

Layer: mpi. Arrays are given; knows nothing of devices, nor of what a job's program does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.mpi import messages

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["OPERATIONS", "Outcome", "Verdict", "classify", "report", "run_job"]

Array = Any  # of NumPy, or of a GPU
Operation = Callable[["MPI.Intracomm", Array, Array], Array]
MARK = "PROBE "  # begins the line that a job prints
SLOW = 2.0  # times as long as through the host
# What Python and launchers say of a rank's signal, then hpctrain and Python of an exception.
CAUSES = (
    r"Fatal Python error: (.*)",
    r"Signal: (.*?) \(\d+\)",
    r"EXIT STRING: (.*?) \(signal",
    r"exited on (signal .*)",
    r"(?:^|\n)error(?: on rank \d+ of \d+)?: (.*)",
    r"\n[\w.]*(?:Error|Exception): (.*)",
)
GRACE = 2.0  # seconds for a launcher to end its ranks


def _send(comm: MPI.Intracomm, array: Array, received: Array) -> Array:
    """MPI_Send to the next rank, MPI_Recv from the one before; odd ranks receive first."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.rank % 2:
        comm.Recv(received, before)
    comm.Send(array, after)
    if comm.rank % 2 == 0:
        comm.Recv(received, before)
    return received


def _isend(comm: MPI.Intracomm, array: Array, received: Array) -> Array:
    """MPI_Isend and MPI_Irecv with the ranks beside this one."""
    from mpi4py import MPI

    requests = [
        comm.Irecv(received, (comm.rank - 1) % comm.size),
        comm.Isend(array, (comm.rank + 1) % comm.size),
    ]
    MPI.Request.Waitall(requests)
    return received


def _sendrecv(comm: MPI.Intracomm, array: Array, received: Array) -> Array:
    """MPI_Sendrecv with the ranks beside this one."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    comm.Sendrecv(array, after, recvbuf=received, source=before)
    return received


def _exchange(comm: MPI.Intracomm, array: Array, received: Array) -> Array:
    """The exchange of slices between nodes."""
    messages.exchange(comm, array, _parts(comm.size, array), received)
    return received


def _gather(comm: MPI.Intracomm, array: Array, received: Array) -> Array:
    """The gathering of parameters between nodes, in place."""
    messages.gather_parts(comm, array, _parts(comm.size, array))
    return array


def _allreduce(comm: MPI.Intracomm, array: Array, received: Array) -> Array:
    """The sum of whole gradients, in place."""
    messages.allreduce(comm, array)
    return array


def _parts(size: int, array: Array) -> list[tuple[int, int]]:
    """An even part of the lines of `array` for every rank."""
    lines = array.nbytes // messages.LINE
    bounds = [lines * k // size for k in range(size + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


# By name. Given a flat array of P times 64 bytes or a multiple, and another of its size to receive
# in; returns the one with the result. Collective.
OPERATIONS: dict[str, Operation] = {
    "Send, Recv": _send,
    "Isend, Irecv": _isend,
    "Sendrecv": _sendrecv,
    "exchange of parts": _exchange,
    "gathering of parts": _gather,
    "Allreduce": _allreduce,
}


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exit code (None: it had to be killed), and all that it printed."""

    code: int | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a job showed: a word of those above, what it reported, and why where it did not."""

    word: str
    facts: dict[str, Any]
    detail: str = ""


def report(facts: dict[str, Any]) -> str:
    """The line by which a job reports; for rank 0 to print."""
    return MARK + json.dumps(facts)


def classify(outcome: Outcome, judge_speed: bool = True) -> Verdict:
    """What an outcome shows. `judge_speed`: whether a slow operation is called slow."""
    line = next((t for t in outcome.text.splitlines() if t.startswith(MARK)), None)
    facts: dict[str, Any] = json.loads(line.removeprefix(MARK)) if line else {}
    if outcome.code is None:
        return Verdict("hang", facts, "killed at the time limit")
    if not facts or outcome.code:
        return Verdict("crash", facts, _cause(outcome))
    if not facts.get("right", True):
        return Verdict("wrong", facts, "another result than in host memory")
    slower = facts.get("direct", 0.0) / facts["staged"] if facts.get("staged") else 0.0
    if judge_speed and slower > SLOW:
        return Verdict("slow", facts, f"{slower:.1f} times as long as through the host")
    return Verdict("right", facts)


def _cause(outcome: Outcome) -> str:
    """The line that says most about why a job failed."""
    for pattern in CAUSES:
        if found := re.search(pattern, outcome.text):
            return found[1].strip()
    lines = [line.strip() for line in outcome.text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else f"exit code {outcome.code} and no output"


def run_job(command: Sequence[str], limit: float) -> Outcome:
    """Run a command in a session of its own; after `limit` seconds, end every process of it.

    Raises `OSError` where the command does not exist.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=limit)
            return Outcome(process.returncode, text)
        except subprocess.TimeoutExpired:
            _end(process)
            text, _ = process.communicate()
            return Outcome(None, text)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the launcher, which ends its ranks; then SIGKILL to the rest of the session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    deadline = time.monotonic() + 5 * GRACE
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.02)


def _session(number: int) -> list[int]:
    """Live processes of a session: ranks have process groups of their own, but its session."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            fields = stat.rpartition(")")[2].split()
            if int(fields[3]) == number and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found
