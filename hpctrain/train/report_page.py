"""Runs as one HTML page: curves, time by phase, ranks, starts, environment, settings that differ.

The page is one file: no script, no font, no picture from elsewhere.

Layer: train. Is given what was read; see `hpctrain.train.report`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from hpctrain import __version__
from hpctrain.train.report import PHASES, RunRecord
from hpctrain.train.report_html import STYLE, Table, clock, legend, of, section, table, value
from hpctrain.train.report_plot import Line, bars, chart
from hpctrain.train.report_ranks import balance, communication, restarts

__all__ = ["page"]

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
        section("Runs", legend([run.name for run in runs]) + table(*_overview(runs))),
        section("Curves", _charts(runs)),
        section("Time by phase", _time(runs)),
        section("Communication", communication(runs)),
        section("Balance of the ranks", balance(runs)),
        section("Starts", table(*_starts(runs))),
        section("Restarts", restarts(runs)),
        section("Environment", table(*_environment(runs))),
        section("Settings", _settings(runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


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
                of(len(run.steps), run.starts[-1]["total_steps"] if run.starts else 0),
                value(float(np.mean(losses)) if losses else math.nan, ".4f"),
                value(run.last(run.evaluations, "loss"), ".4f"),
                value(run.last(run.evaluations, "accuracy"), ".2%"),
                value(float(np.median(speeds)) if len(speeds) else math.nan, ",.0f"),
                clock(sum(run.phases().values())),
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
    rows, lines = [], []
    for run in runs:
        phases = run.phases()
        rows.append((run.name, phases))
        cells = [clock(seconds) for seconds in phases.values()]
        lines.append((run.name, *cells, clock(sum(each.pause for each in run.restarts()))))
    note = "<p>On rank 0. Messages include waiting for slower ranks.</p>"
    return note + legend(PHASES) + bars(rows) + table(head, lines)


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
    different = table(head, rows) if len(runs) > 1 else ""
    files = (
        f"<details><summary>{escape(run.name)}/run.toml</summary><pre>{escape(run.toml)}</pre>"
        "</details>"
        for run in runs
    )
    return different + "".join(files)
