"""A run's recorded events, all ranks on one clock, in Chrome's trace format.

The file opens in https://ui.perfetto.dev and chrome://tracing. A process is a host (of a start),
its tracks are the ranks' threads: computing, communication, data, checkpoint. Arrows lead from a
message's send to the end of its receive, and, for a collective in which all wait for all, from the
rank that came last to the one that waited longest.

A rank's clock is ahead of rank 0's by what `hpctrain.mpi.clocks` measured, before the first event
and after the last; in between it is taken to drift evenly.

Layer: train. Reads what `hpctrain.timeline` wrote. Needs no MPI and no device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.errors import UsageError
from hpctrain.train.timeline_arrows import Arrow, Shown, arrows

__all__ = ["Event", "Part", "Summary", "placed", "read_parts", "write_trace"]

TRACKS = {
    "MainThread": "compute",
    "communication": "communication",
    "hpctrain-prefetch": "data",
    "checkpoint": "checkpoint",
}
LANES = 64  # tracks of a rank at most; those beyond share the last
NOTE = (
    "Host clocks. On a GPU a span is the host's side, from the first launch to the return of the "
    "last; kernels run later. clock_error_us bounds the difference between tracks of different "
    "ranks, given an even drift; where drift_corrected is false the run ended early and only the "
    "clocks at its start are known. Starts are placed by the wall clock of rank 0."
)


class Event(NamedTuple):
    """Of a thread, from `begin` to `end`: nanoseconds of the rank's clock."""

    thread: str
    ident: int
    name: str
    begin: int
    end: int
    facts: dict[str, Any]


@dataclass
class Part:
    """What a rank recorded in one start."""

    header: dict[str, Any]
    trailer: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return int(self.header["rank"])

    @property
    def error(self) -> float:
        """Seconds that `corrected` may be wrong by."""
        ends = [self.header["clock"], self.trailer.get("clock")]
        return max(float(end[2]) for end in ends if end)

    def corrected(self, time: int) -> int:
        """A time of this rank's clock in nanoseconds of rank 0's."""
        at, by, _ = self.header["clock"]
        last, slope = self.trailer.get("clock"), 0.0
        if last and last[0] > at:
            slope = (last[1] - by) / (last[0] - at)
        ahead: float = by * 1e9 + slope * (time - at * 1e9)
        return time - round(ahead)


@dataclass(frozen=True)
class Summary:
    """Of a file that was written."""

    events: int
    arrows: int
    nbytes: int
    facts: dict[str, Any]  # as in the file


def read_parts(folder: Path) -> list[list[Part]]:
    """The parts of each start of a run, in the order of starts, each in that of ranks.

    Raises `UsageError` where there are none.
    """
    starts = [
        [part for file in sorted(start.glob("rank_*.jsonl")) if (part := _read(file))]
        for start in sorted((folder / "timeline").glob("step_*"))
    ]
    if not any(starts):
        raise UsageError(
            f"{folder} holds no timeline; record one with `hpctrain train --timeline all` or "
            "`--timeline 100:110` (log.timeline)"
        )
    return [parts for parts in starts if parts and parts[0].rank == 0]


def _read(file: Path) -> Part | None:
    """A rank's part; a line that a killed run did not finish is left out."""
    part: Part | None = None
    groups: list[str] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, list) and part:
                event = Event(*found)
                if "of" in event.facts:
                    event.facts["of"] = groups[event.facts["of"]]
                part.events.append(event)
            elif part is None:
                part = Part(found)
            elif "group" in found:
                groups.append(found["group"])
            else:
                part.trailer = found
    return part


def write_trace(starts: list[list[Part]], out: Path) -> Summary:
    """Write the trace. Raises `UsageError` where `out` cannot be written."""
    metadata: list[dict[str, Any]] = []
    shown: list[Shown] = []
    found: list[Arrow] = []
    facts: dict[str, Any] = {"note": NOTE, "starts": []}
    for number, parts in enumerate(starts):
        here = placed(parts, number, metadata)
        made, backwards = arrows(here)
        shown += here
        found += made
        facts["starts"].append({**_facts(parts), "arrows_backwards": backwards})
    first = min((each.begin for each in shown), default=0)
    lines = [(each.begin, -each.end, _slice(each, first)) for each in shown]
    for number, arrow in enumerate(found):
        lines += [(arrow.begin, 0, _end("s", number, arrow, first))]
        lines += [(arrow.end, 0, _end("f", number, arrow, first))]
    lines.sort(key=lambda line: line[:2])
    try:
        with out.open("w", encoding="utf-8") as file:
            file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(facts)},\n')
            texts = (_text(line) for line in [*metadata, *(text for _, _, text in lines)])
            file.write('"traceEvents":[\n' + ",\n".join(texts) + "\n]}\n")
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
    return Summary(len(shown), len(found), out.stat().st_size, facts)


