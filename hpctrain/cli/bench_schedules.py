"""All-reduce by schedules as contenders of `hpctrain bench allreduce`.

Layer: cli. Knows nothing of how times are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.cli.bench_contenders import Contender
from hpctrain.cli.bench_fit import chosen
from hpctrain.collectives.algorithms import PRESETS, all_reduce, preset
from hpctrain.collectives.interpreter import Interpreter, node_list, shared_buffers

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.mpi.topology import Topology

__all__ = ["Scheduled", "scheduled"]

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


def scheduled(
    ranks: Topology,
    device: Device,
    names: Sequence[str],
    source: Array,
    expected: np.ndarray[Any, Any],
    choices: str | None = None,
) -> list[Contender]:
    """One contender per named algorithm ("all": every one; "auto": what the file `choices` names
    for this size), each with a buffer of its own.

    Collective. On a GPU only algorithms without peer reads; `UsageError` for others.
    """
    found: list[Contender] = []
    nodes, n = node_list(ranks), source.shape[0]
    for name in PRESETS if "all" in names else names:
        itemsize = source.dtype.itemsize
        if name == "auto":
            schedule = chosen(ranks, n, itemsize, choices)
        else:
            schedule = all_reduce(nodes, n, itemsize, preset(name), name=name)
        if device.name == "cpu":
            array, peers = shared_buffers(ranks, device, n, source.dtype)
        else:
            array, peers = device.empty(n, source.dtype), {}
        interpreter = Interpreter(ranks, device, schedule, array, peers)
        found.append(Scheduled(device, interpreter, array, source, expected))
    return found
