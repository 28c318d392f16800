"""What this rank does when: spans on the host's clock, kept in memory and written to a file.

    with span("forward"):
        ...

Where nothing is recorded, a span is one look at a global: 0.4 us. Any thread may use it; spans of a
thread nest. The clock is `time.perf_counter`. On a GPU a span is the host's side: from the
first launch to the return of the last, while kernels run later.

Knows nothing of MPI, of what the spans mean, and of how they are shown.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["EVENT_BYTES", "Recorder", "mark", "record", "span"]

LOG = logging.getLogger(__name__)
CHUNK, SECONDS = 8192, 10.0  # events, or seconds, between two writes: what a killed run loses
EVENT_BYTES = 256  # of an event in a merged file, with its share of arrows and names, at most
NOTHING = contextlib.nullcontext()
ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one for each line

_recorder: Recorder | None = None


class Recorder:
    """Events of this rank: a file with a line for each, `[thread, id, name, begin, end, facts]`.

    Begin and end are nanoseconds of this rank's clock. Objects between them: the first line, the
    last one after an orderly end, and `{"group": ranks}`, whose number, from 0, is the `of` of
    later events. A file that cannot be written ends the recording with a warning, not the run.

    Attributes:
        dropped: events that came after `limit`; `full_at`: the step in which the first did.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], limit: int) -> None:
        """Begin the file. `limit`: events to keep at most."""
        self._limit, self._kept = limit, 0
        self._events: deque[tuple[Any, ...]] = deque()
        self._counts: Counter[tuple[Any, ...]] = Counter()
        self._groups: dict[str, int] = {}
        self._path = path
        self._step = -1
        self.active = True
        self.dropped, self.full_at = 0, -1
        self._broken = False
        self._flushed = time.perf_counter()
        self._write([header], "w")

    def at_step(self, step: int, inside: bool) -> None:
        """What comes next belongs to `step`; `inside`: it is to be recorded."""
        self._step, self.active = step, inside and not self._broken
        if len(self._events) >= CHUNK or time.perf_counter() - self._flushed > SECONDS:
            with _Span(self, "timeline write", {}):
                self.flush()

    def add(self, name: str, begin: float, end: float, facts: Mapping[str, Any]) -> None:
        """An event of the thread that calls, from `begin` to `end` in seconds of its clock."""
        if not self.active:
            return
        if self._kept >= self._limit:
            if not self.dropped:
                self.full_at = self._step
            self.dropped += 1
            return
        self._kept += 1
        thread = threading.current_thread()
        self._events.append((thread.name, thread.ident, name, begin, end, facts))

    def call(
        self, name: str, group: str, number: int, facts: Any, begin: float, end: float
    ) -> None:
        """A call of MPI, as `hpctrain.mpi.calls.Log` notes it.

        Collectives are counted by who notes them. Messages are counted here, also where nothing
        is kept, so that the n-th of a sender is the n-th of its receiver.
        """
        told = dict(facts) if facts else {}
        if group:
            told |= {"of": group, "number": number}
        elif "with" in told:
            key = (name[-4:].lower() == "send", told["of"], told["with"], told["tag"])
            self._counts[key] += 1
            told["number"] = self._counts[key]
        self.add(name, begin, end, told)

    def count(self, name: str, bucket: int) -> int:
        """The how-manieth exchange of its kind of a bucket this is."""
        self._counts[name, bucket] += 1
        return self._counts[name, bucket]

    def flush(self) -> None:
        """Write what is in memory. One thread at a time."""
        lines: list[Any] = []
        self._flushed = time.perf_counter()
        for _ in range(len(self._events)):  # others may append meanwhile
            thread, ident, name, begin, end, facts = self._events.popleft()
            if "of" in facts and facts["of"] not in self._groups:
                self._groups[facts["of"]] = len(self._groups)
                lines.append({"group": facts["of"]})
            if "of" in facts:
                facts = {**facts, "of": self._groups[facts["of"]]}
            lines.append([thread, ident, name, round(begin * 1e9), round(end * 1e9), facts])
        self._write(lines, "a")

    def close(self, trailer: Mapping[str, Any]) -> None:
        """Write the rest and a last line. Threads may go on; what they add is lost."""
        self.flush()
        self._write([{**trailer, "dropped": self.dropped, "full_at": self.full_at}], "a")

    def _write(self, lines: list[Any], mode: str) -> None:
        if self._broken:
            return
        try:
            if mode == "w":
                self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, encoding="utf-8") as file:
                file.writelines(ENCODE(line) + "\n" for line in lines)
        except OSError as error:
            self._broken, self.active = True, False
            LOG.warning("the timeline ends here: %s: %s", self._path, error.strerror)


class _Span:
    """Adds an event when it is left, also by an exception."""

    __slots__ = ("_begin", "_facts", "_name", "_recorder")

    def __init__(self, recorder: Recorder, name: str, facts: Mapping[str, Any]) -> None:
        self._recorder, self._name, self._facts = recorder, name, facts

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._recorder.add(self._name, self._begin, time.perf_counter(), self._facts)


def record(recorder: Recorder | None) -> None:
    """From now on spans of all threads go to `recorder`, or nowhere."""
    global _recorder
    _recorder = recorder


def span(name: str, **facts: Any) -> contextlib.AbstractContextManager[None]:
    """What is done inside is an event. `facts`: JSON values.

    With a fact `bucket` it is an exchange: it gets a `sequence` number, the same on all ranks that
    exchange the same buckets in the same order.
    """
    recorder = _recorder
    if recorder is None:
        return NOTHING
    if "bucket" in facts:
        facts["sequence"] = recorder.count(name, facts["bucket"])
    return _Span(recorder, name, facts)


def mark(name: str, **facts: Any) -> None:
    """An event without a duration."""
    if _recorder is not None:
        now = time.perf_counter()
        _recorder.add(name, now, now, facts)
