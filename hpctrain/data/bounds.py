"""How many blocks a loader may keep in memory, and how many batches it gathers together.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpctrain.data.order import Window
from hpctrain.data.views import View
from hpctrain.errors import UsageError

__all__ = ["DEPTH", "IN_FLIGHT", "Bounds", "bounds_of", "check_batches", "sample_bytes", "together"]

DEPTH = 2  # groups of batches prepared ahead
IN_FLIGHT = DEPTH + 2  # and the one being made, and the one in use
GROUP_BYTES = 1 << 20  # of batches that are gathered together; half of it: 20 % more CPU time


@dataclass(frozen=True)
class Bounds:
    """Blocks that a rank keeps, and batches of a group."""

    blocks: int
    together: int


def check_batches(batch_size: int, microbatch: int, rank: int, size: int) -> None:
    """Raise `UsageError` where a global batch cannot be cut, or `rank` is none of `size`."""
    if batch_size < 1 or not 1 <= microbatch <= batch_size:
        raise UsageError(
            f"batch_size {batch_size} and microbatch {microbatch} do not go together: "
            f"1 <= microbatch <= batch_size"
        )
    if not 0 <= rank < size:
        raise UsageError(f"rank {rank} is not one of {size} ranks")


def sample_bytes(view: View) -> int:
    """Bytes of one sample's fields."""
    return sum(
        dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        for dtype, shape in view.fields.values()
    )


def together(batch_bytes: int) -> int:
    """How many batches of a rank are gathered together."""
    return max(1, GROUP_BYTES // max(batch_bytes, 1))


def bounds_of(
    view: View, batch: int, batch_size: int, window: Window | None, max_bytes: int, split: str
) -> Bounds:
    """All blocks if they fit, else at least what the order needs at once.

    Args:
        batch: the most samples of a batch that a rank has; batch_size: of all ranks.
        window: of the order; None: batches are read in order.

    Raises `UsageError` with the sum where `max_bytes` are too few.
    """
    blocks = len(view.starts) - 1
    rows = int(np.diff(view.starts).max(initial=1))
    size, samples = sample_bytes(view), int(view.starts[-1])
    if window is None:
        needed, name = -(-batch_size // rows) + 1, "batch"
    else:
        needed, name = blocks if window == "all" else window, f"window={window}"
    needed = max(1, min(needed, blocks))
    for group in (together(batch * size), 1):  # a group of one, where there is no room for more
        batches = IN_FLIGHT * min(group * batch, samples)
        fixed = (batches + rows) * size  # rows: HDF5's buffer for the chunk being decoded
        room = (max_bytes - fixed) // max(rows * size, 1)
        if room >= min(2 * needed, blocks) or (group == 1 and room >= needed):
            return Bounds(max(1, min(room, blocks)), group)
    raise UsageError(
        f"max_bytes={max_bytes} is too small for split {split!r}: {name} needs "
        f"({needed} blocks x {rows} samples + {IN_FLIGHT} batches of this rank = {batches} "
        f"samples + 1 block being read) x {size} bytes = {fixed + needed * rows * size}; raise it"
        + (f", or set the window to {room} blocks" if room > 0 else "")
    )
