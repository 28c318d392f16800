"""One bucket: a range of the flat arrays that is reduced, and later gathered, at once.

Layer: collectives. Is given what all buckets of a rank share; knows nothing of when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpctrain.collectives import carry
from hpctrain.collectives.between import Between, Column, Crossing
from hpctrain.collectives.cut import Cut, Range
from hpctrain.collectives.peers import Memory
from hpctrain.device.dtypes import is_short
from hpctrain.errors import UsageError
from hpctrain.mpi.rounds import Idle, fence
from hpctrain.mpi.topology import Topology
from hpctrain.timeline import span

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["Bucket", "Shared", "checked"]

Array = Any  # of the device


@dataclass(frozen=True)
class Shared:
    """What the buckets of a rank have in common.

    Attributes:
        topology: with communicators that only the buckets use while one of them is at work.
        crossing: makes what crosses nodes; not called on a single node.
        table: of the gradients of the node's ranks; None where they are not visible. others: of
            those after the first, for 16-bit numbers.
        gpu_mpi, message_bytes, idle: see `Column`.
    """

    topology: Topology
    device: Device
    memory: Memory
    crossing: Crossing
    table: Array | None
    others: Array | None
    gpu_mpi: bool
    message_bytes: int | None
    idle: Idle | None

    @property
    def whole(self) -> bool:
        """Whether every node owns everything."""
        return self.crossing.whole and self.topology.node_count > 1

    def owned(self, cut: Cut) -> Range:
        """The range of a bucket that this rank updates."""
        where = self.topology
        if self.whole:
            return cut.column(where.local_rank)
        return cut.slice(where.node_index, where.local_rank)

    def fence(self) -> None:
        """Wait for the ranks of the node, after this rank's own work. Collective over the node."""
        carry.settle(self.device, self.idle)
        if self.topology.local_size == 1:
            return
        if self.idle is None:
            self.topology.node.Barrier()
        else:
            fence(self.topology.node, range(self.topology.local_size), self.idle)


class Bucket:
    """`reduce` and `gather` of one range; both collective over all ranks, buckets in one order."""

    def __init__(self, shared: Shared, cut: Cut, sums: Array, number: int = 0) -> None:
        """`sums`: what `reduce` writes, as long as this rank's owned range of `cut`. `number`: by
        which a timeline tells the buckets apart."""
        start, stop = cut.span
        nbytes = (stop - start) * shared.memory.gradients.dtype.itemsize
        self._facts = {"bucket": number, "bytes": nbytes}
        self._shared, self._cut, self._sums = shared, cut, sums
        self._owned = shared.owned(cut)
        where, memory = shared.topology, shared.memory
        self._short = is_short(memory.gradients.dtype)
        self._parts: list[tuple[Array, int, int]] = [
            (memory.peers[owner][start:stop], start, stop - start)
            for owner, start, stop in cut.sums(where.node_index, where.local_rank)
            if memory.peers
        ]
        self._columns = [(c, cut.column(c)) for c in range(cut.columns)]
        self.between: Between | None = None
        if where.node_count > 1 and where.local_rank < cut.columns:
            self.between = shared.crossing(self._column())

    def _column(self) -> Column:
        shared, where, cut = self._shared, self._shared.topology, self._cut
        return Column(
            where.cross,
            shared.device,
            cut.span,
            cut.column(where.local_rank),
            [cut.slice(node, where.local_rank) for node in range(where.node_count)],
            shared.memory.gradients,
            shared.memory.parameters,
            self._sums,
            shared.gpu_mpi,
            shared.message_bytes,
            shared.idle,
        )

    def reduce(self) -> None:
        """See `SliceReduction.reduce`."""
        several = self._shared.topology.local_size > 1
        with span("reduce bucket", **self._facts):
            if several:
                self._shared.fence()
                self._sum_within_node()
                self._shared.fence()
            if self.between is not None:
                self.between.reduce()
            elif self._short and not several:
                self._widen()

    def gather(self) -> None:
        """See `SliceReduction.gather`."""
        with span("gather bucket", **self._facts):
            if self.between is not None:
                self.between.gather()
            if self._shared.topology.local_size > 1:
                self._shared.fence()
                self._shared.memory.collect(self._columns)

    def _sum_within_node(self) -> None:
        """Add up this rank's part of the node's sums, each into its column's rank's memory.

        On a single node that part is this rank's slice, and goes to `sums`.
        """
        launch, peers = self._shared.device.launch, self._shared.memory.peers
        last = self._shared.topology.node_count == 1
        for target, start, count in self._parts:
            if self._short and last:
                first, others = peers[0][start : start + count], self._shared.others
                launch(
                    "sum_widened", first, others, len(peers) - 1, start, self._sums, count,
                    work=count,
                )  # fmt: skip
                continue
            total = self._sums if last else target
            launch("sum_peers", self._shared.table, len(peers), start, total, count, work=count)

    def _widen(self) -> None:
        """`sums` from this rank's own gradients, where nobody adds to them."""
        start, stop = self._owned
        own, count = self._shared.memory.gradients[start:stop], stop - start
        self._shared.device.launch("sum_widened", own, None, 0, 0, self._sums, count, work=count)


def checked(buckets: Sequence[Range] | None, n: int, grain: int) -> tuple[Range, ...]:
    """The buckets, or one of everything where there are none given.

    Raises:
        UsageError: they do not follow on one another from 0 to `n`, or start within 64 bytes.
    """
    if buckets is None:
        return ((0, n),)
    ends = [0, *(stop for _, stop in buckets)]
    if [start for start, _ in buckets] != ends[:-1] or ends[-1] != n or sorted(ends) != ends:
        raise UsageError(
            f"the buckets {list(buckets)} must follow on one another from 0 to {n}, the number of "
            "elements"
        )
    if any(start % grain for start, _ in buckets):
        raise UsageError(
            f"the buckets {list(buckets)} must start at multiples of {grain} elements (64 bytes)"
        )
    return tuple(buckets)
