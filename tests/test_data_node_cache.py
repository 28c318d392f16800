"""The split once per node: decoded once, the same batches, and a fall-back with one warning."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from data_sets import flip_chunk_byte, make

from hpctrain.data import Loader, Patches, open_dataset, pack
from hpctrain.errors import DataError

pytestmark = pytest.mark.ranks(2, 4)


@pytest.fixture
def dataset(comm, tmp_path):
    """53 samples in 16 blocks, seen by all ranks."""
    folder = comm.bcast(tmp_path) / "set"
    if comm.rank == 0:
        make(folder, 53)
    comm.Barrier()
    yield open_dataset(folder, comm)
    comm.Barrier()


def topology(comm, override=None):
    from hpctrain.mpi.topology import topology

    return topology(comm, override)


def batches(loader, epoch=0):
    return [
        (b.samples.tolist(), b.fields["x"].tolist(), b.groups.tolist()) for b in loader.epoch(epoch)
    ]


def test_two_ranks_decode_each_block_once(comm, dataset):
    node = topology(comm)
    more = {"batch_size": 12, "microbatch": 3, "rank": comm.rank, "size": comm.size}
    shared = Loader(dataset, "train", node=node, **more)
    alone = Loader(dataset, "train", **more)
    for epoch in (0, 1):
        assert batches(shared, epoch) == batches(alone, epoch)
    assert comm.allreduce(shared.blocks_read) == len(dataset.table("train").block)
    assert shared.figures.misses == 0
    node.free()


def test_each_of_two_nodes_has_its_cache(comm, dataset):
    node = topology(comm, ",".join(str(rank % 2) for rank in range(comm.size)))
    loader = Loader(dataset, "train", 12, 3, comm.rank, comm.size, node=node)
    assert comm.allreduce(loader.blocks_read) == 2 * len(dataset.table("train").block)
    assert batches(loader) == batches(Loader(dataset, "train", 12, 3, comm.rank, comm.size))
    node.free()


def test_too_little_memory_falls_back_with_one_warning(comm, dataset, monkeypatch, caplog):
    monkeypatch.setenv("HPCTRAIN_SHM_LIMIT", "100")
    monkeypatch.setattr(logging.getLogger("hpctrain"), "propagate", True)
    node = topology(comm)
    loader = Loader(dataset, "train", 12, 3, comm.rank, comm.size, node=node)
    found = [r.getMessage() for r in caplog.records if "once per node" in r.getMessage()]
    assert len(found) == (comm.rank == 0)
    assert not found or "HPCTRAIN_SHM_LIMIT" in found[0]
    assert batches(loader) == batches(Loader(dataset, "train", 12, 3, comm.rank, comm.size))
    node.free()


def test_a_damaged_block_fails_all_ranks(comm, dataset):
    if comm.rank == 0:
        flip_chunk_byte(dataset.path / "train/shard-00000.h5", "fields/x", 1)
    comm.Barrier()
    node = topology(comm)
    with pytest.raises(DataError, match="shard-00000.h5: field 'x', block 1"):
        Loader(dataset, "train", 12, 3, comm.rank, comm.size, node=node)
    node.free()


def test_patches_are_shared(comm, tmp_path):
    folder = comm.bcast(tmp_path) / "more"
    if comm.rank == 0:
        pack({"v": np.arange(2 * 4 * 4).reshape(2, 4, 4)}, folder)
    comm.Barrier()
    dataset, node = open_dataset(folder, comm), topology(comm)
    more = {"rank": comm.rank, "size": comm.size, "node": node}
    loader = Loader(dataset, "train", 4, 1, view=Patches((2, 2)), **more)
    samples = comm.allreduce([s for b in loader.epoch(0) for s in b.samples.tolist()])
    assert sorted(samples) == list(range(8))
    assert comm.allreduce(loader.blocks_read) == 4
    node.free()
