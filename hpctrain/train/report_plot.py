"""Line charts and stacked bars as SVG text, for a page that needs no network and no script.

Layer: train. Knows nothing of runs. Colors are the page's: --s0, --s1, ... and --line, --text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from hpctrain.train.report import Curve, Values

__all__ = ["COLORS", "Line", "bars", "chart", "ticks"]

COLORS = 8
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 40


@dataclass(frozen=True)
class Line:
    """A curve, what it is called, and the number of its color."""

    name: str
    curve: Curve
    color: int
    dots: bool = False  # for few points that stand for themselves


@dataclass(frozen=True)
class Axis:
    """From values to pixels."""

    first: float
    last: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, values: Values) -> Values:
        first, last = self.first, self.last
        if self.logarithmic:
            values, first, last = np.log10(values), math.log10(first), math.log10(last)
        spread = (last - first) or 1.0
        scaled: Values = self.start + (values - first) / spread * (self.stop - self.start)
        return scaled


def chart(
    title: str, lines: Sequence[Line], marks: Sequence[float] = (), linear: bool = False
) -> str:
    """A chart over steps, or "" where there is no point.

    `marks` are steps with a vertical line. Values that span much are drawn by their logarithms,
    unless `linear`.
    """
    lines = [line for line in lines if len(line.curve.steps)]
    if not lines:
        return ""
    across, up = _axes(lines, linear)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="16" class="title">{escape(title)}</text>',
        *_grid(across, up),
    ]
    for mark in (step for step in marks if across.first < step < across.last):
        x = float(across(np.array([mark]))[0])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{up.start}" class="mark"/>')
    for line in lines:
        parts += _line(line, across, up)
    return "\n".join([*parts, "</svg>"])


def _axes(lines: Sequence[Line], linear: bool) -> tuple[Axis, Axis]:
    first = min(line.curve.steps[0] for line in lines)
    last = max(line.curve.steps[-1] for line in lines)
    values = np.concatenate([line.curve.values for line in lines])
    low, high = float(values.min()), float(values.max())
    logarithmic = not linear and low > 0 and high > 30 * low
    if not logarithmic:
        level = high - low <= 1e-9 * abs(high)  # means of equal numbers differ in the last place
        space = 0.05 * (abs(high) if level else high - low) or 1.0
        low, high = (0.0 if 0 <= low < 0.3 * high else low - space), high + space
    return (
        Axis(float(first), float(max(last, first + 1)), LEFT, WIDTH - RIGHT),
        Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic),
    )


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    marks = _decades(up.first, up.last) if up.logarithmic else ticks(up.first, up.last)
    for value in marks:
        y = float(up(np.array([value]))[0])
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{_number(value)}</text>'
    for value in ticks(across.first, across.last):
        x = float(across(np.array([value]))[0])
        yield f'<text x="{x:.1f}" y="{bottom + 16}" class="mid">{_number(value)}</text>'
    yield f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" class="mid">step</text>'
    yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" class="axis"/>'


def _line(line: Line, across: Axis, up: Axis) -> Iterator[str]:
    curve, color = line.curve, f"var(--s{line.color % COLORS})"
    x, y = across(curve.steps), up(curve.values)
    if (curve.high > curve.low).any():
        edges = [up(np.clip(edge, up.first, up.last)) for edge in (curve.low, curve.high)]
        around = np.concatenate([x, x[::-1]]), np.concatenate([edges[0], edges[1][::-1]])
        yield f'<polygon points="{_points(*around)}" fill="{color}" class="band"/>'
    yield f'<polyline points="{_points(x, y)}" stroke="{color}" class="curve"/>'
    if line.dots or len(x) == 1:
        for step, value, px, py in zip(curve.steps, curve.values, x, y, strict=True):
            told = f"{escape(line.name)}, step {step:.0f}: {value:.5g}"
            dot = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{color}">'
            yield f"{dot}<title>{told}</title></circle>"


def bars(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """A bar for each row, of the shares of its parts. The parts' colors are in their order."""
    row_height, left = 30, 130
    height = len(rows) * row_height + 6
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" class="bars" role="img">']
    for number, (name, shares) in enumerate(rows):
        y, x = number * row_height + 4, float(left)
        total = sum(shares.values()) or 1.0
        parts.append(f'<text x="{left - 8}" y="{y + 16}" class="end">{escape(name)}</text>')
        for color, (part, seconds) in enumerate(shares.items()):
            width = (WIDTH - left - RIGHT) * seconds / total
            told = f"{part}: {seconds:.1f} s, {seconds / total:.1%}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" '
                f'fill="var(--s{color % COLORS})"><title>{told}</title></rect>'
            )
            if width > 40:
                share = f"{seconds / total:.0%}"
                parts.append(f'<text x="{x + 5:.1f}" y="{y + 15}" class="on">{share}</text>')
            x += width
    return "\n".join([*parts, "</svg>"])


def ticks(first: float, last: float, about: int = 5) -> list[float]:
    """Round numbers between `first` and `last`, `about` so many."""
    rough = (last - first) / about
    if not rough > 0 or not math.isfinite(rough):
        return [first]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [n * step for n in range(math.ceil(first / step - 1e-9), math.floor(last / step) + 1)]


def _decades(first: float, last: float) -> list[float]:
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    fine = (1, 3) if len(powers) < 5 else (1,)
    return [m * 10.0**p for p in powers for m in fine if first <= m * 10.0**p <= last]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}"
    return f"{round(value, 10):,.10g}"


def _points(x: Values, y: Values) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
