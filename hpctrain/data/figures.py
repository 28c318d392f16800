"""What a loader has done so far, in numbers that say where the time of a data-bound run goes.

Layer: data.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Figures"]


@dataclass
class Figures:
    """Sums since the loader was made, of this rank."""

    samples: int = 0  # served
    bytes_served: int = 0
    misses: int = 0  # samples that were asked for when their block was not in memory
    blocks_read: int = 0
    bytes_read: int = 0  # decoded, from disk
    read_seconds: float = 0.0  # reading and decoding, in the loader's thread
    wait_seconds: float = 0.0  # of the loop that uses the batches

    def since(self, before: Figures) -> Figures:
        """What was done after `before`, which is a copy (`dataclasses.replace`) from then."""
        names = [field.name for field in fields(self)]
        return Figures(**{name: getattr(self, name) - getattr(before, name) for name in names})

    @property
    def hit_rate(self) -> float:
        """Samples whose block was in memory already, as a fraction of those served."""
        return 1 - self.misses / self.samples if self.samples else 0.0

    @property
    def megabytes_per_second(self) -> float:
        """Decoded megabytes per second of reading."""
        return self.bytes_read / 1e6 / self.read_seconds if self.read_seconds else 0.0

    @property
    def read_amplification(self) -> float:
        """Bytes read for each byte served: below 1 where blocks stay in memory over epochs."""
        return self.bytes_read / self.bytes_served if self.bytes_served else 0.0

    def wait_fraction(self, seconds: float) -> float:
        """The part of `seconds` of training that was spent waiting for data."""
        return self.wait_seconds / seconds if seconds > 0 else 0.0
