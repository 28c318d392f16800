"""Where the samples of an epoch come from: blocks of one's own, or the split in shared memory.

Layer: data. The third source, windows in shared memory, is in `node_windows`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.batches import Part
from hpctrain.data.cache import BlockCache
from hpctrain.data.node_cache import NodeCache
from hpctrain.data.order import BlockWindowOrder
from hpctrain.data.sampling import AnyOrder

__all__ = ["OwnReader", "Reader", "SharedReader", "spans_of"]

Arrays = dict[str, NDArray[Any]]


class Reader(Protocol):
    """The samples of one epoch by position. `misses`: samples that had to be waited for."""

    misses: int

    def gather(self, spans: list[tuple[int, int]], out: Arrays) -> NDArray[np.int64]:
        """The samples at some ranges of positions, in ascending order, into `out`; their ids."""

    def read_ahead(self, position: int) -> None:
        """Read something that will be needed after `position`, if there is room."""

    def finish(self) -> None:
        """The epoch has come to its end."""

    def leave(self, error: BaseException | None) -> None:
        """The reader is not used any more, because of `error` if there was one."""


class _Alone:
    """A reader that no other rank depends on."""

    def __init__(self, order: AnyOrder) -> None:
        self.misses = 0
        self._order = order

    def finish(self) -> None:
        """Nothing: nobody waits for this rank."""

    def leave(self, error: BaseException | None) -> None:
        """Nothing: nobody waits for this rank."""

    def _ids(self, spans: list[tuple[int, int]]) -> NDArray[np.int64]:
        parts = [self._order.samples(start, stop) for start, stop in spans]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class OwnReader(_Alone):
    """Blocks that this rank decodes and keeps."""

    def __init__(self, order: AnyOrder, cache: BlockCache, ahead: bool) -> None:
        """`ahead`: there is room for two windows of the order."""
        super().__init__(order)
        self._cache, self._ahead = cache, ahead

    def gather(self, spans: list[tuple[int, int]], out: Arrays) -> NDArray[np.int64]:
        """See `Reader`."""
        ids = self._ids(spans)
        before = self._cache.misses
        self._cache.gather(ids, out)
        self.misses += self._cache.misses - before
        return ids

    def read_ahead(self, position: int) -> None:
        """A share of the next window's blocks."""
        if self._ahead and isinstance(self._order, BlockWindowOrder):
            self._cache.preload(self._order.blocks_around(position))


class SharedReader(_Alone):
    """The whole split, decoded."""

    def __init__(self, order: AnyOrder, cache: NodeCache) -> None:
        super().__init__(order)
        self._cache = cache

    def gather(self, spans: list[tuple[int, int]], out: Arrays) -> NDArray[np.int64]:
        """See `Reader`."""
        ids = self._ids(spans)
        self._cache.gather(ids, out)
        return ids

    def read_ahead(self, position: int) -> None:
        """Nothing: everything is there."""


def spans_of(parts: list[Part]) -> list[tuple[int, int]]:
    """The positions of some parts, those that meet joined."""
    spans: list[tuple[int, int]] = []
    for part in parts:
        if spans and spans[-1][1] == part.first:
            spans[-1] = (spans[-1][0], part.last)
        else:
            spans.append((part.first, part.last))
    return spans
