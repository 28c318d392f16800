"""Broadcast: between nodes by messages, within a node by peer reads.

Layer: collectives. Knows nothing of MPI and memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.collectives.algorithms_flat import ALGORITHMS
from hpctrain.collectives.algorithms_group import Group, exchange, length
from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.schedule import (
    Chunks,
    Copy,
    Fence,
    Local,
    Place,
    Range,
    Round,
    Schedule,
    Traffic,
)

__all__ = ["broadcast"]

SEGMENT_BYTES = 4 << 20


def broadcast(
    nodes: tuple[int, ...],
    n: int,
    itemsize: int,
    root: int,
    *,
    long: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
) -> Schedule:
    """What rank `root` has, on all ranks.

    One rank per node, the root or else the first, gets it by messages, and the others of the node
    read it from there. Of M nodes these M ranks do: by default a binomial tree, in ceil(lg M)
    rounds; the root sends n ceil(lg M) elements, all others receive n once and send it as often as
    the tree wants. With `long`: the root sends each its chunk, n (M - 1) / M in all, and a ring
    completes them: n (M - 1) / M more each way. The others of a node read n elements each.
    """
    first = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    first[nodes[root]] = root
    order = sorted(first, key=lambda node: (node != nodes[root], node))
    heads = [first[node] for node in order]  # the root is the first
    grain = GRAIN // itemsize
    segment = max(segment_bytes // GRAIN, 1) * grain

    def group(rank: int) -> Group:
        chunks = Chunks(0, n, len(heads), grain)
        grains = -(-n // grain)
        longest = -(-grains // len(heads)) * grain
        return Group(heads, heads.index(rank), chunks, longest, segment, itemsize, 0)

    def rounds(rank: int) -> Iterator[Round]:
        if rank == first[nodes[rank]]:
            yield from scatter_and_gather(group(rank)) if long else tree(group(rank))
        members = tuple(r for r, node in enumerate(nodes) if node == nodes[rank])
        if len(members) > 1:
            yield spread(rank, first[nodes[rank]], members, n)

    def traffic(rank: int) -> Traffic:
        if rank == first[nodes[rank]]:
            return (scatter_and_gather_traffic if long else tree_traffic)(group(rank))
        return Traffic(read=n * itemsize)

    def owned(rank: int) -> tuple[Range, ...]:
        return ((0, n),) if rank == root and n else ()

    name = "scatter and gather" if long else "tree"
    return Schedule(name, "broadcast", n, itemsize, nodes, rounds, owned, traffic)


def spread(rank: int, head: int, members: tuple[int, ...], n: int) -> Round:
    """The members of a node copy all from one of them, which afterwards may write again."""
    copies: tuple[Local, ...] = ()
    if rank != head and n:
        copies = (Copy(0, n, Place(head, 0)),)
    return Round((Fence(members), *copies, Fence(members)))


def children(size: int, index: int) -> tuple[int, list[int]]:
    """(parent, children in the order of sending) in a binomial tree with root 0.

    The parent lacks the lowest bit that is set; children come with the longest way to go first.
    """
    lowest = index & -index if index else 1 << (size - 1).bit_length()
    found, bit = [], lowest // 2
    while bit:
        if index + bit < size:
            found.append(index + bit)
        bit //= 2
    return index - lowest, found


def tree(group: Group) -> Iterator[Round]:
    """Each gets all from its parent, then gives it to its children."""
    span = (group.chunks.start, group.chunks.stop)
    parent, others = children(group.size, group.index)
    count = group.segments(length(span))
    if group.index:
        yield from exchange(group, [], [(parent, span)], count)
    for child in others:
        yield from exchange(group, [(child, span)], [], count)


def tree_traffic(group: Group) -> Traffic:
    span = (group.chunks.start, group.chunks.stop)
    times = len(children(group.size, group.index)[1])
    once, nbytes = group.messages(span, group.segments(length(span))), group.itemsize * length(span)
    got = 1 if group.index else 0
    return Traffic(times * nbytes, times * once, got * nbytes, got * once)


def scatter_and_gather(group: Group) -> Iterator[Round]:
    """The root gives everyone its chunk; then an all-gather by ring."""
    count = group.segments(group.longest)
    if group.index == 0:
        sends = [(k, group.chunks.chunk(k)) for k in range(1, group.size)]
        yield from exchange(group, sends, [], count)
    else:
        yield from exchange(group, [], [(0, group.own)], count)
    yield from ALGORITHMS["ring"].up(group)


def scatter_and_gather_traffic(group: Group) -> Traffic:
    count = group.segments(group.longest)
    once, nbytes = group.messages(group.own, count), group.itemsize * length(group.own)
    moved = Traffic(received=nbytes, receives=once)
    if group.index == 0:
        messages = group.all_messages(count) - once
        moved = Traffic(group.itemsize * group.elements - nbytes, messages)
    return moved + ALGORITHMS["ring"].up_traffic(group)
