"""Packing: arrays, or any Python iterable of samples, into shards and a manifest.

The bytes that are written depend on the samples and the arguments only: not on the clock, on
paths, on the number of ranks, or on what was there before.

Layer: data.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.data.agreed import agreed
from hpctrain.data.manifest import MANIFEST, Manifest, Provenance, Source, load_manifest
from hpctrain.data.plan import Plan, Settings, make_plan
from hpctrain.data.schema import About
from hpctrain.data.spool import Spooled, spool_samples
from hpctrain.data.write import Progress, planned, write_data_set
from hpctrain.errors import DataError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["pack"]

PACKER = "hpctrain data pack 2"  # the number grows when the same input gives other bytes
SPOOL = "spool.part"


def pack(
    fields: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    roles: Mapping[str, str] | None = None,
    splits: Mapping[str, float] | None = None,
    key: str | None = None,
    group: str | None = None,
    stratify: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    block_samples: int | None = None,
    shard_samples: int | None = None,
    gzip: bool = False,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    columns: Mapping[str, list[str]] | None = None,
    vocabularies: Mapping[str, tuple[str, ...]] | None = None,
    tokens: Mapping[str, int] | None = None,
    files: Mapping[str, str] | None = None,
    sources: Sequence[Source] = (),
    licence: str | None = None,
    notes: Mapping[str, Any] | None = None,
    comm: MPI.Intracomm | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a data set into directory `out` and return its manifest.

    Collective if `comm` is given: all ranks pass the same arguments, each writes its share of the
    shards, and the bytes are the same for any number of ranks. An iterable is read by rank 0 alone.

    Args:
        fields: name -> array of shape (n, ...), the same n for all; or, where the splits are
            given, split -> name -> array. Numbers, booleans (stored as uint8), strings (stored as
            codes), `Ragged` or `Computed`. Mapped arrays are read piece by piece. Or an iterable
            of samples, each a dict of numbers, words, bytes or arrays: it is read once, in bounded
            memory, through files in `out` that are removed at the end.
        roles: name -> "input", "label", "mask" or "weight". Default: fields called "label",
            "mask" and "weight" have that role, all others are inputs.
        splits: fractions that add up to 1, such as {"train": 0.8, "test": 0.2}. A sample's split
            follows from its key alone, so that appended samples change no older one's.
            Default: everything is "train".
        key: the field (whole numbers or words, no two alike) that says who a sample is. Default:
            the row number. group: samples with equal values of this field are in the same split.
            Key and group are packed as fields only if they have a role in `roles`.
        stratify: deal the classes of this field evenly to the shards.
        seed, shuffle: samples are written in a random order, so that every block is a fair draw.
        block_samples: samples per block, the unit of reading (default: about 1 MiB).
        shard_samples: samples per file (default: about 128 MiB).
        gzip: compress blocks; smaller, and several times slower to read.
        force: replace a data set that is there. resume: keep shards that are already right.
        dry_run: write no data set; the manifest has counts, bytes before compression, no checksums.
        columns, vocabularies, tokens: names of a table's columns; what the codes of a field stand
            for; how many codes a field of text has. By field; recorded in the manifest, as are
            sources, licence and notes. files: name -> text, written beside the shards.
        progress: called on rank 0 with (samples written, samples in all), of this rank.

    Statistics come from the split "train", or the first if there is none. Raises `UsageError` or
    `DataError`; then `out` has no manifest, or still the one it had.
    """
    settings = Settings(
        roles or {}, seed, shuffle, block_samples, shard_samples, gzip, key, group, stratify
    )
    about = About(columns or {}, vocabularies or {}, tokens or {})
    job = _Job(Path(out), settings, about, splits, force, resume, dry_run, comm, progress)
    job.files, job.notes = dict(files or {}), dict(notes or {})
    job.sources, job.licence = tuple(sources), licence
    if isinstance(fields, Mapping):
        return job.write(fields)
    return _through_spool(fields, job.directory, job.write, force or resume or dry_run, comm)


