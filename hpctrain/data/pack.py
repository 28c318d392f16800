"""Packing: arrays into shards and a manifest, safe to kill at any point.

A shard is written aside, synced, read back and compared with what it should hold, then renamed;
the manifest comes last. So a directory with a manifest is whole, and a killed packer leaves none.
The bytes that are written depend on the arrays and the arguments only: not on the clock, on paths,
or on what was there before.

Layer: data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import (
    MANIFEST,
    Field,
    Manifest,
    Provenance,
    Shard,
    Source,
    Split,
    dataset_id,
    load_manifest,
    write_manifest,
)
from hpctrain.data.order import BLOCKWIN
from hpctrain.data.plan import Array, Plan, Settings, make_plan
from hpctrain.data.ragged import Ragged
from hpctrain.data.shard import Header, ShardReader, write_shard
from hpctrain.data.stats import FieldStatistics
from hpctrain.errors import DataError, UsageError

__all__ = ["pack"]

PACKER = "hpctrain data pack 1"  # the number grows when the same input gives other bytes
Index = dict[str, NDArray[Any]]


def pack(
    fields: Mapping[str, Any],
    out: str | Path,
    *,
    roles: Mapping[str, str] | None = None,
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
    shuffle: bool = True,
    block_samples: int | None = None,
    shard_samples: int | None = None,
    gzip: bool = False,
    force: bool = False,
    resume: bool = False,
    columns: Mapping[str, list[str]] | None = None,
    sources: Sequence[Source] = (),
    licence: str | None = None,
) -> Manifest:
    """Write a data set into directory `out` and return its manifest.

    Args:
        fields: name -> array of shape (n, ...), the same n for all; or, where the splits are
            given, split -> name -> array. Numbers, booleans (stored as uint8), strings (stored as
            codes) or `Ragged`. Mapped arrays are read piece by piece.
        roles: name -> "input", "label", "mask" or "weight". Default: fields called "label",
            "mask" and "weight" have that role, all others are inputs.
        splits: fractions that add up to 1, such as {"train": 0.8, "test": 0.2}. A sample's split
            follows from its row number alone, so appended rows change no older sample's split.
            Default: everything is "train".
        seed, shuffle: samples are written in a random order, so that every block is a fair draw.
        block_samples: samples per block, the unit of reading (default: about 1 MiB).
        shard_samples: samples per file (default: about 128 MiB).
        gzip: compress blocks; smaller, and several times slower to read.
        force: replace a data set that is there. resume: keep shards that are already right.
        columns, sources, licence: recorded in the manifest.

    Statistics come from the split "train", or the first if there is none. Raises `UsageError` or
    `DataError`; then `out` has no manifest, or still the one it had.
    """
    if not fields:
        raise UsageError("there is nothing to pack: no fields were given")
    given = all(isinstance(value, Mapping) for value in fields.values())
    if given and splits:
        raise UsageError("the splits are given by the sources: fractions cannot be given as well")
    parts = dict(fields) if given else {"" if splits else "train": dict(fields)}
    settings = Settings(roles or {}, seed, shuffle, block_samples, shard_samples, gzip)
    plan = make_plan(parts, splits, columns or {}, settings)
    arguments = _arguments(plan, settings, splits)
    provenance = Provenance(tuple(sources), PACKER, seed, arguments, licence)
    _check_keys(plan)
    directory = Path(out)
    try:
        _prepare(directory, provenance, force, resume)
        return _write(directory, plan, provenance, resume)
    except OSError as error:
        raise DataError(f"cannot write the data set {directory}: {error}") from error


def _arguments(
    plan: Plan, settings: Settings, splits: Mapping[str, float] | None
) -> dict[str, Any]:
    """The arguments as they were understood, for the manifest."""
    return {
        "splits": dict(splits) if splits else list(plan.splits),
        "roles": {name: field.role for name, field in plan.fields.items()},
        "shuffle": settings.shuffle,
        "block_samples": plan.block_samples,
        "shard_samples": plan.shard_samples,
        "gzip": settings.gzip,
    }


def _check_keys(plan: Plan) -> None:
    keys = np.concatenate([rows.keys for rows in plan.splits.values()])
    if len(np.unique(keys)) != len(keys):
        raise DataError("two samples have the same key; pack the data in another order")


def _prepare(directory: Path, provenance: Provenance, force: bool, resume: bool) -> None:
    """Make sure that nothing is overwritten unasked, and that no manifest stays while writing."""
    manifest = directory / MANIFEST
    shards = list(directory.glob("*/shard-*.h5*"))
    if manifest.exists() and not force:
        if not resume:
            raise DataError(f"{directory} already holds a data set; --force replaces it")
        if load_manifest(directory).provenance != provenance:
            raise DataError(
                f"{directory} holds a data set packed from other sources or with other arguments; "
                f"--resume cannot go on with it, --force replaces it"
            )
    elif shards and not force and not resume:
        raise DataError(
            f"{directory} holds {len(shards)} shards of an unfinished packing; --resume keeps "
            f"those that are right, --force starts over"
        )
    manifest.unlink(missing_ok=True)
    for shard in shards if force else ():
        shard.unlink()


def _write(directory: Path, plan: Plan, provenance: Provenance, resume: bool) -> Manifest:
    measured = "train" if "train" in plan.splits else next(iter(plan.splits))
    statistics = FieldStatistics(plan.fields)
    splits = {}
    for name in plan.splits:
        (directory / name).mkdir(parents=True, exist_ok=True)
        shards = []
        for index, first, last in plan.shards(name):
            arrays = {
                field: plan.splits[name].take(field, first, last, schema.dtype)
                for field, schema in plan.fields.items()
            }
            shards.append(_shard(directory, plan, name, index, arrays, first, resume))
            if name == measured:
                statistics.add(arrays, plan.block_samples)
        splits[name] = Split(sum(shard.n for shard in shards), tuple(shards))
        _sync(directory / name)
    _check_counts(plan, splits)
    _remove_strays(directory, splits)
    fields = statistics.into(plan.fields)
    manifest = Manifest(
        dataset_id=dataset_id(plan.schema, splits),
        required_features=plan.features,
        order=BLOCKWIN,
        block_samples=plan.block_samples,
        fields=fields,
        splits=splits,
        provenance=provenance,
    )
    write_manifest(directory, manifest)
    _sync(directory)
    return manifest


def _shard(
    directory: Path,
    plan: Plan,
    split: str,
    number: int,
    arrays: dict[str, Array],
    first: int,
    resume: bool,
) -> Shard:
    """Write one shard, or keep the one that is there and right; return its manifest entry."""
    n = len(next(iter(arrays.values())))
    header = Header(split, number, n, plan.block_samples, plan.schema, "gzip" in plan.features)
    index: Index = {"key": plan.splits[split].keys[first : first + n]}
    counts = None
    if plan.label is not None and plan.classes is not None:
        labels = arrays[plan.label]
        assert isinstance(labels, np.ndarray)  # a class label has a fixed shape
        index["label"] = labels.astype(np.int32)
        counts = tuple(int(c) for c in np.bincount(labels.astype(np.int64), minlength=plan.classes))
    file = f"{split}/shard-{number:05d}.h5"
    path, part = directory / file, directory / f"{file}.part"
    if not (resume and path.exists() and not _differs(path, plan.fields, header, arrays, index)):
        write_shard(part, header, arrays, index)
        wrong = _differs(part, plan.fields, header, arrays, index)
        if wrong:
            raise DataError(f"{part} was not written correctly: {wrong}; is the disk sound?")
        part.replace(path)
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return Shard(file, path.stat().st_size, sha256, n, header.blocks, counts)


def _differs(
    path: Path,
    fields: Mapping[str, Field],
    header: Header,
    arrays: Mapping[str, Array],
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


def _same(content: Array, array: Array, first: int, last: int) -> bool:
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
