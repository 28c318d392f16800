"""What each method would take on a model of the network: where `auto` begins, before it measures.

What crosses is priced as a schedule (`collectives.opaque`), every payload with the most bytes that
it can have; what a rank does to a column itself, as passes over the column's memory, a number that
is counted from the methods' kernels. Neither knows caches, other programs, or how the interpreter
of Python delays: a prediction orders what is tried, and what is measured decides.

Layer: compress. Knows nothing of arrays and messages.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import msgspec

from hpctrain.collectives.algorithms import Level, all_reduce
from hpctrain.collectives.cost import price
from hpctrain.collectives.network import Network
from hpctrain.collectives.opaque import gather_and_add, two_shot
from hpctrain.collectives.schedule import Schedule

__all__ = ["predicted"]

ITEMSIZE = 4
# Reads and writes of a column: adding the residual; dense adds up and clears; a selection counts,
# counts again, takes out and clears; "oktopk" besides cuts regions and sums on the host.
PASSES = {"dense": 3, "topk": 5, "oktopk": 7}


def predicted(
    network: Network, nodes: int, n: int, columns: int, traffic: Mapping[str, int]
) -> dict[str, float]:
    """Seconds of a step of each method for which there is a schedule: dense, topk and oktopk.

    Args:
        nodes: that a column of `n` elements is summed over, one rank of each.
        columns: of a node, that cross at the same time and share its NICs.
        traffic: bytes that a rank receives in a step, by method.
    """
    own = network.rank
    bare = _bare(network, columns)
    found = {}
    for name, passes in PASSES.items():
        if name not in traffic:
            continue
        local = passes * n * ITEMSIZE * own.copy_seconds_per_byte
        local += traffic[name] * own.add_seconds_per_byte
        found[name] = local + _crossing(bare, name, nodes, n, traffic[name])
    return found


def _bare(network: Network, columns: int) -> Network:
    """The network for one of the columns, with messages alone: `PASSES` has the rest."""
    sharing, between = -(-columns // network.between.nics), network.between
    return msgspec.structs.replace(
        network,
        between=msgspec.structs.replace(
            between,
            seconds_per_byte=between.seconds_per_byte * sharing,
            burst_bytes=between.burst_bytes / sharing,
        ),
        rank=msgspec.structs.replace(
            network.rank, add_seconds_per_byte=0.0, copy_seconds_per_byte=0.0
        ),
        node=msgspec.structs.replace(network.node, memory_seconds_per_byte=0.0),
    )


@functools.lru_cache(maxsize=256)
def _crossing(network: Network, name: str, nodes: int, n: int, received: int) -> float:
    """Seconds of the messages. `received`: bytes by a rank, spread evenly over its messages."""
    if nodes == 1 or not n:
        return 0.0
    return price(schedule(name, nodes, n, received), network).seconds


def schedule(name: str, nodes: int, n: int, received: int) -> Schedule:
    """The exchange of a method, with payloads of the size that makes it receive so many bytes."""
    places = tuple(range(nodes))
    if name == "dense":
        return all_reduce(places, n, ITEMSIZE, (Level("direct"),), name=name)
    if name == "topk":
        return gather_and_add(places, n, ITEMSIZE, -(-received // (nodes - 1)))
    return two_shot(places, n, ITEMSIZE, -(-received // (2 * (nodes - 1))))
