"""Runs as one HTML page: curves, time by phase, starts, environment, settings that differ.

The page is one file: no script, no font, no picture from elsewhere.

Layer: train. Is given what was read; see `hpctrain.train.report`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from hpctrain import __version__
from hpctrain.train.report import PHASES, RunRecord
from hpctrain.train.report_plot import COLORS, Line, bars, chart

__all__ = ["page"]

STYLE = """
:root { --text: #1c2330; --soft: #5b6472; --back: #ffffff; --grid: #e3e6ea; --line: #9aa2ad;
  --s0: #1f6fb2; --s1: #d1662b; --s2: #2c8a57; --s3: #8a4fa8; --s4: #b8324f; --s5: #7a6a1f;
  --s6: #2a8f96; --s7: #6b6f76; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --soft: #9aa3b0; --back: #14181f;
  --grid: #2a303a; --line: #5b6472; --s0: #5aa9e6; --s1: #f0915a; --s2: #5cc08a; --s3: #c08be0;
  --s4: #ee6f8b; --s5: #c9b458; --s6: #5cc7cf; --s7: #a5a9b0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1180px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 30px 0 8px; }
p { color: var(--soft); margin: 4px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg.bars { max-width: 700px; }
svg .title { fill: var(--text); font-size: 13px; font-weight: 600; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; } svg .on { fill: #fff; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .mark { stroke: var(--line); stroke-dasharray: 3 3; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .band { opacity: 0.16; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 6px 0; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; } th { color: var(--soft); font-weight: 500; }
.wide { overflow-x: auto; } .key { display: inline-block; width: 11px; height: 11px;
  border-radius: 2px; margin: 0 6px 0 14px; } .key:first-child { margin-left: 0; }
pre { background: var(--grid); padding: 12px; overflow-x: auto; font-size: 13px; }
"""
Table = tuple[Sequence[str], list[Sequence[Any]]]
FACTS = {
    "version": "hpctrain", "ranks": "ranks", "nodes": "nodes", "device": "device",
    "dtype": "dtype", "threads": "BLAS threads per rank", "mpi": "MPI", "python": "Python",
    "numpy": "NumPy", "host": "host of rank 0", "system": "system", "dataset_id": "data set",
}  # fmt: skip


def page(runs: Sequence[RunRecord]) -> str:
    """The page, for at least one run."""
    title = "hpctrain: " + ", ".join(run.name for run in runs)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    sections = [
        f"<h1>{escape(title)}</h1><p>Made {made} by hpctrain {__version__}.</p>",
        _section("Runs", _legend([run.name for run in runs]) + _table(*_overview(runs))),
        _section("Curves", _charts(runs)),
        _section("Time by phase", _time(runs)),
        _section("Starts", _table(*_starts(runs))),
        _section("Environment", _table(*_environment(runs))),
        _section("Settings", _settings(runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}"


def _legend(names: Iterable[str]) -> str:
    keys = (
        f'<span class="key" style="background:var(--s{number % COLORS})"></span>{escape(name)}'
        for number, name in enumerate(names)
    )
    return f"<div>{''.join(keys)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _overview(runs: Sequence[RunRecord]) -> Table:
    head = ("run", "state", "steps", "loss of the last 50 steps", "test loss", "test accuracy",
            "samples/s", "time", "starts")  # fmt: skip
    rows: list[Sequence[Any]] = []
    for run in runs:
        losses = [step["loss"] for step in run.steps[-50:]]
        speeds = run.throughput().values
        rows.append(
            (
                run.name,
                run.status.get("state", "unknown"),
                _of(len(run.steps), run.starts[-1]["total_steps"] if run.starts else 0),
                _value(float(np.mean(losses)) if losses else math.nan, ".4f"),
                _value(run.last(run.evaluations, "loss"), ".4f"),
                _value(run.last(run.evaluations, "accuracy"), ".2%"),
                _value(float(np.median(speeds)) if len(speeds) else math.nan, ",.0f"),
                _clock(sum(run.phases().values())),
                len(run.starts),
            )
        )
    return head, rows


def _charts(runs: Sequence[RunRecord]) -> str:
    restarts = [start["step"] for run in runs for start in run.starts[1:]]

    def lines(curve: Any, dots: bool = False) -> list[Line]:
        return [Line(run.name, curve(run), number, dots) for number, run in enumerate(runs)]

    charts = [
        chart("training loss", lines(lambda run: run.curve("loss")), marks=restarts),
        chart("test loss", lines(lambda run: run.evaluated("loss"), True), marks=restarts),
        chart("training accuracy", lines(lambda run: run.curve("accuracy"))),
        chart("test accuracy", lines(lambda run: run.evaluated("accuracy"), True)),
        chart("samples per second", lines(lambda run: run.throughput()), marks=restarts),
        chart("norm of the gradient", lines(lambda run: run.curve("grad_norm"))),
        chart("learning rate", lines(lambda run: run.curve("lr")), linear=True),
    ]
    note = "<p>Lines are means of neighboring steps, bands their extremes"
    note += "; dashed lines are restarts.</p>" if restarts else ".</p>"
    return f'{note}<div class="charts">{"".join(charts)}</div>'


def _time(runs: Sequence[RunRecord]) -> str:
    head = ("run", *PHASES, "restarting")
    rows, table = [], []
    for run in runs:
        phases = run.phases()
        rows.append((run.name, phases))
        cells = [_clock(seconds) for seconds in phases.values()]
        table.append((run.name, *cells, _lost(run)))
    note = "<p>On rank 0. Messages include waiting for slower ranks.</p>"
    return note + _legend(PHASES) + bars(rows) + _table(head, table)


def _lost(run: RunRecord) -> str:
    """Time between a start's last step and the next start's first, the queue's share included."""
    lost = 0.0
    for start in run.starts[1:]:
        before = [s["time"] for s in run.steps if s["time"] < start["time"]]
        after = [s["time"] for s in run.steps if s["time"] > start["time"]]
        if before and after:
            lost += min(after) - max(before)
    return _clock(lost)


def _starts(runs: Sequence[RunRecord]) -> Table:
    head = ("run", "at", "from step", "ranks", "nodes", "device", "how it ended")
    rows: list[Sequence[Any]] = []
    for run in runs:
        for start, ending in zip(run.starts, run.endings(), strict=True):
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
            where = (start.get("ranks"), start.get("nodes"), start.get("device"))
            rows.append((run.name, at, start["step"], *where, ending))
    return head, rows


def _environment(runs: Sequence[RunRecord]) -> Table:
    rows: list[Sequence[Any]] = []
    for key, name in FACTS.items():
        cells = [
            " then ".join(dict.fromkeys(str(s[key]) for s in run.starts if key in s))
            for run in runs
        ]
        if any(cells):
            rows.append((name, *cells))
    return ("", *(run.name for run in runs)), rows


def _settings(runs: Sequence[RunRecord]) -> str:
    values = [
        {f"{s}.{k}": v for s, section in run.config.items() for k, v in section.items()}
        for run in runs
    ]
    keys = sorted({key for settings in values for key in settings})
    rows: list[Sequence[Any]] = [
        (key, *(settings.get(key, "") for settings in values)) for key in keys
    ]
    rows = [row for row in rows if len(set(map(str, row[1:]))) > 1]
    head = ("differs", *(run.name for run in runs))
    different = _table(head, rows) if len(runs) > 1 else ""
    files = (
        f"<details><summary>{escape(run.name)}/run.toml</summary><pre>{escape(run.toml)}</pre>"
        "</details>"
        for run in runs
    )
    return different + "".join(files)


def _of(done: int, total: int) -> str:
    return f"{done:,} of {total:,}" if total else f"{done:,}"


def _value(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"
