"""What becomes of the last batch of an epoch, which is short where G does not divide N.

    keep    it is short: every sample once, sums are divided by the samples that there are
    drop    it is left out: batches all have G samples, up to G - 1 samples are not in the epoch
    pad     it is filled up to G with rows of zeros whose id is -1: every rank always has the same
            shapes; they must be given no weight

Layer: data. Knows nothing of files, orders or MPI.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.batches import Part
from hpctrain.data.microbatches import assign, cut
from hpctrain.errors import UsageError, nearest

__all__ = ["KEEP", "PADDING", "Tail", "check_tail", "fill_up", "with_tail"]

Tail = Literal["keep", "drop", "pad"]
TAILS = ("keep", "drop", "pad")
KEEP: Tail = "keep"
PADDING = -1  # the id of a row that is no sample


def check_tail(tail: str, samples: int, batch_size: int) -> None:
    """Raise `UsageError` for an unknown tail, or one that leaves no batch at all."""
    if tail not in TAILS:
        raise UsageError(f"tail {tail!r} is none of {', '.join(TAILS)}{nearest(str(tail), TAILS)}")
    if tail == "drop" and samples < batch_size:
        raise UsageError(
            f"tail 'drop' leaves no batch: there are {samples} samples and batch_size is "
            f"{batch_size}; make it smaller, or keep the tail"
        )


def with_tail(
    parts: Iterator[Part], tail: Tail, batch_size: int, microbatch: int, rank: int, size: int
) -> Iterator[Part]:
    """The parts of an epoch of one rank of `size`, the short one as `tail` says.

    That of a padded batch has the microbatches of a whole one; `last - first` of its
    `groups[-1]` rows are samples.
    """
    for part in parts:
        if part.global_samples == batch_size or tail == "keep":
            yield part
        elif tail == "pad":
            bounds = cut(batch_size, microbatch)
            mine = assign(len(bounds) - 1, size, rank)
            groups = bounds[mine.start : mine.stop + 1]
            end = part.position + part.global_samples
            first, last = (min(part.position + int(groups[i]), end) for i in (0, -1))
            yield replace(part, first=first, last=last, groups=groups - groups[0])


def fill_up(
    fields: dict[str, NDArray[Any]], ids: NDArray[np.int64], rows: int
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Copies of the last batches' fields and ids with `rows` rows, those that lack as padding."""
    lack = rows - len(ids)
    filled = {
        name: np.concatenate([array, np.zeros((lack, *array.shape[1:]), array.dtype)])
        for name, array in fields.items()
    }
    return filled, np.concatenate([ids, np.full(lack, PADDING, np.int64)])
