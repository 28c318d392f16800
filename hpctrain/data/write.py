"""Writing the shards and the manifest of a planned data set, safe to kill at any point.

A shard is written aside, synced, read back and compared with what it should hold, then renamed;
the manifest comes last. So a directory with a manifest is whole, and a killed packer leaves none.
Shard i of all is written by rank i mod P; its bytes follow from the plan, not from its writer.

Layer: data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.agreed import agreed
from hpctrain.data.manifest import (
    Field,
    Manifest,
    Provenance,
    Shard,
    Split,
    dataset_id,
    write_manifest,
)
from hpctrain.data.order import BLOCKWIN
from hpctrain.data.plan import Plan
from hpctrain.data.ragged import Ragged
from hpctrain.data.schema import Taken
from hpctrain.data.shard import Header, ShardReader
from hpctrain.data.shard_write import write_shard
from hpctrain.data.stats import FieldStatistics
from hpctrain.errors import DataError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Progress", "planned", "write_data_set"]

Index = dict[str, NDArray[Any]]
Progress = Callable[[int, int], None]  # samples done, samples in all
Done = tuple[str, Shard, FieldStatistics | None]


def planned(plan: Plan, provenance: Provenance) -> Manifest:
    """The manifest of a plan that is not carried out: counts, but no checksums.

    The bytes of a shard are those of its values, without compression and HDF5's own.
    """
    splits = {}
    for name, content in plan.splits.items():
        shards = []
        for i, first, last in plan.shards(name):
            rows, n = content.rows[first:last], last - first
            nbytes = sum(content.nbytes(field, rows) for field in content.arrays)
            blocks, counts = -(-n // plan.block_samples), _counts(plan, rows, name)
            shards.append(Shard(_file(name, i), nbytes, "", n, blocks, counts))
        splits[name] = Split(sum(shard.n for shard in shards), tuple(shards))
    return _manifest(plan, splits, plan.fields, provenance)


def write_data_set(
    directory: Path,
    plan: Plan,
    provenance: Provenance,
    resume: bool,
    comm: MPI.Intracomm | None = None,
    progress: Progress | None = None,
    files: Mapping[str, str] | None = None,
) -> Manifest:
    """Write all shards, files and the manifest; return it. Collective if `comm` is given."""

    def make_folders() -> None:
        for name in plan.splits:
            (directory / name).mkdir(parents=True, exist_ok=True)
        for name, text in (files or {}).items():
            (directory / name).write_text(text, encoding="utf-8")

    task = f"write the data set {directory}"
    agreed(comm, task, make_folders, only_first=True)
    done = agreed(comm, task, lambda: _my_shards(directory, plan, resume, comm, progress)) or []
    parts = [done] if comm is None else comm.gather(done) or []
    manifest = agreed(
        comm, task, lambda: _finish(directory, plan, provenance, parts), only_first=True
    )
    manifest = manifest if comm is None else comm.bcast(manifest)
    assert manifest is not None  # rank 0 made it, or `agreed` raised
    return manifest


def _my_shards(
    directory: Path,
    plan: Plan,
    resume: bool,
    comm: MPI.Intracomm | None,
    progress: Progress | None,
) -> list[Done]:
    """Write this rank's shards."""
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    jobs = [(name, *job) for name in plan.splits for job in plan.shards(name)][rank::size]
    total, written = sum(last - first for _, _, first, last in jobs), 0
    measured, done = _measured(plan), []
    for name, number, first, last in jobs:
        arrays = {
            field: plan.splits[name].take(field, first, last, schema.dtype)
            for field, schema in plan.fields.items()
        }
        shard = _shard(directory, plan, name, number, arrays, first, resume)
        statistics = FieldStatistics(plan.fields) if name == measured else None
        if statistics is not None:
            statistics.add(arrays, plan.block_samples)
        done.append((name, shard, statistics))
        written += last - first
        if progress is not None and rank == 0:
            progress(written, total)
    return done


def _finish(
    directory: Path, plan: Plan, provenance: Provenance, parts: list[list[Done]]
) -> Manifest:
    """Put the ranks' shards together and write the manifest."""
    everything = sorted((d for part in parts for d in part), key=lambda done: done[1].file)
    statistics = FieldStatistics(plan.fields)
    for _, _, some in everything:
        if some is not None:
            statistics.merge(some)
    splits = {}
    for name in plan.splits:
        shards = tuple(shard for split, shard, _ in everything if split == name)
        splits[name] = Split(sum(shard.n for shard in shards), shards)
        _sync(directory / name)
    _check_counts(plan, splits)
    _remove_strays(directory, splits)
    manifest = _manifest(plan, splits, statistics.into(plan.fields), provenance)
    write_manifest(directory, manifest)
    _sync(directory)
    return manifest


