"""When a run is to end before it is finished: time, signals, and files in the run folder.

    time     `stop.after` of this process, or the end of the batch job where it is told, less a
             margin for one more step and a checkpoint
    signals  USR1 and USR2, on any rank; the handler only notes them
    files    STOP: end now; SAVE: write a checkpoint and go on; DONE: nothing is left to do

Each rank says before a step what it wants (`Stopping.wants`), the step's own all-reduce adds this
up, and after the step all ranks read the same answer (`Stopping.agree`): no message of its own.

Layer: train. Imports nothing heavy, so that `listen` can come first: until then a signal kills.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.sections import RunConfig

__all__ = [
    "EXIT_RESUBMIT",
    "Limits",
    "Stopping",
    "at_start",
    "leave",
    "limits",
    "listen",
    "mark_done",
    "seconds_of",
]

EXIT_RESUBMIT = 75  # stopped early, with a valid checkpoint
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
# The end of the batch job in seconds since 1970; the first is for job scripts to set.
END_TIMES = ("HPCTRAIN_END_TIME", "SLURM_JOB_END_TIME")
REASONS = ("a signal", "the time limit", "the file STOP")
POLL = 1.0  # seconds between looks for files: each is a request to a parallel file system
FIRST_SAVE = 30.0  # seconds that a checkpoint is taken to need until one is measured, at most
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}

_received: list[int] = []  # signals that came; filled by the handler, which does nothing else


def listen() -> None:
    """From now on USR1 and USR2 are noted instead of ending the process. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def leave(comm: MPI.Intracomm) -> int:
    """The exit status of a run that stopped early; collective, the last thing that is done.

    From here on TERM is ignored: to `srun --kill-on-bad-exit` the first rank that ends with 75 has
    failed, and it sends TERM to those that take longer to end; the job would end with 143.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    comm.Barrier()  # on all ranks, before the first one ends
    return EXIT_RESUBMIT


def seconds_of(text: str, name: str) -> float:
    """The seconds of "3h50m", "1d", "90s" or "90". Raises `UsageError`; `name` is the option's."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) or not text:
        raise UsageError(
            f"{name} is {text!r}, which is no length of time: write days, hours, minutes and "
            "seconds in this order, such as 3h50m, 1d12h or 90s"
        )
    return float(sum(int(n) * UNITS[unit] for n, unit in re.findall(r"(\d+)([dhms])", text)))


@dataclass(frozen=True)
class Limits:
    """When to be gone (seconds since 1970; None: never), and the margin (None: measured)."""

    end: float | None
    margin: float | None


def limits(config: RunConfig, environment: Mapping[str, str] = os.environ) -> Limits:
    """The limits of a run file's [stop] and of the batch job. Raises `UsageError`."""
    section = config.stop
    ends = []
    if section.after:
        ends.append(_started() + seconds_of(section.after, "stop.after"))
    if section.at_job_end:
        told = next((environment[name] for name in END_TIMES if environment.get(name)), "")
        if re.fullmatch(r"\d+", told):
            ends.append(float(told))
    margin = None if section.margin == "auto" else seconds_of(section.margin, "stop.margin")
    return Limits(min(ends, default=None), margin)


def _started() -> float:
    """When this process began: before Python did, which may have taken minutes to load."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        age = 0.0
    return time.time() - max(age, 0.0)


def at_start(folder: Path, config: RunConfig) -> str:
    """ "DONE" or "STOP" where the run folder says that there is nothing to do, else "".

    A DONE of a shorter run, such as one with fewer `run.epochs`, is removed. To be called on one
    rank, for runs that go on from what is there (`--resume auto`).
    """
    done = folder / "DONE"
    if done.exists():
        text = done.read_text(encoding="utf-8").strip()
        if not text or json.loads(text).get("length") == _length(config):
            return "DONE"
        done.unlink()
    return "STOP" if (folder / "STOP").exists() else ""


def mark_done(folder: Path, config: RunConfig, step: int) -> None:
    """Write DONE. To be called on one rank."""
    text = json.dumps({"step": step, "length": _length(config)})
    (folder / "DONE").write_text(text + "\n", encoding="utf-8")


def _length(config: RunConfig) -> list[int]:
    """What the number of a run's steps depends on."""
    return [config.run.epochs, config.run.steps, config.batch.size]


class Stopping:
    """Whether to stop or to save, asked before and answered after every step.

    Attributes, the same on all ranks after `agree`:
        reason: why the run is to stop after this step; "" to go on.
        save: whether a checkpoint was asked for.
    """

    def __init__(self, limits: Limits, folder: Path, first_rank: bool) -> None:
        """`first_rank`: this rank looks at the clock and at the files for all."""
        self.reason, self.save = "", False
        self._limits, self._folder, self._first = limits, folder, first_rank
        self._step = 0.0  # the longest so far, as is _saving once one was measured
        left = FIRST_SAVE * 20 if limits.end is None else max(limits.end - time.time(), 0.0)
        self._saving = min(FIRST_SAVE, left / 20)
        self._saved = False
        self._answers = False  # the checkpoint under way is what the file SAVE asked for
        self._last = time.monotonic()
        self._looked = 0.0

    def wants(self) -> tuple[float, ...]:
        """What this rank asks for, 1 or 0 each: stop by signal, by time, by file; save."""
        stop = save = late = False
        if self._first:
            now = time.monotonic()
            self._step = max(self._step, now - self._last)
            self._last = now
            end = self._limits.end
            late = end is not None and time.time() + self.margin() >= end
            if now - self._looked >= POLL:
                self._looked = now
                stop, save = ((self._folder / name).exists() for name in ("STOP", "SAVE"))
        return tuple(map(float, (bool(_received), late, stop, save)))

    def agree(self, requests: Sequence[float]) -> None:
        """Take the sums of what all ranks want."""
        *stops, save = requests
        self.reason = next((r for r, n in zip(REASONS, stops, strict=True) if n), "")
        self.save = bool(save) and not self._answers

    def margin(self) -> float:
        """Seconds before the end at which to stop: twice the longest step and checkpoint."""
        if self._limits.margin is not None:
            return self._limits.margin
        return 2 * (self._step + self._saving)

    def begun(self) -> None:
        """A checkpoint has begun, which answers SAVE once it is complete."""
        self._answers = self._answers or self.save
        self.save = False

    def paused(self, seconds: float) -> None:
        """Training stood still for a checkpoint: this is not part of a step."""
        self._last += seconds

    def saved(self, seconds: float) -> None:
        """A checkpoint is complete, `seconds` after it was begun: answer SAVE, learn the cost."""
        self._saving = max(self._saving, seconds) if self._saved else seconds
        self._saved = True
        if self._first and self._answers:
            (self._folder / "SAVE").unlink(missing_ok=True)
        self._answers = False
