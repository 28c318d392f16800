"""A run that hangs says where and because of whom, and ends with 124.

A thread on every rank looks whether the rank's calls of MPI go on. Where they have not for
`stop.hang_after`, it writes into the run folder what the rank is in and the Python stacks of all
its threads, hang/rank17.txt. A little later the first rank that could write compares what is there:

    waiting    inside a collective that others of its group did not enter
    busy       outside, using its core: slow rather than hung
    blocked    outside, using none: a disk, a lock, a network, a stop in a debugger
    silent     wrote nothing: stopped, dead, or its node cannot be reached

names the ranks that keep the others waiting, and ends the job.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hpctrain.mpi.calls import Log, compact, expand
from hpctrain.train.folder import RunFolder

__all__ = ["EXIT_HANG", "Watchdog", "silent_nodes", "verdict"]

EXIT_HANG = 124
BUSY = 0.1  # of a core; on a crowded node a rank may get little, and a blocked one uses none
Record = Mapping[str, Any]


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
        events, idle, last = -1, 0.0, time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            idle, last = idle + min(now - last, 2 * self._tick), now
            if events != self._log.events:
                events, idle = self._log.events, 0.0
            late = idle >= self._limit / 2 and self._others_have_written()
            if idle >= self._limit or late:
                self._hangs(idle)
                return

    def _others_have_written(self) -> bool:
        return any(path.stat().st_mtime > self._begun for path in self._folder.glob("rank*.txt"))

    def _hangs(self, idle: float) -> None:
        """Write what is known here, wait for the others, and let the first of them speak."""
        before = self._log.events
        with contextlib.suppress(OSError):
            self._write(idle)
        if self._over.wait(self._grace) or self._log.events != before:
            self._recovered()
            return
        found = read(self._folder)
        if min(found, default=self._rank) == self._rank:
            self._speak(found, idle)
        else:
            time.sleep(self._grace)  # the first rank ends the job, unless it cannot
        self._end(EXIT_HANG)

    def _recovered(self) -> None:
        """It was slow, not hung: take the file back, and watch on."""
        with contextlib.suppress(OSError):
            (self._folder / f"rank{self._rank}.txt").unlink()
        if not self._over.is_set():
            self._watch()

    def _write(self, idle: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f".rank{self._rank}.part"
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self._record(idle)) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        aside.replace(self._folder / f"rank{self._rank}.txt")

    def _record(self, idle: float) -> dict[str, Any]:
        log, share = self._log, _cpu_share()
        return {
            "rank": self._rank,
            "host": platform.node(),
            "pid": os.getpid(),
            "inside": log.inside,
            "last": log.last,
            "group": log.group,
            "number": log.number,
            "counts": log.counts,
            "idle_seconds": round(idle, 1),
            "cpu": round(share, 2),
            "at": _place(),
        }

    def _speak(self, found: Mapping[int, Record], idle: float) -> None:
        text = "\n".join(verdict(found, self._hosts, idle))
        where = f"the Python stacks of the ranks are in {self._folder}"
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n{where}\n".encode())
        with contextlib.suppress(OSError):
            (self._folder / "verdict.txt").write_text(text + "\n", encoding="utf-8")
            RunFolder(self._run, writes=True).status("failed", error=text)
            with (self._run / "bad_nodes.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"{node}\n" for node in silent_nodes(found, self._hosts))


def read(folder: Path) -> dict[int, Record]:
    """The records of all ranks that wrote one."""
    found = {}
    for path in folder.glob("rank*.txt"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
            found[int(record["rank"])] = record
    return found


def verdict(found: Mapping[int, Record], hosts: Sequence[str], idle: float) -> list[str]:
    """Lines that say who waits in what, and who did not come.

    Args:
        found: what ranks wrote, by rank.
        hosts: the host of every rank.
        idle: for how many seconds nothing went on.
    """
    lines = [f"hang: nothing has gone on for {idle:.0f} s"]
    waits: dict[tuple[str, int], list[int]] = {}
    for rank, record in sorted(found.items()):
        if record["inside"] and record["group"]:
            waits.setdefault((record["group"], record["number"]), []).append(rank)
    absent: set[int] = set()
    for (group, number), ranks in waits.items():
        names = {found[rank]["inside"] for rank in ranks}
        lines.append(f"{_ranks(ranks)} in {' and '.join(sorted(names))} #{number} of ranks {group}")
        if len(names) > 1:
            lines += [f"  {_told(found[rank], hosts)}" for rank in ranks]
        gone = [r for r in expand(group) if _count(found, r, group) < number]
        absent.update(gone)
        if gone:
            lines.append(f"  {_ranks(gone)} did not enter it")
    others = set(range(len(hosts))) - {rank for ranks in waits.values() for rank in ranks}
    for rank in sorted(absent | others):
        if rank in found:
            lines.append(_told(found[rank], hosts))
        else:
            lines.append(
                f"rank {rank} ({hosts[rank]}): no sign of life; it is stopped or dead, or its node "
                "cannot be reached"
            )
    return lines


def silent_nodes(found: Mapping[int, Record], hosts: Sequence[str]) -> list[str]:
    """Hosts of which no rank wrote."""
    heard = {hosts[rank] for rank in found}
    return sorted(set(hosts) - heard) if heard else []


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {compact(ranks)}"


def _count(found: Mapping[int, Record], rank: int, group: str) -> int:
    return int(found[rank]["counts"].get(group, 0)) if rank in found else 0


def _told(record: Record, hosts: Sequence[str]) -> str:
    """What one rank is at."""
    rank, last = record["rank"], f"its last call was {record['last'] or 'none'}"
    if record["inside"]:
        what = f"waits in {record['inside']}"
    elif record["cpu"] > BUSY:
        what = f"busy ({record['cpu']:.0%} of a core), so slow rather than hung; {last}"
    else:
        what = f"blocked outside MPI: a disk, a lock, a network?; {last}"
    return f"rank {rank} ({hosts[rank]}): {what}; at {record['at']}"


def _cpu_share(seconds: float = 0.3) -> float:
    """The part of a core that the main thread uses."""
    main = threading.main_thread().ident
    try:
        clock = time.pthread_getcpuclockid(main or 0)
        before, begun = time.clock_gettime(clock), time.monotonic()
        time.sleep(seconds)
        return (time.clock_gettime(clock) - before) / (time.monotonic() - begun)
    except (OSError, AttributeError):
        return 0.0


def _place() -> str:
    """Where the main thread is: "loop.py:87 in epoch"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no Python code"
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