def _manifest(
    plan: Plan, splits: dict[str, Split], fields: dict[str, Field], provenance: Provenance
) -> Manifest:
    return Manifest(
        dataset_id=dataset_id(plan.schema, splits),
        required_features=plan.features,
        order=BLOCKWIN,
        block_samples=plan.block_samples,
        fields=fields,
        splits=splits,
        provenance=provenance,
    )


def _measured(plan: Plan) -> str:
    """The split whose statistics are kept."""
    return "train" if "train" in plan.splits else next(iter(plan.splits))


def _file(split: str, number: int) -> str:
    return f"{split}/shard-{number:05d}.h5"


def _counts(plan: Plan, rows: NDArray[np.int64], split: str) -> tuple[int, ...] | None:
    """Samples of every class among rows of a split's source."""
    if plan.label is None or plan.classes is None:
        return None
    labels = plan.splits[split].arrays[plan.label]
    assert isinstance(labels, np.ndarray)  # a class label has a fixed shape
    found = np.bincount(labels[rows].astype(np.int64), minlength=plan.classes)
    return tuple(int(count) for count in found)


def _shard(
    directory: Path,
    plan: Plan,
    split: str,
    number: int,
    arrays: dict[str, Taken],
    first: int,
    resume: bool,
) -> Shard:
    """Write one shard, or keep the one that is there and right; return its manifest entry."""
    n = len(next(iter(arrays.values())))
    header = Header(split, number, n, plan.block_samples, plan.schema, "gzip" in plan.features)
    rows = plan.splits[split]
    index: Index = {"key": rows.keys[first : first + n]}
    if rows.groups is not None:
        index["group"] = rows.groups[first : first + n].view(np.int64)
    counts = _counts(plan, rows.rows[first : first + n], split)
    if counts is not None and plan.label is not None:
        labels = arrays[plan.label]
        assert isinstance(labels, np.ndarray)  # a class label has a fixed shape
        index["label"] = labels.astype(np.int32)
    values = {name: len(a.values) for name, a in arrays.items() if isinstance(a, Ragged)}
    path = directory / _file(split, number)
    part = path.with_name(f"{path.name}.part")
    if not (resume and path.exists() and not _differs(path, plan.fields, header, arrays, index)):
        _write(part, header, arrays, index)
        wrong = _differs(part, plan.fields, header, arrays, index)
        if wrong:
            raise DataError(f"{part} was not written correctly: {wrong}; is the disk sound?")
        part.replace(path)
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    size = path.stat().st_size
    return Shard(_file(split, number), size, sha256, n, header.blocks, counts, values or None)


def _write(part: Path, header: Header, arrays: dict[str, Taken], index: Index) -> None:
    try:
        write_shard(part, header, arrays, index)
    except (OSError, RuntimeError, ValueError) as error:  # HDF5 wraps what the system says
        part.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {part}: {str(error).splitlines()[0][:300]}; is the disk full? Make "
            f"room and run the same command again with --resume"
        ) from error


def _differs(
    path: Path,
    fields: Mapping[str, Field],
    header: Header,
    arrays: Mapping[str, Taken],
    index: Index,
) -> str:
    """What in the shard at `path` is not as it should be; an empty string if nothing is."""
    try:
        with ShardReader(path, header, fields) as shard:
            for name, array in arrays.items():
                for block, content in enumerate(shard.blocks(name)):
                    if not _same(content, array, *header.rows(block)):
                        return f"field {name!r}, block {block} differs"
            for name, values in index.items():
                if not np.array_equal(shard.read_index(name), values):
                    return f"index {name!r} differs"
    except DataError as error:
        return str(error)
    return ""


def _same(content: Taken, array: Taken, first: int, last: int) -> bool:
    """Equal bit for bit (NaN equals NaN)."""
    if isinstance(array, Ragged):
        assert isinstance(content, Ragged)  # both have the schema's kind
        values = array.values[array.offsets[first] : array.offsets[last]]
        lengths = np.diff(array.offsets[first : last + 1])
        same = np.array_equal(np.diff(content.offsets), lengths)
        return same and content.values.tobytes() == values.tobytes()
    assert isinstance(content, np.ndarray)
    return content.tobytes() == array[first:last].tobytes()


def _check_counts(plan: Plan, splits: Mapping[str, Split]) -> None:
    """As many samples as came in went out."""
    for name, rows in plan.splits.items():
        if splits[name].n != len(rows.rows):
            raise DataError(f"split {name!r}: {len(rows.rows)} came in, {splits[name].n} went out")


def _remove_strays(directory: Path, splits: Mapping[str, Split]) -> None:
    """Remove shards of an earlier, unfinished packing that the new manifest does not list."""
    listed = {directory / shard.file for split in splits.values() for shard in split.shards}
    for path in directory.glob("*/shard-*.h5*"):
        if path not in listed:
            path.unlink()


def _sync(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
