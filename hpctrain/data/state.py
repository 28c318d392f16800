"""Where in the data a run is: what is saved with a checkpoint, and checked when going on.

Layer: data. Knows nothing of loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from hpctrain.data.order import Window
from hpctrain.errors import DataError

__all__ = ["State", "go_on"]

COMPARED = ("dataset_id", "split", "view", "order", "seed", "window")


class State(TypedDict):
    """Where in the data a run is; plain JSON."""

    dataset_id: str
    split: str
    view: str
    order: str
    seed: int
    window: Window
    epoch: int
    position: int


def go_on(mine: State, saved: Mapping[str, Any], samples: int, least: int = 1) -> tuple[int, int]:
    """(epoch, position) to go on from. The end of an epoch is the begin of the next.

    `mine`: the state of the loader that is to go on, with `samples` samples; where fewer than
    `least` are left, the epoch is at its end. Raises `DataError`
    naming what differs if the data set, split, view, order, seed or window does.
    """
    other: dict[str, Any] = {"view": "rows", **saved}  # as it was before there were others
    lacking = sorted(mine.keys() - other.keys())
    if lacking:
        raise DataError(f"the saved state of the data has no {', '.join(lacking)}")
    now: dict[str, Any] = dict(mine)
    differ = [name for name in COMPARED if now[name] != other[name]]
    if differ:
        what = "; ".join(f"{name} was {other[name]}, is {now[name]}" for name in differ)
        raise DataError(
            f"cannot go on in mid-epoch with other data: {what}; "
            f"restore what it was, or start a new run"
        )
    epoch, position = int(other["epoch"]), int(other["position"])
    if not 0 <= position <= samples or epoch < 0:
        raise DataError(
            f"the saved state of the data is at epoch {epoch}, position {position}; "
            f"split {mine['split']!r} has {samples} samples"
        )
    return (epoch + 1, 0) if samples - position < least else (epoch, position)
