"""Which rank is on which node, and the communicators that follow from it.

Ranks may be placed in any way and nodes may have unequal numbers of them; nothing anywhere is
computed as `rank // G`. One machine can play several nodes by an override, for tests and for
trying things out:

    HPCTRAIN_TOPOLOGY=2x2         2 nodes of 2 ranks, in rank order
    HPCTRAIN_TOPOLOGY=3+1         a node of 3 ranks and one of 1
    HPCTRAIN_TOPOLOGY=0,1,0,1     the node of every rank

Layer: mpi. Is given a communicator; knows nothing of what is sent over it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Topology", "alone", "parse_override", "topology"]

VARIABLE = "HPCTRAIN_TOPOLOGY"


@dataclass(frozen=True)
class Topology:
    """Where this rank is among the nodes, with communicators of its own (`free` gives them back).

    Attributes:
        comm: all ranks, in the order of the communicator it was made from.
        node: the ranks of this rank's node, in rank order.
        cross: the ranks with this local rank, one per node that has it, in node order.
        node_index: nodes are numbered 0, 1, ... by their lowest rank.
        local_sizes: ranks per node, for every node.
    """

    comm: MPI.Intracomm
    node: MPI.Intracomm
    cross: MPI.Intracomm
    rank: int
    size: int
    node_index: int
    node_count: int
    local_rank: int
    local_size: int
    local_sizes: tuple[int, ...]

    @property
    def leaders(self) -> MPI.Intracomm | None:
        """The first rank of every node, in node order; None on other ranks."""
        return self.cross if self.local_rank == 0 else None

    def free(self) -> None:
        """Free the communicators. Collective over `comm`."""
        for comm in (self.cross, self.node, self.comm):
            comm.Free()

    def __enter__(self) -> Topology:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:  # after an error the other ranks may never come to a collective call
            self.free()


def topology(comm: MPI.Intracomm, override: str | None = None) -> Topology:
    """The topology of the ranks of `comm`. Collective over `comm`.

    Args:
        comm: any intracommunicator; it is duplicated, so that no message of ours meets yours.
        override: as above; default the environment's HPCTRAIN_TOPOLOGY, else the real nodes.

    Raises:
        UsageError: on all ranks; an override that is malformed, differs between ranks, does not
            fit the number of ranks, or puts ranks of different real nodes on one node.
    """
    from mpi4py import MPI

    text = override if override is not None else os.environ.get(VARIABLE, "")
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    first = shared.bcast(comm.rank)
    shared.Free()
    facts = comm.allgather((first, text))
    real = _numbered([first for first, _ in facts])
    nodes = _overridden([text for _, text in facts], real) if any(t for _, t in facts) else real

    mine = nodes[comm.rank]
    counts = Counter(nodes)
    local_sizes = tuple(counts[node] for node in range(len(counts)))
    local_rank = nodes[: comm.rank].count(mine)
    return Topology(
        comm=comm.Dup(),
        node=_split(comm, mine, comm.rank),
        cross=_split(comm, local_rank, mine),
        rank=comm.rank,
        size=comm.size,
        node_index=mine,
        node_count=len(local_sizes),
        local_rank=local_rank,
        local_size=local_sizes[mine],
        local_sizes=local_sizes,
    )


def alone(where: Topology) -> Topology:
    """The same ranks, every one on a node of its own, in rank order. Collective over `comm`."""
    from mpi4py import MPI

    return Topology(
        comm=where.comm.Dup(),
        node=MPI.COMM_SELF.Dup(),
        cross=where.comm.Dup(),
        rank=where.rank,
        size=where.size,
        node_index=where.rank,
        node_count=where.size,
        local_rank=0,
        local_size=1,
        local_sizes=(1,) * where.size,
    )


def parse_override(text: str, size: int) -> list[int]:
    """The node of each of `size` ranks, from "2x2", "3+1" or "0,1,0,1".

    Raises:
        UsageError: `text` is none of these, or describes another number of ranks.
    """
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        count, ranks = map(int, text.split("x"))
        sizes = [ranks] * count if count * ranks == size else []
        described = count * ranks
    elif re.fullmatch(r"[1-9]\d*(\+[1-9]\d*)+", text):
        sizes = [int(part) for part in text.split("+")]
        described = sum(sizes)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        nodes = [int(part) for part in text.split(",")]
        if len(nodes) == size:
            return nodes
        described = len(nodes)
    else:
        raise UsageError(
            f"{VARIABLE}={text!r} is not a topology: write NODESxRANKS (2x2), ranks per node "
            "(3+1) or the node of every rank (0,1,0,1)"
        )
    if described != size:
        raise UsageError(
            f"{VARIABLE}={text!r} describes {described} ranks, but there are {size}: "
            "change it or the number of ranks"
        )
    return [node for node, ranks in enumerate(sizes) for _ in range(ranks)]


def _overridden(texts: list[str], real: list[int]) -> list[int]:
    """The overridden node of every rank. Same arguments, so the same errors, on all ranks."""
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise UsageError(
                f"{VARIABLE} is {texts[0]!r} on rank 0 but {text!r} on rank {rank}: give all ranks "
                f"the same (mpirun -x {VARIABLE})"
            )
    nodes = _numbered(parse_override(texts[0], len(real)))
    home: dict[int, int] = {}
    for rank, node in enumerate(nodes):
        first = home.setdefault(node, rank)
        if real[rank] != real[first]:
            raise UsageError(
                f"{VARIABLE}={texts[0]!r} puts ranks {first} and {rank} on node {node}, but they "
                "are on different machines: a node of an override must lie within one machine"
            )
    return nodes


def _split(comm: MPI.Intracomm, color: int, key: int) -> MPI.Intracomm:
    return cast("MPI.Intracomm", comm.Split(color, key))


def _numbered(labels: list[int]) -> list[int]:
    """Labels replaced by 0, 1, ... in the order of their first occurrence."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]
