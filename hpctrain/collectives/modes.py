"""Which way a sliced reduction goes: through which memory, and in which thread.

Layer: collectives. Knows nothing of buckets and sums.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.cut import Cut
from hpctrain.collectives.peers import MappedMemory, MappingError, Memory, SharedMemory
from hpctrain.device.dtypes import FLOATS
from hpctrain.errors import DeviceError, UsageError, nearest
from hpctrain.mpi.rounds import threads_may_call
from hpctrain.mpi.topology import Topology
from hpctrain.mpi.window import WindowError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["MODES", "OVERLAPS", "background_wanted", "check", "open_memory"]

log = logging.getLogger(__name__)

MODES = ("auto", "shared", "ipc", "messages", "allreduce")
OVERLAPS = ("auto", "on", "off")


def open_memory(
    topology: Topology, device: Device, n: int, dtype: np.dtype[Any], mode: str
) -> tuple[str, Memory | None]:
    """The mode that is possible, and memory that the node's ranks see, or None. Collective.

    Raises:
        DeviceError: there can be none, and `mode` is not "auto".
    """
    count = Cut(n, dtype.itemsize, topology.local_sizes).padded
    host, several = device.name == "cpu", max(topology.local_sizes) > 1
    wanted = ""
    if mode == "auto" and (host or several):
        wanted = "shared" if host else "ipc"
    elif mode in ("shared", "ipc"):
        wanted = mode
    kinds: dict[str, type[SharedMemory] | type[MappedMemory]] = {
        "shared": SharedMemory,
        "ipc": MappedMemory,
    }
    try:
        if wanted:
            return wanted, kinds[wanted](topology, device, count, dtype)
    except (WindowError, MappingError) as error:
        if mode != "auto":
            raise DeviceError(
                f'reduction "{mode}" is not possible: {error}; use "messages", smaller '
                "models, or fewer ranks per node"
            ) from None
        if topology.rank == 0:
            name = {"shared": "shared memory", "ipc": "CUDA IPC"}[wanted]
            log.warning("messages instead of %s within nodes: %s", name, error)
    return "allreduce" if mode == "allreduce" else "messages", None


def background_wanted(overlap: str, where: Topology) -> bool:
    """Whether exchanges go on beside the computation; the first rank says why not, if asked to.

    "auto": where several nodes exchange messages. Within a node there is little to hide: on the CPU
    adding up is the core's own work, on a GPU each rank reads its slice of its peers' gradients
    once, at the speed of their links.
    """
    if overlap not in OVERLAPS:
        raise UsageError(
            f"overlap is {overlap!r}{nearest(overlap, OVERLAPS)}; it is {', '.join(OVERLAPS)}"
        )
    if overlap == "off" or where.size == 1 or (overlap == "auto" and where.node_count == 1):
        return False
    if threads_may_call():
        return True
    if where.rank == 0:
        log.warning(
            "no exchange of gradients during the backward pass: that is where the MPI library has "
            "MPI_THREAD_MULTIPLE, and was started so"
        )
    return False


def check(mode: str, dtype: np.dtype[Any], device: Device) -> None:
    """Raise `UsageError` or `DeviceError` where there is no such mode for this dtype and device."""
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
