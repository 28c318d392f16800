"""The plot of `hpctrain bench allreduce --plot`: bus bandwidth over size, a line per algorithm.

Both axes are logarithmic. Text and numbers are plain SVG, for a browser or a page of docs.

Layer: cli. Is given rows of the table; knows nothing of how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hpctrain.errors import UsageError

__all__ = ["plot", "write_plot"]

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 250, 36, 44
COLORS = ("#1f6fb4", "#d1592a", "#2f8f4e", "#8653a8", "#b0313b", "#7a5a3a", "#c2519b", "#5d6670")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
STYLE = "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}"


class Axis:
    """Logarithms of values to pixels; `marks` are whole powers of `base` in or around them."""

    def __init__(self, values: Sequence[float], base: int, start: float, stop: float) -> None:
        first = math.floor(math.log(min(values), base) + 1e-9)
        last = max(math.ceil(math.log(max(values), base) - 1e-9), first + 1)
        self.marks = [float(base) ** power for power in range(first, last + 1)]
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        low, high = math.log(self.marks[0]), math.log(self.marks[-1])
        share = (math.log(value) - low) / (high - low)
        return self._start + share * (self._stop - self._start)


def plot(rows: Sequence[dict[str, Any]], title: str) -> str:
    """SVG text. Rows without a bandwidth (one rank alone) are left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["bus_bytes_per_second"] > 0:
            point = (float(row["bytes"]), row["bus_bytes_per_second"] / 1e9)
            curves.setdefault(row["algorithm"], []).append(point)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20">{escape(title)}: bus bandwidth, GB/s</text>',
    ]
    if curves:
        points = [point for curve in curves.values() for point in curve]
        across = Axis([size for size, _ in points], 4, LEFT, WIDTH - RIGHT)
        up = Axis([speed for _, speed in points], 10, HEIGHT - BOTTOM, TOP)
        parts += _grid(across, up)
        for number, (name, curve) in enumerate(curves.items()):
            parts += _curve(number, name, sorted(curve), across, up)
    return "\n".join([*parts, "</svg>", ""])


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for size in across.marks:
        x = f"{across(size):.1f}"
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{_size(size)}</text>'
    for speed in up.marks:
        y = up(speed)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{speed:g}</text>'


def _curve(
    number: int, name: str, curve: Sequence[tuple[float, float]], across: Axis, up: Axis
) -> Iterator[str]:
    color, y = COLORS[number % len(COLORS)], TOP + 12 + 18 * number
    dashes = ' stroke-dasharray="5 4"' if number >= len(COLORS) else ""
    places = [(f"{across(size):.1f}", f"{up(speed):.1f}") for size, speed in curve]
    line = " ".join(",".join(place) for place in places)
    yield f'<polyline points="{line}" stroke="{color}"{dashes}/>'
    yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in places)
    left = WIDTH - RIGHT + 16
    yield f'<line x1="{left}" x2="{left + 20}" y1="{y - 4}" y2="{y - 4}" stroke="{color}"{dashes}/>'
    yield f'<text x="{left + 26}" y="{y}">{escape(name)}</text>'


def _size(nbytes: float) -> str:
    power = min(int(math.log2(nbytes)) // 10, len(UNITS) - 1)
    return f"{nbytes / (1 << 10 * power):g} {UNITS[power]}"


def write_plot(target: str, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write the plot to a file. Raises `UsageError` where that cannot be done."""
    try:
        Path(target).write_text(plot(rows, title), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write --plot {target}: {error.strerror}") from None
