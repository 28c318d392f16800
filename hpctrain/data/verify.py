"""Checking a data set against its manifest: every file, chunk, count and key.

Layer: data. Reads all of the data once, in bounded memory (8 bytes per sample for the keys).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.dataset import Dataset, open_dataset
from hpctrain.data.manifest import Shard
from hpctrain.data.shard import ShardReader
from hpctrain.errors import DataError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["verify"]


def verify(path: str | Path, comm: MPI.Intracomm | None = None) -> Iterator[str]:
    """Problems of the data set in directory `path`, one line each, as they are found.

    A sound data set yields none. Raises `DataError` if there is no readable manifest. If `comm` is
    given: collective; each rank reads its share of the shards, and all ranks yield the problems of
    all, in the order of the shards, when everything has been read.
    """
    dataset = open_dataset(path, comm)
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    jobs = [
        (split, index, shard)
        for split, content in dataset.manifest.splits.items()
        for index, shard in enumerate(content.shards)
    ]
    keys: list[NDArray[np.uint64]] = []
    if comm is None:
        for job in jobs:
            yield from _shard(dataset, *job, keys)
    else:
        mine = [(i, list(_shard(dataset, *jobs[i], keys))) for i in range(rank, len(jobs), size)]
        found = dict(pair for part in comm.allgather(mine) for pair in part)
        keys = [part for parts in comm.allgather(keys) for part in parts]
        for i in range(len(jobs)):
            yield from found[i]
    yield from _whole(dataset, keys)


def _shard(
    dataset: Dataset, split: str, index: int, shard: Shard, keys: list[NDArray[np.uint64]]
) -> Iterator[str]:
    yield from _file(dataset.path / shard.file, shard)
    try:
        with dataset.shard(split, index) as reader:
            yield from _content(dataset, shard, reader, keys)
    except DataError as error:
        yield _first_part(error)


def _whole(dataset: Dataset, keys: list[NDArray[np.uint64]]) -> Iterator[str]:
    """What shards cannot say each for itself."""
    every = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    twice = len(every) - len(np.unique(every))
    if twice:
        yield f"{dataset.path}: {twice} samples have a key that another sample has too"
    listed = {s.file for split in dataset.manifest.splits.values() for s in split.shards}
    for stray in sorted(dataset.path.glob("*/shard-*.h5*")):
        if str(stray.relative_to(dataset.path)) not in listed:
            yield f"{stray}: is not in the manifest"


def _file(path: Path, shard: Shard) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return  # opening the shard says so
    if found != shard.sha256:
        yield f"{path}: sha256 is {found[:16]}..., the manifest says {shard.sha256[:16]}..."


def _content(
    dataset: Dataset, shard: Shard, reader: ShardReader, keys: list[NDArray[np.uint64]]
) -> Iterator[str]:
    for name in dataset.fields:
        yield from _field(dataset, reader, name)
    try:
        keys.append(reader.read_index("key"))
        if shard.class_counts is not None:
            yield from _classes(reader.path, reader.read_index("label"), shard.class_counts)
    except DataError as error:
        yield _first_part(error)


def _field(dataset: Dataset, reader: ShardReader, name: str) -> Iterator[str]:
    """Read every block of a field, going on after a damaged one."""
    schema = dataset.fields[name]
    for block in range(reader.header.blocks):
        first, last = reader.header.rows(block)
        try:
            if schema.shape == "ragged":
                reader.read_ragged(name, block)
            else:
                reader.read_block(
                    name, block, np.empty((last - first, *schema.shape), schema.dtype)
                )
        except DataError as error:
            yield _first_part(error)


def _classes(path: Path, labels: NDArray[Any], counts: tuple[int, ...]) -> Iterator[str]:
    known = (labels >= 0) & (labels < len(counts))
    found = np.bincount(labels[known], minlength=len(counts))
    if not known.all() or tuple(found) != counts:
        yield f"{path}: index 'label': the class counts are not those of the manifest"


def _first_part(error: DataError) -> str:
    """The message without its advice to run this very check."""
    return str(error).split("; `hpctrain data verify", maxsplit=1)[0]
