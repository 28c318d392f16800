"""Who a sample is: its key, its group, the split and the shard that follow from them.

    key of row i            blake2b of "part/i", or with a key field of "key/value"
    split                   key mod 10000 (of the group, where there are groups) against thresholds
    shard, if stratified    the rows, sorted by class, are dealt to the shards like cards

So a sample's split does not change when others are appended or the order changes, and samples of
one group (patient, customer, genome) are in one split.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import DataError, UsageError

__all__ = ["by_key", "check_groups", "deal", "row_keys", "value_keys"]

TOTAL = 10000  # parts that split fractions are counted in


def row_keys(part: str, n: int) -> NDArray[np.uint64]:
    """Keys of rows 0 to n - 1: they stay the same when rows are appended."""
    return _digests([b"%s/%d" % (part.encode(), row) for row in range(n)])


def value_keys(
    kind: str, name: str, array: Any, vocab: tuple[str, ...] | None
) -> NDArray[np.uint64]:
    """Keys that follow from the values of a field alone, uint64 (n,); equal values, equal keys.

    `kind` keeps keys and groups apart. Raises `DataError` for a field that is neither whole
    numbers nor words, one per sample.
    """
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iub":
        raise DataError(
            f"field {name!r} cannot be the {kind}: it takes one whole number or word per sample"
        )
    values, places = np.unique(array, return_inverse=True)
    words = [vocab[value] if vocab is not None else str(value) for value in values.tolist()]
    keys: NDArray[np.uint64] = _digests([f"{kind}/{word}".encode() for word in words])[places]
    return keys


def by_key(keys: NDArray[np.uint64], fractions: Mapping[str, float]) -> dict[str, Any]:
    """Rows per split: key mod 10000 against cumulative thresholds."""
    if any(f <= 0 for f in fractions.values()) or not math.isclose(sum(fractions.values()), 1):
        raise UsageError(f"split fractions must be above 0 and add up to 1, not {dict(fractions)}")
    bounds = np.rint(np.cumsum(list(fractions.values())) * TOTAL)[:-1]
    place = np.searchsorted(bounds, (keys % np.uint64(TOTAL)).astype(np.int64), side="right")
    return {name: np.flatnonzero(place == i) for i, name in enumerate(fractions)}


def check_groups(groups: Mapping[str, NDArray[np.uint64] | None]) -> None:
    """Raise `DataError` if a group is in two splits. `groups`: of every split's samples."""
    seen: dict[str, NDArray[np.uint64]] = {}
    for split, found in groups.items():
        if found is None:
            continue
        mine = np.unique(found)
        for other, theirs in seen.items():
            both = np.intersect1d(mine, theirs)
            if len(both):
                raise DataError(
                    f"{len(both)} groups are in both {other!r} and {split!r}: a group must not "
                    f"straddle splits; divide the sources by group, or use --split"
                )
        seen[split] = mine


def deal(classes: NDArray[Any], shards: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Deal samples to shards so that counts of every class differ by at most one.

    `classes`: (n,), of the samples in their order. Returns the places of the samples in their new
    order, int64 (n,), and the bounds of the shards, int64 (shards + 1,).
    """
    n = len(classes)
    shard_of = np.empty(n, np.int64)
    shard_of[np.argsort(classes, kind="stable")] = np.arange(n) % shards
    bounds = np.zeros(shards + 1, np.int64)
    np.cumsum(np.bincount(shard_of, minlength=shards), out=bounds[1:])
    return np.argsort(shard_of, kind="stable"), bounds


def _digests(words: list[bytes]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(word, digest_size=8).digest() for word in words)
    return np.frombuffer(digests, "<u8").astype(np.uint64)
