"""Reduce-scatter and all-gather within one group of ranks: ring, direct, halving, doubling, peer.

Notation: a group of P members, this one i; n elements in the group's range, cut into one chunk
per member, own = |chunk i|. "Messages" counts segments: a long chunk goes in several. All work
for any P, chunks of any length, also empty ones, and give the same bits on every run and, once
gathered, on all members: each chunk is added up by one member, or by all in the same order.

              reduce-scatter: sent; received              all-gather: sent; received
    ring      n - own; n - |chunk i-1|                    n - |chunk i+1|; n - own
    direct    n - own; (P - 1) own                        (P - 1) own; n - own
    halving   n - own; about the same                     about the same; n - own
    peer      nothing; reads (P - 1) own                  nothing; reads n - own
    doubling  n per round, both ways, lg P rounds         nothing: all have the sum already

    rounds    ring and direct P - 1; halving and doubling lg P (see there for other P); peer one

Order of additions, for chunk c: ring x[c+1] + x[c+2] + ... + x[c] round the ring. direct and peer
x[0] + x[1] + ... . halving: a tree of pairs. doubling: a tree of pairs, the same on all members.

Layer: collectives. Knows nothing of nodes, levels and memory.

References:
    [PY09] P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", J. Parallel Distrib. Comput. 69(2), 2009: ring.
    [TRG05] R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication
    operations in MPICH", Int. J. High Perform. Comput. Appl. 19(1), 2005: halving (Rabenseifner's
    all-reduce), doubling.
"""

from __future__ import annotations

from hpctrain.collectives.algorithms_group import (
    Algorithm,
    Group,
    Rounds,
    exchange,
    exchange_and_add,
    length,
)
from hpctrain.collectives.algorithms_halving import (
    doubling_down,
    doubling_down_traffic,
    doubling_scratch,
    doubling_up,
    doubling_up_traffic,
    halving_down,
    halving_down_traffic,
    halving_scratch,
)
from hpctrain.collectives.schedule import (
    Copy,
    Fence,
    Local,
    Place,
    Reduce,
    Round,
    Traffic,
)

__all__ = ["ALGORITHMS"]


# ring: to the next member, P - 1 times [PY09]


def ring_down(group: Group) -> Rounds:
    """In step t member i sends chunk i - 1 - t and adds chunk i - 2 - t, which arrives.

    Segments follow each other: one is added up while the next one travels. With one segment per
    chunk there is nothing to add meanwhile.
    """
    size, me, count = group.size, group.index, group.segments(group.longest)
    width = group.width(group.longest, count)
    pending: tuple[Local, ...] = ()
    for turn in range((size - 1) * count):
        step, index = divmod(turn, count)
        out = group.part(group.chunks.chunk((me - 1 - step) % size), count, index)
        start, stop = group.part(group.chunks.chunk((me - 2 - step) % size), count, index)
        row = group.scratch + turn % 2 * width
        messages = group.send((me + 1) % size, out)
        messages += group.receive((me - 1) % size, row, row + stop - start)
        yield Round(pending, messages) if count == 1 else Round((), messages, pending)
        sources = (Place(group.rank, row), Place(group.rank, start))
        pending = (Reduce(start, stop, sources),) if start < stop else ()
    yield Round(pending)


def ring_up(group: Group) -> Rounds:
    """In step t member i passes on chunk i - t."""
    size, me, count = group.size, group.index, group.segments(group.longest)
    yield Round(group.cast(group.own))
    for step in range(size - 1):
        out, into = (group.chunks.chunk((me - step - back) % size) for back in (0, 1))
        yield from exchange(group, [((me + 1) % size, out)], [((me - 1) % size, into)], count)


def all_but(group: Group, index: int, count: int) -> tuple[int, int]:
    """(bytes, messages) of all chunks but one."""
    span = group.chunks.chunk(index % group.size)
    messages = group.all_messages(count) - group.messages(span, count)
    return group.volume(group.elements - length(span), messages), messages


def ring_down_traffic(group: Group) -> Traffic:
    count = group.segments(group.longest)
    received = all_but(group, group.index - 1, count)
    return Traffic(*all_but(group, group.index, count), *received)


