"""A rank's share of every global batch, epoch by epoch.

Which samples a step uses, and how they form microbatches, follows from (data set, order, seed,
epoch, window, batch size, microbatch) alone; rank and size only say which of the microbatches
this loader delivers. So any number of ranks sees the same run, and an epoch can be taken up
again at any position by any number of ranks.

Layer: data. Is given rank and size as numbers; knows nothing of MPI, devices or models.

Notation: N samples in the split, G per global batch, m per microbatch, P ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.cache import BlockCache
from hpctrain.data.dataset import Dataset, ShardFiles
from hpctrain.data.figures import Figures
from hpctrain.data.microbatches import assign, batch_bounds, cut, steps
from hpctrain.data.node_cache import NodeCache, open_node_cache
from hpctrain.data.order import SEQUENTIAL, BlockWindowOrder, Window
from hpctrain.data.prefetch import Prefetch
from hpctrain.data.sampling import AnyOrder, Orders
from hpctrain.data.transforms import Transform
from hpctrain.data.views import Patches, Windows, open_view
from hpctrain.errors import DataError, UsageError

if TYPE_CHECKING:
    from hpctrain.mpi.topology import Topology

__all__ = ["Batch", "Loader", "State"]

DEPTH = 2  # batches prepared ahead
IN_FLIGHT = DEPTH + 2  # and the one being made, and the one in use
OPEN_SHARDS = 8
COMPARED = ("dataset_id", "split", "view", "order", "seed", "window")


class State(TypedDict):
    """Where in the data a run is; plain JSON."""

    dataset_id: str
    split: str
    view: str
    order: str
    seed: int
    window: Window
    epoch: int
    position: int


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch. The consumer owns the arrays."""

    step: int  # number of the step within the epoch
    position: int  # the global batch is [position, position + global_samples) of the epoch
    fields: dict[str, NDArray[Any]]  # name -> C-contiguous (n, *shape), n = samples of this rank
    samples: NDArray[np.int64]  # (n,): ids of the samples within the split
    groups: NDArray[np.int64]  # (microbatches + 1,): offsets of the microbatches within the n
    global_samples: int  # samples of all ranks together

    def __len__(self) -> int:
        return len(self.samples)


