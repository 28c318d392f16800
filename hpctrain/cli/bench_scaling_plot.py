"""The plot of `hpctrain bench scaling --plot`: samples per second over ranks, and time by phase.

The left half has a line for each kind of scaling, on logarithmic axes, with a dashed one for an
efficiency of 100 %; the right half a bar for each row of the table. Plain SVG.

Layer: cli. Is given rows of the table; knows nothing of how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from hpctrain.cli.bench_plot import COLORS, STYLE, Axis
from hpctrain.cli.bench_scaling_figures import PHASES, Row
from hpctrain.errors import UsageError

__all__ = ["plot", "write_plot"]

WIDTH, HEIGHT = 900, 380
LEFT, TOP, BOTTOM = 64, 44, 60
MIDDLE, BARS = 420, 560  # where the left half ends, and where the bars begin
BAR = 22  # height of a bar, and as much again for the space around it


def plot(rows: Sequence[Row], title: str) -> str:
    """SVG text."""
    height = max(HEIGHT, TOP + BOTTOM + BAR * 3 // 2 * len(rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20">{escape(title)}: samples/s over ranks</text>',
        f'<text x="{BARS}" y="20">a step by phase, ms</text>',
    ]
    if rows:
        parts += [*_lines(rows), *_bars(rows)]
    return "\n".join([*parts, "</svg>", ""])


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in ("strong", "weak")}
    ideals = {
        kind: [(row.ranks, row.samples_per_second / row.efficiency) for row in mine]
        for kind, mine in kinds.items()
    }
    speeds = [row.samples_per_second for row in rows]
    speeds += [speed for ideal in ideals.values() for _, speed in ideal]
    across = Axis([row.ranks for row in rows], 2, LEFT, MIDDLE)
    up = Axis(speeds, 10, bottom, TOP)
    for count in across.marks:
        x = f"{across(count):.1f}"
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{count:g}</text>'
    for speed in up.marks:
        y = up(speed)
        yield f'<line class="grid" x1="{LEFT}" x2="{MIDDLE}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{speed:,g}</text>'
    for number, (kind, mine) in enumerate(kinds.items()):
        if not mine:
            continue
        color = COLORS[number]
        measured = [(row.ranks, row.samples_per_second) for row in mine]
        for points, dashes in ((ideals[kind], ' stroke-dasharray="5 4"'), (measured, "")):
            line = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
            yield f'<polyline points="{line}" stroke="{color}"{dashes}/>'
        for a, b in measured:
            yield f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3" fill="{color}"/>'
        place = f'x="{LEFT + 110 * number}" y="{HEIGHT - 12}"'
        yield f'<text {place} style="fill:{color}">{kind} scaling</text>'
    yield f'<text x="{LEFT + 220}" y="{HEIGHT - 12}">dashed: efficiency 100 %</text>'


def _bars(rows: Sequence[Row]) -> Iterator[str]:
    longest = max(row.seconds for row in rows) or 1.0
    scale = (WIDTH - BARS - 70) / longest
    y = TOP
    for row in rows:
        x = float(BARS)
        name = f"{row.kind} {row.ranks}"
        yield f'<text x="{BARS - 8}" y="{y + 15}" text-anchor="end">{name}</text>'
        for number, phase in enumerate(PHASES):
            width = row.phases[phase] * scale
            told = f"{phase}: {row.phases[phase] * 1e3:.3g} ms"
            yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
            yield f'fill="{COLORS[2 + number]}"><title>{told}</title></rect>'
            x += width
        yield f'<text x="{x + 6:.1f}" y="{y + 15}">{row.seconds * 1e3:.3g}</text>'
        y += BAR * 3 // 2
    for number, phase in enumerate(PHASES):
        x = BARS + 80 * number
        yield f'<rect x="{x}" y="{y + 8}" width="10" height="10" fill="{COLORS[2 + number]}"/>'
        yield f'<text x="{x + 14}" y="{y + 17}">{phase}</text>'


def write_plot(target: str, rows: Sequence[Row], title: str) -> None:
    """Write the plot to a file. Raises `UsageError` where that cannot be done."""
    try:
        Path(target).write_text(plot(rows, title), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write --plot {target}: {error.strerror}") from None
