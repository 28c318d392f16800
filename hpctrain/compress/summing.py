"""Compressed sums for programs of any kind: flat arrays, and any communicator.

    total = GradientSum(MPI.COMM_WORLD, [(256, 64), (64,)], method="topk", density=0.01)
    for gradient in total.tensors: ...   write into it; or share it by DLPack
    total.sum()                          now they hold the sums over all ranks

The ranks of a node add up through memory that they share; what crosses nodes is compressed, and
what is not sent is kept for the next step.

Layer: compress. Knows nothing of networks and update rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.slices import SliceReduction
from hpctrain.compress.between import Compression
from hpctrain.compress.finite import square_sums
from hpctrain.compress.settings import Settings
from hpctrain.device import open_device
from hpctrain.errors import HpctrainError, UsageError
from hpctrain.mpi.topology import topology
from hpctrain.nn.layout import Layout, Store

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["GradientSum"]

Array = Any  # numpy.ndarray, or an array of the device


class GradientSum:
    """The sum over ranks of float32 gradients, compressed between nodes. Collective to create.

    Attributes:
        gradients: float32, shape (n,), n the elements of all tensors and padding (zeros): this
            rank's gradient, and after `sum` the sum over all ranks. It is contiguous, and is shared
            without a copy by `__array_interface__`, `__cuda_array_interface__` and DLPack.
        tensors: parts of it in the shapes that were given, in their order.
        compression: see `Compression`; empty where there is one node.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        shapes: Sequence[Sequence[int]],
        method: str = "topk",
        density: float = 0.01,
        *,
        settings: Settings | None = None,
        device: Device | None = None,
        nodes: str | None = None,
    ) -> None:
        """All arguments are the same on all ranks.

        Args:
            comm: any intracommunicator; it stays the caller's.
            shapes: of the tensors. Those of one dim, and small ones, are not compressed.
            method, density: as in `Settings`.
            settings: all of them, in place of `method` and `density`.
            device: where the arrays are; default the CPU. A GPU is opened before MPI starts.
            nodes: topology override such as "2x2", to play several nodes on one.
        """
        self._device = device or open_device("cpu")
        self._topology = topology(comm, nodes)
        self._device.prepare(["float32"], self._topology.node)
        tensors = [(str(k), tuple(shape), True) for k, shape in enumerate(shapes)]
        layout = Layout(tensors, np.float32)
        self.compression = Compression(settings or Settings(method, density), layout)
        self._slices = SliceReduction(
            self._topology, self._device, layout.size, np.float32, crossing=self.compression
        )
        self.gradients: Array = self._slices.gradients
        store = Store(layout, self.gradients)
        self.tensors: list[Array] = [store.view(name) for name, _, _ in tensors]

    def sum(self, full: bool = False) -> None:
        """Replace `gradients` by what is applied of their sum over all ranks. Collective.

        The same bits on all ranks. What a rank's node did not send yet is part of a later sum.

        Args:
            full: send everything, and what was kept before: nothing is kept afterwards. For the
                last step, and before ranks change. The same on all ranks.

        Raises:
            HpctrainError: on all ranks, a gradient is not finite; `gradients` are undefined, and
                nothing that was kept has changed.
        """
        slices, device = self._slices, self._device
        if full:
            self.compression.flush()
        slices.reduce()
        at = 0
        for start, stop in slices.owned:
            part = slices.sums[at : at + stop - start]
            device.copy(slices.parameters[start:stop], part)
            at += stop - start
        squares = device.to_host(square_sums(device, slices.sums))
        total = np.array([float(np.isfinite(squares.sum(dtype=np.float64)))])
        slices.all_reduce(total)
        slices.gather()
        if total[0] < self._topology.size:
            self.compression.undo()
            raise HpctrainError(
                "a gradient is not finite, or above 1e17: leave this step out, lower the learning "
                "rate, or look for bad samples"
            )
        self.compression.settle(self._topology.comm)
        device.copy(self.gradients, slices.parameters)

    def add(self, array: Any) -> None:
        """`sum` of a flat float32 array of one tensor, in place. Collective.

        `array`: shape (n,), n the elements of the only tensor; anything that NumPy can look at
        without a copy (`__array_interface__`, DLPack), or an array of the device. Copied twice.
        """
        if len(self.tensors) != 1:
            raise UsageError(
                f"add takes the gradient of one tensor, and there are {len(self.tensors)}: write "
                "into `tensors`, and call sum"
            )
        own = self.tensors[0].reshape(-1)
        given = array if self._device.name != "cpu" else _host_view(array)
        if given.shape != own.shape or given.dtype != np.float32:
            raise UsageError(
                f"add takes {own.shape} of float32, not {given.shape} of {given.dtype}"
            )
        self._device.copy(own, given)
        self.sum()
        self._device.copy(given, own)

    def free(self) -> None:
        """Give shared memory and communicators back. Collective; the arrays are dead afterwards."""
        self.tensors, self.gradients = [], None
        self._slices.free()
        self._topology.free()


def _host_view(array: Any) -> Array:
    """The memory of a host array of another library."""
    if hasattr(array, "__array_interface__"):
        return np.asarray(array)
    return np.from_dlpack(array)
