"""What a packer will write, decided before the first byte: schema, splits, rows of every shard.

All of it follows from the arrays and the arguments by index arithmetic, so the bytes of shard i do
not depend on who writes it or when.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.computed import ComputedRagged
from hpctrain.data.identity import by_key, check_groups, deal, row_keys, value_keys
from hpctrain.data.manifest import Field, schema_sha256
from hpctrain.data.order import permutation
from hpctrain.data.ragged import Ragged
from hpctrain.data.schema import (
    NAME,
    About,
    Array,
    Taken,
    class_label,
    classes_of,
    encode,
    make_schema,
    sample_bytes,
)
from hpctrain.errors import DataError, UsageError, nearest

__all__ = ["Plan", "Rows", "Settings", "make_plan"]

BLOCK_BYTES = 1 << 20
BLOCK_MOST = 4096  # samples
SHARD_BYTES = 128 << 20
CHUNK_LIMIT = 1 << 32  # bytes: HDF5's limit for a chunk


@dataclass(frozen=True)
class Settings:
    """The arguments of packing that shape its output."""

    roles: Mapping[str, str]
    seed: int
    shuffle: bool
    block_samples: int | None
    shard_samples: int | None
    gzip: bool
    key: str | None = None  # the field that says who a sample is
    group: str | None = None  # the field whose equal values stay in one split
    stratify: str | None = None  # the field whose values are dealt evenly to the shards


@dataclass(frozen=True)
class Rows:
    """The samples of one split: rows of its source arrays in the order they are written."""

    arrays: dict[str, Array]
    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]  # of rows[i]
    groups: NDArray[np.uint64] | None  # of rows[i]
    bounds: NDArray[np.int64]  # of the shards

    def nbytes(self, name: str, rows: NDArray[np.int64]) -> int:
        """Bytes of field `name` in some rows as its source has it; with offsets if it is ragged."""
        array = self.arrays[name]
        if isinstance(array, Ragged | ComputedRagged):
            return int(array.lengths[rows].sum()) * array.dtype.itemsize + 8 * (len(rows) + 1)
        return len(rows) * math.prod(array.shape[1:]) * array.dtype.itemsize

    def take(self, name: str, first: int, last: int, dtype: str) -> Taken:
        """Field `name` of the samples first to last - 1, as `dtype` in native byte order."""
        rows, array = self.rows[first:last], self.arrays[name]
        if isinstance(array, Ragged | ComputedRagged):
            part = array.take(rows)
            return Ragged(part.values.astype(dtype), part.offsets)
        ascending = np.argsort(rows)  # a mapped file is read front to back
        out = np.empty((len(rows), *array.shape[1:]), dtype)
        out[ascending] = array[rows[ascending]]
        return out


@dataclass(frozen=True)
class Plan:
    """Schema and rows of a data set that is to be written."""

    fields: dict[str, Field]
    features: tuple[str, ...]
    block_samples: int
    shard_samples: int
    splits: dict[str, Rows]
    classes: int | None  # of the label field
    label: str | None

    @property
    def schema(self) -> str:
        return schema_sha256(self.fields, self.block_samples, self.features)

    def shards(self, split: str) -> Iterator[tuple[int, int, int]]:
        """(shard index, first, last) of every shard of a split."""
        bounds = self.splits[split].bounds.tolist()
        for index, (first, last) in enumerate(pairwise(bounds)):
            yield index, first, last


def make_plan(
    parts: Mapping[str, Mapping[str, Any]],
    fractions: Mapping[str, float] | None,
    about: About,
    settings: Settings,
) -> Plan:
    """Plan a data set.

    `parts`: split -> field -> array or `Categories`; with `fractions`, one part called "" that
    is divided. Raises `UsageError` or `DataError`.
    """
    arrays, vocabularies = encode(parts)
    identities = {part: _identify(part, c, vocabularies, settings) for part, c in arrays.items()}
    apart = {settings.key, settings.group} - set(settings.roles)  # known by index, not as fields
    arrays = {p: {n: v for n, v in c.items() if n not in apart} for p, c in arrays.items()}
    if not all(arrays.values()):
        raise UsageError("there is nothing to pack beside the key and the group")
    fields = make_schema(arrays, {**vocabularies, **about.vocab}, about, settings.roles)
    block, shard = _sizes(sample_bytes(fields, next(iter(arrays.values()))), settings)
    label = class_label(fields)
    classes = classes_of([content[label] for content in arrays.values()]) if label else None
    splits = {
        name: rows
        for part, content in arrays.items()
        for name, rows in _divide(
            part, content, identities[part], fractions, shard, settings, label
        ).items()
    }
    for name, rows in splits.items():
        if not len(rows.rows):
            raise DataError(f"split {name!r} got no samples: there are too few for its fraction")
    check_groups({name: rows.groups for name, rows in splits.items()})
    ragged = any(f.shape == "ragged" for f in fields.values())
    features = tuple(n for n, used in (("gzip", settings.gzip), ("ragged", ragged)) if used)
    return Plan(fields, features, block, shard, splits, classes, label if classes else None)


Identity = tuple[NDArray[np.uint64], NDArray[np.uint64] | None]  # keys, groups


def _identify(
    part: str,
    content: Mapping[str, Array],
    vocabularies: Mapping[str, tuple[str, ...]],
    settings: Settings,
) -> Identity:
    """Keys and groups of all rows of a part."""
    found: list[NDArray[np.uint64] | None] = []
    for kind in ("key", "group"):
        name = getattr(settings, kind)
        if name is not None and name not in content:
            raise UsageError(
                f"the {kind} {name!r} is no field{nearest(name, content)}; "
                f"there are {', '.join(content)}"
            )
        values = None if name is None else content[name]
        vocab = vocabularies.get(name or "")
        found.append(None if name is None else value_keys(kind, name, values, vocab))
    keys, groups = found
    return row_keys(part, len(next(iter(content.values())))) if keys is None else keys, groups


def _divide(
    part: str,
    content: dict[str, Array],
    identity: Identity,
    fractions: Mapping[str, float] | None,
    shard: int,
    settings: Settings,
    label: str | None,
) -> dict[str, Rows]:
    """The splits of one part, each in its final order."""
    keys, groups = identity
    everything = {part: np.arange(len(keys))}
    by = keys if groups is None else groups
    chosen = everything if fractions is None else by_key(by, fractions)
    splits = {}
    for name, rows in chosen.items():
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be the name of a split: use letters, digits and _")
        if settings.shuffle:
            rows = rows[permutation(len(rows), settings.seed, "pack", name)]
        count = -(-len(rows) // shard)
        bounds = np.minimum(np.arange(count + 1, dtype=np.int64) * shard, len(rows))
        if settings.stratify is not None and count:
            classes = _strata(content, settings.stratify, label)
            order, bounds = deal(classes[rows], count)
            rows = rows[order]
        splits[name] = Rows(
            content, rows, keys[rows], None if groups is None else groups[rows], bounds
        )
    return splits


def _strata(content: Mapping[str, Array], name: str, label: str | None) -> NDArray[Any]:
    array = content.get(name)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iub":
        hint = "" if name in content else nearest(name, content)
        raise UsageError(
            f"cannot stratify by {name!r}{hint}: it must be a field of one whole "
            f"number or word per sample" + (f", such as {label!r}" if label else "")
        )
    return array


def _sizes(size: float, settings: Settings) -> tuple[int, int]:
    """Samples per block and per shard: as asked for, else about 1 MiB and 128 MiB.

    The default block is a power of two, the default shard a whole number of blocks.
    """
    block, shard = settings.block_samples, settings.shard_samples
    if block is None:
        block = min(BLOCK_MOST, 1 << max(0, int(math.log2(max(BLOCK_BYTES / size, 1)))))
    if shard is None:
        shard = max(1, int(SHARD_BYTES / size) // max(block, 1)) * block
    if block < 1 or shard < 1:
        raise UsageError(f"block_samples {block} and shard_samples {shard} must be 1 or more")
    if block > 1 and block * size >= CHUNK_LIMIT:
        raise UsageError(f"block_samples {block} of {size:.0f} bytes exceed HDF5's 4 GiB per chunk")
    return block, shard
