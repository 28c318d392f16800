"""Collectives of many levels: one composition from which flat and hierarchical ones follow.

A level groups the ranks, and its groups' members cut the range among themselves: they add up
(`down`) so that each member has the sum of one chunk, then the next level does the same with the
owners of a chunk, one from each group, and on the way back each group completes its range (`up`).
The last level has one group. What can be chosen for each level is its group size, its
algorithm (which is also the transport: `peer` reads the memory of the node, the others send), its
stripes (how many members of a group take chunks) and its wire; for the whole, a pipeline depth:
the buffer goes in so many pieces, and while one crosses, the next is added up in the nodes and the
one before it is spread there.

    ring, direct, ...   one level: all ranks
    leader              (peer, node, 1 stripe)   then all leaders
    two-level           (peer, node)             then the owners of each slice
    torus               (peer, node)             then rows of nodes by ring, then columns by ring
    three-level         (peer, 2), (peer, node)  then across nodes

With equal groups of G ranks, M nodes and two levels, a rank reads 2 (G - 1) / G of the n elements
from its peers and sends what the algorithm between nodes sends of n / G: 2 (M - 1) / M. Groups may
have any sizes: each cuts the range evenly among its own members, and where two groups' cuts differ
an owner has several pieces, each with partners of its own. No rank is computed from another's
number; the nodes are a list.

Additions: within the innermost groups in the algorithm's order, then those sums in the next
level's order, and so on: the same bits on all ranks and on every run with the same arguments.

Layer: collectives. Knows nothing of MPI and memory.

References:
    [HCL25] M. Hidayetoglu et al., "HiCCL: a hierarchical collective communication library",
    IPDPS 2025: the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpctrain.collectives.algorithms_broadcast import broadcast
from hpctrain.collectives.algorithms_flat import ALGORITHMS
from hpctrain.collectives.composition import Composition, Level, Node
from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.schedule import (
    Fence,
    Round,
    Schedule,
    Traffic,
    merged,
)
from hpctrain.errors import UsageError, nearest

__all__ = [
    "ACROSS",
    "PRESETS",
    "Level",
    "all_gather",
    "all_reduce",
    "broadcast",
    "preset",
    "reduce_scatter",
]

SEGMENT_BYTES = 4 << 20  # of a message, at most

PRESETS: dict[str, tuple[Level, ...]] = {
    "ring": (Level("ring"),),
    "doubling": (Level("doubling"),),
    "rabenseifner": (Level("halving"),),
    "direct": (Level("direct"),),
    "leader": (Level("peer", "node", stripes=1), Level("halving")),
    "two-level": (Level("peer", "node"), Level("direct")),
    "torus": (Level("peer", "node"), Level("ring", "square"), Level("ring")),
    "three-level": (Level("peer", 2), Level("peer", "node"), Level("direct")),
}

# What may carry a bucket between nodes once the ranks of each have added up their parts: with any
# of them the k-th node ends with the k-th part, so that who owns what does not depend on it.
ACROSS: dict[str, tuple[Level, ...]] = {
    name: (Level("peer", "node"), Level(name)) for name in ("direct", "halving", "ring")
}


def preset(name: str) -> tuple[Level, ...]:
    """The levels of a known algorithm. Raises `UsageError` for another name."""
    if name not in PRESETS:
        raise UsageError(
            f"no algorithm is called {name!r}{nearest(name, PRESETS)}; there are "
            f"{', '.join(PRESETS)}"
        )
    return PRESETS[name]


def all_reduce(
    nodes: tuple[int, ...],
    n: int,
    itemsize: int,
    levels: tuple[Level, ...],
    *,
    name: str = "all-reduce",
    depth: int = 1,
    segment_bytes: int = SEGMENT_BYTES,
    by_node: bool = True,
) -> Schedule:
    """The sum over all ranks, on all ranks.

    Args:
        nodes: the node of every rank, in any order.
        levels: innermost first; the last one's group is "all".
        depth: pieces of the buffer that follow each other through the levels.
        segment_bytes: of a message, at most; longer ones overlap with their addition.
        by_node: groups take their members in the order of nodes; otherwise in that of ranks,
            which for a ring may cross between nodes at every step.

    Raises:
        UsageError: levels that do not end in one group, or peer reads between nodes.
    """
    made = Composition(nodes, levels, n, itemsize, depth, segment_bytes, by_node)

    def rounds(rank: int) -> Iterator[Round]:
        pieces = [made.tree(rank, piece) for piece in range(depth)]
        for step in range(depth + 2):
            stages = [
                stage(pieces[step - late])
                for late, stage in enumerate((down, across, up))
                if 0 <= step - late < depth
            ]
            yield from merged(stages)
        yield from closing(pieces)

    def traffic(rank: int) -> Traffic:
        return sum((moved(made.tree(rank, p), True, True) for p in range(depth)), Traffic())

    return made.schedule(name, "all-reduce", rounds, made.owned, traffic)


def reduce_scatter(
    nodes: tuple[int, ...], n: int, itemsize: int, levels: tuple[Level, ...], **choices: Any
) -> Schedule:
    """The sum over all ranks, each in the ranges that it owns; other arguments as `all_reduce`.

    The other ranges are left undefined. Ranges that a rank owns are those it can give to
    `all_gather` with the same arguments. They start at multiples of `grain` bytes, 64 or more.
    """
    return _half("reduce-scatter", nodes, n, itemsize, levels, **choices)


def all_gather(
    nodes: tuple[int, ...], n: int, itemsize: int, levels: tuple[Level, ...], **choices: Any
) -> Schedule:
    """What every rank has in the ranges that it owns, on all ranks; arguments as `all_reduce`."""
    return _half("all-gather", nodes, n, itemsize, levels, **choices)


def _half(
    kind: str,
    nodes: tuple[int, ...],
    n: int,
    itemsize: int,
    levels: tuple[Level, ...],
    *,
    name: str = "",
    segment_bytes: int = SEGMENT_BYTES,
    by_node: bool = True,
    grain: int = GRAIN,
) -> Schedule:
    if ALGORITHMS[levels[-1].algorithm].whole:
        raise UsageError(
            f"{kind}: with {levels[-1].algorithm!r} at the last level every rank has the whole "
            "sum; use ring, direct or halving"
        )
    made = Composition(nodes, levels, n, itemsize, 1, segment_bytes, by_node, grain)
    scatter = kind == "reduce-scatter"

    def rounds(rank: int) -> Iterator[Round]:
        tree = made.tree(rank)
        if scatter:
            yield from down(tree)
            yield from across_down(tree)
        else:
            yield from across_up(tree)
            yield from up(tree)
        yield from closing([tree])

    def traffic(rank: int) -> Traffic:
        return moved(made.tree(rank), scatter, not scatter)

    return made.schedule(name or kind, kind, rounds, made.owned, traffic)


def down(tree: Node) -> Iterator[Round]:
    """The innermost level's reduce-scatter."""
    return tree.algorithm.down(tree.group)


