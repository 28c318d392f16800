"""What `hpctrain bench scaling` makes of the runs: seconds by phase, speed-up, efficiency.

Of each run the first fifth of its steps is left out (threads start, caches fill), and the rest is
averaged, so that a step that waited for a disk counts. Of several runs the one with the median time
stands for all; its phases add up to its time.

Phases are those of rank 0. In `exchange` it also waits for slower ranks; what a thread exchanges
behind the computation is in no phase. On a GPU, where launching a kernel does not wait for it,
`exchange` has the waiting for the kernels as well.

Layer: cli. Is given records of runs; starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.errors import HpctrainError

if TYPE_CHECKING:
    from hpctrain.cli.bench_scaling import Setting
    from hpctrain.train.report import RunRecord

__all__ = ["PHASES", "Figures", "Row", "figures_of", "notes_of", "rows_of", "text_of"]

PHASES = ("compute", "data", "exchange", "update")
LEFT_OUT = 5  # the first step in so many


@dataclass(frozen=True)
class Figures:
    """One run. `seconds` is a mean step's, `phases` its parts; `host` is rank 0's."""

    seconds: float
    phases: dict[str, float]
    nodes: int
    threads: int
    device: str
    host: str


@dataclass(frozen=True)
class Row:
    """A line of the table. `speedup` and `efficiency` are against the fewest ranks of its kind.

    `runs`: the seconds per step of each run, of which `seconds` is the median.
    """

    kind: str
    ranks: int
    nodes: int
    threads: int
    batch: int
    samples_per_second: float
    seconds: float
    speedup: float
    efficiency: float
    phases: dict[str, float]
    runs: list[float]
    device: str
    host: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        return asdict(self)


def figures_of(record: RunRecord, ranks: int) -> Figures:
    """Figures of a run. Raises `HpctrainError` where it is not one of so many ranks."""
    started = record.starts[-1] if record.starts else {}
    steps = record.steps[len(record.steps) // LEFT_OUT :]
    if started.get("ranks") != ranks or not steps:
        raise HpctrainError(
            f"{record.folder} holds {len(record.steps)} steps on {started.get('ranks', 'no')} "
            f"ranks, not a run on {ranks}; look at what --launch starts"
        )
    mean = {
        key: sum(step[f"{key}_seconds"] for step in steps) / len(steps)
        for key in ("data", "step", "exchange", "update")
    }
    compute = max(mean["step"] - mean["exchange"] - mean["update"], 0.0)
    phases = {"compute": compute} | {key: mean[key] for key in PHASES[1:]}
    return Figures(
        mean["data"] + mean["step"],
        phases,
        started["nodes"],
        started["threads"],
        started["device"],
        started["host"],
    )


def rows_of(found: Mapping[Setting, Sequence[Figures]]) -> list[Row]:
    """The table, strong scaling first, by ranks; a setting without runs has no row."""
    rows: list[Row] = []
    for kind in ("strong", "weak"):
        base: tuple[int, float] | None = None
        settings = [s for s in found if kind in s.kinds and found[s]]
        for setting in sorted(settings, key=lambda s: s.ranks):
            runs = sorted(found[setting], key=lambda figures: figures.seconds)
            middle = runs[(len(runs) - 1) // 2]
            speed = setting.batch / middle.seconds
            base = base or (setting.ranks, speed)
            speedup = speed / base[1]
            rows.append(
                Row(
                    kind,
                    setting.ranks,
                    middle.nodes,
                    middle.threads,
                    setting.batch,
                    speed,
                    middle.seconds,
                    speedup,
                    speedup * base[0] / setting.ranks,
                    middle.phases,
                    [figures.seconds for figures in found[setting]],
                    middle.device,
                    middle.host,
                )
            )
    return rows


def notes_of(rows: Sequence[Row], microbatch: int, cpu: str) -> list[str]:
    """What a reader of the figures must know: too few cores, uneven work, unequal threads."""
    notes = []
    cores, threads = cores_here()
    here = os.uname().nodename
    crowded = sorted({r.ranks for r in rows if (r.nodes, r.host) == (1, here) and r.ranks > cores})
    if crowded:
        on = f"{cores} core{'s' * (cores != 1)}"
        if threads != cores:
            on += f" with {threads} hardware threads"
        notes.append(
            f"{_counts(crowded)} ran on {on} ({cpu}): ranks take turns there, and this says "
            "nothing about scaling; use more nodes, or fewer ranks"
        )
    blas = {row.ranks: row.threads for row in rows if row.device == "cpu"}
    if len(set(blas.values())) > 1:
        told = ", ".join(f"{ranks}: {threads}" for ranks, threads in sorted(blas.items()))
        notes.append(
            "BLAS threads per rank differ, since ranks share a node's cores (ranks: threads: "
            f"{told}); --set parallel.threads=1 compares ranks of one thread"
        )
    for ranks, batch in sorted({(row.ranks, row.batch) for row in rows}):
        parts = -(-batch // microbatch)
        most = -(-parts // ranks)
        if parts % ranks:
            notes.append(
                f"a batch of {batch} is {parts} microbatches of {microbatch}: on {ranks} ranks one "
                f"has {most}, which allows an efficiency of {parts / ranks / most:.0%} at most"
            )
    if any(row.device != "cpu" for row in rows):
        notes.append("on a GPU the exchange has the waiting for the kernels before it")
    return notes


def cores_here() -> tuple[int, int]:
    """Cores, and hardware threads of them, that this process may use."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for number in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(path.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(number))
    return len(cores), len(allowed)


def _counts(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks))} rank{'s' * (list(ranks) != [1])}"


def text_of(rows: Sequence[Row], steps: int, repeat: int, notes: Sequence[str]) -> list[str]:
    """The tables and notes as lines."""
    from hpctrain.cli.bench import table

    lines: list[str] = []
    head = ["ranks", "nodes", "threads", "batch", "samples/s", "ms/step", "speed-up", "efficiency"]
    for kind, what in (("strong", "one global batch"), ("weak", "one batch for each rank")):
        mine = [row for row in rows if row.kind == kind]
        if not mine:
            continue
        lines.append(f"{kind} scaling ({what}); {steps} steps, median of {repeat}, phases in ms")
        cells = [
            [
                str(row.ranks),
                str(row.nodes),
                str(row.threads),
                str(row.batch),
                f"{row.samples_per_second:,.0f}",
                f"{row.seconds * 1e3:.2f}",
                f"{row.speedup:.2f}",
                f"{row.efficiency:.0%}",
                *(f"{row.phases[phase] * 1e3:.2f}" for phase in PHASES),
            ]
            for row in mine
        ]
        lines += [*table([*head, *PHASES], cells, left=0), ""]
    return [*lines, *(f"note: {note}" for note in notes)]
