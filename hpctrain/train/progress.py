"""How far a run is: a bar on a terminal, a line every few seconds otherwise. Rank 0 only.

Layer: train. Knows nothing of files and networks.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hpctrain.data.figures import Figures
from hpctrain.log import say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from hpctrain.train.step import StepResult

__all__ = ["Progress", "on_terminal"]


def on_terminal() -> bool:
    """Whether somebody watches standard output as it is written.

    Open MPI gives rank 0 a pseudo-terminal even where its own output goes to a file: then mpirun,
    which is the parent process, tells.
    """
    if not sys.stdout.isatty():
        return False
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return True
    try:
        return str(Path(f"/proc/{os.getppid()}/fd/1").readlink()).startswith("/dev/pts/")
    except OSError:
        return False


class Progress:
    """Reports steps. `shown`: False on all ranks but one."""

    def __init__(self, first_step: int, total_steps: int, every: float, shown: bool) -> None:
        self._first, self._total = first_step, total_steps
        self._every = every
        self._shown = shown
        self._samples = 0
        self._waited = self._saved = 0.0
        self.figures = Figures()  # of the loader; for the caller to set
        self._before = Figures()
        self._begun = self._reported = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._shown and on_terminal():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, result: StepResult, waited: float) -> None:
        """Report step number `step`, counted from 0. `waited`: seconds spent waiting for data."""
        if not self._shown:
            return
        self._samples += result.samples
        self._waited += waited
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step + 1, description=self._text(result, now))
        elif now - self._reported >= self._every or step + 1 == self._total:
            left = (now - self._begun) / (step + 1 - self._first) * (self._total - step - 1)
            say(f"step {step + 1}/{self._total}  {self._text(result, now)}  left {_clock(left)}")
        else:
            return
        if self._bar is None or now - self._reported >= self._every:
            self._reported, self._samples = now, 0
            self._waited = self._saved = 0.0
            self._before = replace(self.figures)

    def saved(self, seconds: float) -> None:
        """Training stood still for a checkpoint that is complete."""
        self._saved += seconds

    def message(self, text: str) -> None:
        """A line above the bar, or just a line."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            say(text)

    def _text(self, result: StepResult, now: float) -> str:
        seconds = max(now - self._reported, 1e-9)
        accuracy = "" if math.isnan(result.accuracy) else f"  accuracy {result.accuracy:.1%}"
        saving = f"  checkpoints {self._saved / seconds:.1%}" if self._saved else ""
        return (
            f"loss {result.loss:.4f}{accuracy}  lr {result.lr:.2e}  "
            f"{self._samples / seconds:,.0f} samples/s  data {self._waited / seconds:.0%}"
            f"{self._reading()}{saving}"
        )

    def _reading(self) -> str:
        """What the loader did since the last report, where it read anything."""
        done = self.figures.since(self._before)
        if not done.bytes_read:
            return ""
        return (
            f" ({done.megabytes_per_second:,.0f} MB/s, {done.hit_rate:.0%} hits, "
            f"read x{done.read_amplification:.2f})"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
