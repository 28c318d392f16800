"""Global batches, the microbatches they are cut into, and who computes which.

The global batch of step t is positions [t G, min((t + 1) G, N)) of the epoch's order. It is cut
into microbatches of m consecutive positions (the last may be short) before anybody asks how many
ranks there are; ranks are then given whole, consecutive microbatches. The last batch of an epoch
is short; what else may become of it is said in `tails`.

Layer: data. Knows nothing of files, orders or MPI.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["assign", "batch_bounds", "cut", "steps"]


def steps(samples: int, batch_size: int) -> int:
    """Steps in an epoch of `samples` positions: the same number on every rank."""
    return -(-samples // batch_size)


def batch_bounds(step: int, batch_size: int, samples: int) -> tuple[int, int]:
    """First and last (exclusive) position of the global batch of a step."""
    return min(step * batch_size, samples), min((step + 1) * batch_size, samples)


def cut(samples: int, microbatch: int) -> NDArray[np.int64]:
    """Offsets of the microbatches of a global batch: int64 of shape (microbatches + 1,).

    Microbatch i is offsets[i]:offsets[i + 1]; all but the last hold `microbatch` samples.
    """
    count = -(-samples // microbatch)
    return np.minimum(np.arange(count + 1, dtype=np.int64) * microbatch, samples)


def assign(n_microbatches: int, size: int, rank: int) -> range:
    """The microbatches of `rank` among `size` ranks: consecutive, and in number at most one apart.

    With more ranks than microbatches some ranges are empty: such a rank takes part in every
    exchange with nothing of its own.
    """
    return range(n_microbatches * rank // size, n_microbatches * (rank + 1) // size)
