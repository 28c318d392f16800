"""What ranks share and therefore wait for: ports, cores and the memory of a node.

Each serves in the order in which it is asked: what meets at one takes, together, the sum of what
each would take alone.

Layer: collectives. Knows nothing of schedules.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

from hpctrain.collectives.network import Network

__all__ = ["Ports"]


class Ports:
    """The ports, cores and memories of the nodes, as the times from which they are free.

    Attributes:
        busy: seconds that each NIC has carried bytes at its rate, by (node, NIC, direction); what
            passes in a burst takes none.
        crossed: bytes between nodes and inside them, by (node, direction): "sent", "received",
            "inside" (messages) or "read" (peer reads).
    """

    def __init__(self, network: Network, places: dict[int, tuple[int, int, int]]) -> None:
        """`places`: for each rank its node, its number on it, and the ranks of the node."""
        self._network, self._places = network, places
        self._free: dict[tuple[object, ...], float] = defaultdict(float)
        self._cores: dict[int, list[float]] = {}
        cores = network.node.cores
        for node, _, size in places.values():
            if size > cores:
                self._cores.setdefault(node, [0.0] * cores)
        self._half = network.between.duplex == "half"
        self.busy: dict[tuple[object, ...], float] = defaultdict(float)
        self.crossed: dict[tuple[int, str], int] = defaultdict(int)

    def work(self, rank: int, begin: float, seconds: float, nbytes: int) -> float:
        """When a rank that wants to begin then has spent `seconds` of a core on `nbytes`."""
        node = self._places[rank][0]
        cores = self._cores.get(node)
        if cores is not None:
            begin = max(begin, heapq.heappop(cores))
        end = self._memory(node, begin, begin + seconds, nbytes)
        if cores is not None:
            heapq.heappush(cores, end)
        return end

    def read(self, rank: int, nbytes: int) -> None:
        """Count what a rank reads of its peers' memory."""
        self.crossed[self._places[rank][0], "read"] += nbytes

    def leave(self, rank: int, inside: bool, ready: float, nbytes: int) -> tuple[float, float]:
        """(begin, end) of a message that goes out of a rank's port."""
        return self._pass(rank, inside, "sent", ready, nbytes)

    def arrive(self, rank: int, inside: bool, ready: float, nbytes: int) -> float:
        """When all bytes of a message have come in by a rank's port, without the latency."""
        end = self._pass(rank, inside, "received", ready, nbytes)[1]
        if inside:
            node = self._places[rank][0]
            self.crossed[node, "inside"] += nbytes
            return self._memory(node, ready, end, nbytes)
        return end

    def _pass(
        self, rank: int, inside: bool, way: str, ready: float, nbytes: int
    ) -> tuple[float, float]:
        network, burst = self._network, 0.0
        port: tuple[object, ...]
        if inside:
            port, seconds = (rank, way), nbytes * network.inside.seconds_per_byte
        else:
            node, number, _ = self._places[rank]
            port = (node, number % network.between.nics, "both" if self._half else way)
            port, seconds = ("nic", *port), nbytes * network.between.seconds_per_byte
            burst = network.between.burst_bytes * network.between.seconds_per_byte
            self.crossed[node, way] += nbytes
        free = max(ready - burst, self._free.get(port, -burst))  # earlier, where a burst may pass
        self._free[port] = free + seconds
        begin, end = max(ready, free), max(ready, free + seconds)
        if not inside:
            self.busy[port] += end - begin
        return begin, end

    def _memory(self, node: int, begin: float, end: float, nbytes: int) -> float:
        """`end`, or later where the node's memory is not done with all that was asked of it."""
        each = self._network.node.memory_seconds_per_byte
        if not each:
            return end
        port = ("memory", node)
        self._free[port] = max(self._free[port], begin) + nbytes * each
        return max(end, self._free[port])