class Loader:
    """Batches of a split for one rank of `size`.

    Not collective: nothing is exchanged between ranks (but see `node`). All ranks must pass the
    same arguments but `rank`; then every rank gets the same number of batches, and every sample is
    in exactly one batch of one rank per epoch (but for orders that draw with replacement). A rank
    may get batches of 0 samples (more ranks than
    microbatches); it takes part in the step all the same.

    Args:
        dataset, split: what to read.
        batch_size: G, samples of a global batch; the last batch of an epoch may be short.
        microbatch: m, at most G; default G, which only one rank can compute.
        seed, window, order: see `hpctrain.data.order` and `hpctrain.data.sampling`. `window` is in
            blocks, or "all". weights: the field of the order weighted-v1.
        fields: names of the fields to read, all of fixed shape by default.
        view: what a sample is: None (a row), `Windows` of text or `Patches` of volumes.
        transform: random changes keyed by (seed, epoch, sample), see `hpctrain.data.transforms`.
        max_bytes: bound on this rank's decoded blocks and batches, checked here.
        node: keep the decoded split once per node, in memory that its ranks share; each reads its
            part now. Then creating the loader is collective over `node.comm`. Where the memory is
            short, every rank keeps blocks of its own, with one warning.

    Raises `UsageError` for arguments that break a rule, `DataError` for what the data set lacks.
    Reading errors are `DataError`s raised by `next`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        microbatch: int | None = None,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        window: Window = "all",
        fields: Sequence[str] | None = None,
        max_bytes: int = 1 << 30,
        order: str = "blockwin-v1",
        weights: str | None = None,
        view: Windows | Patches | None = None,
        transform: Transform | None = None,
        node: Topology | None = None,
    ) -> None:
        self.dataset, self.split = dataset, split
        self.batch_size, self.microbatch = batch_size, microbatch or batch_size
        self.rank, self.size = rank, size
        self.seed, self.window = int(seed), window
        dataset.split(split)  # refuses a wrong name
        self._check()
        self._view = open_view(dataset, split, fields, view)
        self.samples = int(self._view.starts[-1])
        self._orders = Orders(dataset, split, order, self._view.starts, self.seed, window, weights)
        self.order, self._sequential = self._orders.name, order == SEQUENTIAL
        self._transform = transform
        self._files = ShardFiles(dataset, split, OPEN_SHARDS)
        self.figures = Figures()
        self._cache: BlockCache | NodeCache | None = None
        if node is not None:
            self._cache = self._shared(node)
        self._room = 0 if isinstance(self._cache, NodeCache) else self._slots(max_bytes)
        if self._cache is None and not self._view.varies:
            self._cache = self._new_cache(0)

    @property
    def steps(self) -> int:
        """Steps in a whole epoch: ceil(N / G), the same on every rank."""
        return steps(self.samples, self.batch_size)

    @property
    def blocks_read(self) -> int:
        """Blocks read from disk so far; each holds up to `manifest.block_samples` samples."""
        return self.figures.blocks_read

    def epoch(
        self, epoch: int, start_step: int = 0, *, position: int | None = None
    ) -> Prefetch[Batch]:
        """This rank's batches of an epoch, from step `start_step` on, prepared by a thread.

        `position` is where the first of these batches begins, by default start_step * G; it is
        for going on with an epoch that was begun with another batch size. The iterator ends its
        thread at the end, on `close()`, and when a loop over it is left.
        """
        first = start_step * self.batch_size if position is None else position
        if start_step < 0 or first < 0:
            raise UsageError(f"start_step {start_step} and position {first} must not be negative")
        return Prefetch(self._batches(epoch, start_step, first), DEPTH, self._waited)

    def state(self, epoch: int, step: int = 0, *, position: int | None = None) -> State:
        """The state after `step` steps of an epoch have been used by the optimizer.

        Give `position` (batch.position + batch.global_samples) where the epoch was begun with
        another batch size.
        """
        if position is None:
            position = min(step * self.batch_size, self.samples)
        return State(
            dataset_id=self.dataset.dataset_id,
            split=self.split,
            view=self._view.name,
            order=self.order,
            seed=self.seed,
            window=self.window,
            epoch=epoch,
            position=position,
        )

    def restore(self, state: State) -> tuple[int, int]:
        """(epoch, position) to go on from. The end of an epoch is the begin of the next.

        The number of ranks and the batch size may have changed since. Raises `DataError` naming
        what differs if the data set, split, order, seed or window has.
        """
        mine: dict[str, Any] = dict(self.state(0))
        other: dict[str, Any] = {"view": "rows", **state}  # as it was before there were others
        lacking = sorted(mine.keys() - other.keys())
        if lacking:
            raise DataError(f"the saved state of the data has no {', '.join(lacking)}")
        differ = [name for name in COMPARED if mine[name] != other[name]]
        if differ:
            what = "; ".join(f"{name} was {other[name]}, is {mine[name]}" for name in differ)
            raise DataError(
                f"cannot go on in mid-epoch with other data: {what}; "
                f"restore what it was, or start a new run"
            )
        epoch, position = int(other["epoch"]), int(other["position"])
        if not 0 <= position <= self.samples or epoch < 0:
            raise DataError(
                f"the saved state of the data is at epoch {epoch}, position {position}; "
                f"split {self.split!r} has {self.samples} samples"
            )
        return (epoch + 1, 0) if position == self.samples else (epoch, position)

    def close(self) -> None:
        """Close the shards that are open. They are opened again when needed."""
        self._files.close()

    def _batches(self, epoch: int, step: int, position: int) -> Iterator[Batch]:
        order, left = self._orders.epoch(epoch), self.samples - position
        cache = self._cache or self._new_cache(epoch)
        for number in range(steps(max(left, 0), self.batch_size)):
            first, last = batch_bounds(number, self.batch_size, left)
            yield self._batch(order, cache, epoch, step + number, position + first, last - first)
            if isinstance(order, BlockWindowOrder) and isinstance(cache, BlockCache):
                self._read_ahead(order, cache, position + last)

    def _batch(
        self,
        order: AnyOrder,
        cache: BlockCache | NodeCache,
        epoch: int,
        step: int,
        position: int,
        count: int,
    ) -> Batch:
        bounds = cut(count, self.microbatch)
        mine = assign(len(bounds) - 1, self.size, self.rank)
        groups = bounds[mine.start : mine.stop + 1]
        ids = order.samples(position + int(groups[0]), position + int(groups[-1]))
        misses = cache.misses
        fields = cache.gather(ids)
        self.figures.misses += cache.misses - misses
        self.figures.samples += len(ids)
        self.figures.bytes_served += sum(array.nbytes for array in fields.values())
        if self._transform is not None:
            fields = self._transform(fields, ids, self.seed, epoch)
        return Batch(step, position, fields, ids, groups - groups[0], count)

    def _read_ahead(self, order: BlockWindowOrder, cache: BlockCache, position: int) -> None:
        """Read a share of the next window's blocks, if there is room for two windows."""
        if self.window != "all" and self._room >= 2 * self.window:
            cache.preload(order.blocks_around(position))

    def _waited(self, seconds: float) -> None:
        self.figures.wait_seconds += seconds

    def _new_cache(self, epoch: int) -> BlockCache:
        return BlockCache(
            self._view.starts,
            self._view.fields,
            self._room,
            lambda block, out: self._read_block(epoch, block, out),
        )

    def _shared(self, node: Topology) -> NodeCache | None:
        """The node's cache, or None where it cannot be had. Collective over `node.comm`."""
        if self._view.varies:
            raise UsageError("windows of text differ from epoch to epoch: no node cache holds them")
        return open_node_cache(
            node,
            self._view.starts,
            self._view.fields,
            lambda block, out: self._read_block(0, block, out),
        )

    def _read_block(self, epoch: int, block: int, out: dict[str, NDArray[Any]]) -> None:
        begun = time.perf_counter()
        self._view.read(self._files, (self.seed, epoch), block, out)
        self.figures.read_seconds += time.perf_counter() - begun
        self.figures.blocks_read += 1
        self.figures.bytes_read += sum(array.nbytes for array in out.values())

    def _check(self) -> None:
        if self.batch_size < 1 or not 1 <= self.microbatch <= self.batch_size:
            raise UsageError(
                f"batch_size {self.batch_size} and microbatch {self.microbatch} do not go "
                f"together: 1 <= microbatch <= batch_size"
            )
        if not 0 <= self.rank < self.size:
            raise UsageError(f"rank {self.rank} is not one of {self.size} ranks")

    def _slots(self, max_bytes: int) -> int:
        """How many blocks to keep: all if they fit, else at least what the order needs at once."""
        blocks = len(self._view.starts) - 1
        rows = int(np.diff(self._view.starts).max(initial=1))
        per_sample = sum(
            dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            for dtype, shape in self._view.fields.values()
        )
        most = steps(steps(self.batch_size, self.microbatch), self.size) * self.microbatch
        batches = IN_FLIGHT * min(most, self.batch_size, self.samples)
        fixed = (batches + rows) * per_sample  # rows: HDF5's buffer for the chunk being decoded
        if self._sequential:
            needed, name = -(-self.batch_size // rows) + 1, "batch"
        else:
            needed = blocks if self.window == "all" else self.window
            name = f"window={self.window}"
        needed = max(1, min(needed, blocks))
        room = (max_bytes - fixed) // max(rows * per_sample, 1)
        if room < needed:
            raise UsageError(
                f"max_bytes={max_bytes} is too small for split {self.split!r}: {name} needs "
                f"({needed} blocks x {rows} samples + {IN_FLIGHT} batches of this rank = {batches} "
                f"samples + 1 block being read) x {per_sample} bytes = "
                f"{fixed + needed * rows * per_sample}; raise it"
                + (f", or set the window to {room} blocks" if room > 0 else "")
            )
        return max(1, min(room, blocks))
