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
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.batches import Batch, Batches, Memory, Part, Share
from hpctrain.data.bounds import (
    DEPTH,
    Bounds,
    bounds_of,
    check_batches,
    sample_bytes,
    together,
)
from hpctrain.data.cache import BlockCache
from hpctrain.data.dataset import Dataset, ShardFiles
from hpctrain.data.figures import Figures
from hpctrain.data.microbatches import steps
from hpctrain.data.node_cache import NodeCache, open_node_cache
from hpctrain.data.node_windows import NodeWindows
from hpctrain.data.order import BLOCKWIN, SEQUENTIAL, BlockWindowOrder, Window
from hpctrain.data.readers import OwnReader, Reader, SharedReader, spans_of
from hpctrain.data.sampling import Orders
from hpctrain.data.state import State, go_on
from hpctrain.data.tails import Tail, check_tail, fill_up, with_tail
from hpctrain.data.transforms import Transform
from hpctrain.data.views import Patches, Windows, open_view
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.mpi.topology import Topology

__all__ = ["Batch", "Loader", "State"]

OPEN_SHARDS = 128  # each is 0.6 MiB of HDF5's; to open one again costs as much as to read 3 MiB


class Loader:
    """Batches of a split for one rank of `size`.

    Not collective: nothing is exchanged between ranks (but see `node`). All ranks must pass the
    same arguments but `rank`; then every rank gets the same number of batches, and every sample is
    in exactly one batch of one rank per epoch (but for orders that draw with replacement). A rank
    may get batches of 0 samples (more ranks than microbatches); it takes part all the same.

    Args:
        dataset, split: what to read. batch_size: G, samples of a global batch; see `tail`.
        microbatch: m, at most G; default G, which only one rank can compute.
        seed, window, order: see `hpctrain.data.order` and `hpctrain.data.sampling`. `window` is in
            blocks, or "all". weights: the field of the order weighted-v1.
        fields: names of the fields to read, all of fixed shape by default.
        view: what a sample is: None (a row), `Windows` of text or `Patches` of volumes.
        transform: random changes keyed by (seed, epoch, sample), see `hpctrain.data.transforms`.
        max_bytes: bound on this rank's decoded blocks and batches, checked here. HDF5 takes 0.6 MiB
            beside it for each shard that is open, at most 128.
        node: decode blocks once per node, into memory that its ranks share: all of the split now,
            or where that is too large (or a sample differs from epoch to epoch) one or two windows
            of the order at a time. Then creating the loader is collective over `node.comm`, all
            ranks begin the same epochs and take the same steps, and a new epoch ends the one
            before. Where there is too little memory for a window, or the order has none, every
            rank keeps blocks of its own, with one warning.
        node_bytes: bound on that memory, per node; None: what the node has.
        staging: allocates the memory of batches, such as a device's page-locked `staging`; called
            by the threads that make and use the iterator of an epoch, not by the loader's own.
        tail: what becomes of a short last batch: keep, drop or pad, see `hpctrain.data.tails`.

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
        node_bytes: int | None = None,
        staging: Callable[[int], NDArray[Any]] | None = None,
        tail: Tail = "keep",
    ) -> None:
        self.dataset, self.split = dataset, split
        self.batch_size, self.microbatch = batch_size, microbatch or batch_size
        self.rank, self.size = rank, size
        self.seed, self.window = int(seed), window
        dataset.split(split)  # refuses a wrong name
        check_batches(batch_size, self.microbatch, rank, size)
        self._view = open_view(dataset, split, fields, view)
        self.samples = int(self._view.starts[-1])
        check_tail(tail, self.samples, self.batch_size)
        self.tail: Tail = tail
        self._orders = Orders(dataset, split, order, self._view.starts, self.seed, window, weights)
        self.order, self._sequential = self._orders.name, order == SEQUENTIAL
        self._transform, self._staging = transform, staging
        self._share = Share(self.batch_size, self.microbatch, rank, size)
        self._files = ShardFiles(dataset, split, OPEN_SHARDS)
        self.figures = Figures()
        self._cache: BlockCache | NodeCache | NodeWindows | None = None
        if node is not None:
            self._cache = self._shared(node, node_bytes)
        self._bounds = self._bound(max_bytes)
        if self._cache is None and not self._view.varies:
            self._cache = self._new_cache(0)
        self._newest: weakref.ref[Batches] | None = None

    @property
    def steps(self) -> int:
        """Steps in a whole epoch: ceil(N / G), the same on every rank; floor with tail "drop"."""
        if self.tail == "drop":
            return self.samples // self.batch_size
        return steps(self.samples, self.batch_size)

    @property
    def blocks_read(self) -> int:
        """Blocks read from disk so far; each holds up to `manifest.block_samples` samples."""
        return self.figures.blocks_read

    def epoch(self, epoch: int, start_step: int = 0, *, position: int | None = None) -> Batches:
        """This rank's batches of an epoch, from step `start_step` on, prepared by a thread.

        `position` is where the first of these batches begins, by default start_step * G; it is
        for going on with an epoch that was begun with another batch size. The iterator ends its
        thread at the end, on `close()`, and when a loop over it is left.
        """
        first = start_step * self.batch_size if position is None else position
        if start_step < 0 or first < 0:
            raise UsageError(f"start_step {start_step} and position {first} must not be negative")
        number = 0
        if isinstance(self._cache, NodeWindows):
            before = None if self._newest is None else self._newest()
            if before is not None:
                before.close()
            number = self._cache.begin()
        batches = Batches(
            partial(self._groups, epoch, start_step, first, number),
            DEPTH,
            None if self._staging is None else self._memory,
            self._waited,
        )
        self._newest = weakref.ref(batches)
        return batches

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
        what differs if the data set, split, view, order, seed or window has.
        """
        least = self.batch_size if self.tail == "drop" else 1
        return go_on(self.state(0), state, self.samples, least)

    def close(self) -> None:
        """Close the shards that are open. They are opened again when needed."""
        self._files.close()

    def _groups(
        self,
        epoch: int,
        step: int,
        position: int,
        number: int,
        memories: SimpleQueue[Memory],
        closed: Event,
    ) -> Iterator[list[Batch]]:
        """The batches of an epoch, those together that are gathered together."""
        reader, error = self._reader(epoch, position, number, closed), None
        try:
            parts, size = self._parts(step, position), self._bounds.together
            while some := list(islice(parts, size)):
                memory = self._memory() if self._staging is None else memories.get()
                yield self._group(reader, epoch, some, memory)
                reader.read_ahead(some[-1].position + some[-1].global_samples)
            reader.finish()
        except BaseException as failure:
            error = failure
            raise
        finally:
            reader.leave(error)

    def _parts(self, step: int, position: int) -> Iterator[Part]:
        parts = self._share.parts(self.samples, step, position)
        return with_tail(parts, self.tail, self.batch_size, self.microbatch, self.rank, self.size)

    def _group(self, reader: Reader, epoch: int, parts: list[Part], memory: Memory) -> list[Batch]:
        bounds = np.cumsum([0, *(int(part.groups[-1]) for part in parts)]).tolist()
        there = sum(part.last - part.first for part in parts)  # less, if the last one is padded
        fields, misses = memory.first(there), reader.misses
        ids = reader.gather(spans_of(parts), fields)
        self.figures.misses += reader.misses - misses
        self.figures.samples += len(ids)
        self.figures.bytes_served += sum(array.nbytes for array in fields.values())
        if self._transform is not None:
            fields = self._transform(fields, ids, self.seed, epoch)
        if there < bounds[-1]:
            fields, ids = fill_up(fields, ids, bounds[-1])
        batches = []
        for part, first, last in zip(parts, bounds, bounds[1:], strict=False):
            mine = {name: array[first:last] for name, array in fields.items()}
            groups, count = part.groups, part.global_samples
            batches.append(Batch(part.step, part.position, mine, ids[first:last], groups, count))
        return batches

    def _memory(self) -> Memory:
        """Memory for the batches of a group."""
        rows = min(self._bounds.together * self._share.most, self.samples)
        return Memory(self._staging or partial(np.empty, dtype=np.uint8), self._view.fields, rows)

    def _reader(self, epoch: int, position: int, number: int, closed: Event) -> Reader:
        order = self._orders.epoch(epoch)
        read = partial(self._read_block, epoch)
        if isinstance(self._cache, NodeWindows):
            assert isinstance(order, BlockWindowOrder)  # `_shared` takes no other
            return self._cache.reader(number, order, position, closed, read)
        if isinstance(self._cache, NodeCache):
            return SharedReader(order, self._cache)
        ahead = self.window != "all" and self._bounds.blocks >= 2 * self.window
        return OwnReader(order, self._cache or self._new_cache(epoch), ahead)

    def _waited(self, seconds: float) -> None:
        self.figures.wait_seconds += seconds

    def _new_cache(self, epoch: int) -> BlockCache:
        starts, fields = self._view.starts, self._view.fields
        return BlockCache(starts, fields, self._bounds.blocks, partial(self._read_block, epoch))

    def _shared(self, node: Topology, limit: int | None) -> NodeCache | NodeWindows | None:
        """The node's cache, or None where it cannot be had. Collective over `node.comm`."""
        return open_node_cache(
            node,
            self._view.starts,
            self._view.fields,
            partial(self._read_block, 0),
            whole=not self._view.varies,
            window=self.window if self.order == BLOCKWIN else None,
            limit=limit,
        )

    def _bound(self, max_bytes: int) -> Bounds:
        if self._cache is not None:
            return Bounds(0, together(self._share.most * sample_bytes(self._view)))
        window = None if self._sequential else self.window
        most = self._share.most
        return bounds_of(self._view, most, self.batch_size, window, max_bytes, self.split)

    def _read_block(self, epoch: int, block: int, out: dict[str, NDArray[Any]]) -> None:
        begun = time.perf_counter()
        self._view.read(self._files, (self.seed, epoch), block, out)
        self.figures.read_seconds += time.perf_counter() - begun
        self.figures.blocks_read += 1
        self.figures.bytes_read += sum(array.nbytes for array in out.values())
