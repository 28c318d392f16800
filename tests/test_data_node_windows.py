"""Windows of blocks once per node: the same batches, each block decoded once, bounded memory."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from data_sets import flip_chunk_byte, make
from test_data_node_cache import topology

from hpctrain.data import Loader, Ragged, Windows, open_dataset, pack
from hpctrain.data.node_windows import NodeWindows
from hpctrain.errors import DataError

pytestmark = pytest.mark.ranks(1, 2, 3, 4)
BLOCKS, ROWS = 16, 4  # of the data set below: blocks, and samples in a block
BYTES = (12, 8)  # of a sample's fields


def bound(blocks, ranks):
    """Bytes for so many blocks (two fields in cache lines), the lock and the ranks' counters."""
    lines = sum(-(-blocks * ROWS * nbytes // 64) for nbytes in BYTES)
    return (lines + 1 + ranks) * 64


@pytest.fixture
def dataset(comm, tmp_path):
    """53 samples in 16 blocks, seen by all ranks."""
    folder = comm.bcast(tmp_path) / "set"
    if comm.rank == 0:
        make(folder, 53)
    comm.Barrier()
    yield open_dataset(folder, comm)
    comm.Barrier()


def batches(loader, epoch=0, **more):
    return [
        (
            b.step,
            b.samples.tolist(),
            {n: a.tolist() for n, a in b.fields.items()},
            b.groups.tolist(),
        )
        for b in loader.epoch(epoch, **more)
    ]


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize(
    ("batch_size", "microbatch", "window"), [(12, 3, 3), (50, 25, 2), (2, 1, 4)]
)
def test_each_block_is_decoded_once_in_an_epoch(
    comm, dataset, buffers, batch_size, microbatch, window
):
    node = topology(comm)
    more = {"rank": comm.rank, "size": comm.size, "window": window, "seed": 3}
    limit = bound(buffers * window, comm.size)
    shared = Loader(
        dataset, "train", batch_size, microbatch, node=node, node_bytes=limit, max_bytes=1, **more
    )
    assert isinstance(shared._cache, NodeWindows) and shared._cache.buffers == buffers
    alone = Loader(dataset, "train", batch_size, microbatch, **more)
    for epoch in range(3):
        assert batches(shared, epoch) == batches(alone, epoch)
        assert comm.allreduce(shared.blocks_read) == (epoch + 1) * BLOCKS
    assert shared.figures.samples == alone.figures.samples
    node.free()


def test_memory_stays_below_the_bound_for_a_set_that_is_larger(comm, tmp_path):
    """16 MiB of samples through 4 MiB that the ranks share."""
    folder = comm.bcast(tmp_path) / "set"
    if comm.rank == 0:
        x = np.arange(1 << 21).reshape(4096, 512)
        pack({"x": x}, folder, block_samples=64, shard_samples=1024)
    comm.Barrier()
    dataset, node, limit = open_dataset(folder, comm), topology(comm), 4 << 20
    assert sum(s.bytes for s in dataset.split("train").shards) > 4 * limit
    before = shared_memory()
    loader = Loader(dataset, "train", 64, 8, comm.rank, comm.size, window=7, max_bytes=1, node=node,
                    node_bytes=limit)  # fmt: skip
    for batch in loader.epoch(0):
        assert (batch.fields["x"][:, 1] % 512 == 1).all()
        comm.Barrier()
    assert 0 < shared_memory() - before <= limit
    assert comm.allreduce(loader.blocks_read) == 64
    node.free()


def shared_memory():
    """Bytes of shared memory that this process has mapped and touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssShmem"))


def test_an_epoch_that_is_left_and_one_that_begins_in_the_middle(comm, dataset):
    node = topology(comm)
    more = {"rank": comm.rank, "size": comm.size, "window": 2}
    loader = Loader(dataset, "train", 8, 2, node=node, node_bytes=bound(4, comm.size), **more)
    alone = Loader(dataset, "train", 8, 2, **more)
    for stop in (1, 0, 3):
        with loader.epoch(stop) as found:
            pairs = zip(found, alone.epoch(stop), strict=True)
            for batch, expected in itertools.islice(pairs, stop):
                assert batch.samples.tolist() == expected.samples.tolist()
                comm.Barrier()  # ranks take the same steps
    assert batches(loader, 1, start_step=2) == batches(alone, 1, start_step=2)
    assert batches(loader, 2, position=53) == []
    node.free()


def test_windows_of_text_are_shared(comm, tmp_path):
    folder = comm.bcast(tmp_path) / "text"
    if comm.rank == 0:
        rng = np.random.default_rng(0)
        text = [rng.integers(0, 255, 3000, np.uint8) for _ in range(12)]
        pack({"text": Ragged.of(text)}, folder, shard_samples=2, block_samples=1)
    comm.Barrier()
    dataset, node = open_dataset(folder, comm), topology(comm)
    more = {"rank": comm.rank, "size": comm.size, "view": Windows("text", 50)}
    for window in ("all", 2):
        shared = Loader(dataset, "train", 32, 8, node=node, window=window, **more)
        alone = Loader(dataset, "train", 32, 8, window=window, **more)
        assert isinstance(shared._cache, NodeWindows)
        found = [batches(shared, epoch) for epoch in (0, 1)]
        assert found == [batches(alone, epoch) for epoch in (0, 1)] and found[0] != found[1]
        assert comm.allreduce(shared.blocks_read) == 2 * (len(shared._view.starts) - 1)
    node.free()


def test_a_damaged_block_is_named_and_no_rank_waits(comm, dataset):
    if comm.rank == 0:
        flip_chunk_byte(dataset.path / "train/shard-00000.h5", "fields/x", 1)
    comm.Barrier()
    node = topology(comm)
    loader = Loader(
        dataset, "train", 12, 3, comm.rank, comm.size, window=3, node=node,
        node_bytes=bound(6, comm.size),
    )  # fmt: skip
    said = "nothing was wrong with the blocks that this rank needed"
    try:
        batches(loader)
    except DataError as error:
        said = str(error)
    everything = comm.allgather(said)
    assert sum("shard-00000.h5: field 'x', block 1" in text for text in everything) == 1
    known = ("shard-00000.h5", "could not read its share", "nothing was wrong")
    assert all(any(part in text for part in known) for text in everything)
    node.free()


def test_orders_without_windows_fall_back_with_one_warning(comm, dataset, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("hpctrain"), "propagate", True)
    node = topology(comm)
    more = {"rank": comm.rank, "size": comm.size, "order": "stratified-v1"}
    loader = Loader(dataset, "train", 12, 3, node=node, node_bytes=500, **more)
    found = [r.getMessage() for r in caplog.records if "once per node" in r.getMessage()]
    assert len(found) == (comm.rank == 0) and all("node_bytes is 500" in text for text in found)
    assert batches(loader) == batches(Loader(dataset, "train", 12, 3, **more))
    node.free()
