"""A run that hangs says where and because of whom, and ends with 124.

A thread on every rank looks whether the rank's calls of MPI go on. Where they have not for half of
`stop.hang_after`, it writes into the run folder what the rank is in and the Python stacks of all
its threads, hang/rank17.txt, and again from time to time. Ranks that get on meanwhile write
hang/alive3.txt. After `stop.hang_after` the first rank that stands still compares what is there:

    waiting    inside a collective that others of its group did not enter
    busy       outside, using its core: slow rather than hung
    blocked    outside, using none: a disk, a lock, a network, a stop in a debugger
    silent     wrote nothing: stopped, dead, or its node cannot be reached

Where a rank gets on, it is not a hang. Where one is busy, it is named, and the run goes on; but not
for longer than `PATIENCE` times as long, as an endless loop is busy too. Else the ranks that keep
the others waiting are named, and the job ends.

Layer: train. Knows nothing of what is trained.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hpctrain.mpi.calls import Log
from hpctrain.train.folder import RunFolder
from hpctrain.train.verdict import busy, read, silent_nodes, verdict

__all__ = ["EXIT_HANG", "Watchdog"]

EXIT_HANG = 124
PATIENCE = 4  # times `hang_after` until a rank that computes counts as hung, too
LOOKS = 4  # in `hang_after`; a rank that computed between any two of the last ones is busy


class Watchdog:
    """Watches this rank while the block runs: `with Watchdog(...): train(...)`."""

    def __init__(
        self,
        log: Log,
        folder: Path,
        rank: int,
        hosts: Sequence[str],
        hang_after: float,
        end: Callable[[int], None],
    ) -> None:
        """
        Args:
            log: what this rank's communicators note.
            folder: the run folder; hang/ in it is written.
            hosts: the host of every rank.
            hang_after: seconds without any call of MPI that begins or ends; 0: do not watch.
            end: ends all ranks; called with `EXIT_HANG` from the watching thread.
        """
        self._log, self._run, self._folder = log, folder, folder / "hang"
        self._rank, self._hosts = rank, hosts
        self._limit, self._end = hang_after, end
        self._tick = min(max(hang_after / 20, 0.05), 1.0)
        self._grace = min(max(hang_after / 5, 1.0), 10.0)  # for the other ranks to write
        self._over = threading.Event()
        self._begun = time.time()
        self._idle = self._clock = self._looked = self._next = 0.0
        self._used = 0.0  # CPU seconds of the main thread, at the last look
        self._shares: deque[float] = deque([0.0], LOOKS)  # of a core, between the last looks
        self._lively: dict[int, tuple[str, float]] = {}  # of ranks: what they wrote, and when
        self._late = 0.0  # see `_turn`
        self._told = False

    def __enter__(self) -> Watchdog:
        if self._limit:
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        """Count the seconds in which nothing begins or ends.

        A tick that lasted long does not count: the whole job was suspended, not hung.
        """
        events, last = -1, time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._tick), now
            self._clock += passed
            self._idle += passed
            if events != self._log.events:
                events, self._idle = self._log.events, 0.0
            if self._clock - self._looked >= self._limit / LOOKS:
                self._look()
            if self._idle >= self._limit and self._clock >= self._next:
                self._next = self._clock + self._limit / LOOKS
                self._late = self._turn()
                if self._idle >= self._limit + self._late and self._hangs():
                    self._end(EXIT_HANG)
                    return

    def _look(self) -> None:
        """Write how it goes where this rank stands still, or another does."""
        used = _main_seconds()
        self._shares.append((used - self._used) / max(self._clock - self._looked, 1e-9))
        self._used, self._looked = used, self._clock
        with contextlib.suppress(OSError):
            if self._idle >= self._limit / 2:
                self._mine("alive").unlink(missing_ok=True)
                self._write()
                return
            self._mine("rank").unlink(missing_ok=True)
            if self._standing():
                self._mine("alive").write_text(str(self._log.events), encoding="ascii")
            else:
                self._mine("alive").unlink(missing_ok=True)
        self._told = False

    def _mine(self, kind: str) -> Path:
        return self._folder / f"{kind}{self._rank}.txt"

    def _standing(self) -> list[int]:
        """Ranks that have written that they stand still."""
        found = []
        for path in self._folder.glob("rank*.txt"):
            with contextlib.suppress(OSError, ValueError):
                if path.stat().st_mtime > self._begun:
                    found.append(int(path.stem.removeprefix("rank")))
        return sorted(found)

    def _turn(self) -> float:
        """Seconds that this rank leaves to those before it: the first one compares and speaks,
        others only where it does not, so that thousands do not read what thousands wrote."""
        before = sum(rank < self._rank for rank in self._standing())
        return min(before, 2) * (self._limit / 2 + self._grace)

    def _hangs(self) -> bool:
        """Compare, wait for others to write, compare again; whether to end, having said why."""
        before = self._log.events
        if self._gets_on() or self._is_slow():
            return False
        with contextlib.suppress(OSError):
            self._write()
        if self._over.wait(self._grace) or self._log.events != before:
            return False
        if self._gets_on() or self._is_slow():
            return False
        self._speak()
        return True

    def _gets_on(self) -> bool:
        """Whether a rank has got on within `hang_after`, by our clock, as far as it has told."""
        for path in self._folder.glob("alive*.txt"):
            with contextlib.suppress(OSError, ValueError):
                rank, text = int(path.stem.removeprefix("alive")), path.read_text("ascii")
                if self._lively.get(rank, ("", 0.0))[0] != text:
                    self._lively[rank] = text, self._clock
        return any(self._clock - seen < self._limit for _, seen in self._lively.values())

    def _is_slow(self) -> bool:
        """Whether a rank computes, for which the others may wait a while; said once."""
        found, left = read(self._folder), PATIENCE * self._limit + self._late - self._idle
        if left <= 0 or not busy(found):
            return False
        if not (self._told or self._late):
            self._told = True
            text = "\n".join(verdict(found, self._hosts, self._idle))
            _say(f"{text}\nthe run goes on; it ends in {left:.0f} s if this does")
        return True

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f".rank{self._rank}.part"
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self._record()) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        aside.replace(self._mine("rank"))

    def _record(self) -> dict[str, Any]:
        log = self._log.current()
        return {
            "rank": self._rank,
            "host": platform.node(),
            "pid": os.getpid(),
            "inside": log.inside,
            "last": log.last,
            "group": log.group,
            "number": log.number,
            "counts": log.counts,
            "idle_seconds": round(self._idle, 1),
            "cpu": round(max(self._shares), 2),
            "at": _place(),
        }

    def _speak(self) -> None:
        found = read(self._folder)
        text = "\n".join(verdict(found, self._hosts, self._idle))
        _say(f"{text}\nthe Python stacks of the ranks are in {self._folder}")
        with contextlib.suppress(OSError):
            (self._folder / "verdict.txt").write_text(text + "\n", encoding="utf-8")
            RunFolder(self._run, writes=True).status("failed", error=text)
            with (self._run / "bad_nodes.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"{node}\n" for node in silent_nodes(found, self._hosts))


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _main_seconds() -> float:
    """CPU seconds of the main thread; that of the whole process would count this thread too."""
    try:
        clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        return time.clock_gettime(clock)
    except (OSError, AttributeError):
        return 0.0


def _place() -> str:
    """Where the main thread is: "loop.py:87 in epoch"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no Python code"
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
