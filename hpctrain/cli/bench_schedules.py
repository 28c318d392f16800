"""All-reduce by schedules as contenders of `hpctrain bench allreduce`.

Layer: cli. Knows nothing of how times are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.cli.bench_contenders import Contender
from hpctrain.cli.bench_fit import chosen, reads_peers
from hpctrain.collectives.algorithms import PRESETS, all_reduce, preset
from hpctrain.collectives.buffers import Buffers
from hpctrain.collectives.interpreter import Interpreter, node_list
from hpctrain.collectives.schedule import Schedule
from hpctrain.mpi import gpu

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.mpi.topology import Topology

__all__ = ["Scheduled", "scheduled", "schedules_named"]

Array = Any  # of the device


@dataclass
class Scheduled(Contender):
    """A schedule that replaces the buffer by the sum."""

    device: Device
    interpreter: Interpreter
    array: Array
    source: Array
    expected: np.ndarray[Any, Any]

    def __post_init__(self) -> None:
        self.name = self.interpreter.schedule.name

    def fill(self) -> None:
        self.device.copy(self.array, self.source)

    def add(self) -> None:
        self.interpreter.run()

    def wrong(self) -> int:
        found = self.array if self.device.name == "cpu" else self.device.to_host(self.array)
        return int(np.count_nonzero(found != self.expected))


def schedules_named(
    ranks: Topology, n: int, itemsize: int, names: Sequence[str], choices: str | None = None
) -> list[Schedule]:
    """One per named algorithm; "all": every one; "auto": what the file `choices` names for this
    size. Collective. `UsageError` for another name."""
    nodes = node_list(ranks)
    return [
        chosen(ranks, n, itemsize, choices)
        if name == "auto"
        else all_reduce(nodes, n, itemsize, preset(name), name=name)
        for name in (PRESETS if "all" in names else names)
    ]


def scheduled(
    ranks: Topology,
    device: Device,
    schedules: Sequence[Schedule],
    source: Array,
    expected: np.ndarray[Any, Any],
    order: str = "auto",
) -> tuple[list[Scheduled], Buffers]:
    """One contender per schedule, and the buffers that they all use; for the caller to free.

    Collective. `order`: whether MPI is given GPU memory, see `mpi.gpu.decide`.

    Raises:
        DeviceError: a schedule reads the memory of peers, and that cannot be mapped.
    """
    n, comm = source.shape[0], ranks.comm
    sends = device.name != "cpu" and ranks.size > 1 and len(schedules) > 0
    gpu_mpi = sends and gpu.decide(comm, device.name, order).on
    visible = any(map(reads_peers, schedules))
    buffers = Buffers(ranks, device, n if schedules else 0, source.dtype, visible)
    found = []
    for schedule in schedules:
        array, peers = buffers.array, buffers.peers
        interpreter = Interpreter(ranks, device, schedule, array, peers, gpu_mpi=gpu_mpi)
        found.append(Scheduled(device, interpreter, array, source, expected))
    return found, buffers