def _facts(parts: list[Part]) -> dict[str, Any]:
    """What is to be known of a start: clocks, and all that is not there."""
    header, present = parts[0].header, {part.rank for part in parts}
    return {
        **{key: header[key] for key in ("version", "from_step", "ranks", "device", "steps")},
        "clock_error_us": round(max(part.error for part in parts) * 1e6, 3),
        "drift_corrected": all("clock" in part.trailer for part in parts),
        "clock_ahead_us": {p.rank: round(p.header["clock"][1] * 1e6, 3) for p in parts},
        "dropped": {
            part.rank: {"events": part.trailer["dropped"], "from_step": part.trailer["full_at"]}
            for part in parts
            if part.trailer.get("dropped")
        },
        "missing_ranks": sorted(set(range(header["ranks"])) - present),
        "ended_early": [part.rank for part in parts if "clock" not in part.trailer],
    }


def placed(parts: list[Part], start: int, metadata: list[dict[str, Any]]) -> list[Shown]:
    """The events of a start on its tracks, in nanoseconds since 1970; the tracks' names."""
    header = parts[0].header
    shift = round(header["wall"] * 1e9) - round(header["clock"][0] * 1e9)
    hosts: dict[str, int] = {}
    shown = []
    for part in parts:
        host, rank = part.header["host"], part.rank
        if host not in hosts:
            hosts[host] = 1_000_000 * start + len(hosts) + 1
            name = f"start from step {header['from_step']}, {host}"
            metadata.append(_named("process_name", hosts[host], 0, {"name": name}))
        pid = hosts[host]
        lanes = _lanes(part.events)
        names = list(dict.fromkeys(lanes.values()))
        for index, (kind, lane) in enumerate(names):
            name = f"rank {rank} {kind}" + (f" {lane + 1}" if lane else "")
            tid = rank * LANES + min(index, LANES - 1)
            metadata.append(_named("thread_name", pid, tid, {"name": name}))
            metadata.append(_named("thread_sort_index", pid, tid, {"sort_index": tid}))
        for event in part.events:
            tid = rank * LANES + min(names.index(lanes[event.thread, event.ident]), LANES - 1)
            begin, end = part.corrected(event.begin) + shift, part.corrected(event.end) + shift
            shown.append(Shown(rank, pid, tid, event.name, begin, end, event.facts))
    return shown


def _lanes(events: list[Event]) -> dict[tuple[str, int], tuple[str, int]]:
    """For each thread its kind and the number of its track: one at a time uses a track."""
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    for event in events:
        begin, end = spans.get((event.thread, event.ident), (event.begin, event.end))
        spans[event.thread, event.ident] = min(begin, event.begin), max(end, event.end)
    order = list(TRACKS)
    lanes: dict[tuple[str, int], tuple[str, int]] = {}
    ends: dict[str, list[int]] = {}
    for thread, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        kind = TRACKS.get(thread[0], thread[0])
        used = ends.setdefault(kind, [])
        lane = next((n for n, last in enumerate(used) if last <= begin), len(used))
        used[lane : lane + 1] = [end]
        lanes[thread] = kind, lane

    def place(thread: tuple[str, int]) -> tuple[int, tuple[str, int]]:
        return (order.index(thread[0]) if thread[0] in order else len(order)), lanes[thread]

    return {thread: lanes[thread] for thread in sorted(lanes, key=place)}


def _named(name: str, pid: int, tid: int, told: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": told}


def _slice(each: Shown, first: int) -> dict[str, Any]:
    told = {key: _short(value) for key, value in each.facts.items()}
    place = {"pid": each.pid, "tid": each.tid, "ts": _us(each.begin - first)}
    if each.begin == each.end and each.name == "stop":
        return {"ph": "i", "s": "p", **place, "name": each.name, "args": told}
    span = {"ph": "X", **place, "dur": _us(each.end - each.begin), "name": each.name}
    return {**span, "args": told} if told else span


def _end(ph: str, number: int, arrow: Arrow, first: int) -> dict[str, Any]:
    pid, tid, time = (*arrow.source, arrow.begin) if ph == "s" else (*arrow.target, arrow.end)
    told = {"ph": ph, "id": number, "pid": pid, "tid": tid, "ts": _us(time - first)}
    return {**told, "name": arrow.name, "cat": "arrow"} | ({"bp": "e"} if ph == "f" else {})


def _short(value: Any) -> Any:
    """Lists of ranks may be long; 24 characters tell enough."""
    return value[:23] + "..." if isinstance(value, str) and len(value) > 26 else value


def _us(nanoseconds: int) -> float:
    return nanoseconds / 1000


_text = json.JSONEncoder(separators=(",", ":")).encode
