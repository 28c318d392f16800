"""Checking a data set against its manifest: every file, chunk, count and key.

A check that may be cut short (large sets, short jobs) keeps notes: each rank appends a line to a
file of its own for every shard that it found sound, and the next check leaves those out whose size
and time of change are still the same. Their keys are read all the same.

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


def verify(
    path: str | Path, comm: MPI.Intracomm | None = None, notes: Path | None = None
) -> Iterator[str]:
    """Problems of the data set in directory `path`, one line each, as they are found.

    A sound data set yields none. Raises `DataError` if there is no readable manifest. If `comm` is
    given: collective; each rank reads its share of the shards, and all ranks yield the problems of
    all, in the order of the shards, when everything has been read. `notes`: where the notes are,
    <notes>.<rank>; they are removed when all has been found sound.
    """
    dataset = open_dataset(path, comm)
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    known: set[str] = _noted(notes) if notes and rank == 0 else set()
    known = known if comm is None else comm.bcast(known)
    jobs = [
        (split, index, shard)
        for split, content in dataset.manifest.splits.items()
        for index, shard in enumerate(content.shards)
    ]
    jobs.sort(key=lambda job: _note(dataset, job[2]) in known)  # the work is shared evenly
    keys: list[NDArray[np.uint64]] = []
    mine = (_job(dataset, *job, keys, known, notes, rank) for job in jobs[rank::size])
    sound = True
    if comm is None:
        for problems in mine:
            for problem in problems:
                sound = False
                yield problem
    else:
        numbered = [(rank + i * size, list(found)) for i, found in enumerate(mine)]
        found = dict(pair for part in comm.allgather(numbered) for pair in part)
        keys = [part for parts in comm.allgather(keys) for part in parts]
        for i in range(len(jobs)):
            sound = sound and not found[i]
            yield from found[i]
    for problem in _whole(dataset, keys):
        sound = False
        yield problem
    if notes and sound and rank == 0:
        for file in notes.parent.glob(f"{notes.name}.*"):
            file.unlink()


def _job(
    dataset: Dataset,
    split: str,
    index: int,
    shard: Shard,
    keys: list[NDArray[np.uint64]],
    known: set[str],
    notes: Path | None,
    rank: int,
) -> Iterator[str]:
    """Check one shard, or take a note's word for it."""
    note = _note(dataset, shard)
    if note in known:
        try:
            with dataset.shard(split, index) as reader:
                keys.append(reader.read_index("key"))
        except DataError as error:
            yield _first_part(error)
        return
    sound = True
    for problem in _shard(dataset, split, index, shard, keys):
        sound = False
        yield problem
    if sound and notes:
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.with_name(f"{notes.name}.{rank}").open("a", encoding="utf-8") as file:
            file.write(f"{note}\n")


def _note(dataset: Dataset, shard: Shard) -> str:
    """What is noted of a sound shard: nothing that changes when the file is written again."""
    try:
        status = (dataset.path / shard.file).stat()
    except OSError:
        return f"{shard.file} is missing"
    return f"{shard.file} {shard.sha256} {status.st_size} {status.st_mtime_ns}"


def _noted(notes: Path) -> set[str]:
    lines: set[str] = set()
    for file in sorted(notes.parent.glob(f"{notes.name}.*")):
        lines.update(file.read_text(encoding="utf-8").splitlines())
    return lines


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
