"""A rank's share of every global batch, epoch by epoch.

Which samples a step uses, and how they form microbatches, follows from (data set, order, seed,
epoch, window, batch size, microbatch) alone; rank and size only say which of the microbatches
this loader delivers. So any number of ranks sees the same run, and an epoch can be taken up
again at any position by any number of ranks.

Layer: data. Is given rank and size as numbers; knows nothing of MPI, devices or models.

Notation: N samples in the split, G per global batch, m per microbatch, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.cache import BlockCache
from hpctrain.data.dataset import Dataset, ShardFiles
from hpctrain.data.manifest import Field
from hpctrain.data.microbatches import assign, batch_bounds, cut, steps
from hpctrain.data.order import SEQUENTIAL, Order, Window, make_order
from hpctrain.data.prefetch import Prefetch
from hpctrain.data.shard import storage_dtype
from hpctrain.errors import DataError, UsageError

__all__ = ["Batch", "Loader", "State"]

DEPTH = 2  # batches prepared ahead
IN_FLIGHT = DEPTH + 2  # and the one being made, and the one in use
OPEN_SHARDS = 8
COMPARED = ("dataset_id", "split", "order", "seed", "window")


class State(TypedDict):
    """Where in the data a run is; plain JSON."""

    dataset_id: str
    split: str
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

    Not collective: nothing is exchanged between ranks. All ranks must pass the same arguments but
    `rank`; then every rank gets the same number of batches, and every sample is in exactly one
    batch of one rank per epoch. A rank may get batches of 0 samples (more ranks than
    microbatches); it takes part in the step all the same.

    Args:
        dataset, split: what to read.
        batch_size: G, samples of a global batch; the last batch of an epoch may be short.
        microbatch: m, at most G; default G, which only one rank can compute.
        seed, window, order: see `hpctrain.data.order`. `window` is in blocks, or "all".
        fields: names of the fields to read, all by default. Ragged fields are not served.
        max_bytes: bound on this rank's decoded blocks and batches, checked here.

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
    ) -> None:
        self.dataset, self.split = dataset, split
        self.batch_size, self.microbatch = batch_size, microbatch or batch_size
        self.rank, self.size = rank, size
        self.seed, self.window, self.order = int(seed), window, order
        self.samples = dataset.split(split).n
        self._check()
        self._table = dataset.table(split)
        make_order(order, self._table.starts, self.seed, 0, window)  # refuses a wrong name
        self._schema = _served(dataset, fields)
        self._files = ShardFiles(dataset, split, OPEN_SHARDS)
        self._cache = BlockCache(
            self._table.starts,
            {name: (storage_dtype(f.dtype), _shape(f)) for name, f in self._schema.items()},
            self._slots(max_bytes),
            self._read_block,
        )

    @property
    def steps(self) -> int:
        """Steps in a whole epoch: ceil(N / G), the same on every rank."""
        return steps(self.samples, self.batch_size)

    @property
    def blocks_read(self) -> int:
        """Blocks read from disk so far; each holds up to `manifest.block_samples` samples."""
        return self._cache.blocks_read

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
        order = make_order(self.order, self._table.starts, self.seed, epoch, self.window)
        return Prefetch(self._batches(order, start_step, first), DEPTH)

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
        other: dict[str, Any] = dict(state)
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

    def _batches(self, order: Order, step: int, position: int) -> Iterator[Batch]:
        left = self.samples - position
        for number in range(steps(max(left, 0), self.batch_size)):
            first, last = batch_bounds(number, self.batch_size, left)
            yield self._batch(order, step + number, position + first, last - first)

    def _batch(self, order: Order, step: int, position: int, count: int) -> Batch:
        bounds = cut(count, self.microbatch)
        mine = assign(len(bounds) - 1, self.size, self.rank)
        groups = bounds[mine.start : mine.stop + 1]
        ids = order.samples(position + int(groups[0]), position + int(groups[-1]))
        return Batch(step, position, self._cache.gather(ids), ids, groups - groups[0], count)

    def _read_block(self, block: int, out: dict[str, NDArray[Any]]) -> None:
        shard = self._files[int(self._table.shard[block])]
        for name, array in out.items():
            shard.read_block(name, int(self._table.block[block]), array)

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
        blocks = len(self._table.starts) - 1
        rows = int(np.diff(self._table.starts).max(initial=1))
        per_sample = sum(
            storage_dtype(f.dtype).itemsize * int(np.prod(_shape(f), dtype=np.int64))
            for f in self._schema.values()
        )
        most = steps(steps(self.batch_size, self.microbatch), self.size) * self.microbatch
        batches = IN_FLIGHT * min(most, self.batch_size, self.samples)
        fixed = (batches + rows) * per_sample  # rows: HDF5's buffer for the chunk being decoded
        if self.order == SEQUENTIAL:
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


def _shape(field: Field) -> tuple[int, ...]:
    return () if field.shape == "ragged" else field.shape


def _served(dataset: Dataset, names: Sequence[str] | None) -> dict[str, Field]:
    """The fields to read: those asked for, or all of fixed shape."""
    if names is None:
        return {n: f for n, f in dataset.fields.items() if f.shape != "ragged"}
    fields = {name: dataset.field(name) for name in names}
    ragged = [name for name, field in fields.items() if field.shape == "ragged"]
    if ragged:
        raise DataError(
            f"field {ragged[0]!r} of {dataset.path} is ragged: batches hold fields of fixed shape "
            f"only; read it with Dataset.read"
        )
    return fields
