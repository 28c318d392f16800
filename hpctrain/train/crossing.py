"""How much of a gradient crosses nodes at once, and by which algorithm: from the run file.

Layer: train. Knows nothing of how sums are made.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.collectives import cost_choice
from hpctrain.collectives.cost_across import Pick, pick, picks
from hpctrain.collectives.cut import Range
from hpctrain.collectives.interpreter import node_list
from hpctrain.collectives.network import COMMON, Network, load_network
from hpctrain.mpi.agree import on_first_rank
from hpctrain.parallel.buckets import suited_bytes
from hpctrain.train.session import Session

__all__ = ["algorithms", "bucket_bytes", "network_of"]


def network_of(session: Session) -> Network | None:
    """The network that the run file names. Collective.

    Read also where nothing needs it: a wrong one is to be seen at once.
    """
    file = session.config.parallel.network
    return on_first_rank(session.topology.comm, lambda: load_network(file)) if file else None


def bucket_bytes(session: Session, network: Network | None) -> int:
    """Bytes of gradients exchanged together: as the run file says, or what suits.

    Collective over all ranks where there is a network.
    """
    parallel, layout = session.config.parallel, session.layouts.parameters
    nbytes = layout.size * layout.dtype.itemsize
    if parallel.bucket_mib:
        return parallel.bucket_mib << 20
    if not _crosses(session):
        return max(nbytes, 1)
    if network is None:
        return suited_bytes(nbytes)
    nodes, itemsize, named = _nodes(session), layout.dtype.itemsize, parallel.algorithm

    def seconds(size: int) -> float:
        priced = pick(nodes, size // itemsize, itemsize, network, named)
        return priced.seconds[priced.algorithm]

    return on_first_rank(
        session.topology.comm, lambda: cost_choice.bucket_bytes(seconds, most=nbytes)
    )


def algorithms(
    session: Session, buckets: Sequence[Range], network: Network | None
) -> dict[Range, Pick]:
    """For every bucket the algorithm between nodes; empty where nothing crosses. Collective.

    "auto" is what is cheapest on the run file's network, else on `network.COMMON`; a run that goes
    on with as many nodes takes the same ones again.
    """
    parallel, layout = session.config.parallel, session.layouts.parameters
    if not _crosses(session) or parallel.reduction == "allreduce":
        return {}
    if parallel.algorithm != "auto":
        return dict.fromkeys(buckets, Pick(parallel.algorithm, {}))
    nodes, sizes = _nodes(session), [stop - start for start, stop in buckets]
    found = on_first_rank(
        session.topology.comm,
        lambda: picks(nodes, sizes, layout.dtype.itemsize, network or COMMON),
    )
    return dict(zip(buckets, found, strict=True))


def _crosses(session: Session) -> bool:
    """Whether gradients are sent in messages."""
    return session.topology.node_count > 1 or session.config.parallel.reduction == "messages"


def _nodes(session: Session) -> tuple[int, ...]:
    """The node of every rank; with "messages" each is one of its own. Collective."""
    if session.config.parallel.reduction == "messages":
        return tuple(range(session.topology.size))
    return node_list(session.topology)
