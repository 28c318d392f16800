"""A copy of a data set on a disk of each node, whole or not there.

The ranks of a node copy different files, each aside, summed while it is copied and compared with
the manifest, then renamed; the manifest comes last. A copy that is whole is used again, and the
right files of an unfinished one are kept. The folder is named by the data set's id, so two data
sets or two versions never mix.

Layer: data. Is given the node's communicator or none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.data.agreed import agreed
from hpctrain.data.dataset import Dataset
from hpctrain.data.manifest import MANIFEST, Shard, load_manifest
from hpctrain.errors import DataError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Staged", "stage"]

PIECE = 8 << 20  # bytes copied at a time
MARGIN = 16 << 20  # bytes to be left free on the disk


@dataclass(frozen=True)
class Staged:
    """Where the copy is, and what it took."""

    path: Path
    bytes_copied: int  # by all ranks of the node
    seconds: float


def stage(dataset: Dataset, to: str | Path, node: MPI.Intracomm | None = None) -> Staged:
    """Copy a data set into a folder of its own below `to`, a directory on this node.

    Collective over `node`, the ranks of one node, if given. Raises `DataError` on all of its ranks
    where there is too little room, a file cannot be copied, or one is not what the manifest says.
    """
    begun = time.perf_counter()
    folder = Path(to) / dataset.dataset_id.removeprefix("sha256:")[:16]
    rank, size = (0, 1) if node is None else (node.rank, node.size)
    shards = [s for split in dataset.manifest.splits.values() for s in split.shards]
    mine = shards[rank::size]
    missing = [s for s in mine if not _is_there(folder / s.file, s)]
    wanted = sum(s.bytes for s in missing)
    wanted = wanted if node is None else node.allreduce(wanted)
    task = f"stage {dataset.path} to {folder}"

    def prepare() -> None:
        if _finished(folder, dataset) and not wanted:
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        for split in dataset.manifest.splits:
            (folder / split).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if wanted + MARGIN > free:
            raise DataError(
                f"cannot {task}: {wanted:,} bytes are to be copied and {free:,} are free; stage to "
                f"another disk, or train from {dataset.path}"
            )

    def copy() -> None:
        for shard in missing:
            _copy(dataset.path / shard.file, folder / shard.file, shard)

    agreed(node, task, prepare, only_first=True)
    agreed(node, task, copy)
    agreed(node, task, lambda: _finish(dataset, folder), only_first=True)
    return Staged(folder, wanted, time.perf_counter() - begun)


def _is_there(path: Path, shard: Shard) -> bool:
    """Whether a file has the size it should have; its content was summed when it was renamed."""
    try:
        return path.stat().st_size == shard.bytes
    except OSError:
        return False


def _finished(folder: Path, dataset: Dataset) -> bool:
    try:
        return load_manifest(folder).dataset_id == dataset.dataset_id
    except DataError:
        return False


def _copy(source: Path, target: Path, shard: Shard) -> None:
    part = target.with_name(f"{target.name}.part")
    digest = hashlib.sha256()
    try:
        with source.open("rb") as read, part.open("wb") as write:
            while piece := read.read(PIECE):
                digest.update(piece)
                write.write(piece)
            write.flush()
            os.fsync(write.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"cannot copy {source} to {part}: {error.strerror or error}; is the disk full?"
        ) from error
    if digest.hexdigest() != shard.sha256:
        part.unlink()
        raise DataError(
            f"{source}: its sha256 is {digest.hexdigest()[:16]}..., the manifest says "
            f"{shard.sha256[:16]}...; restore it, or pack the data again"
        )
    part.replace(target)


def _finish(dataset: Dataset, folder: Path) -> None:
    """Copy the files beside the shards, the manifest last."""
    if _finished(folder, dataset):
        return
    others = [p for p in sorted(dataset.path.iterdir()) if p.is_file() and p.name != MANIFEST]
    keep: Callable[[Path], bool] = lambda path: not path.name.endswith(".part")  # noqa: E731
    for path in [*filter(keep, others), dataset.path / MANIFEST]:
        part = folder / f"{path.name}.part"
        shutil.copyfile(path, part)
        part.replace(folder / path.name)
