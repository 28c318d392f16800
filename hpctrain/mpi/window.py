"""Memory that the ranks of a node share: one segment per rank, mapped by all of them.

Each rank makes an anonymous file in memory (memfd_create), and its peers open it through
/proc/<pid>/fd/<n>. Why not MPI_Win_allocate_shared, measured with Open MPI 5.0.11:

* Nothing can stay behind: the memory has no name in any file system, and is gone with the last
  process that maps it, SIGKILL or not. (An Open MPI window leaves nothing either, but other MPIs
  name their segments.)
* The size of /dev/shm is no limit. In a container it is 64 MiB unless asked for, and writing past
  it is SIGBUS, not an error. Here the limit is the memory itself (and the cgroup's): too little
  is an error before anything is allocated, and all ranks agree on it.
* Giving it back is local. A window must be freed collectively, and one that is not can hang
  MPI_Finalize (Intel MPI, MPICH); after an error on one rank no collective call is safe.
* Pages are made (posix_fallocate) by the rank that owns the segment: NUMA-local memory, and no
  page faults in the first step.
* As quick: both are pages of the same kernel file system.

It needs a kernel that lets a process open a file of another one of the same user, in the same PID
namespace; where it does not, all ranks are told so and messages are used instead.

Layer: mpi. Knows nothing of what is kept in the memory.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpctrain.mpi.agree import first_problem
from hpctrain.mpi.memory import available_memory
from hpctrain.mpi.topology import Topology

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["NodeWindow", "WindowError"]

MARGIN = 0.9  # of the available memory that a window may take
VARIABLE = "HPCTRAIN_SHM_LIMIT"


class WindowError(Exception):
    """There can be no shared memory. Raised on all ranks alike; the text says why and where."""


class NodeWindow:
    """One segment of shared memory per rank of a node, zeroed, starting on a page boundary.

    The memory lives as long as an array that refers to it, on any rank of the node.
    """

    def __init__(self, topology: Topology, nbytes: int) -> None:
        """Allocate a segment of `nbytes` (0 is fine; may differ between ranks).

        Collective over `topology.comm`: either all nodes get their windows or none does.
        HPCTRAIN_SHM_LIMIT (bytes) stands for the node's available memory, if set.

        Raises:
            WindowError: too little memory on a node, or a rank cannot map its peers' memory.
        """
        self._node = topology.node
        _agree(topology.comm, _shortage(topology.node, nbytes))
        descriptor, problem = _reserve(nbytes)
        try:
            _agree(topology.comm, problem)
            status = os.fstat(descriptor)
            owner = (os.getpid(), descriptor, (status.st_dev, status.st_ino), nbytes)
            owners = topology.node.allgather(owner)
            self._segments, problem = _map_all(owners)
            _agree(topology.comm, problem)  # also: no rank closes before all peers have opened
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def segment(self, local_rank: int) -> NDArray[np.uint8]:
        """The memory of one rank of the node, shape (its nbytes,), writable by all ranks."""
        return self._segments[local_rank]

    def fence(self) -> None:
        """Wait for all ranks of the node: what was written before it can be read after it.

        Collective over the node. A barrier is enough: MPI's own shared-memory transport relies on
        the same ordering of a rank's writes before the message that announces them.
        """
        self._node.Barrier()


def _agree(comm: MPI.Intracomm, problem: str) -> None:
    """Raise on all ranks the first rank's problem, if any rank has one."""
    if found := first_problem(comm, problem):
        raise WindowError(found)


def _shortage(node: MPI.Intracomm, nbytes: int) -> str:
    """Why the node cannot hold all its segments, or an empty string. Collective over the node."""
    total = node.allreduce(nbytes)
    problem = ""
    if node.rank == 0:
        named = os.environ.get(VARIABLE, "")
        free = int(named) if named.isdigit() else int(MARGIN * available_memory())
        if total > free:
            problem = f"{total:,} bytes of shared memory are needed and {free:,} can be had"
            problem += f" ({VARIABLE})" if named else " of this node's memory"
    return problem


def _reserve(nbytes: int) -> tuple[int, str]:
    """A descriptor of `nbytes` of zeroed memory, its pages already made, or -1 and why not."""
    descriptor = -1
    try:
        descriptor = os.memfd_create("hpctrain", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, max(nbytes, 1))
    except (OSError, AttributeError) as error:
        if descriptor >= 0:
            os.close(descriptor)
        return -1, f"cannot reserve {nbytes:,} bytes of shared memory: {error}"
    return descriptor, ""


def _map_all(
    owners: list[tuple[int, int, tuple[int, int], int]],
) -> tuple[list[NDArray[np.uint8]], str]:
    """The segments of (process, descriptor, file, nbytes), or why they cannot be mapped."""
    segments = []
    for pid, descriptor, file, nbytes in owners:
        try:
            opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                status = os.fstat(opened)
                if (status.st_dev, status.st_ino) != file:
                    return [], f"process {pid} is another one here: other PID namespace (container)"
                mapped = mmap.mmap(opened, max(nbytes, 1), mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(opened)
        except (OSError, ValueError) as error:
            return [], f"cannot map the memory of process {pid}: {error}"
        segments.append(np.frombuffer(mapped, np.uint8, nbytes))
    return segments, ""
