"""What a report says of ranks beside one another, of their messages, and of restarts.

Layer: train. Is given what was read; see `hpctrain.train.report`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import Any

from hpctrain.train.report import RANK_PHASES, RunRecord
from hpctrain.train.report_html import clock, legend, table
from hpctrain.train.report_plot import Line, bars, chart

__all__ = ["balance", "communication", "restarts"]

SHOWN = 16  # ranks of a run; of more, those with the most time of their own
NEWEST = 30  # lines about slow ranks
OWN = ("compute", "data", "checkpoints")  # the rest of a step is spent in messages, waiting too


def communication(runs: Sequence[RunRecord]) -> str:
    """Time in MPI, what of it lay behind the computation, and its share of a step over the run."""
    head = ("run", "step", "in messages", "exchange", "behind the computation", "update")
    keys = (
        "step_seconds",
        "message_seconds",
        "exchange_seconds",
        "hidden_seconds",
        "update_seconds",
    )
    rows = [(run.name, *(_each_step(run, key) for key in keys)) for run in runs]
    lines = [Line(run.name, run.share("message_seconds"), n) for n, run in enumerate(runs)]
    note = (
        "<p>Means of a step on rank 0. Messages, and exchange (of gradients and parameters), "
        "include waiting for slower ranks; what a thread does behind the computation costs no "
        "time.</p>"
    )
    share = chart("share of a step in messages", lines, linear=True)
    return f'{note}{table(head, rows)}<div class="charts">{share}</div>'


def _each_step(run: RunRecord, key: str) -> str:
    found = [step[key] for step in run.steps if key in step]
    return f"{1000 * sum(found) / len(run.steps):.3g} ms" if found else "-"


def balance(runs: Sequence[RunRecord]) -> str:
    """Each rank's time by phase, and who was said to keep the others waiting."""
    parts = []
    for run in runs:
        ranks = run.ranks()
        if not ranks:
            continue
        own = {rank: sum(spent[key] for key in OWN) for rank, _, spent in ranks}
        kept = sorted(sorted(own, key=lambda rank: -own[rank])[:SHOWN])
        rows = [(f"rank {rank}, {host}"[:24], spent) for rank, host, spent in ranks if rank in kept]
        which = f"the {SHOWN} slowest of {len(ranks)} ranks" if len(ranks) > SHOWN else "all ranks"
        parts.append(f"<h3>{escape(run.name)}: {which}</h3>{bars(rows)}")
    head = ("run", "step", "slow rank", "host", "phase", "times the usual", "more a step")
    slow = [
        (run.name, record["step"], each["rank"], each["host"], each["phase"],
         f"{each['ratio']:.2f}", f"{1000 * each['extra']:.3g} ms")
        for run in runs
        for record in run.balances
        for each in record.get("slowest", [])
    ]  # fmt: skip
    if not any(run.balances for run in runs):
        return "<p>Not compared yet: that is done in the first minute, or at the end.</p>"
    note = (
        "<p>Of the newest start, shares of a step. A rank with more time of its own keeps the "
        "others waiting: theirs is in messages.</p>"
    )
    told = table(head, slow[-NEWEST:]) if slow else "<p>No rank took 10 % longer than most.</p>"
    if len(slow) > NEWEST:
        told = f"<p>Slow ranks, the newest {NEWEST} of {len(slow)} lines:</p>{told}"
    return (note + legend(RANK_PHASES) + "".join(parts) if parts else "") + told


def restarts(runs: Sequence[RunRecord]) -> str:
    """Each restart: what was done again, and the time that it cost."""
    head = ("run", "at", "start before", "from step", "steps done again", "their time",
            "until the first step", "lost")  # fmt: skip
    rows: list[Sequence[Any]] = []
    for run in runs:
        found = run.restarts()
        rows += [
            (run.name, _at(r.time), r.ending, r.step, r.again, clock(r.again_seconds),
             clock(r.pause), clock(r.lost))
            for r in found
        ]  # fmt: skip
        if len(found) > 1:
            total = (sum(r.again for r in found), *(
                clock(sum(each))
                for each in zip(*((r.again_seconds, r.pause, r.lost) for r in found), strict=True)
            ))  # fmt: skip
            rows.append((run.name, "", "all of them", "", *total))
    if not rows:
        return "<p>None.</p>"
    note = (
        "<p>Until the first step: the time in the queue, and starting. Lost is both together. A "
        "run that was killed may have done the steps of one more second.</p>"
    )
    return note + table(head, rows)


def _at(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