def ring_up_traffic(group: Group) -> Traffic:
    count = group.segments(group.longest)
    return Traffic(*all_but(group, group.index + 1, count), *all_but(group, group.index, count))


def ring_scratch(group: Group) -> int:
    return 2 * group.width(group.longest, group.segments(group.longest))


# direct: every member with every other


def direct_down(group: Group) -> Rounds:
    """Member i sends everyone its chunk; first to i + 1, then to i + 2, so that all are busy."""
    size, me = group.size, group.index
    count = group.segments(group.longest, size - 1)
    there = [(me + k) % size for k in range(1, size)]
    back = [(me - k) % size for k in range(1, size)]
    sends = [(k, group.chunks.chunk(k)) for k in there]
    width = group.width(group.longest, count)
    return exchange_and_add(group, group.own, sends, back, range(size), count, width)


def direct_up(group: Group) -> Rounds:
    size, me = group.size, group.index
    sends = [((me + k) % size, group.own) for k in range(1, size)]
    receives = [((me - k) % size, group.chunks.chunk((me - k) % size)) for k in range(1, size)]
    yield Round(group.cast(group.own))
    yield from exchange(group, sends, receives, group.segments(group.longest))


def to_each(group: Group, count: int) -> tuple[int, int]:
    """(bytes, messages) of the own chunk, P - 1 times."""
    messages = (group.size - 1) * group.messages(group.own, count)
    return group.volume((group.size - 1) * length(group.own), messages), messages


def direct_down_traffic(group: Group) -> Traffic:
    count = group.segments(group.longest, group.size - 1)
    return Traffic(*all_but(group, group.index, count), *to_each(group, count))


def direct_up_traffic(group: Group) -> Traffic:
    count = group.segments(group.longest)
    return Traffic(*to_each(group, count), *all_but(group, group.index, count))


def direct_scratch(group: Group) -> int:
    count = group.segments(group.longest, group.size - 1)
    return 2 * (group.size - 1) * group.width(group.longest, count)


# peer: straight out of the memory of the node's other ranks


def peer_down(group: Group) -> Rounds:
    """Once all have written: add up the own chunk of everyone's buffer."""
    if group.size == 1:
        return
    start, stop = group.own
    sources = tuple(Place(rank, start) for rank in group.members)
    adding: tuple[Local, ...] = (Reduce(start, stop, sources),) if start < stop else ()
    yield Round(meanwhile=(Fence(tuple(group.members)), *adding))


def peer_up(group: Group) -> Rounds:
    """Once all have their chunk: copy everyone's, beginning with the next member's."""
    if group.size == 1:
        return
    copies = []
    for away in range(1, group.size):
        index = (group.index + away) % group.size
        start, stop = group.chunks.chunk(index)
        if start < stop:
            copies.append(Copy(start, stop, Place(group.members[index], start)))
    yield Round(meanwhile=(Fence(tuple(group.members)), *copies))


def peer_down_traffic(group: Group) -> Traffic:
    return Traffic(read=(group.size - 1) * length(group.own) * group.itemsize)


def peer_up_traffic(group: Group) -> Traffic:
    return Traffic(read=(group.elements - length(group.own)) * group.itemsize)


def nothing(group: Group) -> Rounds:
    return iter(())


def no_traffic(group: Group) -> Traffic:
    return Traffic()


def no_scratch(group: Group) -> int:
    return 0


ALGORITHMS = {
    "ring": Algorithm(ring_down, ring_up, ring_down_traffic, ring_up_traffic, ring_scratch),
    "direct": Algorithm(
        direct_down, direct_up, direct_down_traffic, direct_up_traffic, direct_scratch
    ),
    "halving": Algorithm(
        halving_down, doubling_up, halving_down_traffic, doubling_up_traffic, halving_scratch
    ),
    "doubling": Algorithm(
        doubling_down, nothing, doubling_down_traffic, no_traffic, doubling_scratch, whole=True
    ),
    "peer": Algorithm(peer_down, peer_up, peer_down_traffic, peer_up_traffic, no_scratch),
}
