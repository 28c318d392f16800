"""Reduce a slice, update a slice, gather the parameters: the exchange of data-parallel training.

Every rank ends with the sum of its own slice of the gradient, updates that slice of the
parameters, and then all get all parameters. The flat arrays may be cut into buckets, in which this
is done one after the other. Inside a node nothing is sent: the ranks map each
other's gradients, so that adding up reads each gradient once, straight from its owner's memory. On
the CPU they share one parameter array as well, and gathering is a fence; on a GPU each has its own,
and copies its peers' parts. Between nodes a rank exchanges only its column (`cut.py`) by messages
(`across.py`, or another `between.Between`).

One step of two nodes of two ranks, A B and C D; each owns a quarter:

    fence    A adds a+b in the left half, B in the right; C and D likewise
    fence    A and C exchange the quarters of the left half and add; B and D of the right
    update   of the parameters, by each rank in its quarter
    gather   A and C exchange the left half's parameters, B and D the right half's; fence
             GPU: A copies the right half from B, B the left half from A; C and D likewise

Layer: collectives. Is given a topology and a device; knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.collectives import carry
from hpctrain.collectives.across import Dense, carrier
from hpctrain.collectives.background import Background
from hpctrain.collectives.between import Between, Crossing
from hpctrain.collectives.bucket import Bucket, Shared, checked
from hpctrain.collectives.cut import GRAIN, Cut, Range
from hpctrain.collectives.modes import MODES, background_wanted, check, open_memory
from hpctrain.collectives.peers import Memory, OwnMemory
from hpctrain.device.dtypes import is_short, wide_dtype
from hpctrain.mpi import gpu, messages
from hpctrain.mpi.rounds import for_thread
from hpctrain.mpi.topology import Topology, alone

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["MODES", "SliceReduction"]


class SliceReduction:
    """Flat gradients and parameters of all ranks, and the two collectives between them.

    Attributes:
        mode: "shared", "ipc", "messages" or "allreduce": what is really done.
        gpu_mpi: whether messages are sent from and to a GPU's memory itself.
        gradients: shape (n,), this rank's; it writes them, and `reduce` adds them up.
        parameters: shape (n,); with "shared" one array for all ranks of the node.
        owned: the range (start, stop) of each bucket that this rank updates; it may be empty.
            Those of all ranks together are [0, n) without overlap; except with "allreduce", and
            where each node owns everything: see `counted`.
        peers: the gradients of the ranks of the node, in local rank order, with "shared" and "ipc".
        sums: what `reduce` leaves: the sums over all ranks of the gradients in `owned`, one range
            after the other; of float32 where gradients are bfloat16 or float16. It is that part of
            `gradients` itself where the ranges follow on one another and need no wider type.
        between: what crosses nodes, for each bucket that has something to cross.
        buckets: the ranges that are reduced one after the other.
        sliced: whether ranks own different ranges; with "allreduce" each owns everything.
        counted: whether the ranges `owned` of all ranks for which this is true are [0, n) without
            overlap: whoever adds up over ranks, or writes a file, leaves the others out.
        writes_parameters: whether this rank is the one to set initial values of `parameters`.

    All arrays start as zeros, and live as long as something refers to them; with "ipc" the peers'
    only until `free`.
    """

    def __init__(
        self,
        topology: Topology,
        device: Device,
        n: int,
        dtype: DTypeLike,
        mode: str = "auto",
        message_bytes: int | None = None,
        gpu_mpi: str = "auto",
        buckets: Sequence[Range] | None = None,
        crossing: Crossing | None = None,
        overlap: str = "off",
    ) -> None:
        """Collective over `topology.comm`; all arguments are the same on all ranks.

        Args:
            n: number of elements; 0, fewer than ranks and more than 2^31 are fine.
            dtype: float32, float64, bfloat16 or float16. 16-bit numbers are added in float32; what
                goes between nodes is a node's sum, rounded to 16 bits.
            mode: "shared" (CPU), "ipc" (GPU): memory that a node's ranks map, messages between
                nodes. "messages": every rank is a node of its own. "allreduce": plain
                MPI_Allreduce of the whole gradient, every rank owns everything. "auto": shared on
                the CPU, ipc on a GPU; messages (and a warning on rank 0) where that fails.
            message_bytes: the most bytes in one message; the default suits.
            gpu_mpi: whether MPI is given GPU memory: "on", "off" or "auto", see `mpi.gpu.decide`.
            buckets: ranges that are reduced one after the other; default: all at once.
            crossing: what crosses nodes; default `Dense`. With "allreduce" it is not asked.
            overlap: whether a thread does the exchanges while the rank goes on: "on", "off" or
                "auto", on where messages cross nodes; see `background_wanted`. The sums are the
                same bits.

        Raises:
            UsageError: an unknown mode, dtype or `gpu_mpi`; buckets that do not cover the array.
            DeviceError: mode "shared" or "ipc" on a device that lacks it, or where the memory
                cannot be shared or mapped; the text says why.
        """
        dtype = np.dtype(dtype)
        check(mode, dtype, device)
        self.n, self.dtype, self.device = n, dtype, device
        self._own_topology: Topology | None = None
        self._message_bytes = message_bytes
        ranges = self.buckets = checked(buckets, n, GRAIN // dtype.itemsize)
        self.mode, memory = open_memory(topology, device, n, dtype, mode)
        if memory is None:
            topology = self._own_topology = alone(topology)
            count = Cut(n, dtype.itemsize, topology.local_sizes).padded
            memory = OwnMemory(device, count, dtype)
        self._memory: Memory = memory
        self._topology, self._comm = topology, topology.comm
        self._gradients, self._parameters = memory.gradients, memory.parameters
        self.gradients, self.parameters = self._gradients[:n], self._parameters[:n]
        self.peers: list[Any] = [peer[:n] for peer in memory.peers]
        crosses = topology.node_count > 1 and device.name != "cpu"
        self.gpu_mpi = crosses and gpu.decide(topology.comm, device.name, gpu_mpi).on
        self._whole: carry.Carrier | None = None
        self._buckets: list[Bucket] = []
        self.between: tuple[Between, ...] = ()
        self._begun = self._reduced = 0
        self._arrivals = [0] * len(ranges)
        self._copies: list[MPI.Intracomm] = []
        self._background: Background | None = None
        if self.sliced and background_wanted(overlap, self._topology):
            self._background = Background(device)
        self._take_ranges(ranges, crossing or Dense())

    @property
    def sliced(self) -> bool:
        return self.mode != "allreduce"

    @property
    def waited(self) -> float:
        """Seconds that other threads have waited for the one that exchanges."""
        return self._background.waited if self._background else 0.0

    @property
    def writes_parameters(self) -> bool:
        return not self._memory.one_array or self._topology.local_rank == 0

    def reduce(self) -> None:
        """Afterwards `sums` is the sum over all ranks of `gradients[owned]`. Collective.

        Other parts of `gradients` are undefined, and all but `sums` may be written again. The sum
        is added within each node in local rank order, then over nodes in node order, by one rank:
        the same bits on every run with the same topology and, after `gather`, on all ranks.
        ("allreduce": the MPI library's order, which promises neither.)

        With n bytes, L ranks on this node, N nodes, C columns: reads n from the node's memory and
        writes n / L; sends and receives (N - 1) / N of n / C bytes, in N - 1 messages per round.
        """
        if self._whole is not None:
            if self._short:
                own, n = self.gradients, self.n
                self.device.launch("sum_widened", own, None, 0, 0, self.sums, n, work=n)
            if self._comm.size > 1:
                limit = self._message_bytes or messages.MESSAGE_BYTES
                self._whole.allreduce(self.sums if self._short else self._gradients, limit)
            return
        if self._background is None:
            for bucket in self._buckets:
                bucket.reduce()
            return
        self.begin(len(self._buckets))
        self._background.wait(self._reduced)
        self._begun = 0

    def begin(self, count: int) -> None:
        """The gradients of the first `count` buckets are final: from now on they may be reduced.

        Not collective: `reduce` is, and all ranks have to call it. Until then this rank's gradients
        in these buckets are left alone. Without a thread nothing is done before `reduce`.

        Raises what the thread has raised, as do `reduce`, `gather` and `arrive`.
        """
        if self._background is not None:
            for bucket in self._buckets[self._begun : count]:
                self._reduced = self._background.submit(bucket.reduce)
            self._begun = max(self._begun, count)

    def gather(self, wait: bool = True) -> None:
        """After every rank updated `parameters[owned]`: all are current on all ranks. Collective.

        Between `reduce` and the end of `gather` a rank reads and writes only `parameters[owned]`.
        Receives (N - 1) / N of n / C bytes; within the node it is a fence and, with "ipc", a copy
        of (C - 1) / C of n bytes from its peers' memory, which may go on after the return: who
        writes parameters otherwise than between `reduce` and `gather` fences before.

        Without `wait` a thread goes on with it, the last bucket first: the forward pass begins with
        these. Who reads parameters calls `arrive` before.
        """
        for index in reversed(range(len(self._buckets))):
            if self._background is None:
                self._buckets[index].gather()
            else:
                self._arrivals[index] = self._background.submit(self._buckets[index].gather)
        if wait:
            self.arrive()

    def arrive(self, bucket: int = 0) -> None:
        """Wait until the parameters of a bucket, and of all after it, are current. Not collective.

        Quick where they are.
        """
        if self._background is not None:
            self._background.wait(self._arrivals[bucket])

    def all_reduce(self, values: NDArray[np.float64]) -> None:
        """Replace a few float64 `values` on the host by their sums over all ranks. Collective."""
        messages.allreduce_sum(self._comm, values)

    def fence(self) -> None:
        """Wait for the ranks of the node; what they wrote can be read. Collective over the node.

        A barrier is enough after each rank's own work is done: MPI's own transports rely on the
        same ordering of a rank's writes before the message that announces them.
        """
        carry.settle(self.device)
        if self._topology.local_size > 1:
            self._topology.node.Barrier()

    def free(self) -> None:
        """Give communicators and the peers' memory back. Collective."""
        if self._background is not None:
            self._background.close()
        self._whole = None
        self.peers.clear()
        self._buckets.clear()
        self.between = ()
        self._memory.free()
        if self._own_topology is not None:
            self._own_topology.free()
            self._own_topology = None
        for comm in self._copies:
            comm.Free()
        self._copies = []

    def _take_ranges(self, ranges: Sequence[Range], crossing: Crossing) -> None:
        """Who owns and sums what: `owned`, `sums` and the buckets."""
        self.owned, self.counted = tuple(ranges), self._comm.rank == 0
        self._short = is_short(self.dtype)
        if not self.sliced:
            self.sums = self._room_for_sums()
            wide = wide_dtype(self.dtype)  # MPI_SUM does not add 16-bit numbers
            self._whole, _ = carrier(
                self._comm, self.device, wide, self.n, self.gpu_mpi, self._message_bytes
            )
            return
        shared, sizes = self._shared(crossing), self._topology.local_sizes
        cuts = [Cut(stop - start, self.dtype.itemsize, sizes, start) for start, stop in ranges]
        self.owned = tuple(shared.owned(cut) for cut in cuts)
        self.counted = not shared.whole or self._topology.node_index == 0
        self.sums = self._room_for_sums()
        at = 0
        for number, (cut, (start, stop)) in enumerate(zip(cuts, self.owned, strict=True)):
            self._buckets.append(Bucket(shared, cut, self.sums[at : at + stop - start], number))
            at += stop - start
        self.between = tuple(b.between for b in self._buckets if b.between is not None)

    def _room_for_sums(self) -> Any:
        """See `sums`."""
        filled = [(start, stop) for start, stop in self.owned if start < stop]
        pairs = zip(filled, filled[1:], strict=False)
        if not self._short and all(one[1] == other[0] for one, other in pairs):
            return self.gradients[filled[0][0] : filled[-1][1]] if filled else self.gradients[:0]
        count = sum(stop - start for start, stop in filled)
        return self.device.empty(count, wide_dtype(self.dtype))

    def _shared(self, crossing: Crossing) -> Shared:
        peers, device, where, idle = self.peers, self.device, self._topology, None
        if self._background is not None:
            self._copies = for_thread(where.node, where.cross)
            where = replace(where, node=self._copies[0], cross=self._copies[1])
            idle = self._background.idle
        return Shared(
            where,
            device,
            self._memory,
            crossing,
            device.peers(peers) if peers else None,
            device.peers(peers[1:]) if self._short and peers[1:] else None,
            self.gpu_mpi,
            self._message_bytes,
            idle,
        )
