"""Copies of what a checkpoint holds, in host memory, so that training need not wait for a disk.

The memory is allocated once, its pages made, and used again for every checkpoint. Padding is left
out: the copy is the files' bytes, in stretches, and is written and sent as it is.

Layer: checkpoint. Is given a device and parts; knows nothing of ranks and of files' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint.draft import Block
from hpctrain.checkpoint.parts import CHUNK, Part, Plan
from hpctrain.checkpoint.tensors import SUFFIX

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.device.interface import Ticket

__all__ = ["Staging", "needed_bytes"]

Bytes = NDArray[np.uint8]
NOTHING = np.empty(0, np.uint8)


class Stretch(NamedTuple):
    """Bytes of a file from `start` on, which lie in the memory from `begin` up to `end`."""

    file: str
    start: int
    begin: int
    end: int


class Staging:
    """This rank's bytes of a checkpoint. `memory` holds them; `copy` fills it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._all = NOTHING
        self._used = 0
        self._stretches: list[Stretch] = []
        self._tickets: list[Ticket] = []

    @property
    def memory(self) -> Bytes:
        """What the last `copy` filled, shape (bytes,); complete after `settle`."""
        return self._all[: self._used]

    def reserve(self, nbytes: int) -> None:
        """Make room, and the pages too: else the first copy would wait for them."""
        if nbytes > self._all.nbytes:
            self._all = NOTHING
            self._all = self._device.staging(nbytes)
            self._all.fill(0)

    def copy(self, plans: Mapping[str, Plan], parts: Sequence[Part], first: bool) -> None:
        """Begin to copy the ranges that `parts` own; `first`: also the files' headers.

        The arrays must not change before `settle` has returned.
        """
        self.reserve(needed_bytes(plans, parts, first))
        self._stretches, self._used = [], 0
        for name, plan in plans.items():
            if first:
                header = np.frombuffer(plan.header, np.uint8)
                self._place(name, 0, header.nbytes)[:] = header
            for part in parts:
                if f"{part.file}{SUFFIX}" != name or part.owned[0] == part.owned[1]:
                    continue
                owned = part.view(*part.owned)
                for start, begin, end in part.runs(plan.tensors, *part.owned):
                    piece = owned[begin:end]
                    room = self._place(name, start, int(piece.nbytes))
                    self._tickets.append(self._device.download(piece, room))

    def _place(self, file: str, start: int, nbytes: int) -> Any:
        begin, end = self._used, self._used + nbytes
        self._used = end
        last = self._stretches[-1] if self._stretches else None
        if last and last.file == file and last.start + last.end - last.begin == start:
            self._stretches[-1] = last._replace(end=end)
        else:
            self._stretches.append(Stretch(file, start, begin, end))
        return self._all[begin:end]

    def settle(self) -> None:
        """Wait until the copy is complete."""
        for ticket in self._tickets:
            ticket.wait()
        self._tickets = []

    def blocks(self) -> Iterator[Block]:
        """The memory, in order, as blocks of at most 16 MiB."""
        for file, start, begin, end in self._stretches:
            for first in range(begin, end, CHUNK):
                last = min(first + CHUNK, end)
                yield Block(file, start + first - begin, self._all[first:last].data)


def needed_bytes(plans: Mapping[str, Plan], parts: Sequence[Part], first: bool) -> int:
    """Bytes of this rank's copy."""
    total = sum(len(plan.header) for plan in plans.values()) if first else 0
    for part in parts:
        pieces = part.layout.pieces(*part.owned)
        total += part.layout.dtype.itemsize * sum(last - first for _, first, last in pieces)
    return total
