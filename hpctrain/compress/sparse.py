"""Sums of sparse vectors over ranks: all-gather, and Ok-Topk.

Every rank brings the payload of what it selected. Both add up the same bits on all ranks, and
return which of a rank's own entries were rejected: those go back into its residual, so that over
all ranks   applied + rejected = selected   holds for every element and step.

    all-gather   everyone gives its entries to everyone. Nothing is rejected. Received: (P - 1) k
                 entries; with independent selections the sum has up to P k.
    Ok-Topk      elements are cut into one region per rank. Entries go to their region's rank, which
                 adds them up and gives those above a common threshold to everyone. Received: about
                 k (P - 1) / P entries and as many sums, at most twice as many.

Ok-Topk keeps the threshold for some steps and moves it a little by how many entries it let pass;
every `every` steps it is found exactly, from counts of the leading bits of all sums. Regions
follow where entries are: all ranks' quantiles, averaged. A rank whose region holds more than twice
its share passes on the largest, in place of moving the surplus to others before the exchange.

Order of additions: by rank, for every element. All-gather adds up on the device. Ok-Topk copies
its k selected entries to the host, adds up there, and copies the sums back: no more crosses.

Layer: compress. Is given payloads of `topk`; knows nothing of gradients.

References:
    [LH22] S. Li, T. Hoefler, "Near-optimal sparse allreduce for distributed deep learning", PPoPP
    2022. Here searches are on sorted indices, sums of boundaries in 64 bits, and a rank keeps what
    was rejected, entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.compress.entries import Entries, Format, concatenated, find
from hpctrain.compress.interface import Payload, require
from hpctrain.compress.topk import TopK, TopKReader
from hpctrain.compress.transport import Transport

__all__ = ["AllGather", "OkTopk"]

Array = Any  # of the device
PASSES = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of the 31 bits of an absolute value


class AllGather:
    """Everyone gives its entries to everyone."""

    name = "topk"

    def __init__(self, transport: Transport, codec: TopK) -> None:
        """`codec`: makes the payloads; the same on all ranks. `UsageError`: of no fixed size."""
        require(codec, "fixed_size", "an all-gather makes room for everyone's payload beforehand")
        self._transport, self._codec = transport, codec
        self._format = Format(codec.extent, codec.values)

    def traffic(self, k: int) -> int:
        """Bytes that a rank sends, and receives."""
        return (self._transport.size - 1) * self._format.nbytes(self._codec.extent.n, k)

    def combine(self, sent: Payload, out: Array) -> Payload | None:
        """Add what all ranks sent to `out`; what was rejected of this rank's own. Collective."""
        transport, codec, step = self._transport, self._codec, sent.header.step
        arrived = transport.all_gather(sent.data, [sent.nbytes] * transport.size)
        for rank, data in enumerate(arrived):
            mine = rank == transport.rank
            codec.add_into(sent if mine else codec.received(data, step, transport.head(rank)), out)
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


