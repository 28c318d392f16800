"""All guarantees of a loader together, over random shapes, views and orders, on simulated ranks."""

from __future__ import annotations

import json
import tempfile
import threading

import numpy as np
import pytest
from data_sets import no_thread_left
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import Loader, Patches, Ragged, Windows, open_dataset, pack
from hpctrain.data.transforms import FlipAndShift
from hpctrain.errors import UsageError

SIZES = (1, 2, 3, 4, 7)
VIEWS = {
    "rows": {"transform": FlipAndShift("image", 1), "fields": ["image", "label"]},
    "windows": {"view": Windows("text", 7)},
    "patches": {"view": Patches((2, 3), (1, 2)), "fields": ["image"]},
}
ORDERS = ("blockwin-v1", "stratified-v1", "balanced-v1", "sequential")


def make(folder, n, block, shard):
    rng = np.random.default_rng(n)
    fields = {
        "image": rng.integers(0, 255, (n, 4, 5), np.uint8),
        "label": np.arange(n) % 3,
        "text": Ragged.of([rng.integers(1, 99, 14 + int(rng.integers(20))) for _ in range(n)]),
    }
    pack(fields, folder, block_samples=block, shard_samples=shard)
    return open_dataset(folder)


def everything(dataset, size, epoch, position=None, **more):
    """Of all ranks: every microbatch in its place, and every sample's values."""
    ranks = [
        list(Loader(dataset, "train", rank=r, size=size, **more).epoch(epoch, position=position))
        for r in range(size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # as many steps on every rank
    cut, ids, values = [], [], []
    for parts in zip(*ranks, strict=True):
        assert sum(map(len, parts)) == parts[0].global_samples
        cut.append([n for part in parts for n in np.diff(part.groups).tolist()])
        for part in parts:
            ids += part.samples.tolist()
            if len(part):
                arrays = [a.reshape(len(part), -1) for a in part.fields.values()]
                values += np.concatenate(arrays, 1).tolist()
    return cut, ids, values


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_l1_to_l8_l12_and_l13(data):
    """No rank enters what a step is made of, and any number of ranks goes on from anywhere."""
    draw = data.draw
    n, block, shard = draw(st.integers(1, 40)), draw(st.integers(1, 7)), draw(st.integers(7, 20))
    view = draw(st.sampled_from(list(VIEWS)))
    order = draw(st.sampled_from(ORDERS if view == "rows" else ("blockwin-v1", "sequential")))
    batch_size = draw(st.integers(1, 30))
    more = VIEWS[view] | {
        "batch_size": batch_size,
        "microbatch": draw(st.integers(1, batch_size)),
        "order": order,
        "window": draw(st.sampled_from([1, 3, "all"])) if order == "blockwin-v1" else "all",
        "seed": draw(st.integers(0, 2**40)),
    }
    with tempfile.TemporaryDirectory() as folder, no_thread_left():
        dataset = make(folder, n, block, shard)
        epoch, size = draw(st.integers(0, 3)), draw(st.sampled_from(SIZES[1:]))
        one = everything(dataset, 1, epoch, **more)
        assert everything(dataset, size, epoch, **more) == one
        total = Loader(dataset, "train", **more).samples
        assert len(one[1]) == total
        if order != "balanced-v1":
            assert sorted(one[1]) == list(range(total))
        if order == "sequential":
            assert one[1] == list(range(total))
        position = draw(st.integers(0, total - 1))
        state = json.loads(
            json.dumps(Loader(dataset, "train", **more).state(epoch, position=position))
        )
        other = more | {"batch_size": draw(st.integers(1, 30)), "microbatch": 1}
        assert Loader(dataset, "train", **other).restore(state) == (epoch, position)
        rest = everything(dataset, draw(st.sampled_from(SIZES)), epoch, position, **other)
        assert rest[1:] == (one[1][position:], one[2][position:])


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 60), st.integers(1, 7), st.sampled_from([1, 2, 5]), st.integers(1, 20))
def test_l9_the_least_memory_that_is_accepted_is_enough(n, block, window, batch_size):
    with tempfile.TemporaryDirectory() as folder, no_thread_left():
        dataset = make(folder, n, block, 20)
        more = {"batch_size": batch_size, "window": window, "fields": ["image"], "microbatch": 1}
        with pytest.raises(UsageError) as refusal:
            Loader(dataset, "train", max_bytes=1, **more)
        least = int(str(refusal.value).split("= ")[-1].split(";")[0])
        with pytest.raises(UsageError):
            Loader(dataset, "train", max_bytes=least - 1, **more)
        small = everything(dataset, 1, 0, max_bytes=least, **more)
        assert small == everything(dataset, 1, 0, **more)


