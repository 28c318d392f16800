"""What `hpctrain doctor --vet` makes of its figures: each node against the median over nodes.

Every figure is a rate: more is better. A node is an outlier where a rate is below a share of the
median over all nodes. The shares are wide enough for what is normal on one machine (turbo clocks, a
file system that others use) and narrow enough for what is not (a throttled CPU, half of the memory
channels, a link that fell back to a tenth). With one node there is nothing to compare with.

Layer: cli. Is given figures; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

__all__ = ["MEASURES", "Node", "Outlier", "document", "lines_of", "outliers_of"]


@dataclass(frozen=True)
class Measure:
    """A figure of a node: its title, its unit, units per second in it, and the least share."""

    title: str
    unit: str
    scale: float
    share: float


MEASURES = {
    "copy": Measure("memory copy", "GB/s", 1e9, 0.8),
    "product": Measure("matrix product", "GFLOP/s", 1e9, 0.8),
    "inside": Measure("all-reduce in the node", "GB/s", 1e9, 0.6),
    "between": Measure("all-reduce of two nodes", "GB/s", 1e9, 0.6),
    "write": Measure("file write", "MB/s", 1e6, 0.4),
    "read": Measure("file read", "MB/s", 1e6, 0.4),
}


@dataclass(frozen=True)
class Node:
    """A node, its lowest rank, and its rates by name of the measure; nan: not measured."""

    host: str
    rank: int
    ranks: int
    rates: dict[str, float]


@dataclass(frozen=True)
class Outlier:
    """A rate of a node that is below `threshold`: a share of the median over the nodes."""

    host: str
    rank: int
    measure: str
    rate: float
    median: float
    threshold: float

    def __str__(self) -> str:
        what = MEASURES[self.measure]
        rate, middle, least = (x / what.scale for x in (self.rate, self.median, self.threshold))
        return (
            f"{self.host} (rank {self.rank}): {what.title} {rate:.3g} {what.unit}; the median is "
            f"{middle:.3g}, the least allowed {least:.3g} ({what.share:.0%} of it)"
        )


def outliers_of(nodes: Sequence[Node]) -> list[Outlier]:
    """What is below its share of the median, by measure and node; nothing where there is one node.

    A node whose rate is nan while others have one (its file could not be written) is an outlier.
    """
    found = []
    for name, measure in MEASURES.items():
        known = [node.rates[name] for node in nodes if not math.isnan(node.rates[name])]
        if len(nodes) < 2 or not known:
            continue
        middle = median(known)
        least = middle * measure.share
        for node in nodes:
            if not node.rates[name] >= least:
                found.append(Outlier(node.host, node.rank, name, node.rates[name], middle, least))
    return found


def lines_of(nodes: Sequence[Node], outliers: Sequence[Outlier], seconds: float) -> list[str]:
    """The report: figures of all nodes, the median, and the outliers."""
    from hpctrain.cli.bench import table

    used = [name for name in MEASURES if any(not math.isnan(n.rates[name]) for n in nodes)]
    head = ["node", "ranks", *(f"{MEASURES[n].title} {MEASURES[n].unit}" for n in used)]
    marked = {(outlier.rank, outlier.measure) for outlier in outliers}
    rows = [
        [
            node.host,
            str(node.ranks),
            *(_number(node.rates[n], n) + "!" * ((node.rank, n) in marked) for n in used),
        ]
        for node in nodes
    ]
    if len(nodes) > 1:
        middles = [median([n.rates[u] for n in nodes if not math.isnan(n.rates[u])]) for u in used]
        middle = [_number(rate, name) for rate, name in zip(middles, used, strict=True)]
        rows.append(["median", "", *middle])
    lines = [*table(head, rows), ""]
    lines += [f"[outlier] {outlier}" for outlier in outliers]
    if len(nodes) == 1:
        lines.append("one node: nothing to compare it with")
    bad = len({outlier.rank for outlier in outliers})
    lines.append(f"{len(nodes)} node{'s' * (len(nodes) > 1)}, outliers: {bad}; {seconds:.1f} s")
    return lines


def _number(rate: float, name: str) -> str:
    return "-" if math.isnan(rate) else f"{rate / MEASURES[name].scale:.4g}"


def document(nodes: Sequence[Node], outliers: Sequence[Outlier], seconds: float) -> dict[str, Any]:
    """Plain values for a JSON document; rates in bytes or operations per second, None: none."""

    def plain(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "seconds": seconds,
        "thresholds": {name: measure.share for name, measure in MEASURES.items()},
        "nodes": [
            asdict(node) | {"rates": {name: plain(rate) for name, rate in node.rates.items()}}
            for node in nodes
        ],
        "outliers": [asdict(o) | {"rate": plain(o.rate)} for o in outliers],
        "bad_nodes": sorted({outlier.host for outlier in outliers}),
    }
