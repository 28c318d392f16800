"""What a packer will write, decided before the first byte: schema, splits, rows of every shard.

All of it follows from the arrays and the arguments by index arithmetic, so the bytes of shard i do
not depend on who writes it or when.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import ROLES, Column, Field, Role, schema_sha256
from hpctrain.data.order import permutation
from hpctrain.data.ragged import Ragged
from hpctrain.data.tables import Categories
from hpctrain.errors import DataError, UsageError, nearest

__all__ = ["Array", "Plan", "Rows", "Settings", "classes_of", "make_plan"]

Array = NDArray[Any] | Ragged
TOTAL = 10000  # parts that split fractions are counted in
BLOCK_BYTES = 1 << 20
BLOCK_MOST = 4096  # samples
SHARD_BYTES = 128 << 20
CHUNK_LIMIT = 1 << 32  # bytes: HDF5's limit for a chunk
CLASSES_MOST = 1 << 16
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
          "float16", "float32", "float64")  # fmt: skip
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Settings:
    """The arguments of packing that shape its output."""

    roles: Mapping[str, str]
    seed: int
    shuffle: bool
    block_samples: int | None
    shard_samples: int | None
    gzip: bool


@dataclass(frozen=True)
class Rows:
    """The samples of one split: rows of its source arrays in the order they are written."""

    arrays: dict[str, Array]
    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]  # of rows[i]

    def take(self, name: str, first: int, last: int, dtype: str) -> Array:
        """Field `name` of the samples first to last - 1, as `dtype` in native byte order."""
        rows, array = self.rows[first:last], self.arrays[name]
        if isinstance(array, Ragged):
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
        n = len(self.splits[split].rows)
        for index, first in enumerate(range(0, n, self.shard_samples)):
            yield index, first, min(first + self.shard_samples, n)


def make_plan(
    parts: Mapping[str, Mapping[str, Any]],
    fractions: Mapping[str, float] | None,
    columns: Mapping[str, list[str]],
    settings: Settings,
) -> Plan:
    """Plan a data set.

    `parts`: split -> field -> array or `Categories`; with `fractions`, one part called "" that
    is divided. Raises `UsageError` or `DataError`.
    """
    arrays, vocabularies = _encode(parts)
    fields = _schema(arrays, vocabularies, columns, settings.roles)
    splits = {
        name: rows
        for part, content in arrays.items()
        for name, rows in _divide(part, content, fractions, settings).items()
    }
    for name, rows in splits.items():
        if not len(rows.rows):
            raise DataError(f"split {name!r} got no samples: there are too few for its fraction")
    block, shard = _sizes(_sample_bytes(fields, next(iter(arrays.values()))), settings)
    ragged = any(f.shape == "ragged" for f in fields.values())
    features = tuple(n for n, used in (("gzip", settings.gzip), ("ragged", ragged)) if used)
    label = _class_label(fields)
    classes = classes_of([content[label] for content in arrays.values()]) if label else None
    return Plan(fields, features, block, shard, splits, classes, label if classes else None)


def classes_of(labels: list[Any]) -> int | None:
    """Number of classes if all labels are in 0..65535, else None."""
    labels = [label for label in labels if len(label)]
    low = min((int(label.min()) for label in labels), default=-1)
    high = max((int(label.max()) for label in labels), default=-1)
    return high + 1 if low >= 0 and high < CLASSES_MOST else None


def _class_label(fields: Mapping[str, Field]) -> str | None:
    """The first label field that holds one whole number per sample."""
    for name, field in fields.items():
        if field.role == "label" and field.shape == () and "int" in field.dtype:
            return name
    return None


def _encode(
    parts: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, dict[str, Array]], dict[str, tuple[str, ...]]]:
    """Arrays with categories as codes of one vocabulary for all parts; checks counts and names."""
    words: dict[str, set[str]] = {}
    parts = {part: {k: _words(v) for k, v in content.items()} for part, content in parts.items()}
    for content in parts.values():
        for name, value in content.items():
            if isinstance(value, Categories):
                words.setdefault(name, set()).update(value.vocab)
    vocabularies = {name: tuple(sorted(found)) for name, found in words.items()}
    arrays: dict[str, dict[str, Array]] = {}
    for part, content in parts.items():
        arrays[part] = {}
        for name, value in content.items():
            if isinstance(value, Categories):
                value = value.recoded(vocabularies[name])
            array = value if isinstance(value, Ragged) else np.asanyarray(value)
            _check_array(name, array)
            arrays[part][name] = array
        counts = {name: len(array) for name, array in arrays[part].items()}
        if len(set(counts.values())) != 1:
            where = f" of split {part!r}" if part else ""
            raise DataError(f"the fields{where} differ in their number of samples: {counts}")
    return arrays, vocabularies


def _words(value: Any) -> Any:
    """Arrays of strings as `Categories`, all else as it is."""
    text = isinstance(value, np.ndarray) and value.dtype.kind in "US"
    return Categories.of(value) if text else value


def _check_array(name: str, array: Array) -> None:
    if not NAME.fullmatch(name):
        raise DataError(f"{name!r} cannot be the name of a field: use letters, digits and _ . -")
    kind = array.values.dtype if isinstance(array, Ragged) else array.dtype
    if kind != np.dtype(bool) and kind.name not in DTYPES:
        raise DataError(
            f"field {name!r} has dtype {kind}, which shards do not hold; "
            f"convert it to one of {', '.join(DTYPES)}"
        )
    if not isinstance(array, Ragged) and (array.ndim == 0 or 0 in array.shape[1:]):
        raise DataError(f"field {name!r} has shape {array.shape}: it needs an axis of samples")


def _schema(
    arrays: Mapping[str, Mapping[str, Array]],
    vocabularies: Mapping[str, tuple[str, ...]],
    columns: Mapping[str, list[str]],
    roles: Mapping[str, str],
) -> dict[str, Field]:
    """The fields without statistics; the same in every part."""
    schemas = []
    for content in arrays.values():
        schemas.append({
            name: Field(
                *_kind(array),
                _role(name, roles),
                vocabularies.get(name),
                tuple(Column(c) for c in columns[name]) if name in columns else None,
            )
            for name, array in content.items()
        })  # fmt: skip
    for name in roles:
        if name not in schemas[0]:
            raise UsageError(
                f"there is no field {name!r}{nearest(name, schemas[0])}; "
                f"there are {', '.join(schemas[0])}"
            )
    for part, schema in zip(arrays, schemas, strict=True):
        if schema != schemas[0]:
            raise DataError(
                f"splits {next(iter(arrays))!r} and {part!r} do not have the same fields: "
                f"{_brief(schemas[0])} and {_brief(schema)}"
            )
    return schemas[0]


def _brief(schema: Mapping[str, Field]) -> str:
    return ", ".join(f"{name} {f.dtype} {f.shape}" for name, f in schema.items())


def _kind(array: Array) -> tuple[str, Any]:
    dtype = array.values.dtype if isinstance(array, Ragged) else array.dtype
    name = "uint8" if dtype == np.dtype(bool) else dtype.name
    return name, "ragged" if isinstance(array, Ragged) else tuple(array.shape[1:])


def _role(name: str, roles: Mapping[str, str]) -> Role:
    role = roles.get(name, name if name in ROLES else "input")
    if role not in ROLES:
        raise UsageError(f"field {name!r} cannot have role {role!r}; roles are {', '.join(ROLES)}")
    return cast(Role, role)


def _divide(
    part: str, content: dict[str, Array], fractions: Mapping[str, float] | None, settings: Settings
) -> dict[str, Rows]:
    """The splits of one part, each in its final order."""
    n = len(next(iter(content.values())))
    keys = _keys(part, n)
    chosen = {part: np.arange(n)} if fractions is None else _by_key(keys, fractions)
    splits = {}
    for name, rows in chosen.items():
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be the name of a split: use letters, digits and _")
        if settings.shuffle:
            rows = rows[permutation(len(rows), settings.seed, "pack", name)]
        splits[name] = Rows(content, rows, keys[rows])
    return splits


def _keys(part: str, n: int) -> NDArray[np.uint64]:
    """Key of row i: blake2b of "part/i". It stays the same when rows are appended."""
    digests = b"".join(
        hashlib.blake2b(b"%s/%d" % (part.encode(), row), digest_size=8).digest() for row in range(n)
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _by_key(keys: NDArray[np.uint64], fractions: Mapping[str, float]) -> dict[str, Any]:
    """Rows per split: key mod 10000 against cumulative thresholds."""
    if any(f <= 0 for f in fractions.values()) or not math.isclose(sum(fractions.values()), 1):
        raise UsageError(f"split fractions must be above 0 and add up to 1, not {dict(fractions)}")
    bounds = np.rint(np.cumsum(list(fractions.values())) * TOTAL)[:-1]
    place = np.searchsorted(bounds, (keys % np.uint64(TOTAL)).astype(np.int64), side="right")
    return {name: np.flatnonzero(place == i) for i, name in enumerate(fractions)}


def _sample_bytes(fields: Mapping[str, Field], arrays: Mapping[str, Array]) -> float:
    size = 0.0
    for name, array in arrays.items():
        if isinstance(array, Ragged):
            size += array.values.nbytes / max(len(array), 1) + 8
        else:
            size += math.prod(array.shape[1:]) * np.dtype(fields[name].dtype).itemsize
    return max(size, 1.0)


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
