"""The pieces that a report's page is put together from: style, sections, tables, durations.

Layer: train. Knows nothing of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from hpctrain.train.report_plot import COLORS

__all__ = ["STYLE", "Table", "clock", "legend", "of", "section", "table", "value"]

STYLE = """
:root { --text: #1c2330; --soft: #5b6472; --back: #ffffff; --on: #ffffff; --grid: #e3e6ea;
  --line: #9aa2ad;
  --s0: #1f6fb2; --s1: #d1662b; --s2: #2c8a57; --s3: #8a4fa8; --s4: #b8324f; --s5: #7a6a1f;
  --s6: #2a8f96; --s7: #6b6f76; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --soft: #9aa3b0;
  --back: #14181f; --on: #14181f;
  --grid: #2a303a; --line: #5b6472; --s0: #5aa9e6; --s1: #f0915a; --s2: #5cc08a; --s3: #c08be0;
  --s4: #ee6f8b; --s5: #c9b458; --s6: #5cc7cf; --s7: #a5a9b0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1180px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 30px 0 8px; }
h3 { font-size: 14px; font-weight: 600; margin: 12px 0 4px; }
p { color: var(--soft); margin: 4px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 14px; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg.bars { max-width: 700px; }
svg .title { fill: var(--text); font-size: 13px; font-weight: 600; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; } svg .on { fill: var(--on); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .mark { stroke: var(--line); stroke-dasharray: 3 3; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .band { opacity: 0.16; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 6px 0; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; white-space: nowrap; } th { color: var(--soft); font-weight: 500; }
.wide { overflow-x: auto; } .key { display: inline-block; width: 11px; height: 11px;
  border-radius: 2px; margin: 0 6px 0 14px; } .key:first-child { margin-left: 0; }
pre { background: var(--grid); padding: 12px; overflow-x: auto; font-size: 13px; }
"""
Table = tuple[Sequence[str], list[Sequence[Any]]]


def section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}"


def legend(names: Iterable[str]) -> str:
    keys = (
        f'<span class="key" style="background:var(--s{number % COLORS})"></span>{escape(name)}'
        for number, name in enumerate(names)
    )
    return f"<div>{''.join(keys)}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def of(done: int, total: int) -> str:
    return f"{done:,} of {total:,}" if total else f"{done:,}"


def value(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"