class OkTopk:
    """Entries go to their region's rank, and the largest sums to everyone."""

    name = "oktopk"

    def __init__(
        self, transport: Transport, codec: TopK, every: int = 32, regions_every: int = 64
    ) -> None:
        """`codec`: makes the payloads that are brought; the same on all ranks.

        `every`, `regions_every`: steps between exact thresholds, and between new regions.
        """
        self._transport, self._exchange, self._n = transport, transport.host, codec.extent.n
        self._reader = TopKReader(transport.device, codec.extent, "float32")
        self._entries = Format(codec.extent, codec.values)
        self._totals = Format(codec.extent, "float32")
        self._every, self._regions_every = every, regions_every
        self._steps = 0
        self._threshold = np.float32(0)
        self._bounds = [self._n * j // transport.size for j in range(transport.size + 1)]
        self._sums = np.zeros(0, np.float32)

    def traffic(self, k: int) -> int:
        """About the bytes that a rank receives in a step where entries are spread evenly."""
        size = self._exchange.size
        share, region = -(-k // size), -(-self._n // size)
        return (size - 1) * sum(f.nbytes(region, share) for f in (self._entries, self._totals))

    def combine(self, sent: Payload, out: Array) -> Payload | None:
        """Add the accepted sums to `out`; what was rejected of this rank's own. Collective."""
        n, k, step = self._n, sent.header.k, sent.header.step
        chosen = self._entries.unpack(self._transport.fetch(sent.data), 0, n, step)
        if self._steps % self._regions_every == 0:
            self._cut_regions(chosen)
        indices, sums = self._reduce(chosen, k, step)
        if self._steps % self._every == 0:
            self._threshold = self._find_threshold(sums, k)
        accepted = self._gather(self._passed(indices, sums, k), k, step)
        self._adapt(accepted.size, k)
        self._steps += 1
        self._reader.add_into(self._placed(self._totals.pack(accepted, 0, n, step)), out)
        rejected = chosen.where(~find(chosen.indices, accepted.indices))
        return self._placed(self._entries.pack(rejected, 0, n, step))

    def _placed(self, payload: Payload) -> Payload:
        """The same on the device."""
        return Payload(payload.header, self._transport.place(payload.data))

    def _cut_regions(self, chosen: Entries) -> None:
        """New regions, from the quantiles of all ranks' indices."""
        size, n = self._exchange.size, self._n
        ends = np.array([n * j // size for j in range(1, size)], np.int64)
        if chosen.size:
            ends = chosen.indices[[chosen.size * j // size for j in range(1, size)]]
        total = np.sum(self._all(ends), axis=0)  # of 64 bits: P n may be above 2^31
        self._bounds = [0, *(int(end) // size for end in total), n] if size > 1 else [0, n]

    def _reduce(
        self, chosen: Entries, k: int, step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Indices of this rank's region that anyone brought an entry for, and their sums."""
        spans, form = self._spans(), self._entries
        payloads = [form.pack(chosen.between(*span), *span, step).data for span in spans]
        rooms = [form.nbytes(stop - start, min(k, stop - start)) for start, stop in spans]
        start, stop = spans[self._exchange.rank]
        got = [
            form.unpack(data, start, stop, step)
            for data in self._exchange.all_to_all(payloads, rooms)
        ]
        if self._sums.size < stop - start:
            self._sums = np.zeros(stop - start, np.float32)
        for entries in got:
            self._sums[entries.indices - start] += entries.values
        indices = np.unique(np.concatenate([entries.indices for entries in got]))
        sums = self._sums[indices - start]
        self._sums[indices - start] = 0
        return indices, sums

    def _find_threshold(self, sums: NDArray[np.float32], k: int) -> np.float32:
        """The k-th largest absolute sum of all regions; 0 where there are no more than `k`."""
        keys = magnitude_bits(sums)
        prefix, wanted = 0, k
        for shift, bits in PASSES:
            digits = (keys >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
            mine = np.bincount(digits, minlength=1 << bits).astype(np.int64)
            counts = np.sum(self._all(mine), axis=0)
            above = np.cumsum(counts[::-1])[::-1]  # of this digit and larger ones
            reached = np.flatnonzero(above >= wanted)
            if not reached.size:
                return np.float32(0)
            digit = int(reached[-1])
            wanted -= int(above[digit] - counts[digit])
            prefix |= digit << shift
            keys = keys[digits == digit]
        return np.uint32(prefix).view(np.float32)

    def _passed(self, indices: NDArray[np.int64], sums: NDArray[np.float32], k: int) -> Entries:
        """Sums of this rank's region at or above the threshold: the largest, where too many."""
        keys = magnitude_bits(sums)
        kept = np.flatnonzero(keys >= self._threshold.view(np.uint32))
        share = self._share(k)
        if kept.size > share:  # ties: the lowest indices
            order = np.argsort(~keys[kept], kind="stable")[:share]
            kept = np.sort(kept[order])
        return Entries(indices[kept], sums[kept])

    def _gather(self, passed: Entries, k: int, step: int) -> Entries:
        spans, form, share = self._spans(), self._totals, self._share(k)
        bounds = [form.nbytes(stop - start, min(share, stop - start)) for start, stop in spans]
        own = form.pack(passed, *spans[self._exchange.rank], step)
        payloads = self._exchange.all_gather(own.data, bounds)
        return concatenated(
            [form.unpack(data, *span, step) for data, span in zip(payloads, spans, strict=True)]
        )

    def _spans(self) -> list[tuple[int, int]]:
        """The regions, by rank."""
        return list(zip(self._bounds, self._bounds[1:], strict=False))

    def _adapt(self, count: int, k: int) -> None:
        """Move the threshold so that about `k` entries pass in the next step."""
        if count < 0.75 * k:
            self._threshold = self._threshold / np.float32(1.01)
        elif count > 1.25 * k:
            self._threshold = self._threshold * np.float32(1.008)

    def _share(self, k: int) -> int:
        """The most sums that one rank passes on."""
        return -(-2 * k // self._exchange.size)

    def _all(self, numbers: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        """As many numbers from every rank, by rank."""
        nbytes = [numbers.nbytes] * self._exchange.size
        return [
            payload.view(np.int64).copy()
            for payload in self._exchange.all_gather(numbers.view(np.uint8), nbytes)
        ]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; equal on all ranks."""
        return {
            "steps": self._steps,
            "threshold": float(self._threshold),
            "bounds": list(self._bounds),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with as many ranks and elements."""
        self._steps = int(state["steps"])
        self._threshold = np.float32(state["threshold"])
        self._bounds = [int(bound) for bound in state["bounds"]]


def magnitude_bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Whole numbers in the order of absolute values."""
    return np.asarray(values, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
