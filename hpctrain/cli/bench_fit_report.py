"""What `hpctrain bench allreduce --fit` and `--predict` print and write.

Layer: cli. Is given measured and predicted times; knows nothing of how they were taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from hpctrain.cli.bench import table
from hpctrain.collectives.cost import Price
from hpctrain.collectives.cost_choice import Choice
from hpctrain.collectives.cost_fit import PARAMETERS, Observation, predictions
from hpctrain.collectives.network import Network

__all__ = ["fit_report", "prediction", "prediction_report"]

WIRE = 0.8  # of a predicted time: from here on the wire is what it takes


def fit_report(
    path: str, network: Network, found: Sequence[Observation], wrong: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    """Figures and lines of a fit. `wrong`: of each schedule, elements that were not the sum."""
    ratios = predictions(network, found) / [one.seconds for one in found]
    rows: list[dict[str, Any]] = [
        {
            "schedule": one.schedule.name,
            "bytes": one.schedule.n * one.schedule.itemsize,
            "seconds": one.seconds,
            "fitted_over_measured": float(ratio),
            "wrong": count,
        }
        for one, ratio, count in zip(found, ratios, wrong, strict=True)
    ]
    errors = np.abs(ratios - 1)
    lines = [f"# {path}: {network.source}"]
    lines += [
        f"{section}.{key} = {getattr(getattr(network, section), key):.3g}"
        for section, key in PARAMETERS
    ]
    lines += table(
        ["schedule", "bytes", "measured ms", "fitted / measured", "#wrong"],
        [
            [
                row["schedule"],
                f"{row['bytes']:,}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{row['fitted_over_measured']:.2f}",
                str(row["wrong"]),
            ]
            for row in rows
        ],
    )
    lines.append(f"# error: median {np.median(errors):.0%}, largest {errors.max():.0%}")
    return {"network": msgspec.to_builtins(network), "results": rows}, lines


def prediction(
    choice: Choice, priced: Price, seconds: float, wrong: int, picked: bool
) -> dict[str, Any]:
    """The row of an algorithm at a size; `seconds` and `wrong` are measured."""
    return {
        "bytes": choice.nbytes,
        "algorithm": choice.algorithm,
        "segment_bytes": choice.segment_bytes,
        "predicted_seconds": priced.seconds,
        "wire_seconds": priced.wire_seconds,
        "seconds": seconds,
        "wrong": wrong,
        "picked": picked,
    }


def prediction_report(
    path: str, picks: Sequence[Choice], rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Figures and lines of a prediction; one pick for each size."""
    head = [
        "bytes",
        "algorithm",
        "segment",
        "predicted ms",
        "measured ms",
        "ratio",
        "wire",
        "#wrong",
        "",
    ]
    cells = [_cells(row) for row in rows]
    lines = [f"# predicted by {path}; wire: share of the predicted time", *table(head, cells, 2)]
    summary = []
    for pick in picks:
        same = [row for row in rows if row["bytes"] == pick.nbytes]
        best = min(same, key=lambda row: float(row["seconds"]))
        mine = next(row for row in same if row["picked"])
        over = mine["seconds"] / best["seconds"]
        summary.append({"bytes": pick.nbytes, "picked_over_best": over})
        lines.append(f"{pick}; measured {over:.2f} times the best, {best['algorithm']}")
    on_wire = [r["predicted_seconds"] / r["seconds"] - 1 for r in rows if _wire(r) > WIRE]
    if on_wire:
        worst = max(on_wire, key=abs)
        lines.append(
            f"# {len(on_wire)} times with the wire over {WIRE:.0%}: predicted within "
            f"{abs(worst):.0%}"
        )
    return {"network": path, "results": list(rows), "picks": summary}, lines


def _cells(row: dict[str, Any]) -> list[str]:
    """A line of the table of predictions."""
    return [
        f"{row['bytes']:,}",
        row["algorithm"],
        f"{row['segment_bytes']:,}",
        f"{row['predicted_seconds'] * 1e3:.3f}",
        f"{row['seconds'] * 1e3:.3f}",
        f"{row['predicted_seconds'] / row['seconds']:.2f}",
        f"{_wire(row):.0%}",
        str(row["wrong"]),
        "picked" if row["picked"] else "",
    ]


def _wire(row: dict[str, Any]) -> float:
    """The share of the wire in the predicted time."""
    return float(row["wire_seconds"] / max(row["predicted_seconds"], 1e-12))
