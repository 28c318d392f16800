"""Reduce a slice, update a slice, gather the parameters: the exchange of data-parallel training.

Every rank ends with the sum of its own slice of the gradient, updates that slice of the
parameters, and then all get all parameters. Inside a node nothing is sent: the ranks map each
other's gradients and share one parameter array, so that adding up reads each gradient once,
straight from its owner's memory, and gathering is a fence. Between nodes a rank exchanges
only its column (`cut.py`) by messages (`across.py`).

One step of two nodes of two ranks, A B and C D; each owns a quarter:

    fence    A adds a+b in the left half, B in the right; C and D likewise
    fence    A and C exchange the quarters of the left half and add; B and D of the right
    update   of the parameters, by each rank in its quarter
    gather   A and C exchange the left half's parameters, B and D the right half's; fence

Layer: collectives. Is given a topology and a device; knows nothing of what the numbers mean.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.collectives.across import Across, on_host, to_device
from hpctrain.collectives.cut import Cut
from hpctrain.errors import DeviceError, UsageError, nearest
from hpctrain.mpi import messages
from hpctrain.mpi.topology import Topology, alone
from hpctrain.mpi.window import NodeWindow, WindowError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["MODES", "SliceReduction"]

log = logging.getLogger(__name__)

MODES = ("auto", "shared", "messages", "allreduce")


class SliceReduction:
    """Flat gradients and parameters of all ranks, and the two collectives between them.

    Attributes:
        mode: "shared", "messages" or "allreduce": what is really done.
        gradients: shape (n,), this rank's; it writes them, and `reduce` adds them up.
        parameters: shape (n,); with "shared" one array for all ranks of the node.
        owned: (start, stop), the range this rank updates. Except with "allreduce" the ranges of
            all ranks together are [0, n) without overlap; a range may be empty.
        peers: the gradients of the ranks of the node, in local rank order.
        sliced: whether ranks own different ranges; with "allreduce" each owns everything.
        writes_parameters: whether this rank is the one to set initial values of `parameters`.

    All arrays start as zeros, and live as long as something refers to them.
    """

    def __init__(
        self,
        topology: Topology,
        device: Device,
        n: int,
        dtype: DTypeLike,
        mode: str = "auto",
        message_bytes: int | None = None,
    ) -> None:
        """Collective over `topology.comm`; all arguments are the same on all ranks.

        Args:
            n: number of elements; 0, fewer than ranks and more than 2^31 are fine.
            dtype: float32 or float64.
            mode: "shared": memory shared within nodes, messages between them. "messages": every
                rank is a node of its own. "allreduce": plain MPI_Allreduce of the whole gradient,
                every rank owns everything. "auto": shared where the device allows, messages (and
                a warning on rank 0) where there is too little memory to share.
            message_bytes: the most bytes in one message; the default suits.

        Raises:
            UsageError: an unknown mode or dtype.
            DeviceError: mode "shared" on a device whose memory is not the host's, or where the
                memory cannot be shared; the text says why.
        """
        dtype = np.dtype(dtype)
        _check(mode, dtype, device)
        self.n, self.dtype, self.device = n, dtype, device
        self.window: NodeWindow | None = None
        self._own_topology: Topology | None = None
        self._comm = topology.comm
        self._message_bytes = message_bytes
        if mode in ("auto", "shared") and device.name == "cpu":
            self.window = self._open_window(topology, required=mode == "shared")
        if self.window is not None:
            self.mode = "shared"
        else:
            self.mode = "allreduce" if mode == "allreduce" else "messages"
            topology = self._own_topology = alone(topology)
        self._topology = topology
        self._cut = Cut(n, dtype.itemsize, topology.local_sizes)
        self._make_arrays()
        self._across = self._make_across()

    @property
    def sliced(self) -> bool:
        return self.mode != "allreduce"

    @property
    def writes_parameters(self) -> bool:
        return self.window is None or self._topology.local_rank == 0

    def reduce(self) -> None:
        """Afterwards `gradients[owned]` is the sum over all ranks. Collective.

        Other parts of `gradients` are undefined, and all of it may be written again. The sum is
        added within each node in local rank order, then over nodes in node order, by one rank: the
        same bits on every run with the same topology and, after `gather`, on all ranks.
        ("allreduce": the MPI library's order, which promises neither.)

        With n bytes, L ranks on this node, N nodes, C columns: reads n from the node's memory and
        writes n / L; sends and receives (N - 1) / N of n / C bytes, in N - 1 messages per round.
        """
        if self.mode == "allreduce":
            host = on_host(self.device, self._gradients)
            messages.allreduce(self._comm, host, self._message_bytes or messages.MESSAGE_BYTES)
            to_device(self.device, host, self._gradients)
            return
        if self.window is not None and self._topology.local_size > 1:
            self.fence()
            self._sum_within_node()
            self.fence()
        if self._across is not None:
            self._across.reduce(self._gradients)

    def gather(self) -> None:
        """After every rank updated `parameters[owned]`: all are current on all ranks. Collective.

        Between `reduce` and the end of `gather` a rank reads and writes only `parameters[owned]`.
        Receives (N - 1) / N of n / C bytes; within the node it is a fence.
        """
        if self._across is not None:
            self._across.gather(self._parameters)
        self.fence()

    def all_reduce(self, values: NDArray[np.float64]) -> None:
        """Replace a few float64 `values` on the host by their sums over all ranks. Collective."""
        messages.allreduce_sum(self._comm, values)

    def fence(self) -> None:
        """Wait for the ranks of the node; what they wrote can be read. Collective over the node."""
        self.device.synchronize()
        if self.window is not None and self._topology.local_size > 1:
            self.window.fence()

    def free(self) -> None:
        """Give communicators and this object's hold on the memory back. Collective."""
        self.window = None
        self._across = None
        if self._own_topology is not None:
            self._own_topology.free()
            self._own_topology = None

    def _open_window(self, topology: Topology, required: bool) -> NodeWindow | None:
        """Room for every rank's gradients and, on the node's first rank, the parameters."""
        size = Cut(self.n, self.dtype.itemsize, topology.local_sizes).padded * self.dtype.itemsize
        try:
            return NodeWindow(topology, 2 * size if topology.local_rank == 0 else size)
        except WindowError as error:
            if required:
                raise DeviceError(
                    f'reduction "shared" is not possible: {error}; use "messages", smaller '
                    "models, or fewer ranks per node"
                ) from None
            if topology.rank == 0:
                log.warning("messages instead of shared memory within nodes: %s", error)
            return None

    def _make_arrays(self) -> None:
        count, where = self._cut.padded, self._topology
        if self.window is None:
            self._gradients = self.device.zeros(count, self.dtype)
            self._parameters = self.device.zeros(count, self.dtype)
            self.peers = [self._gradients[: self.n]]
        else:
            memory = self.window
            segments = [memory.segment(k).view(self.dtype) for k in range(where.local_size)]
            self._gradients = self.device.wrap(segments[where.local_rank][:count])
            self._parameters = self.device.wrap(segments[0][count:])
            self.peers = [self.device.wrap(segment[: self.n]) for segment in segments]
        self.gradients = self._gradients[: self.n]
        self.parameters = self._parameters[: self.n]
        self._table = self.device.peers(self.peers)
        self._sums = [
            (self.peers[owner][start:stop], start, stop - start)
            for owner, start, stop in self._cut.sums(where.node_index, where.local_rank)
        ]
        self.owned = (0, self.n)
        if self.sliced:
            self.owned = self._cut.slice(where.node_index, where.local_rank)

    def _make_across(self) -> Across | None:
        where = self._topology
        if not self.sliced or where.node_count == 1 or where.local_rank >= self._cut.columns:
            return None
        slices = [self._cut.slice(node, where.local_rank) for node in range(where.node_count)]
        return Across(where.cross, slices, self.device, self.dtype, self._message_bytes)

    def _sum_within_node(self) -> None:
        """Add up this rank's part of the node's sums, each into its column's rank's memory."""
        table = self._table
        for target, start, count in self._sums:
            self.device.launch(
                "sum_peers", table, len(self.peers), start, target, count, work=count
            )


def _check(mode: str, dtype: np.dtype[Any], device: Device) -> None:
    if mode not in MODES:
        raise UsageError(
            f"no reduction is called {mode!r}{nearest(mode, MODES)}; there are {', '.join(MODES)}"
        )
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise UsageError(f"a reduction of {dtype} is not possible: use float32 or float64")
    if mode == "shared" and device.name != "cpu":
        raise DeviceError(
            f'reduction "shared" needs arrays in host memory, and those of device {device.name!r} '
            'are not: use "messages" or "auto"'
        )
