"""The plot of tools/scale_study.py: efficiency against nodes on a logarithmic axis, as SVG text.

The charts of the run report are over steps and take their colors from its page; this picture stands
alone, in a page on a web site that has no style of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 290, 60, 26, 58, 40
COLORS = ("#1b6ca8", "#c8553d", "#3d8b5f", "#8a5aa8", "#b08900", "#555555")


@dataclass(frozen=True)
class Panel:
    """A title (what is trained; on what), numbers of nodes, and efficiencies by algorithm."""

    title: str
    nodes: Sequence[int]
    columns: Mapping[str, Sequence[float]]


def svg(panels: Sequence[Panel]) -> str:
    """All panels, two in a row."""
    rows = -(-len(panels) // 2)
    width, height = WIDTH * min(len(panels), 2), HEIGHT * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({index % 2 * WIDTH},{index // 2 * HEIGHT})">')
        parts += _panel(panel)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel) -> Iterator[str]:
    first, last = math.log2(panel.nodes[0]), math.log2(panel.nodes[-1])

    def across(count: float) -> float:
        return LEFT + (math.log2(count) - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - value * (HEIGHT - BOTTOM - TOP)

    what, _, where = panel.title.partition("; ")
    yield f'<text x="{LEFT}" y="18" font-weight="bold">{escape(what)}</text>'
    yield f'<text x="{LEFT}" y="33">{escape(where)}</text>'
    middle = (HEIGHT + TOP - BOTTOM) / 2
    yield (
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        "predicted efficiency of a step</text>"
    )
    for percent in range(0, 101, 20):
        y = up(percent / 100)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
    for count in panel.nodes[:: 1 + len(panel.nodes) // 8]:
        x = across(count)
        yield f'<text x="{x:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{count:,}</text>'
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">nodes</text>'
    for number, (name, values) in enumerate(panel.columns.items()):
        color = COLORS[number % len(COLORS)]
        places = zip(panel.nodes, values, strict=True)
        points = " ".join(f"{across(count):.1f},{up(value):.1f}" for count, value in places)
        yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8"/>'
        x = LEFT + 110 * number
        yield f'<text x="{x}" y="49" fill="{color}">{escape(name)}</text>'
