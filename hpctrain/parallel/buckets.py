"""Which tensors are exchanged together, and which buckets have all their gradients.

A bucket is a range of the layout, in whose order gradients become ready: the first ones can go out
while the backward pass computes the next.

Layer: parallel. Knows nothing of ranks and messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.collectives.cut import Range
from hpctrain.nn.layout import Layout

__all__ = ["Readiness", "bucket_ranges", "suited_bytes"]

LEAST_BYTES, MOST_BYTES = 1 << 20, 25 << 20
WANTED = 8  # buckets, where that makes none of them too small or too large


def suited_bytes(nbytes: int) -> int:
    """The size of buckets for gradients of `nbytes`: an eighth, but 1 to 25 MiB.

    What cannot be hidden is the last bucket's exchange, and the first one's parameters: an eighth
    of all, with the rest behind the computation. Below a mebibyte a message costs more time for
    itself than for its bytes on most networks; above 25 more buckets of that size come for free.
    """
    return min(max(nbytes // WANTED, LEAST_BYTES), MOST_BYTES)


def bucket_ranges(layout: Layout, nbytes: int) -> list[Range]:
    """The layout cut at tensors into ranges as near to `nbytes` as that allows.

    What is left at the end joins the range before where it is less than half of one.
    """
    count, ends = max(nbytes // layout.dtype.itemsize, 1), [0]
    for entry in layout.entries:
        before = entry.offset - ends[-1]
        if before and before + entry.size - count > count - before:
            ends.append(entry.offset)
    if len(ends) > 1 and layout.size - ends[-1] < count / 2:
        ends.pop()
    ends.append(layout.size)
    return list(zip(ends, ends[1:], strict=False))


class Readiness:
    """Counts, for each bucket, the tensors whose gradients are not final yet."""

    def __init__(self, layout: Layout, buckets: Sequence[Range]) -> None:
        self._all = [0] * len(buckets)
        self._buckets: dict[str, list[int]] = {}
        for entry in layout.entries:
            last = entry.offset + entry.size
            touched = [k for k, (a, b) in enumerate(buckets) if a < last and entry.offset < b]
            self._buckets[entry.name] = touched
            for k in touched:
                self._all[k] += 1
        self.reset()

    def reset(self) -> None:
        """A new backward pass: nothing is final."""
        self._missing = list(self._all)
        self._complete = 0

    def buckets(self, name: str) -> list[int]:
        """The buckets in which a tensor lies."""
        return self._buckets[name]

    def done(self, name: str) -> int:
        """A tensor's gradient is final; how many buckets, from the first on, are complete now."""
        for bucket in self._buckets[name]:
            self._missing[bucket] -= 1
        while self._complete < len(self._missing) and not self._missing[self._complete]:
            self._complete += 1
        return self._complete
