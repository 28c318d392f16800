"""What run folders hold, read back for a report: curves, times, starts, environment.

Reads metrics.jsonl, STATUS.json and run.toml; a line that a killed run did not finish is left out.

Layer: train. Needs no MPI and no device; knows nothing of pages.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import UsageError

__all__ = ["PHASES", "RANK_PHASES", "Curve", "Restart", "RunRecord", "read_run", "thinned"]

PHASES = ("compute", "messages", "data", "checkpoints", "evaluation")
RANK_PHASES = ("compute", "messages", "data", "checkpoints")  # of one rank's steps
Values = NDArray[np.float64]
Record = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Values over steps, with the smallest and largest where points stand for several."""

    steps: Values
    values: Values
    low: Values
    high: Values


@dataclass(frozen=True)
class Restart:
    """A start that went on from where one before had ended.

    Attributes:
        again: steps that had been done before, and were done again; `again_seconds`: in which they
            had been done. To within the last second of a run that was killed.
        pause: seconds from the last sign of the start before to the first step: the queue, and
            starting.
    """

    time: float
    step: int
    ending: str  # of the start before
    again: int
    again_seconds: float
    pause: float

    @property
    def lost(self) -> float:
        """Seconds that a run in one piece would not have needed."""
        return self.again_seconds + self.pause


@dataclass(frozen=True)
class RunRecord:
    """A run, by what it wrote down; lists of records are in the order of writing."""

    name: str
    folder: Path
    status: Record
    config: dict[str, dict[str, Any]]
    toml: str
    starts: list[Record]
    steps: list[Record]
    evaluations: list[Record]
    checkpoints: list[Record]
    stops: list[Record]
    balances: list[Record]

    def curve(self, key: str, points: int = 200) -> Curve:
        """A number of the steps' records, thinned out to at most `points`."""
        found = [(s["step"], s[key]) for s in self.steps if _finite(s.get(key))]
        return thinned(found, points)

    def evaluated(self, key: str) -> Curve:
        """A number of the evaluations, over the step they were after."""
        return thinned([(e["step"], e[key]) for e in self.evaluations if _finite(e.get(key))], 400)

    def throughput(self, points: int = 200) -> Curve:
        """Samples per second; steps that waited for data count with that time."""
        found = []
        for step in self.steps:
            seconds = step.get("step_seconds", 0.0) + step.get("data_seconds", 0.0)
            if seconds > 0:
                found.append((step["step"], step["samples"] / seconds))
        return thinned(found, points)

    def share(self, key: str, points: int = 200) -> Curve:
        """What fraction of a step its seconds `key` are."""
        found = [
            (s["step"], s[key] / s["step_seconds"])
            for s in self.steps
            if key in s and s.get("step_seconds", 0.0) > 0
        ]
        return thinned(found, points)

    def phases(self) -> dict[str, float]:
        """Seconds on rank 0 by what they were spent on, in the order of `PHASES`."""
        total = {key: _sum(self.steps, f"{key}_seconds") for key in ("step", "data", "message")}
        return {
            "compute": total["step"] - total["message"],
            "messages": total["message"],
            "data": total["data"],
            "checkpoints": _sum(self.checkpoints, "seconds"),
            "evaluation": _sum(self.evaluations, "seconds"),
        }

    def restarts(self) -> list[Restart]:
        """Every start but the first."""
        found, endings = [], self.endings()
        for number, start in enumerate(self.starts[1:], 1):
            first = next((s for s in self.steps if s["time"] > start["time"]), None)
            begun = start["time"]
            if first is not None:
                begun = first["time"] - first.get("step_seconds", 0.0)
            earlier = [s["time"] for s in self.steps if s["time"] < start["time"]]
            last = start.get("last_time") or max(earlier, default=start["time"])
            again, seconds = start.get("again", 0), start.get("again_seconds", 0.0)
            pause = max(begun - last, 0.0)
            found.append(
                Restart(start["time"], start["step"], endings[number - 1], again, seconds, pause)
            )
        return found

    def ranks(self) -> list[tuple[int, str, dict[str, float]]]:
        """Each rank of the newest start, its host, and its seconds a step by `RANK_PHASES`."""
        since = self.starts[-1]["step"] if self.starts else 0
        found = [b for b in self.balances if b["step"] >= since and "seconds" in b]
        found = [b for b in found if len(b["seconds"]) == len(found[-1]["seconds"])]
        if not found:
            return []
        steps = sum(b["steps"] for b in found)
        sums = np.sum([b["seconds"] for b in found], axis=0) / steps
        return [
            (rank, host, dict(zip(RANK_PHASES, (row[0], row[3], row[1], row[2]), strict=True)))
            for rank, (host, row) in enumerate(zip(found[-1]["hosts"], sums.tolist(), strict=True))
        ]

    def last(self, records: list[Record], key: str) -> float:
        """The newest value of `key`; nan where there is none."""
        return next((r[key] for r in reversed(records) if _finite(r.get(key))), math.nan)

    def endings(self) -> list[str]:
        """How each start ended: the reason of its stop, the state of the run, or unknown."""
        texts = []
        for number, start in enumerate(self.starts):
            after = self.starts[number + 1]["time"] if number + 1 < len(self.starts) else math.inf
            stop = [s for s in self.stops if start["time"] <= s["time"] < after]
            if stop:
                texts.append(f"stopped by {stop[-1]['reason']}")
            elif after == math.inf:
                texts.append(str(self.status.get("state", "unknown")))
            else:
                texts.append("killed, or finished and then made longer")
        return texts


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises `UsageError` where it is none."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UsageError(
            f"{folder} is not a run folder: it holds no metrics.jsonl; give the folder that "
            "`hpctrain train` printed"
        )
    records: dict[str, list[Record]] = {}
    with metrics.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
                records.setdefault(record["kind"], []).append(record)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    toml = _text(folder / "run.toml")
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        status=json.loads(_text(folder / "STATUS.json") or "{}"),
        config=tomllib.loads(toml),
        toml=toml,
        starts=records.get("start", []),
        steps=records.get("step", []),
        evaluations=records.get("evaluation", []),
        checkpoints=records.get("checkpoint", []),
        stops=records.get("stop", []),
        balances=records.get("balance", []),
    )


def thinned(found: Iterable[tuple[float, float]], points: int) -> Curve:
    """At most `points` points: means of equally many neighbours, with their extremes."""
    pairs = np.array(list(found), np.float64).reshape(-1, 2)
    group = max(-(-len(pairs) // points), 1)
    starts = np.arange(0, len(pairs), group)
    if not len(starts):
        empty = np.zeros(0)
        return Curve(empty, empty, empty, empty)
    sizes = np.diff(np.append(starts, len(pairs)))
    steps, values = (np.add.reduceat(column, starts) / sizes for column in pairs.T)
    low, high = (edge.reduceat(pairs[:, 1], starts) for edge in (np.minimum, np.maximum))
    return Curve(steps, values, low, high)


def _sum(records: list[Record], key: str) -> float:
    return float(sum(record.get(key, 0.0) for record in records))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