def up(tree: Node) -> Iterator[Round]:
    """The innermost level's all-gather."""
    return tree.algorithm.up(tree.group)


def across(tree: Node) -> Iterator[Round]:
    """All levels but the innermost, both ways."""
    yield from across_down(tree)
    yield from across_up(tree)


# Level by level, and not piece by piece: all ranks of a level are then in the same round of it, so
# that messages of several pieces between two ranks come in the same order on both.


def across_down(tree: Node) -> Iterator[Round]:
    for nodes in tree.levels()[1:]:
        yield from merged([down(node) for node in nodes])


def across_up(tree: Node) -> Iterator[Round]:
    for nodes in reversed(tree.levels()[1:]):
        yield from merged([up(node) for node in nodes])


def closing(trees: list[Node]) -> Iterator[Round]:
    """Wait for the last peer reads: afterwards a rank may write what its peers have read."""
    fences: dict[Fence, None] = {}
    for tree in trees:
        for node in tree.all():
            if node.algorithm is ALGORITHMS["peer"] and node.group.size > 1:
                fences[Fence(tuple(node.group.members))] = None
    if fences:
        yield Round(tuple(fences))


def moved(tree: Node, scatter: bool, gather: bool) -> Traffic:
    """The formulas of all levels together."""
    found = Traffic()
    for node in tree.all():
        if scatter:
            found += node.algorithm.down_traffic(node.group)
        if gather:
            found += node.algorithm.up_traffic(node.group)
    return found
