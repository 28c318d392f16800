"""Reduce a slice, update a slice, gather the parameters: the exchange of data-parallel training.

Every rank ends with the sum of its own slice of the gradient, updates that slice of the
parameters, and then all get all parameters. Inside a node nothing is sent: the ranks map each
other's gradients, so that adding up reads each gradient once, straight from its owner's memory. On
the CPU they share one parameter array as well, and gathering is a fence; on a GPU each has its own,
and copies its peers' parts. Between nodes a rank exchanges only its column (`cut.py`) by messages
(`across.py`).

One step of two nodes of two ranks, A B and C D; each owns a quarter:

    fence    A adds a+b in the left half, B in the right; C and D likewise
    fence    A and C exchange the quarters of the left half and add; B and D of the right
    update   of the parameters, by each rank in its quarter
    gather   A and C exchange the left half's parameters, B and D the right half's; fence
             GPU: A copies the right half from B, B the left half from A; C and D likewise

Layer: collectives. Is given a topology and a device; knows nothing of what the numbers mean.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.collectives import carry
from hpctrain.collectives.across import Across, carrier
from hpctrain.collectives.cut import Cut
from hpctrain.collectives.peers import MappedMemory, MappingError, Memory, OwnMemory, SharedMemory
from hpctrain.device.dtypes import FLOATS, is_short, wide_dtype
from hpctrain.errors import DeviceError, UsageError, nearest
from hpctrain.mpi import gpu, messages
from hpctrain.mpi.topology import Topology, alone
from hpctrain.mpi.window import WindowError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["MODES", "SliceReduction"]

log = logging.getLogger(__name__)

MODES = ("auto", "shared", "ipc", "messages", "allreduce")


class SliceReduction:
    """Flat gradients and parameters of all ranks, and the two collectives between them.

    Attributes:
        mode: "shared", "ipc", "messages" or "allreduce": what is really done.
        gpu_mpi: whether messages are sent from and to a GPU's memory itself.
        gradients: shape (n,), this rank's; it writes them, and `reduce` adds them up.
        parameters: shape (n,); with "shared" one array for all ranks of the node.
        owned: (start, stop), the range this rank updates. Except with "allreduce" the ranges of
            all ranks together are [0, n) without overlap; a range may be empty.
        peers: the gradients of the ranks of the node, in local rank order, with "shared" and "ipc".
        sums: what `reduce` leaves, the sum over all ranks of the range `owned` of the gradients:
            that range itself, or an array of float32 where they are bfloat16 or float16.
        sliced: whether ranks own different ranges; with "allreduce" each owns everything.
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

        Raises:
            UsageError: an unknown mode, dtype or `gpu_mpi`.
            DeviceError: mode "shared" or "ipc" on a device that lacks it, or where the memory
                cannot be shared or mapped; the text says why.
        """
        dtype = np.dtype(dtype)
        _check(mode, dtype, device)
        self.n, self.dtype, self.device = n, dtype, device
        self._own_topology: Topology | None = None
        self._message_bytes = message_bytes
        memory = self._open_memory(topology, mode)
        if memory is None:
            self.mode = "allreduce" if mode == "allreduce" else "messages"
            topology = self._own_topology = alone(topology)
            count = Cut(n, dtype.itemsize, topology.local_sizes).padded
            memory = OwnMemory(device, count, dtype)
        self._memory: Memory = memory
        self._topology, self._comm = topology, topology.comm
        self._cut = Cut(n, dtype.itemsize, topology.local_sizes)
        self._take_arrays()
        crosses = topology.node_count > 1 and device.name != "cpu"
        self.gpu_mpi = crosses and gpu.decide(topology.comm, device.name, gpu_mpi).on
        self._across = self._make_across()
        self._whole: carry.Carrier | None = None
        if self.mode == "allreduce":
            wide = wide_dtype(dtype)  # MPI_SUM does not add 16-bit numbers
            self._whole, _ = carrier(self._comm, device, wide, n, self.gpu_mpi, message_bytes)

    @property
    def sliced(self) -> bool:
        return self.mode != "allreduce"

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
                self._widen()
            if self._comm.size > 1:
                limit = self._message_bytes or messages.MESSAGE_BYTES
                self._whole.allreduce(self.sums if self._short else self._gradients, limit)
            return
        if self._topology.local_size > 1:
            self.fence()
            self._sum_within_node()
            self.fence()
        if self._across is not None:
            self._across.reduce()
        elif self._short and self._topology.local_size == 1:
            self._widen()

    def gather(self) -> None:
        """After every rank updated `parameters[owned]`: all are current on all ranks. Collective.

        Between `reduce` and the end of `gather` a rank reads and writes only `parameters[owned]`.
        Receives (N - 1) / N of n / C bytes; within the node it is a fence and, with "ipc", a copy
        of (C - 1) / C of n bytes from its peers' memory, which may go on after the return: who
        writes parameters otherwise than between `reduce` and `gather` fences before.
        """
        if self._across is not None:
            self._across.gather()
        if self._topology.local_size > 1:
            self.fence()
            self._memory.collect((c, self._cut.column(c)) for c in range(self._cut.columns))

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
        self._across = self._whole = None
        self.peers.clear()
        self._sums.clear()
        self._table = None
        self._memory.free()
        if self._own_topology is not None:
            self._own_topology.free()
            self._own_topology = None

    def _open_memory(self, topology: Topology, mode: str) -> Memory | None:
        """Memory that the node's ranks see; None where it is not wanted, or not possible."""
        count = Cut(self.n, self.dtype.itemsize, topology.local_sizes).padded
        try:
            if self.device.name == "cpu" and mode in ("auto", "shared"):
                self.mode = "shared"
                return SharedMemory(topology, self.device, count, self.dtype)
            several = max(topology.local_sizes) > 1
            if self.device.name != "cpu" and (mode == "ipc" or (mode == "auto" and several)):
                self.mode = "ipc"
                return MappedMemory(topology, self.device, count, self.dtype)
        except (WindowError, MappingError) as error:
            if mode != "auto":
                raise DeviceError(
                    f'reduction "{mode}" is not possible: {error}; use "messages", smaller '
                    "models, or fewer ranks per node"
                ) from None
            if topology.rank == 0:
                wanted = {"shared": "shared memory", "ipc": "CUDA IPC"}[self.mode]
                log.warning("messages instead of %s within nodes: %s", wanted, error)
        return None

    def _take_arrays(self) -> None:
        where = self._topology
        self._gradients, self._parameters = self._memory.gradients, self._memory.parameters
        self.gradients = self._gradients[: self.n]
        self.parameters = self._parameters[: self.n]
        self.peers: list[Any] = [peer[: self.n] for peer in self._memory.peers]
        self._table = self.device.peers(self.peers) if self.peers else None
        self._sums: list[tuple[Any, int, int]] = [
            (self.peers[owner][start:stop], start, stop - start)
            for owner, start, stop in self._cut.sums(where.node_index, where.local_rank)
            if self.peers
        ]
        self.owned = (0, self.n)
        if self.sliced:
            self.owned = self._cut.slice(where.node_index, where.local_rank)
        start, stop = self.owned
        self.sums = self.gradients[start:stop]
        self._short = is_short(self.dtype)
        if self._short:
            self.sums = self.device.empty(stop - start, wide_dtype(self.dtype))
            self._others = self.device.peers(self.peers[1:]) if self.peers[1:] else None

    def _make_across(self) -> Across | None:
        where = self._topology
        if not self.sliced or where.node_count == 1 or where.local_rank >= self._cut.columns:
            return None
        return Across(
            where.cross,
            [self._cut.slice(node, where.local_rank) for node in range(where.node_count)],
            self.device,
            self._gradients,
            self._parameters,
            self.sums,
            self.gpu_mpi,
            self._message_bytes,
        )

    def _sum_within_node(self) -> None:
        """Add up this rank's part of the node's sums, each into its column's rank's memory.

        Of 16-bit gradients on a single node that is this rank's slice, in float32.
        """
        for target, start, count in self._sums:
            if self._short and self._topology.node_count == 1:
                first = self.peers[0][start : start + count]
                self.device.launch(
                    "sum_widened", first, self._others, len(self.peers) - 1, start, self.sums,
                    count, work=count,
                )  # fmt: skip
                continue
            self.device.launch(
                "sum_peers", self._table, len(self.peers), start, target, count, work=count
            )

    def _widen(self) -> None:
        """`sums` from this rank's own gradients, where nobody adds to them."""
        start, stop = self.owned
        own, count = self.gradients[start:stop], stop - start
        self.device.launch("sum_widened", own, None, 0, 0, self.sums, count, work=count)


def _check(mode: str, dtype: np.dtype[Any], device: Device) -> None:
    if mode not in MODES:
        raise UsageError(
            f"no reduction is called {mode!r}{nearest(mode, MODES)}; there are {', '.join(MODES)}"
        )
    if dtype not in FLOATS.values():
        raise UsageError(f"a reduction of {dtype} is not possible: use {', '.join(FLOATS)}")
    if mode == "shared" and device.name != "cpu":
        raise DeviceError(
            f'reduction "shared" needs arrays in host memory, and those of device {device.name!r} '
            'are not: use "ipc", "messages" or "auto"'
        )
    if mode == "ipc" and device.name == "cpu":
        raise DeviceError(
            'reduction "ipc" needs the memory of a GPU, not of device "cpu": use "shared", '
            '"messages" or "auto"'
        )
