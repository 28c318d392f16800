"""Recording what all ranks do when, in the run folder, for `hpctrain report --timeline`.

    timeline/step_00000120/rank_00003.jsonl     of the start that went on from step 120

Each rank writes its own file, so that what a run did is there also where it was killed. The clocks
of the ranks are compared before the first event and after the last; of a run that did not end in
order only the first comparison is known.

Layer: train. Knows nothing of how a step is done; see `hpctrain.train.timeline_trace` for reading.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain import __version__
from hpctrain.errors import UsageError
from hpctrain.mpi.agree import on_first_rank
from hpctrain.mpi.clocks import measure
from hpctrain.timeline import EVENT_BYTES, Recorder, record

if TYPE_CHECKING:
    from hpctrain.mpi.calls import Log
    from hpctrain.train.session import Session

__all__ = ["recording", "steps_of"]

AtStep = Callable[[int], None]


def steps_of(text: str) -> range:
    """The steps that log.timeline names: "" (none), "all", or "100:110" (as Python's slices).

    Raises `UsageError` for anything else.
    """
    if text in ("", "all"):
        return range(1 << 62) if text else range(0)
    match = re.fullmatch(r"(\d*):(\d*)", text)
    first, stop = (int(match[1] or 0), int(match[2] or 1 << 62)) if match else (0, 0)
    if first >= stop:
        raise UsageError(
            f'log.timeline is "{text}"; give the steps to record as "all", or as FIRST:STOP '
            'with FIRST below STOP, such as "100:110"'
        )
    return range(first, stop)


@contextlib.contextmanager
def recording(session: Session, folder: Path, calls: Log, step: int) -> Iterator[AtStep]:
    """Record inside, where log.timeline says so; else nothing is done. Collective.

    Args:
        folder: the run folder.
        step: that the run begins with, or goes on from.

    Yields:
        what is to be called with the number of a step before that begins.
    """
    log, comm = session.config.log, session.comm
    steps = steps_of(log.timeline)
    if not steps:
        yield lambda step: None
        return
    place = folder / "timeline" / f"step_{step:08d}"
    on_first_rank(comm, lambda: shutil.rmtree(place, ignore_errors=True))
    ahead, wall = measure(comm), time.time()
    header = {
        "version": __version__,
        "rank": comm.rank,
        "ranks": comm.size,
        "host": platform.node(),
        "device": session.device.name,
        "from_step": step,
        "steps": log.timeline,
        "wall": wall,
        "clock": ahead,
    }
    limit = max(log.timeline_mb * 10**6 // (EVENT_BYTES * comm.size), 1)
    recorder = Recorder(place / f"rank_{comm.rank:05d}.jsonl", header, limit)

    def at_step(number: int) -> None:
        recorder.at_step(number, number in steps)

    at_step(step)
    calls.tell(recorder.call)
    record(recorder)
    try:
        yield at_step
        calls.tell(None)
        recorder.close({"clock": measure(comm)})
    except BaseException as error:
        recorder.close({"error": type(error).__name__})
        raise
    finally:
        calls.tell(None)
        record(None)