def test_memory_of_batches_is_allocated_by_the_thread_that_uses_them(tmp_path):
    """A GPU's page-locked memory belongs to the device of the thread that asks for it."""
    dataset, asked = make(tmp_path, 40, 4, 10), []

    def staging(nbytes):
        asked.append((threading.current_thread(), nbytes))
        return np.full(nbytes, 7, np.uint8)

    more = {"batch_size": 3, "fields": ["image", "label"]}
    found = everything(dataset, 2, 0, staging=staging, **more, microbatch=1)
    assert found == everything(dataset, 2, 0, **more, microbatch=1)
    assert {thread for thread, _ in asked} == {threading.main_thread()}
    loader = Loader(dataset, "train", 3, staging=staging, fields=["image", "label"])
    batches = list(loader.epoch(0))
    images = [batch.fields["image"].ctypes.data for batch in batches]
    assert len(set(images)) == len(images)  # the consumer owns them: none is used again


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_l7_tails(data):
    """A dropped batch is missing, a padded one has the samples of the short one, and zeros."""
    draw = data.draw
    n, block, batch_size = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 7)),
        draw(st.integers(1, 30)),
    )
    more = VIEWS[draw(st.sampled_from(["rows", "windows"]))] | {
        "batch_size": batch_size,
        "microbatch": draw(st.integers(1, batch_size)),
        "window": draw(st.sampled_from([2, "all"])),
    }
    epoch, size = draw(st.integers(0, 3)), draw(st.sampled_from(SIZES))
    with tempfile.TemporaryDirectory() as folder, no_thread_left():
        dataset = make(folder, n, block, 20)
        total = Loader(dataset, "train", **more).samples
        cut, ids, values = everything(dataset, size, epoch, **more)
        whole = total - total % batch_size
        if whole:
            found = everything(dataset, size, epoch, tail="drop", **more)
            assert found == (cut[: whole // batch_size], ids[:whole], values[:whole])
            loader = Loader(dataset, "train", tail="drop", **more)
            assert loader.steps == whole // batch_size
            assert loader.restore(loader.state(epoch, loader.steps)) == (epoch + 1, 0)
        ranks = [
            list(Loader(dataset, "train", rank=r, size=size, tail="pad", **more).epoch(epoch))
            for r in range(size)
        ]
        for batches in ranks:
            assert len({tuple(batch.groups) for batch in batches}) == 1  # the same shapes always
            for batch in batches:
                padding = batch.samples < 0
                assert all(not array[padding].any() for array in batch.fields.values())
        steps = list(zip(*ranks, strict=True))
        assert all(sum(map(len, parts)) == batch_size for parts in steps)
        there = [part.samples[part.samples >= 0].tolist() for parts in steps for part in parts]
        assert sum(there, []) == ids and len(steps) == len(cut)
        counts = [parts[0].global_samples for parts in steps]
        assert sum(counts) == total and set(counts[:-1]) <= {batch_size}


def test_l7_tails_that_cannot_be(tmp_path):
    dataset = make(tmp_path, 9, 4, 8)
    more = {"batch_size": 10, "fields": ["image"]}
    with pytest.raises(UsageError, match="'drop' leaves no batch: there are 9 samples"):
        Loader(dataset, "train", tail="drop", **more)
    with pytest.raises(UsageError, match="'padd' is none of keep, drop, pad"):
        Loader(dataset, "train", tail="padd", **more)