@dataclass
class _Job:
    """The arguments of one packing."""

    directory: Path
    settings: Settings
    about: About
    splits: Mapping[str, float] | None
    force: bool
    resume: bool
    dry_run: bool
    comm: MPI.Intracomm | None
    progress: Progress | None
    files: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    licence: str | None = None

    def write(self, content: Mapping[str, Any]) -> Manifest:
        """Plan and write a data set of these fields. Collective if there is a communicator."""
        plan, provenance = _certain(
            agreed(self.comm, "read the sources", lambda: self._prepare(content))
        )
        if self.dry_run:
            return planned(plan, provenance)
        agreed(
            self.comm,
            f"write the data set {self.directory}",
            lambda: _prepare(self.directory, provenance, self.force, self.resume),
            only_first=True,
        )
        return write_data_set(
            self.directory, plan, provenance, self.resume, self.comm, self.progress, self.files
        )

    def _prepare(self, content: Mapping[str, Any]) -> tuple[Plan, Provenance]:
        plan = _plan(content, self.splits, self.about, self.settings)
        arguments = _arguments(plan, self.settings, self.splits) | self.notes
        sums = {n: hashlib.sha256(t.encode()).hexdigest() for n, t in self.files.items()}
        arguments |= {"files": sums} if sums else {}
        seed = self.settings.seed
        return plan, Provenance(self.sources, PACKER, seed, arguments, self.licence)


def _through_spool(
    samples: Iterable[Mapping[str, Any]],
    directory: Path,
    write: Callable[[Mapping[str, Any]], Manifest],
    allowed: bool,
    comm: MPI.Intracomm | None,
) -> Manifest:
    """Spool an iterable beside the shards, write the data set, and remove the spool."""
    folder = directory / SPOOL
    new = not directory.exists()

    def spool() -> list[Spooled]:
        if (directory / MANIFEST).exists() and not allowed:
            raise DataError(f"{directory} already holds a data set; --force replaces it")
        shutil.rmtree(folder, ignore_errors=True)
        return spool_samples(samples, folder)

    try:
        spooled = agreed(comm, f"write into {folder}", spool, only_first=True)
        if comm is not None:
            spooled = comm.bcast(spooled)
        content: dict[str, Any] = {}
        for one in _certain(spooled):
            content |= one.fields()
        return write(content)
    finally:
        if comm is None or comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            if new and directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()


def _certain(value: Any) -> Any:
    """A result that `agreed` gave, which is there or an error was raised."""
    assert value is not None
    return value


def _plan(
    fields: Mapping[str, Any],
    splits: Mapping[str, float] | None,
    about: About,
    settings: Settings,
) -> Plan:
    if not fields:
        raise UsageError("there is nothing to pack: no fields were given")
    given = all(isinstance(value, Mapping) for value in fields.values())
    if given and splits:
        raise UsageError("the splits are given by the sources: fractions cannot be given as well")
    parts = dict(fields) if given else {"" if splits else "train": dict(fields)}
    plan = make_plan(parts, splits, about, settings)
    _check_keys(plan, settings)
    return plan


def _arguments(
    plan: Plan, settings: Settings, splits: Mapping[str, float] | None
) -> dict[str, Any]:
    """The arguments as they were understood, for the manifest."""
    named = {name: getattr(settings, name) for name in ("key", "group", "stratify")}
    return {
        "splits": dict(splits) if splits else list(plan.splits),
        "roles": {name: schema.role for name, schema in plan.fields.items()},
        "shuffle": settings.shuffle,
        "block_samples": plan.block_samples,
        "shard_samples": plan.shard_samples,
        "gzip": settings.gzip,
    } | {name: value for name, value in named.items() if value is not None}


def _check_keys(plan: Plan, settings: Settings) -> None:
    keys = np.concatenate([rows.keys for rows in plan.splits.values()])
    twice = len(keys) - len(np.unique(keys))
    if twice and settings.key:
        raise DataError(
            f"{twice} samples have a {settings.key!r} that another sample has too: it is not a "
            f"key; use it as the group, or leave the key to the row numbers"
        )
    if twice:
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
