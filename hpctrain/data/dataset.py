"""An opened data set: its manifest, and the block tables and shards that the manifest promises.

Opening reads manifest.json only; shards are opened when their blocks are read.

Layer: data. Is given a communicator or none; knows nothing of orders or batches.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import Field, Manifest, Split, load_manifest, schema_sha256
from hpctrain.data.ragged import Ragged
from hpctrain.data.shard import Header, ShardReader, check_filters
from hpctrain.errors import DataError, nearest

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["BlockTable", "Dataset", "ShardFiles", "open_dataset"]


@dataclass(frozen=True)
class BlockTable:
    """The blocks of a split in manifest order.

    Block b holds the samples with ids starts[b] to starts[b + 1] - 1 and is block `block[b]` of
    shard `shard[b]`. `starts` is int64 of shape (blocks + 1,), the others of shape (blocks,).
    """

    starts: NDArray[np.int64]
    shard: NDArray[np.int64]
    block: NDArray[np.int64]

    @classmethod
    def of(cls, split: Split, block_samples: int) -> BlockTable:
        lengths: list[int] = []
        places: list[tuple[int, int]] = []
        for index, shard in enumerate(split.shards):
            for block in range(shard.blocks):
                lengths.append(min(block_samples, shard.n - block * block_samples))
                places.append((index, block))
        where = np.array(places, np.int64).reshape(-1, 2)
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return cls(starts, where[:, 0], where[:, 1])


class Dataset:
    """A data set on disk. Holds no file open; safe to share between threads."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._schema = schema_sha256(
            manifest.fields, manifest.block_samples, manifest.required_features
        )

    @property
    def dataset_id(self) -> str:
        return self.manifest.dataset_id

    @property
    def fields(self) -> dict[str, Field]:
        return self.manifest.fields

    @property
    def splits(self) -> dict[str, int]:
        """Number of samples per split."""
        return {name: split.n for name, split in self.manifest.splits.items()}

    @property
    def classes(self) -> int | None:
        """Number of classes of the label field, or None where samples have no class."""
        counts = [s.class_counts for split in self.manifest.splits.values() for s in split.shards]
        return max((len(c) for c in counts if c is not None), default=None)

    def split(self, name: str) -> Split:
        """The split called `name`. Raises `DataError` if there is none."""
        if name not in self.manifest.splits:
            raise DataError(
                f"{self.path} has no split {name!r}{nearest(name, self.splits)}; "
                f"it has {', '.join(self.splits)}"
            )
        return self.manifest.splits[name]

    def field(self, name: str) -> Field:
        """The field called `name`. Raises `DataError` if there is none."""
        if name not in self.fields:
            raise DataError(
                f"{self.path} has no field {name!r}{nearest(name, self.fields)}; "
                f"it has {', '.join(self.fields)}"
            )
        return self.fields[name]

    def named(self, role: str) -> list[str]:
        """The names of the fields with this role ("input", "label", "mask", "weight")."""
        return [name for name, field in self.fields.items() if field.role == role]

    def moments(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of a field over the training split, as float64.

        Of shape (columns,) for a packed table, else of shape (). Raises `DataError` where the
        field has no finite value.
        """
        field = self.field(name)
        stats = [c.stats for c in field.columns] if field.columns else [field.stats]
        known = [s for s in stats if s is not None]
        if len(known) != len(stats):
            raise DataError(f"{self.path}: field {name!r} has no finite value to take a mean of")
        shape = (len(known),) if field.columns else ()
        return (
            np.array([s.mean for s in known]).reshape(shape),
            np.array([s.std for s in known]).reshape(shape),
        )

    def table(self, split: str) -> BlockTable:
        """The block table of a split."""
        return BlockTable.of(self.split(split), self.manifest.block_samples)

    def header(self, split: str, index: int) -> Header:
        """What shard `index` of a split says about itself."""
        n, gzip = self.split(split).shards[index].n, "gzip" in self.manifest.required_features
        return Header(split, index, n, self.manifest.block_samples, self._schema, gzip)

    def shard(self, split: str, index: int) -> ShardReader:
        """Open shard `index` of a split; the caller closes it."""
        shard = self.split(split).shards[index]
        check_filters(self.path, self.manifest.required_features)
        header = self.header(split, index)
        return ShardReader(self.path / shard.file, header, self.fields, shard.bytes)

    def read(self, split: str, name: str) -> NDArray[Any] | Ragged:
        """A whole field of a split in manifest order: (n, *shape), or `Ragged`. For small sets."""
        field = self.field(name)
        blocks: list[Any] = []
        for index in range(len(self.split(split).shards)):
            with self.shard(split, index) as shard:
                blocks.extend(shard.blocks(name))
        if field.shape == "ragged":
            return Ragged.of([sample for block in blocks for sample in block], field.dtype)
        return np.concatenate(blocks) if blocks else np.empty((0, *field.shape), field.dtype)

    def keys(self, split: str) -> NDArray[np.uint64]:
        """The stable keys of a split's samples, uint64 of shape (n,), by sample id."""
        return self.index(split, "key", np.dtype(np.uint64))

    def index(self, split: str, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """An index ("key", "label", "group") of all samples of a split, (n,), by sample id."""
        parts = []
        for index in range(len(self.split(split).shards)):
            with self.shard(split, index) as shard:
                parts.append(shard.read_index(name))
        return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)


class ShardFiles:
    """The few shards of a split that are open, least recently used closed first."""

    def __init__(self, dataset: Dataset, split: str, limit: int) -> None:
        self._dataset, self._split, self._limit = dataset, split, limit
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._process = os.getpid()

    def __getitem__(self, index: int) -> ShardReader:
        if os.getpid() != self._process:
            raise DataError(
                f"process {os.getpid()} was forked from {self._process}, which reads "
                f"{self._dataset.path}: what HDF5 holds open is shared by both and reads wrong "
                f"data; make the loader after the fork, or start processes with spawn"
            )
        if index not in self._open:
            while len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            self._open[index] = self._dataset.shard(self._split, index)
        self._open.move_to_end(index)
        return self._open[index]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def open_dataset(path: str | Path, comm: MPI.Intracomm | None = None) -> Dataset:
    """Open the data set in directory `path`.

    Collective if `comm` is given: rank 0 reads the manifest and sends it to the others, and an
    error on rank 0 is raised on every rank. Raises `DataError`.
    """
    directory = Path(path)
    if comm is None or comm.size == 1:
        return Dataset(directory, load_manifest(directory))
    manifest: Manifest | None = None
    error: str | None = None
    if comm.rank == 0:
        try:
            manifest = load_manifest(directory)
        except DataError as failure:
            error = str(failure)
    manifest, error = comm.bcast((manifest, error), root=0)
    if manifest is None:
        raise DataError(str(error))
    return Dataset(directory, manifest)
