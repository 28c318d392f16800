"""Which algorithm carries a bucket between nodes: what a network makes cheapest.

The ranks of a node have added up a bucket, each of them its own part (`cut.py`), and those parts
cross nodes. Priced is the whole: all ranks of a node at once, which share its NICs, there and back.

    direct     a message to every other node: one round, (M - 1) messages
    halving    recursive halving, and doubling on the way back: lg M rounds and messages
    ring       to the next node: M - 1 rounds, one message each

All three send the same bytes. Where bytes take the time they are equal, and the direct one is
taken; with few bytes for each of many nodes the number of messages decides.

Layer: collectives. Knows nothing of MPI and training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.collectives.algorithms import ACROSS, all_reduce
from hpctrain.collectives.cost import floor_seconds, price
from hpctrain.collectives.network import Network

__all__ = ["Pick", "pick", "picks"]

MARGIN = 0.95  # of the direct one's time: what does not win by so much is left alone


@dataclass(frozen=True)
class Pick:
    """An algorithm between nodes.

    Attributes:
        algorithm: a name in `ACROSS`.
        seconds: predicted of a bucket, there and back, by algorithm; without those that cannot win
            by their formula alone. Empty: nothing was predicted.
    """

    algorithm: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        if len(self.seconds) < 2:
            return self.algorithm
        shown = (f"{name} {1e3 * value:.3g} ms" for name, value in self.seconds.items())
        return f"{self.algorithm} ({', '.join(shown)})"


def pick(
    nodes: tuple[int, ...], n: int, itemsize: int, network: Network, named: str = "auto"
) -> Pick:
    """The algorithm for buckets of `n` elements.

    Args:
        nodes: the node of every rank.
        named: "auto", or the only one of `ACROSS` that is looked at.

    A pure function of its arguments: ranks that give the same ones need not agree on it. On up to
    two nodes all algorithms are the same: direct.
    """
    if named == "auto" and len(set(nodes)) <= 2:
        named = "direct"
    names = tuple(ACROSS) if named == "auto" else (named,)
    made = {name: all_reduce(nodes, n, itemsize, ACROSS[name], name=name) for name in names}
    floors = {name: floor_seconds(schedule, network) for name, schedule in made.items()}
    found: dict[str, float] = {}
    for name in sorted(made, key=lambda name: floors[name]):
        if not found or floors[name] * MARGIN < min(found.values()):
            found[name] = price(made[name], network).seconds
    best = min(found, key=lambda name: found[name])
    if found.get("direct", float("inf")) * MARGIN <= found[best]:
        best = "direct"
    return Pick(best, {name: found[name] for name in ACROSS if name in found})


def picks(
    nodes: tuple[int, ...], sizes: Sequence[int], itemsize: int, network: Network
) -> list[Pick]:
    """The same for buckets of `sizes` elements each.

    Sizes are priced as the next power of two, so that a few prices do for all buckets.
    """
    classes = [1 << (n - 1).bit_length() if n else 0 for n in sizes]
    found = {n: pick(nodes, n, itemsize, network) for n in set(classes)}
    return [found[n] for n in classes]
