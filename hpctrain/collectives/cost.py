"""What a schedule takes on a network, without running it: seconds, and bytes over each link.

The schedule's own rounds are done by clocks (`cost_clocks`): message by message, with what ranks
share. A schedule of few ranks is priced with a clock for every rank. Of more ranks only those of
some nodes have one, of each size of node the first and the last, and meet their own mirror image
where a partner has none; no list of rounds is kept. 4,096 nodes of 8 ranks take seconds.

Left out: congestion behind the NICs, noise, and that ranks do not begin at the same time.

Layer: collectives. Knows nothing of MPI.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from hpctrain.collectives.cost_clocks import Clocks
from hpctrain.collectives.network import Network
from hpctrain.collectives.schedule import Schedule

__all__ = ["ALL_CLOCKS", "Link", "Price", "floor_seconds", "price", "representatives"]

ALL_CLOCKS = 64  # ranks: up to so many every rank has a clock


@dataclass(frozen=True)
class Link:
    """Bytes of one node: over its NICs each way, in messages inside, and read from peers."""

    sent: int = 0
    received: int = 0
    inside: int = 0
    read: int = 0


@dataclass(frozen=True)
class Price:
    """What a collective takes.

    Attributes:
        seconds: from the start, common to all ranks, to the end of the last rank.
        wire_seconds: that the busiest NIC carries bytes at its rate, in one direction; without
            those that pass in a burst, which do not wait for the rate.
        links: of the nodes whose ranks had clocks.
    """

    seconds: float
    wire_seconds: float
    links: dict[int, Link]


def price(schedule: Schedule, network: Network, nodes: Iterable[int] | None = None) -> Price:
    """What the schedule takes on the network.

    Args:
        nodes: those whose ranks get a clock; default all where there are up to `ALL_CLOCKS` ranks,
            otherwise `representatives`.

    Raises:
        UsageError: a schedule that does not end.
    """
    if nodes is None:
        few = schedule.size <= ALL_CLOCKS
        nodes = schedule.nodes if few else representatives(schedule.nodes)
    clocks = Clocks(schedule, network, places(schedule.nodes, set(nodes)))
    clocks.run()
    seen = clocks.ports.crossed
    return Price(
        max(clocks.ends.values(), default=0.0),
        max(clocks.ports.busy.values(), default=0.0),
        {
            node: Link(*(seen[node, way] for way in ("sent", "received", "inside", "read")))
            for node in sorted({place[0] for place in clocks.places.values()})
        },
    )


def representatives(nodes: tuple[int, ...]) -> list[int]:
    """Of each number of ranks that nodes have: the first such node and the last one.

    What a rank does depends on its node's size and, where P is no power of two, on its place among
    the groups: what is odd happens to the first or to the last of them. Equal nodes whose ranks
    are a power of two in all do the same: the first one stands for all.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for node, size in sorted(Counter(nodes).items()):
        by_size[size].append(node)
    if len(by_size) == 1 and len(nodes) & (len(nodes) - 1) == 0:
        return [min(nodes)]
    return sorted({node for same in by_size.values() for node in (same[0], same[-1])})


def places(nodes: tuple[int, ...], chosen: set[int]) -> dict[int, tuple[int, int, int]]:
    """For each rank of the chosen nodes: its node, its number there, the ranks there."""
    found: dict[int, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        if node in chosen:
            found[node].append(rank)
    return {
        rank: (node, number, len(ranks))
        for node, ranks in found.items()
        for number, rank in enumerate(ranks)
    }


def floor_seconds(schedule: Schedule, network: Network, rank: int = 0) -> float:
    """Less than the schedule can take, from its formula: no round is looked at.

    A rank posts its messages one after the other, and its bytes pass one port at best.
    """
    moved = schedule.traffic(rank)
    inside, between = network.inside, network.between
    each = min(inside.message_seconds, between.message_seconds)
    byte = min(inside.seconds_per_byte, between.seconds_per_byte)
    least = max(moved.sent, moved.received) * byte
    read = moved.read * min(inside.read_seconds_per_byte, network.rank.add_seconds_per_byte)
    return max((moved.sends + moved.receives) * each, least, read)
