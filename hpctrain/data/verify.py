"""Checking a data set against its manifest: every file, chunk, count and key.

Layer: data. Reads all of the data once, in bounded memory (8 bytes per sample for the keys).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.dataset import Dataset, open_dataset
from hpctrain.data.manifest import Shard
from hpctrain.data.shard import ShardReader
from hpctrain.errors import DataError

__all__ = ["verify"]


def verify(path: str | Path) -> Iterator[str]:
    """Problems of the data set in directory `path`, one line each, as they are found.

    A sound data set yields none. Raises `DataError` if there is no readable manifest.
    """
    dataset = open_dataset(path)
    keys: list[NDArray[np.uint64]] = []
    for split, content in dataset.manifest.splits.items():
        for index, shard in enumerate(content.shards):
            yield from _file(dataset.path / shard.file, shard)
            try:
                with dataset.shard(split, index) as reader:
                    yield from _content(dataset, shard, reader, keys)
            except DataError as error:
                yield _first_part(error)
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
