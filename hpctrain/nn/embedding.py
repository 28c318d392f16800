"""Embedding: rows of a table by number, with a gradient that is summed in the order of the batch.

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpctrain.autograd import Tape, Variable
from hpctrain.errors import DataError, UsageError

__all__ = ["embedding"]

Array = Any


def embedding(tape: Tape, ids: Variable, table: Variable) -> Variable:
    """y[...] = table[ids[...]].

    Args:
        ids: (...) int64, each in [0, vocabulary); brought to the host to be checked and sorted.
        table: (vocabulary, features).

    Returns:
        (..., features). Raises `DataError` for an id that the table does not have.
    """
    device = tape.device
    if ids.value.dtype != np.int64:
        raise UsageError(f"embedding: the ids are {ids.value.dtype}; convert them to int64")
    vocabulary, features = table.shape
    host_ids = device.to_host(ids.value).reshape(-1)
    outside = np.flatnonzero((host_ids < 0) | (host_ids >= vocabulary))
    if outside.size:
        raise DataError(
            f"embedding: id {host_ids[outside[0]]} (element {outside[0]} of the ids, one of "
            f"{outside.size}) is not in the table of {vocabulary} rows; ids must be 0 to "
            f"{vocabulary - 1}: use a larger vocabulary or check the data"
        )
    n = host_ids.size
    y = device.empty((*ids.shape, features), table.value.dtype)
    device.launch("embedding_forward", table.value, ids.value, y, n, features, work=n)

    def gradient(dy: Array, out: Array) -> None:
        device.launch("fill", out, 0.0, out.size, work=out.size)
        unique, starts = np.unique(host_ids, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(starts)])
        arrays = [
            device.from_host(array.astype(np.int64, copy=False))
            for array in (np.argsort(host_ids, kind="stable"), starts, unique)
        ]
        device.launch(
            "embedding_backward", dy, *arrays, out, unique.size, features,
            work=unique.size * -(-features // 32),
        )  # fmt: skip

    return tape.record(
        y, (table,), lambda dy: tape.accumulate(table, lambda out: gradient(dy, out))
    )
