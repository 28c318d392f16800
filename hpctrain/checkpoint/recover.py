"""The newest checkpoint that is whole, on any level: in the shared folder, or on the nodes.

What is whole only on the nodes is put together in the shared folder first, every rank copying what
its node has and checking every byte on the way. From there on it is a checkpoint like any other,
for any number of ranks, and no longer depends on the nodes.

Layer: checkpoint. Is given folders and a topology; knows nothing of what the bytes mean.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.checkpoint.agree import on_rank_zero
from hpctrain.checkpoint.draft import Block, Draft
from hpctrain.checkpoint.local import LocalRecord, Mark, NodeFolder, read_local
from hpctrain.checkpoint.read import latest_valid, verify
from hpctrain.checkpoint.record import Piece, checkpoint_step, checkpoints
from hpctrain.errors import CheckpointError
from hpctrain.mpi.agree import first_problem

if TYPE_CHECKING:
    from hpctrain.mpi.topology import Topology

__all__ = ["newest_valid"]


class CannotWriteError(CheckpointError):
    """There is a checkpoint on the nodes, but no room for it in the shared folder, or the like."""


LOG = logging.getLogger(__name__)
Source = tuple[int, str]  # node, path of a rank's record there
Sources = dict[Mark, dict[int, list[Source]]]  # where each rank's bytes of a checkpoint are


def newest_valid(folder: Path, where: Topology, local: NodeFolder | None) -> Path | None:
    """The newest checkpoint that is whole, as a folder in `folder`, the same on all ranks; None
    where there is none at all. Collective.

    Damaged ones are named in warnings, as by `latest_valid`. A line says where it was found.

    Raises:
        CheckpointError: there are checkpoints but none is whole.
    """
    comm = where.comm
    if local is None:
        return latest_valid(folder, comm)
    sources = _sources(local, where)
    shared = on_rank_zero(comm, f"checkpoints in {folder}", lambda: checkpoints(folder))
    for mark in sorted(sources, reverse=True):
        for path in [path for path in shared if checkpoint_step(path) >= mark.step]:
            shared.remove(path)
            try:
                verify(path, comm)
            except CheckpointError as error:
                _warn(where, f"{error}; trying the one before it")
            else:
                return path
        try:
            return _put_together(folder, where, mark, sources[mark])
        except CannotWriteError:  # an older one would only lose more
            raise
        except CheckpointError as error:
            _warn(where, f"{error}; trying the one before it")
    return latest_valid(folder, comm)


def _warn(where: Topology, text: str) -> None:
    if where.rank == 0:
        LOG.warning("%s", text)


def _sources(local: NodeFolder, where: Topology) -> Sources:
    """What all nodes have. A rank that started elsewhere may find its bytes on any node."""
    mine = list(local.found()) if where.local_rank == 0 else []
    told = where.comm.allgather((where.node_index, [(m, r, str(path)) for m, r, path in mine]))
    found: Sources = {}
    for node, entries in told:
        for mark, rank, path in entries:
            found.setdefault(Mark(*mark), {}).setdefault(rank, []).append((node, path))
    return found


def _put_together(
    folder: Path, where: Topology, mark: Mark, sources: dict[int, list[Source]]
) -> Path:
    """Copy a checkpoint from the nodes to the shared folder. Collective."""
    comm, doing = where.comm, f"checkpoint {mark.name} on the nodes is not whole"
    putting = f"checkpoint {mark.name} on the nodes cannot be put together in {folder}"
    missing = [rank for rank in range(mark.ranks) if rank not in sources]
    if missing:
        raise CheckpointError(f"{doing}: no node has what rank {missing[0]} of {mark.ranks} wrote")
    record = _any_record(where, sources)
    if record is None or record.step != mark.step:
        raise CheckpointError(f"{doing}: its records are damaged")
    draft = Draft(folder, record.step, 1, record.files, record.dtypes, record.state)
    _write(lambda: on_rank_zero(comm, putting, draft.prepare))
    try:
        pieces, nodes = _copy_all(draft, where, sources, (doing, putting))
        lists = comm.gather(pieces) or []
        _write(lambda: on_rank_zero(comm, putting, lambda: draft.publish(lists)))
    except CheckpointError:
        on_rank_zero(comm, doing, draft.discard)
        raise
    verify(draft.final, comm)
    if where.rank == 0:
        s = "s" * (len(nodes) > 1)
        LOG.info("step %d was put together from what %d node%s had", mark.step, len(nodes), s)
    return draft.final


def _write(work: Callable[[], object]) -> None:
    try:
        work()
    except CheckpointError as error:
        raise CannotWriteError(str(error)) from error


def _any_record(where: Topology, sources: dict[int, list[Source]]) -> LocalRecord | None:
    """A record that can be read, the same on all ranks: what it says of the whole is in each."""
    found = None
    if where.local_rank == 0:
        mine = [path for places in sources.values() for n, path in places if n == where.node_index]
        for path in mine:
            try:
                found = read_local(Path(path))
                break
            except (CheckpointError, OSError):
                continue
    return next((record for record in where.comm.allgather(found) if record), None)


def _copy_all(
    draft: Draft, where: Topology, sources: dict[int, list[Source]], doing: tuple[str, str]
) -> tuple[list[Piece], set[int]]:
    """Copy every rank's bytes, from another node where those of one are damaged. Collective.

    Returns the pieces that this rank has written, and the nodes that anything came from.
    """
    left = {rank: list(places) for rank, places in sources.items()}
    pieces: list[Piece] = []
    nodes: set[int] = set()
    while left:
        turns = {rank: places.pop(0) for rank, places in left.items()}
        failed: dict[int, str] = {}
        unwritten = ""
        for rank, (node, path) in turns.items():
            if node == where.node_index and rank % where.local_size == where.local_rank:
                try:
                    pieces += draft.write(_blocks(Path(path)))
                except CheckpointError as error:
                    failed[rank] = str(error)
                except OSError as error:
                    unwritten = unwritten or f"{error.filename}: {error.strerror}"
        if found := first_problem(where.comm, unwritten):
            raise CannotWriteError(f"{doing[1]}: {found}")
        reasons = {rank: why for told in where.comm.allgather(failed) for rank, why in told.items()}
        nodes |= {node for rank, (node, _) in turns.items() if rank not in reasons}
        for rank, why in reasons.items():
            _warn(where, f"rank {rank}'s part on node {turns[rank][0]} is damaged ({why})")
            if not left[rank]:
                raise CheckpointError(f"{doing[0]}: {why}")
        left = {rank: left[rank] for rank in reasons}
    return pieces, nodes


def _blocks(path: Path) -> Iterator[Block]:
    """What a rank has staged, checked against its record."""
    try:
        record = read_local(path)
        with path.with_suffix(".bin").open("rb") as file:
            for piece in record.pieces:
                data = file.read(piece.stop - piece.start)
                if hashlib.sha256(data).hexdigest() != piece.sha256:
                    raise CheckpointError(f"{file.name} does not match its checksums")
                yield Block(piece.file, piece.start, memoryview(data))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
