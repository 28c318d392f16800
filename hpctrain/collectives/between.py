"""What crosses nodes in a sliced reduction, as a plug: exact sums, or compressed ones.

Inside a node a bucket is cut into columns, one per local rank (`cut.py`), and the ranks of a node
add up their own; what a column's ranks then tell each other, from node to node, is for a `Between`
to decide. `Across` is the exact one.

Layer: collectives. Says what a `Between` is given and must do; knows none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hpctrain.collectives.cut import Range
from hpctrain.mpi.rounds import Idle

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["Between", "Column", "Crossing"]

Array = Any  # of the device


@dataclass(frozen=True)
class Column:
    """One bucket's column on one node: everything that a `Between` is made of.

    Attributes:
        comm: the column's ranks, in node order, to send on; nobody else uses it meanwhile.
        bucket: (start, stop) in elements of the flat arrays: what is reduced together.
        span: the column's part of it; the same on all ranks of `comm`.
        slices: for every rank of `comm` its part of `span`, in order and without gaps.
        gradients: shape (padded n,): in `span` this node's sums, once `reduce` is called.
        parameters: shape (padded n,), of the gradients' dtype.
        sums: what `reduce` writes: as long as `span` where the `Between` is whole, else as this
            rank's slice; of the wide dtype. It may be that part of `gradients` itself.
        gpu_mpi: whether the arrays of a GPU are given to MPI as they are.
        message_bytes: most bytes in one message; None for what suits.
        idle: called between two looks at messages under way, and sleeps a little: whoever waits
            does so in a thread beside the computation. None: waiting may block.
    """

    comm: MPI.Intracomm
    device: Device
    bucket: Range
    span: Range
    slices: Sequence[Range]
    gradients: Array
    parameters: Array
    sums: Array
    gpu_mpi: bool = False
    message_bytes: int | None = None
    idle: Idle | None = None


class Between(Protocol):
    """Sums one column over nodes. Both methods are collective over the column's ranks.

    They may run in a thread of their own, one call at a time: messages go by `InFlight`, waited
    for with the column's `idle`. A rank may be ahead of another by a bucket, never by more calls of
    one `Between` than messages in order allow.
    """

    def reduce(self) -> None:
        """From the node's sums in `gradients[span]` make the sums over all nodes, in `sums`."""

    def gather(self) -> None:
        """After the update: complete `parameters[span]`. Nothing where it is whole."""


class Crossing(Protocol):
    """Makes a `Between` for each column. Not collective; all ranks give equal ones.

    Attributes:
        whole: True: a column is owned once per node, and updated alike on all nodes, so that
            `sums` are the same bits on all of them and no parameters cross. False: it is divided
            across nodes, and each rank updates its slice.
    """

    @property
    def whole(self) -> bool: ...

    def __call__(self, column: Column) -> Between: ...
