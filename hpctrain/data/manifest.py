"""The manifest of a data set: what is in it, read and written as one checked JSON file.

`manifest.json` is the only file that is read at start-up. It holds the schema (fields, dtypes,
shapes, roles), the count, size and sha256 of every shard, statistics of the training split and
where the data came from. It is written last, so a directory with a manifest is a whole data set.

Format "hpctrain-shards" 1.0. A reader refuses another major version and any entry of
`required_features` that it does not know; it reads any minor version and skips keys it does not
know. `dataset_id` covers the schema and the sha256 of every shard in order: two data sets with the
same id give the same samples in the same order.

Layer: data. Knows nothing of HDF5 and opens no shard.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpctrain.errors import DataError

__all__ = [
    "FEATURES",
    "FORMAT",
    "MANIFEST",
    "ROLES",
    "VERSION",
    "Column",
    "Field",
    "Manifest",
    "Provenance",
    "Role",
    "Shard",
    "Source",
    "Split",
    "Stats",
    "dataset_id",
    "load_manifest",
    "schema_sha256",
    "write_manifest",
]

FORMAT = "hpctrain-shards"
VERSION = (1, 0)  # major: others are refused; minor: others are read
MANIFEST = "manifest.json"
FEATURES = frozenset({"gzip", "ragged"})  # what this reader can do beyond plain fields
ROLES = ("input", "label", "mask", "weight")
Role = Literal["input", "label", "mask", "weight"]


class Stats(msgspec.Struct, frozen=True):
    """Statistics of the finite values of a field in the training split; m2 = sum (x - mean)^2."""

    count: int
    mean: float
    m2: float
    min: float
    max: float

    @property
    def std(self) -> float:
        """The standard deviation of the values themselves (divided by count, not count - 1)."""
        return math.sqrt(self.m2 / self.count)


class Column(msgspec.Struct, frozen=True, omit_defaults=True):
    """One column of a table that was packed into a field of shape (columns,)."""

    name: str
    stats: Stats | None = None


class Field(msgspec.Struct, frozen=True, omit_defaults=True):
    """One field of a sample. `shape` is without the sample axis; "ragged": 1-D, any length."""

    dtype: str
    shape: tuple[int, ...] | Literal["ragged"]
    role: Role
    vocab: tuple[str, ...] | None = None  # code i stands for vocab[i]
    columns: tuple[Column, ...] | None = None
    stats: Stats | None = None
    tokens: int | None = None  # text: number of codes; code 0 ends a document


class Shard(msgspec.Struct, frozen=True, omit_defaults=True):
    """One shard file; `file` is relative to the data set's directory."""

    file: str
    bytes: int
    sha256: str
    n: int
    blocks: int
    class_counts: tuple[int, ...] | None = None
    values: dict[str, int] | None = None  # of the ragged fields: values in this shard


class Split(msgspec.Struct, frozen=True):
    """The shards of one split, in the order that numbers its samples."""

    n: int
    shards: tuple[Shard, ...]


class Source(msgspec.Struct, frozen=True):
    """A file the data came from."""

    name: str
    bytes: int
    sha256: str


