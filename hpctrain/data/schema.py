"""The schema of a data set that is to be packed: from arrays to fields.

Layer: data. Knows nothing of files, splits or shards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.computed import Computed, ComputedRagged
from hpctrain.data.manifest import ROLES, Column, Field, Role
from hpctrain.data.ragged import Ragged
from hpctrain.data.tables import Categories
from hpctrain.errors import DataError, UsageError, nearest

__all__ = [
    "NAME",
    "About",
    "Array",
    "Taken",
    "class_label",
    "classes_of",
    "encode",
    "make_schema",
    "sample_bytes",
]

Taken = NDArray[Any] | Ragged  # samples in memory
Array = Taken | Computed | ComputedRagged  # samples that can be taken
CLASSES_MOST = 1 << 16
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
          "float16", "float32", "float64")  # fmt: skip
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class About:
    """What is known of fields beyond their arrays, by name."""

    columns: Mapping[str, list[str]] = field(default_factory=dict)  # of a table
    vocab: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what codes stand for
    tokens: Mapping[str, int] = field(default_factory=dict)  # text: number of codes


def classes_of(labels: list[Any]) -> int | None:
    """Number of classes if all labels are in 0..65535, else None."""
    labels = [label for label in labels if len(label)]
    low = min((int(label.min()) for label in labels), default=-1)
    high = max((int(label.max()) for label in labels), default=-1)
    return high + 1 if low >= 0 and high < CLASSES_MOST else None


def class_label(fields: Mapping[str, Field]) -> str | None:
    """The first label field that holds one whole number per sample."""
    for name, schema in fields.items():
        if schema.role == "label" and schema.shape == () and "int" in schema.dtype:
            return name
    return None


def encode(
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
            known = isinstance(value, Ragged | Computed | ComputedRagged)
            array = value if known else np.asanyarray(value)
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
    kind = array.dtype
    if kind != np.dtype(bool) and kind.name not in DTYPES:
        raise DataError(
            f"field {name!r} has dtype {kind}, which shards do not hold; "
            f"convert it to one of {', '.join(DTYPES)}"
        )
    if isinstance(array, Ragged | ComputedRagged):
        return
    if array.ndim == 0 or 0 in array.shape[1:]:
        raise DataError(f"field {name!r} has shape {array.shape}: it needs an axis of samples")


def make_schema(
    arrays: Mapping[str, Mapping[str, Array]],
    vocabularies: Mapping[str, tuple[str, ...]],
    about: About,
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
                tuple(map(Column, about.columns[name])) if name in about.columns else None,
                tokens=about.tokens.get(name),
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
    name = "uint8" if array.dtype == np.dtype(bool) else array.dtype.name
    if isinstance(array, Ragged | ComputedRagged):
        return name, "ragged"
    return name, tuple(array.shape[1:])


def _role(name: str, roles: Mapping[str, str]) -> Role:
    role = roles.get(name, name if name in ROLES else "input")
    if role not in ROLES:
        raise UsageError(f"field {name!r} cannot have role {role!r}; roles are {', '.join(ROLES)}")
    return cast(Role, role)


def sample_bytes(fields: Mapping[str, Field], arrays: Mapping[str, Array]) -> float:
    size = 0.0
    for name, array in arrays.items():
        if isinstance(array, Ragged | ComputedRagged):
            mean = float(array.lengths.mean()) if len(array) else 0.0
            size += mean * array.dtype.itemsize + 8
        else:
            size += math.prod(array.shape[1:]) * np.dtype(fields[name].dtype).itemsize
    return max(size, 1.0)
