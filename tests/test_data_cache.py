"""The block cache against plain indexing, with fewer slots than blocks."""

from __future__ import annotations

import numpy as np
import pytest
from data_sets import make as make_set
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import Dataset, Loader
from hpctrain.data.cache import BlockCache
from hpctrain.data.dataset import ShardFiles


def make(lengths, slots, fail=None):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    number = np.arange(starts[-1], dtype=np.int32)
    whole = {"a": np.stack([number, -number], 1), "b": number.astype(np.float64)}

    def read(block, out):
        if block == fail:
            raise OSError(f"block {block}")
        for name, array in out.items():
            array[...] = whole[name][starts[block] : starts[block + 1]]

    fields = {"a": (np.dtype(np.int32), (2,)), "b": (np.dtype(np.float64), ())}
    return BlockCache(starts, fields, slots, read), whole


def gathered(cache, ids):
    out = {"a": np.empty((len(ids), 2), np.int32), "b": np.empty(len(ids))}
    cache.gather(np.asarray(ids, np.int64), out)
    return out


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 9), st.data())
def test_gather_is_indexing(lengths, slots, data):
    cache, whole = make(lengths, min(slots, len(lengths)))
    for _ in range(4):
        ids = np.array(data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=20)), np.int64)
        found = gathered(cache, ids)
        for name in whole:
            np.testing.assert_array_equal(found[name], whole[name][ids])
            assert found[name].dtype == whole[name].dtype and found[name].flags.c_contiguous


def test_blocks_are_read_once_if_all_fit():
    cache, _ = make([3] * 8, 8)
    for _ in range(3):
        gathered(cache, np.random.default_rng(0).permutation(24))
    assert cache.blocks_read == 8


def test_least_recently_used_goes_first():
    cache, _ = make([2] * 4, 2)
    for ids in ([0], [2], [0], [4], [0]):  # blocks 0, 1, 0, 2 (pushes out 1), 0
        gathered(cache, ids)
    assert cache.blocks_read == 3


def test_a_block_that_failed_is_not_kept():
    cache, whole = make([2] * 3, 1, fail=1)
    gathered(cache, [0])
    for _ in range(2):
        with pytest.raises(OSError, match="block 1"):
            gathered(cache, [2])
    np.testing.assert_array_equal(gathered(cache, [5, 0])["b"], whole["b"][[5, 0]])


def test_batches_are_copies():
    """What the consumer does with a batch does not reach the cache."""
    cache, whole = make([4], 1)
    gathered(cache, np.arange(4))["a"][...] = 99
    np.testing.assert_array_equal(gathered(cache, np.arange(4))["a"], whole["a"])


def test_shards_stay_open_and_the_least_recently_used_is_closed(tmp_path, monkeypatch):
    """To open a shard costs more than to read a block: none is opened twice while there is room."""
    dataset, opened = make_set(tmp_path, 60, shard=6), []  # 10 shards
    shard = Dataset.shard
    monkeypatch.setattr(Dataset, "shard", lambda *a: opened.append(a[2]) or shard(*a))
    files = ShardFiles(dataset, "train", 4)
    for index in (0, 1, 2, 3, 0, 1, 4, 0, 2):
        assert files[index].header.shard_index == index
    assert opened == [0, 1, 2, 3, 4, 2]
    files.close()
    opened.clear()
    loader = Loader(dataset, "train", 7, window=2, max_bytes=2000)
    for epoch in range(2):
        assert sum(len(batch) for batch in loader.epoch(epoch)) == 60
    assert sorted(opened) == list(range(10))
    loader.close()
