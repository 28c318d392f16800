"""The buffer of a schedule on each rank, where the node's other ranks can read it.

On the CPU it is a shared window; on a GPU an allocation of its own that the peers map by CUDA IPC.

Layer: collectives. Knows nothing of schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.peers import Mapping, MappingError
from hpctrain.errors import DeviceError
from hpctrain.mpi.window import NodeWindow

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.mpi.topology import Topology

__all__ = ["Buffers"]

Array = Any  # of the device


class Buffers:
    """One array per rank, of zeros at first.

    Attributes:
        array: shape (n,), this rank's.
        peers: those of all ranks of the node by rank, this one's included; {} where it was not
            asked for.
    """

    def __init__(
        self, topology: Topology, device: Device, n: int, dtype: DTypeLike, visible: bool = True
    ) -> None:
        """Collective over `topology.comm`; all arguments are the same on all ranks.

        `visible`: whether the ranks of a node need to see each other's.

        Raises:
            WindowError: there can be no shared memory on the CPU.
            DeviceError: a rank cannot map the GPU memory of another one on its node.
        """
        dtype, rank = np.dtype(dtype), topology.rank
        self._mapping: Mapping | None = None
        self.peers: dict[int, Array] = {}
        if not visible:
            allocate = device.zeros if device.name == "cpu" else device.shared
            self.array = allocate(n, dtype)
            return
        if device.name == "cpu":
            window = NodeWindow(topology, -(-n * dtype.itemsize // GRAIN) * GRAIN)
            segments = [window.segment(k).view(dtype)[:n] for k in range(topology.local_size)]
            arrays = [device.wrap(segment) for segment in segments]
        else:
            try:
                self._mapping = Mapping(topology, device, n, dtype)
            except MappingError as error:
                raise DeviceError(
                    f"ranks of a node cannot read each other's GPU memory: {error}; use algorithms "
                    "without reads of peers (ring, direct, rabenseifner, doubling), or make every "
                    f"rank a node of its own: HPCTRAIN_TOPOLOGY={topology.size}x1"
                ) from None
            arrays = self._mapping.arrays
        self.peers = dict(zip(topology.node.allgather(rank), arrays, strict=True))
        self.array = self.peers[rank]

    def free(self) -> None:
        """Give it back; the arrays of a GPU's peers are dead then. Collective over the node.

        A window lives as long as an array that refers to it, on any rank.
        """
        self.peers = {}
        if self._mapping is not None:
            self._mapping.free()
            self._mapping = None
