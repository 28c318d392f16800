"""Small schedules that show one or two parameters of a network each: what a fit measures first.

They run by the interpreter and are priced like any other schedule, so a measured time is explained
by the same rules as that of a collective.

Layer: collectives. Knows nothing of MPI and of fitting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from hpctrain.collectives.schedule import (
    Copy,
    Fence,
    Local,
    Message,
    Place,
    Recv,
    Reduce,
    Round,
    Schedule,
    Send,
    Traffic,
)

__all__ = ["probes"]

SMALL = 64  # bytes
SIZES = (256 << 10, 2 << 20)  # bytes of a message
MEMORY = (1 << 20, 8 << 20)  # bytes that are copied, read or added
TOGETHER = 16  # small messages in one round, or fences in a row


def probes(nodes: tuple[int, ...], itemsize: int) -> list[Schedule]:
    """Those that the ranks allow: no messages between nodes where there is one node."""
    homes: dict[int, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        homes[node].append(rank)
    found = []
    for nbytes in MEMORY:
        found.append(_local(f"copy of {nbytes}", nodes, nbytes, itemsize, _copy))
        found.append(_local(f"sum of {nbytes}", nodes, nbytes, itemsize, _sum))
    firsts = [ranks[0] for ranks in homes.values()]
    found.append(_local("copy, one rank", nodes, MEMORY[0], itemsize, _copy, firsts))
    if any(len(ranks) > 1 for ranks in homes.values()):
        found.append(_fences(nodes, homes, itemsize))
        found += [_reads(nodes, homes, nbytes, itemsize) for nbytes in MEMORY]
        inside = [
            pair for ranks in homes.values() for pair in zip(ranks[::2], ranks[1::2], strict=False)
        ]
        found += _messages("inside", nodes, inside, itemsize)
    ordered = list(homes.values())
    between = [
        pair
        for a, b in zip(ordered[::2], ordered[1::2], strict=False)
        for pair in zip(a, b, strict=False)
    ]
    return found + (_messages("between", nodes, between, itemsize) if between else [])


def _made(
    name: str, nodes: tuple[int, ...], n: int, itemsize: int, rounds: Callable[[int], list[Round]]
) -> Schedule:
    def lazily(rank: int) -> Iterator[Round]:
        return iter(rounds(rank))

    return Schedule(
        name, "probe", n, itemsize, nodes, lazily, lambda rank: (), lambda rank: Traffic()
    )


def _copy(rank: int, n: int) -> Local:
    return Copy(0, n, Place(rank, n))


def _sum(rank: int, n: int) -> Local:
    return Reduce(0, n, (Place(rank, 0), Place(rank, n)))


def _local(
    name: str,
    nodes: tuple[int, ...],
    nbytes: int,
    itemsize: int,
    operation: Callable[[int, int], Local],
    ranks: list[int] | None = None,
) -> Schedule:
    """One operation on the two halves of the buffer, on some ranks or on all at once."""
    n = nbytes // itemsize

    def rounds(rank: int) -> list[Round]:
        return [Round((operation(rank, n),))] if ranks is None or rank in ranks else []

    return _made(name, nodes, 2 * n, itemsize, rounds)


def _fences(nodes: tuple[int, ...], homes: dict[int, list[int]], itemsize: int) -> Schedule:
    def rounds(rank: int) -> list[Round]:
        members = tuple(homes[nodes[rank]])
        return [Round((Fence(members),))] * TOGETHER if len(members) > 1 else []

    return _made("fences", nodes, SMALL // itemsize, itemsize, rounds)


def _reads(
    nodes: tuple[int, ...], homes: dict[int, list[int]], nbytes: int, itemsize: int
) -> Schedule:
    """Every rank copies the second half of the next one's buffer to the first half of its own."""
    n = nbytes // itemsize

    def rounds(rank: int) -> list[Round]:
        members = homes[nodes[rank]]
        if len(members) == 1:
            return []
        other = members[(members.index(rank) + 1) % len(members)]
        fence = Fence(tuple(members))
        return [Round((fence, Copy(0, n, Place(other, n)), fence))]

    return _made(f"read of {nbytes}", nodes, 2 * n, itemsize, rounds)


def _messages(
    name: str, nodes: tuple[int, ...], pairs: list[tuple[int, int]], itemsize: int
) -> list[Schedule]:
    """Both of a pair send and receive, all pairs at once."""
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    found = []
    for count, nbytes in ((1, SMALL), (TOGETHER, SMALL), *((1, size) for size in SIZES)):
        n = nbytes // itemsize

        def rounds(rank: int, n: int = n, count: int = count) -> list[Round]:
            if rank not in other:
                return []
            room = count * n
            messages: tuple[Message, ...] = ()
            for k in range(count):
                messages += (Recv(other[rank], room + k * n, room + (k + 1) * n),)
                messages += (Send(other[rank], k * n, (k + 1) * n),)
            return [Round((), messages)]

        title = f"{name}, {count} x {nbytes}"
        found.append(_made(title, nodes, count * n, itemsize, rounds))
    return found
