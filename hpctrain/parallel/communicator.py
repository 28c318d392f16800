"""The ranks of a run and the device they compute on, for loops of one's own.

Layer: parallel. Knows nothing of networks and files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.device import Device, open_device, visible_gpus
from hpctrain.errors import UsageError
from hpctrain.mpi.gpu import warn_of_shared_gpus
from hpctrain.mpi.messages import allreduce
from hpctrain.mpi.start import choose_gpu, start
from hpctrain.mpi.topology import topology

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "open_chosen_device"]

SUMMABLE = "fdil"  # dtype.char of the types that MPI_SUM has on every MPI library


def open_chosen_device(name: str) -> Device:
    """Open "auto", "cpu", "cuda" or "sim"; of several GPUs that of `choose_gpu`. Before MPI starts.

    Raises:
        DeviceError: there is no such device, or MPI runs already and it is a GPU.
        UsageError: the user's choice of a GPU is not possible.
    """
    gpus = visible_gpus(name)
    return open_device(name, local_rank=choose_gpu(gpus) if gpus else 0)


class Communicator:
    """Ranks, the nodes they are on, and a device.

    Collective to create. From then on an uncaught exception on any rank or thread ends all ranks.

    Args:
        comm: any intracommunicator, which stays the caller's; default all ranks of the job.
        device: "auto", "cpu", "cuda" or "sim", or a device that is open. A GPU must be opened
            before MPI starts: who brings a `comm` of several ranks brings the open device too.
        nodes: topology override such as "2x2", to play several nodes on one; see `topology`.

    Attributes:
        mpi_comm: the communicator that was given. rank, size: of this process in it.
        device: where arrays live. topology: nodes and local ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        device: str | Device = "auto",
        nodes: str | None = None,
    ) -> None:
        self.device = open_chosen_device(device) if isinstance(device, str) else device
        world = start()
        self.mpi_comm = world if comm is None else comm
        self.rank: int = self.mpi_comm.rank
        self.size: int = self.mpi_comm.size
        self.topology = topology(self.mpi_comm, nodes)
        warn_of_shared_gpus(self.mpi_comm, self.device.uuid)

    def all_reduce(self, array: Any) -> Any:
        """Replace a host array by its sum over all ranks, and return it. Collective.

        The array is C-contiguous, of float32, float64, int32 or int64, of one shape on all ranks.
        Plain MPI_Allreduce: for losses and counts; gradients go through `DistributedOptimizer`.
        """
        if array.dtype.char not in SUMMABLE or not array.flags.c_contiguous:
            raise UsageError(
                f"all_reduce cannot sum dtype {array.dtype}, contiguous: "
                f"{array.flags.c_contiguous}; pass a C-contiguous array of float32, float64, int32 "
                "or int64"
            )
        allreduce(self.mpi_comm, array.reshape(-1))
        return array

    def mean(self, value: float, weight: float = 1.0) -> float:
        """The weighted mean of `value` over all ranks. Collective."""
        total = self.all_reduce(np.array([value * weight, weight], np.float64))
        return float(total[0] / total[1])

    def free(self) -> None:
        """Free the communicators made here. Collective; `mpi_comm` is left alone."""
        self.topology.free()
