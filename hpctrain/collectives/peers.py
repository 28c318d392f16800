"""Memory for the gradients and parameters of a rank, and how its node's ranks see each other's.

    OwnMemory      nobody else sees it: what others need goes as messages
    SharedMemory   CPU: every rank's gradients and one array of parameters in shared host memory
    MappedMemory   GPU: every rank maps its peers' device memory by CUDA IPC, and has parameters of
                   its own, which it completes from its peers'

All three hold arrays of `count` elements that start as zeros.

Layer: collectives. Knows nothing of who owns which part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hpctrain.collectives import carry
from hpctrain.collectives.cut import GRAIN, Range
from hpctrain.mpi.agree import first_problem
from hpctrain.mpi.topology import Topology
from hpctrain.mpi.window import NodeWindow

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["MappedMemory", "Mapping", "MappingError", "Memory", "OwnMemory", "SharedMemory"]

Array = Any  # of the device


class MappingError(Exception):
    """Ranks cannot map each other's device memory. Raised on all ranks alike; says why."""


class Memory(Protocol):
    """What the three kinds have in common.

    Attributes:
        gradients, parameters: shape (count,), this rank's.
        peers: the gradients of every rank of the node, in local rank order; [] if not visible.
        one_array: whether the node's ranks have one array of parameters together.
    """

    gradients: Array
    parameters: Array
    peers: list[Array]
    one_array: bool

    def collect(self, columns: Iterable[tuple[int, Range]]) -> None:
        """Take the range of `parameters` of each (local rank, range) from that peer's parameters.

        The peers have fenced before, and change nothing before the next fence.
        """

    def free(self) -> None:
        """Give back what others see. Collective over the node; the peers' arrays are dead then."""


class OwnMemory:
    """Gradients and parameters that only this rank sees."""

    one_array = False

    def __init__(self, device: Device, count: int, dtype: np.dtype[Any]) -> None:
        # A GPU's pool may hand out memory that MPI cannot register: take allocations of our own.
        allocate = device.zeros if device.name == "cpu" else device.shared
        self.gradients = allocate(count, dtype)
        self.parameters = allocate(count, dtype)
        self.peers: list[Array] = []

    def collect(self, columns: Iterable[tuple[int, Range]]) -> None:
        """Nothing: messages have brought everything."""

    def free(self) -> None:
        """Nothing is shared."""


class SharedMemory:
    """A window: every rank's gradients and, on the node's first rank, the parameters of all."""

    one_array = True

    def __init__(
        self, topology: Topology, device: Device, count: int, dtype: np.dtype[Any]
    ) -> None:
        """Collective over `topology.comm`. Raises `WindowError`."""
        nbytes = count * dtype.itemsize
        window = NodeWindow(topology, 2 * nbytes if topology.local_rank == 0 else nbytes)
        segments = [window.segment(k).view(dtype) for k in range(topology.local_size)]
        self.peers = [device.wrap(segment[:count]) for segment in segments]
        self.gradients = self.peers[topology.local_rank]
        self.parameters = device.wrap(segments[0][count:])

    def collect(self, columns: Iterable[tuple[int, Range]]) -> None:
        """Nothing: it is one array."""

    def free(self) -> None:
        """The memory lives as long as an array that refers to it, on any rank."""


class Mapping:
    """One allocation of a GPU's memory per rank, which all ranks of its node map by CUDA IPC.

    Attributes:
        arrays: shape (count,), of every rank of the node in local rank order; zeros at first.
    """

    def __init__(
        self, topology: Topology, device: Device, count: int, dtype: np.dtype[Any]
    ) -> None:
        """Collective over `topology.comm`: either all ranks map their peers or none does.

        Raises:
            MappingError: a rank cannot export its memory, map a peer's, or read it rightly.
        """
        self._node, self._device, self._rank = topology.node, device, topology.local_rank
        self._size = max(count, GRAIN // dtype.itemsize)
        self._imported: list[Array] = []
        self.arrays: list[Array] = []
        handle, problem = self._export(dtype)
        if not first_problem(topology.comm, problem):
            handles: list[bytes] = self._node.allgather(handle)
            problem = self._import(handles, dtype)
            if not first_problem(topology.comm, problem):
                problem = self._misread()
        if found := first_problem(topology.comm, problem):
            self.free()
            raise MappingError(found)
        self.arrays = [array[:count] for array in self.arrays]

    def _export(self, dtype: np.dtype[Any]) -> tuple[bytes, str]:
        """This rank's memory and a handle of it, or why there is none."""
        try:
            self._own = self._device.shared(self._size, dtype)
            return self._device.export(self._own), ""
        except Exception as error:  # CuPy's own types; the other ranks must be told
            return b"", f"cannot export device memory: {error}"

    def _import(self, handles: list[bytes], dtype: np.dtype[Any]) -> str:
        """Map every peer's memory; why a peer's cannot be mapped, or ""."""
        for peer, handle in enumerate(handles):
            if peer == self._rank:  # a process cannot map its own export
                self.arrays.append(self._own)
                continue
            try:
                self.arrays.append(self._device.import_(handle, self._size, dtype))
            except Exception as error:  # as above
                return f"cannot map the device memory of local rank {peer}: {error}"
            self._imported.append(self.arrays[-1])
        return ""

    def _misread(self) -> str:
        """Every rank writes its number and reads its peers'; what is wrong with them, or "".

        Collective over the node. The memory is zeros again afterwards.
        """
        self._mark(self._rank + 1)
        self._node.Barrier()
        problem = ""
        try:
            found = [int(self._device.to_host(array[:1])[0]) for array in self.arrays]
            if found != list(range(1, len(found) + 1)):
                problem = f"reads {found} from its peers, which wrote 1 to {len(found)}"
        except Exception as error:  # as above
            problem = f"cannot read its peers' device memory: {error}"
        self._node.Barrier()
        self._mark(0)
        return problem

    def _mark(self, value: int) -> None:
        array = self._own[:1]
        self._device.copy(array, self._device.from_host(np.array([value], array.dtype)))
        carry.settle(self._device)

    def free(self) -> None:
        """Give it back; the arrays are dead then. Collective over the node.

        Nobody unmaps what another rank's work still reads.
        """
        carry.settle(self._device)
        self._node.Barrier()
        for array in self._imported:
            self._device.close(array)
        self._imported, self.arrays = [], []
        self._node.Barrier()  # memory is given back only when nobody maps it


class MappedMemory:
    """Gradients and parameters in one `Mapping`."""

    one_array = False

    def __init__(
        self, topology: Topology, device: Device, count: int, dtype: np.dtype[Any]
    ) -> None:
        """Collective over `topology.comm`. Raises `MappingError`, on all ranks."""
        self._mapping = Mapping(topology, device, 2 * count, dtype)
        self._device, self._rank = device, topology.local_rank
        self.peers = [array[:count] for array in self._mapping.arrays]
        self._parameters = [array[count:] for array in self._mapping.arrays]
        self.gradients, self.parameters = self.peers[self._rank], self._parameters[self._rank]

    def collect(self, columns: Iterable[tuple[int, Range]]) -> None:
        """See `Memory`. Copies on this rank's stream, straight from the peers' memory."""
        for owner, (start, stop) in columns:
            if owner != self._rank and start < stop:
                self._device.copy(self.parameters[start:stop], self._parameters[owner][start:stop])

    def free(self) -> None:
        """See `Memory`."""
        self.peers, self._parameters = [], []
        self._mapping.free()
