"""What `hpctrain bench allreduce` compares: ways to add up over ranks, and a copy.

Layer: cli. Knows nothing of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.slices import SliceReduction
from hpctrain.mpi import messages

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["Contender", "CopiedSlices", "Copy", "InPlace", "OutOfPlace", "Slices", "Whole"]

Array = NDArray[Any]


class Contender:
    """One way to add up: `fill` the input, `add` (what is timed), then count the `wrong`."""

    name = ""

    def fill(self) -> None:
        """Put this rank's numbers into place."""

    def add(self) -> None:
        """The sum over all ranks. Collective."""

    def wrong(self) -> int:
        """Elements of this rank's result that differ from the exact sum."""
        return 0


@dataclass
class InPlace(Contender):
    """MPI_Allreduce that replaces the input."""

    comm: MPI.Intracomm
    source: Array
    expected: Array
    name = "MPI_Allreduce in place"

    def __post_init__(self) -> None:
        self.array = np.empty_like(self.source)

    def fill(self) -> None:
        np.copyto(self.array, self.source)

    def add(self) -> None:
        messages.allreduce(self.comm, self.array)

    def wrong(self) -> int:
        return _differ(self.array, self.expected)


@dataclass
class OutOfPlace(Contender):
    """MPI_Allreduce from one array to another."""

    comm: MPI.Intracomm
    source: Array
    expected: Array
    name = "MPI_Allreduce"

    def __post_init__(self) -> None:
        self.result = np.empty_like(self.source)

    def fill(self) -> None:
        self.result.fill(-1)

    def add(self) -> None:
        count = messages.MESSAGE_BYTES // self.source.itemsize
        for first in range(0, self.source.size, count):
            part = slice(first, first + count)
            self.comm.Allreduce(self.source[part], self.result[part])

    def wrong(self) -> int:
        return _differ(self.result, self.expected)


@dataclass
class Slices(Contender):
    """Reduce and gather as in training, with nothing in between: the sums are in the gradients.

    `source` is on the device, `expected` on the host.
    """

    slices: SliceReduction
    source: Any
    expected: Array

    def __post_init__(self) -> None:
        self.name = f"slices ({self.slices.mode})"

    def fill(self) -> None:
        self.slices.fence()  # nobody reads these gradients any more
        self.slices.device.copy(self.slices.gradients, self.source)

    def add(self) -> None:
        self.slices.reduce()
        self.slices.gather()

    def wrong(self) -> int:
        [(first, last)] = self.slices.owned
        sums = self.slices.device.to_host(self.slices.gradients[first:last])
        return _differ(sums, self.expected[first:last])


class CopiedSlices(Slices):
    """The same, and each slice is copied in between, so that all ranks can read all sums."""

    def __post_init__(self) -> None:
        self.name = f"slices ({self.slices.mode}) + copy"

    def add(self) -> None:
        part, slices = slice(*self.slices.owned[0]), self.slices
        slices.reduce()
        slices.device.copy(slices.parameters[part], slices.gradients[part])
        slices.gather()

    def wrong(self) -> int:
        return _differ(self.slices.device.to_host(self.slices.parameters), self.expected)


class Whole(Slices):
    """MPI_Allreduce of gradients in a GPU's memory, in place: the reduction "allreduce"."""

    def __post_init__(self) -> None:
        self.name = "MPI_Allreduce in place"


@dataclass
class Copy(Contender):
    """Not a sum: all ranks copy as many bytes at once."""

    device: Device
    source: Any
    name = "copy"

    def __post_init__(self) -> None:
        self.target = self.device.zeros(self.source.shape, self.source.dtype)

    def add(self) -> None:
        self.device.copy(self.target, self.source)


def _differ(array: Array, expected: Array) -> int:
    return int(np.count_nonzero(array != expected))