class Provenance(msgspec.Struct, frozen=True):
    """Where the data came from and how it was packed."""

    sources: tuple[Source, ...]
    packer: str
    seed: int
    arguments: dict[str, Any]
    licence: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of manifest.json."""

    format: str = FORMAT
    format_version: tuple[int, int] = VERSION
    dataset_id: str
    required_features: tuple[str, ...]
    order: str
    block_samples: int
    fields: dict[str, Field]
    splits: dict[str, Split]
    provenance: Provenance


class _Header(msgspec.Struct):
    """The part of a manifest that every version shares: enough to refuse the rest by name."""

    format: str
    format_version: tuple[int, int]
    required_features: tuple[str, ...] = ()


def schema_sha256(fields: dict[str, Field], block_samples: int, features: tuple[str, ...]) -> str:
    """Hash of what the samples look like: names, dtypes, shapes, roles, vocabularies, layout."""
    schema = {
        "block_samples": block_samples,
        "features": features,
        "fields": {
            name: [f.dtype, f.shape, f.role, f.vocab, [c.name for c in f.columns or ()], f.tokens]
            for name, f in fields.items()
        },
    }
    return hashlib.sha256(msgspec.json.encode(schema)).hexdigest()


def dataset_id(schema: str, splits: dict[str, Split]) -> str:
    """The identity of a data set: its schema and the sha256 of every shard, in order."""
    digest = hashlib.sha256(schema.encode())
    for name, split in splits.items():
        digest.update(f"\n{name}".encode())
        for shard in split.shards:
            digest.update(f" {shard.n} {shard.sha256}".encode())
    return f"sha256:{digest.hexdigest()}"


def load_manifest(directory: Path) -> Manifest:
    """Read and check `directory`/manifest.json. Raises `DataError`; opens no shard."""
    text = _read(directory)
    where = directory / MANIFEST
    try:
        header = msgspec.json.decode(text, type=_Header)
        _check_version(where, header)
        manifest = msgspec.json.decode(text, type=Manifest)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{where} is not a manifest of format {FORMAT} {VERSION[0]}.x: {error}; "
            f"it is written by `hpctrain data pack`"
        ) from error
    _check_sums(where, manifest)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json aside, sync it and rename it: it is there whole or not at all."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    part = directory / f"{MANIFEST}.part"
    with part.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(directory / MANIFEST)


def _read(directory: Path) -> bytes:
    try:
        return (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"cannot read {directory / MANIFEST}: {error.strerror}") from error
    if not directory.is_dir():
        raise DataError(
            f"there is no data set at {directory}: no such directory; "
            f"`hpctrain data pack` makes one"
        )
    if any(directory.glob("*/shard-*.h5*")):
        raise DataError(
            f"{directory} holds shards but no {MANIFEST}: packing was not finished; "
            f"run the same `hpctrain data pack` again with --resume"
        )
    raise DataError(f"{directory} is not a data set: it has no {MANIFEST}")


def _check_version(where: Path, header: _Header) -> None:
    if header.format != FORMAT:
        raise DataError(f"{where} has format {header.format!r}; this hpctrain reads {FORMAT!r}")
    major, minor = header.format_version
    if major != VERSION[0]:
        raise DataError(
            f"{where} has format version {major}.{minor}; this hpctrain reads {VERSION[0]}.x: "
            f"use the hpctrain that wrote it, or pack the data again"
        )
    unknown = sorted(set(header.required_features) - FEATURES)
    if unknown:
        raise DataError(
            f"{where} needs the features {', '.join(unknown)}, which this hpctrain does not have "
            f"(it has {', '.join(sorted(FEATURES))}): use a newer hpctrain, or pack the data again"
        )


def _check_sums(where: Path, manifest: Manifest) -> None:
    """Counts must add up and the id must fit: the manifest was not edited by hand."""
    size = manifest.block_samples
    if size < 1:
        raise DataError(f"{where} says block_samples {size}; it must be 1 or more")
    for name, split in manifest.splits.items():
        bad = [s.file for s in split.shards if s.n < 1 or s.blocks != -(-s.n // size)]
        if bad or sum(s.n for s in split.shards) != split.n:
            raise DataError(
                f"{where} contradicts itself: the counts of split {name!r} do not add up"
                f"{' at ' + bad[0] if bad else ''}; pack the data again"
            )
    schema = schema_sha256(manifest.fields, size, manifest.required_features)
    same_version = manifest.format_version == VERSION
    if same_version and manifest.dataset_id != dataset_id(schema, manifest.splits):
        raise DataError(
            f"{where} was changed after packing: its dataset_id does not fit its fields and "
            f"shards; restore it, or pack the data again"
        )
