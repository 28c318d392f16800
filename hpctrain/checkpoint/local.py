"""Checkpoints on the nodes themselves: on their disks or in /dev/shm, quick and often.

    PATH/run-4f2a90c1-b7e01d55/       of one run: a hash of its folder, and its number
        node_00003/
            step_00000150.4.9c0d3f21/     of 4 ranks, and the number of this save
                rank_00006.bin            what rank 6 had staged
                rank_00006.json           which bytes of which files that is, with checksums
                rank_00004.bin, .json     rank 4 lives on the node before: a copy

Every rank's bytes are on its own node and on the next one, so that a node may be lost. A checkpoint
is whole when some node has each rank's pair; `recover` puts the files together from them.

Nothing is synced: these outlive a killed job, not a machine that goes down, which is what the copy
is for. Half a file does not match its checksums.

Layer: checkpoint. This file knows only folders; `Partners` says who copies whose bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from hpctrain.checkpoint.agree import on_every_rank, on_rank_zero
from hpctrain.checkpoint.draft import Block, opened, write_at, write_whole
from hpctrain.checkpoint.drain import Beat
from hpctrain.checkpoint.parts import CHUNK
from hpctrain.checkpoint.record import Piece
from hpctrain.errors import CheckpointError

if TYPE_CHECKING:
    from hpctrain.mpi.topology import Topology

__all__ = [
    "Bytes",
    "LocalRecord",
    "Mark",
    "NodeFolder",
    "Partners",
    "open_folder",
    "partners",
    "read_local",
]

LOG = logging.getLogger(__name__)
Bytes = Any  # numpy.ndarray of uint8
NUMBER = "run_id"  # in the folder of checkpoints that all ranks share
NAME = re.compile(r"step_(\d{8,})\.(\d+)\.([0-9a-f]{8})")


class Mark(NamedTuple):
    """Which checkpoint: its step, the ranks that wrote it, and the number of the save."""

    step: int
    ranks: int
    save: str

    @property
    def name(self) -> str:
        return f"step_{self.step:08d}.{self.ranks}.{self.save}"


class LocalRecord(msgspec.Struct, frozen=True):
    """What rank_00006.json holds: the pieces are in the order of rank_00006.bin.

    The rest is that of the whole checkpoint, the same for all ranks; see `record.Record`.
    """

    step: int
    state: dict[str, Any]
    dtypes: list[str]
    files: dict[str, int]
    pieces: list[Piece]

    def encode(self) -> bytes:
        """The text of the file; its first line is the sha256 of the second."""
        text = json.dumps(msgspec.to_builtins(self), allow_nan=False).encode()
        return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def read_local(path: Path) -> LocalRecord:
    """The record at `path`. Raises `CheckpointError` where it is damaged, or OSError."""
    digest, _, text = path.read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged")
    return msgspec.json.decode(text, type=LocalRecord)


@dataclass(frozen=True)
class NodeFolder:
    """This node's part of a run's local checkpoints."""

    run: Path  # all that this node has of the run; of a node it was before, too
    node: int

    @property
    def path(self) -> Path:
        return self.run / f"node_{self.node:05d}"

    def prepare(self, mark: Mark, nbytes: int) -> None:
        """Make the folder of a checkpoint; `nbytes` are to be written to it on this node."""
        (self.path / mark.name).mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and free < nbytes:
            raise CheckpointError(
                f"{nbytes / 1e6:,.1f} MB are needed in {self.path} and {free / 1e6:,.1f} MB are "
                "free; make room, name another folder in checkpoint.local, or leave it out"
            )

    def write(self, mark: Mark, rank: int, blocks: Iterable[Block], beat: Beat) -> list[Piece]:
        """Write a rank's staged bytes; the pieces."""
        pieces, offset = [], 0
        path = self.path / mark.name / f"rank_{rank:05d}.bin"
        with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            for block in blocks:
                pieces.append(write_at(descriptor, block, offset))
                offset += block.data.nbytes
                beat()
        return pieces

    def write_copy(self, mark: Mark, rank: int, data: Bytes, beat: Beat) -> None:
        """Write what another node's rank has sent."""
        path = self.path / mark.name / f"rank_{rank:05d}.bin"
        with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            for first in range(0, len(data), CHUNK):
                write_whole(descriptor, data[first : first + CHUNK].data, first)
                beat()

    def complete(self, mark: Mark, records: Iterable[tuple[int, bytes]]) -> None:
        """Write the records of ranks, which makes their bytes count."""
        for rank, text in records:
            path = self.path / mark.name / f"rank_{rank:05d}.json"
            aside = path.with_suffix(".part")
            aside.write_bytes(text)
            aside.rename(path)

    def prune(self, kept: Mark) -> None:
        """Remove all that is here of the run but `kept`. A failure is only a warning."""
        for path in list(self.run.glob("node_*/step_*")):
            if path.name != kept.name:
                try:
                    shutil.rmtree(path)
                except FileNotFoundError:  # nodes of one machine do this side by side
                    continue
                except OSError as error:
                    LOG.warning("the old checkpoint %s cannot be removed: %s", path, error.strerror)

    def remove(self) -> None:
        """Remove all that this node has of the run."""
        shutil.rmtree(self.run, ignore_errors=True)

    def found(self) -> Iterator[tuple[Mark, int, Path]]:
        """What lies on this node: which checkpoint, which rank's, the path of the record."""
        for path in self.run.glob("node_*/step_*/rank_*.json"):
            match = NAME.fullmatch(path.parent.name)
            rank = path.stem.removeprefix("rank_")
            if match and rank.isdigit():
                yield Mark(int(match[1]), int(match[2]), match[3]), int(rank), path


def open_folder(local: str, checkpoints: Path, where: Topology) -> NodeFolder:
    """This node's folder for the run whose shared checkpoints are in `checkpoints`. Collective.

    What an earlier run of the same folder has left on the nodes is removed.
    """
    doing = f"checkpoint.local, {local}, cannot be used"
    number = on_rank_zero(where.comm, doing, lambda: _number(checkpoints))
    place = hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()[:8]
    folder = NodeFolder(Path(local) / f"run-{place}-{number}", where.node_index)

    def ready() -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        for path in Path(local).glob(f"run-{place}-*"):
            if path != folder.run and where.local_rank == 0:
                shutil.rmtree(path, ignore_errors=True)

    on_every_rank(where.comm, doing, ready)
    return folder


def _number(checkpoints: Path) -> str:
    path = checkpoints / NUMBER
    if not path.exists():
        checkpoints.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n", encoding="ascii")
    text = path.read_text(encoding="ascii").strip()
    if not re.fullmatch("[0-9a-f]{8}", text):
        raise CheckpointError(f"{path} holds {text!r} instead of 8 hexadecimal digits; remove it")
    return text


@dataclass(frozen=True)
class Partners:
    """Whose bytes this rank sends where: `to` keeps a copy of ours, we one of each of `sources`.

    `to` is None where there is one node.
    """

    to: int | None
    sources: Sequence[int]


def partners(where: Topology) -> Partners:
    """The rank on the next node with the same local rank, or as near as there is. Collective."""
    nodes: list[list[int]] = [[] for _ in range(where.node_count)]
    places = where.comm.allgather((where.node_index, where.local_rank))
    for rank, (node, _) in enumerate(places):
        nodes[node].append(rank)
    if len(nodes) == 1:
        return Partners(None, [])
    targets = []
    for node, local in places:
        beyond = nodes[(node + 1) % len(nodes)]
        targets.append(beyond[local % len(beyond)])
    sources = [rank for rank, target in enumerate(targets) if target == where.rank]
    return Partners(targets[where.rank], sources)
