"""What a simulated GPU was asked to do, counted.

Layer: device. Knows nothing of how anything is done.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Counts"]


@dataclass
class Counts:
    """Numbers since the last reset.

    Attributes:
        launches: kernels, by name.
        products: calls of `matmul`.
        copies, copied: how many copies and how many bytes, by direction: "to device" and "to host";
            "on device" also counts fills.
        synchronizations: times that the host waited, by kind: "device" for all streams (also hidden
            in the freeing of memory outside the pool), "stream", "event", and "copy" for copies
            that block, such as every copy to or from host memory that is not pinned.
        checked: launches that ran thread by thread on the SIMT target.
        bytes: device memory in use; peak_bytes: the most that was in use at once.
    """

    launches: Counter[str] = field(default_factory=Counter)
    products: int = 0
    copies: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    synchronizations: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    bytes: int = 0
    peak_bytes: int = 0

    def allocated(self, nbytes: int) -> None:
        """Count memory taken, or given back where `nbytes` is negative."""
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def copy_of(self, direction: str, nbytes: int) -> None:
        """Count a copy."""
        self.copies[direction] += 1
        self.copied[direction] += nbytes

    def taken(self) -> Counts:
        """A copy that later work does not change."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Count from zero, and the peak from what is in use."""
        fresh = Counts(bytes=self.bytes, peak_bytes=self.bytes)
        self.__dict__.update(fresh.__dict__)
