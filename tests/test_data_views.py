"""Windows of text, patches of volumes, orders that look at the samples, transforms, figures."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from data_sets import flip_chunk_byte, make, no_thread_left
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import Loader, Patches, Ragged, Windows, open_dataset, pack
from hpctrain.data.order import BlockWindowOrder
from hpctrain.data.sampling import StratifiedOrder, WeightedOrder, class_weights
from hpctrain.data.transforms import FlipAndShift, words
from hpctrain.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def threads():
    with no_thread_left():
        yield
        gc.collect()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents whose values count up from 0 within a shard's stream, so that places show."""
    lengths = [13, 0, 40, 7, 25, 61, 3, 50, 11, 90]
    ends = np.cumsum(lengths)
    documents = [np.arange(e - n, e, dtype=np.int32) for n, e in zip(lengths, ends, strict=True)]
    folder = tmp_path_factory.mktemp("text") / "set"
    fields = {"text": Ragged.of(documents), "label": np.arange(10) % 2}
    pack(fields, folder, shuffle=False, shard_samples=6, block_samples=2)
    return open_dataset(folder)


def gathered(dataset, size=1, epoch=0, **more):
    """All batches of all ranks, put together step by step: (samples, fields)."""
    loaders = [Loader(dataset, "train", 8, 2, rank, size, **more) for rank in range(size)]
    batches = [batch for step in zip(*(loader.epoch(epoch) for loader in loaders), strict=True)
               for batch in step]  # fmt: skip
    fields = {
        name: np.concatenate([batch.fields[name] for batch in batches])
        for name in batches[0].fields
    }
    return np.concatenate([batch.samples for batch in batches]), fields


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("size", [1, 3])
def test_windows_cover_the_text_once(text, length, size):
    totals = [shard.values["text"] for shard in text.split("train").shards]
    seen = []
    for epoch in (0, 1):
        samples, fields = gathered(text, size, epoch, view=Windows("text", length))
        windows = fields["text"]
        assert windows.shape == (sum((t - length) // length for t in totals), length + 1)
        assert sorted(samples) == list(range(len(windows)))
        assert (np.diff(windows, axis=1) == 1).all()  # also over the borders of documents
        inputs = np.sort(windows[:, :-1].ravel())
        assert len(np.unique(inputs)) == len(inputs)
        assert len(inputs) > sum(totals) - 2 * length * len(totals)
        seen.append(windows[np.argsort(samples)])
    if length > 1:
        assert (seen[0] != seen[1]).any()  # another offset
    again = gathered(text, 2, 1, view=Windows("text", length))
    np.testing.assert_array_equal(again[1]["text"][np.argsort(again[0])], seen[1])


def test_windows_that_cannot_be(text):
    for view, fields, error, says in [
        (Windows("text", 0), None, UsageError, "length 0"),
        (Windows("label", 4), None, DataError, "'label'.*is not ragged"),
        (Windows("text", 4000), None, DataError, "no window of 4000"),
        (Windows("text", 4), ["label"], UsageError, "that field alone"),
    ]:
        with pytest.raises(error, match=says):
            Loader(text, "train", 4, fields=fields, view=view)


def test_the_view_is_part_of_the_state(text):
    loader = Loader(text, "train", 4, view=Windows("text", 4))
    state = loader.state(0, 1)
    assert loader.restore(state) == (0, 4)
    with pytest.raises(DataError, match="view was windows text 4, is windows text 5"):
        Loader(text, "train", 4, view=Windows("text", 5)).restore(state)
    rows = Loader(text, "train", 4)
    old = {name: value for name, value in rows.state(0, 1).items() if name != "view"}
    assert rows.restore(old) == (0, 4)


def test_damaged_text_is_named(text, tmp_path):
    pack({"text": Ragged.of([np.arange(90, dtype=np.uint8)])}, tmp_path)
    flip_chunk_byte(tmp_path / "train/shard-00000.h5", "fields/text/data", 0)
    loader = Loader(open_dataset(tmp_path), "train", 4, view=Windows("text", 4))
    with pytest.raises(DataError, match="shard-00000.h5: field 'text', values"):
        list(loader.epoch(0))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes") / "set"
    number = np.arange(3 * 6 * 5 * 4, dtype=np.int32).reshape(3, 6, 5, 4)
    fields = {"t1": number, "rgb": np.stack([number, -number], -1), "age": np.arange(3)}
    pack(fields, folder, shard_samples=2, block_samples=1, shuffle=False)
    return open_dataset(folder)


@pytest.mark.parametrize("stride", [None, (2, 3, 1)])
@pytest.mark.parametrize("size", [1, 2])
def test_patches(volumes, stride, size):
    whole = volumes.read("train", "t1")
    view = Patches((3, 2, 4), stride)
    samples, fields = gathered(volumes, size, view=view, fields=["t1", "rgb"])
    assert sorted(samples) == list(range(len(samples)))
    assert fields["rgb"].shape[1:] == (3, 2, 4, 2)
    loader = Loader(volumes, "train", 8, view=view, fields=["t1"])
    corners = set()
    for sample, patch, colours in zip(samples, fields["t1"], fields["rgb"], strict=True):
        v, x, y, z = corner = loader._view.corner(int(sample))
        np.testing.assert_array_equal(patch, whole[v, x : x + 3, y : y + 2, z : z + 4])
        np.testing.assert_array_equal(colours[..., 1], -patch)
        corners.add(corner)
    xs, ys = ([0, 3], [0, 2, 3]) if stride is None else ([0, 2, 3], [0, 3])
    assert corners == {(v, x, y, 0) for v in range(3) for x in xs for y in ys}


def test_a_patch_reads_its_slab_and_not_the_volume(tmp_path):
    volume = np.zeros((1, 64, 128, 128), np.float32)  # 4 MiB: four chunks of 16 planes
    pack({"t1": volume}, tmp_path, block_samples=1)
    flip_chunk_byte(tmp_path / "train/shard-00000.h5", "fields/t1", 3)
    loader = Loader(open_dataset(tmp_path), "train", 1, view=Patches((16, 64, 64)),
                    order="sequential")  # fmt: skip
    batches = loader.epoch(0)
    assert sum(len(next(batches)) for _ in range(8)) == 8  # the first two slabs
    with pytest.raises(DataError, match="field 't1', block 0"):
        list(batches)


@pytest.mark.parametrize(
    ("view", "fields", "error", "says"),
    [
        (Patches((7, 2, 2)), ["t1"], UsageError, r"\(7, 2, 2\).*do not fit volumes of \(6, 5, 4\)"),
        (Patches((2, 2, 2), (0, 1, 1)), ["t1"], UsageError, "do not fit"),
        (Patches((2, 2, 2)), ["age"], DataError, "the same first 3 dims"),
    ],
)
def test_patches_that_cannot_be(volumes, view, fields, error, says):
    with pytest.raises(error, match=says):
        Loader(volumes, "train", 4, fields=fields, view=view)


# ---- orders that look at the samples ----


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """600 samples, 5 % of class 1; weight i of sample i in the source."""
    label = (np.arange(600) % 20 == 0).astype(np.int64)
    fields = {"x": np.arange(600), "label": label, "weight": np.arange(600, dtype=np.float32)}
    folder = tmp_path_factory.mktemp("skewed") / "set"
    pack(fields, folder, block_samples=16, shard_samples=100)
    return open_dataset(folder)


@pytest.mark.parametrize(
    "more", [{"order": "balanced-v1"}, {"order": "weighted-v1", "weights": "weight"}]
)
def test_l13_weighted_sampling_is_a_pure_function(skewed, more):
    """The same samples at the same positions for any number of ranks, from any position on."""
    samples, fields = gathered(skewed, 1, 2, **more)
    for size in (2, 3, 7):
        again = gathered(skewed, size, 2, **more)
        np.testing.assert_array_equal(again[0], samples)
        np.testing.assert_array_equal(again[1]["x"], fields["x"])
    loader = Loader(skewed, "train", 8, 2, **more)
    rest = [s for batch in loader.epoch(2, position=123) for s in batch.samples]
    np.testing.assert_array_equal(rest, samples[123:])
    assert len(samples) == 600 and len(np.unique(samples)) < 600
    assert (gathered(skewed, 1, 3, **more)[0] != samples).any()


def test_l13_frequencies(skewed):
    found = np.concatenate([
        gathered(skewed, 1, epoch, order="balanced-v1")[1]["label"] for epoch in range(5)
    ])  # fmt: skip
    assert abs(found.mean() - 0.5) < 0.04  # 3000 draws: four standard deviations
    more = {"order": "weighted-v1", "weights": "weight"}
    x = np.concatenate([gathered(skewed, 1, epoch, **more)[1]["x"] for epoch in range(5)])
    assert abs(x.mean() - 599 * 2 / 3) < 4 * 141 / 3000**0.5  # of a density that grows with x


@given(st.integers(0, 2**62), st.integers(0, 500), st.integers(0, 500))
@settings(deadline=None, max_examples=30)
def test_weighted_order_has_random_access(seed, a, b):
    order = WeightedOrder(np.float32([0, 1, 0, 2, 5]), seed, 1)
    start, stop = sorted((a, b))
    whole = order.samples(0, 500)
    np.testing.assert_array_equal(order.samples(start, stop), whole[start:stop])
    assert set(whole.tolist()) <= {1, 3, 4}


def test_class_weights():
    weights = class_weights(np.array([0, 0, 3, 0, 3]))
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 2])


@given(st.integers(0, 99), st.lists(st.integers(1, 90), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_stratified_batches(seed, counts):
    """Every sample once; any stretch of positions has each class's share, give or take two."""
    classes = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(classes)
    order = StratifiedOrder(classes, seed, 3)
    n = len(classes)
    ids = order.samples(0, n)
    assert sorted(ids) == list(range(n))
    for start in range(0, n, 16):
        part = classes[order.samples(start, min(start + 16, n))]
        share = len(part) * np.array(counts) / n
        limit = 2 + len(counts)
        assert (np.abs(np.bincount(part, minlength=len(counts)) - share) < limit).all()


def test_stratified_loader(skewed):
    samples, fields = gathered(skewed, 3, order="stratified-v1")
    assert sorted(samples) == list(range(600))
    rare = fields["label"].reshape(6, 100).sum(axis=1)
    assert rare.sum() == 30 and rare.min() >= 4 and rare.max() <= 6
    assert Loader(skewed, "train", 8, order="stratified-v1").state(0)["order"] == "stratified-v1"


def test_orders_that_do_not_fit(skewed, tmp_path):
    def refuses(error, says, dataset=skewed, **more):
        with pytest.raises(error, match=says):
            Loader(dataset, "train", 8, **more)

    refuses(UsageError, 'set the window to "all"', order="balanced-v1", window=3)
    refuses(UsageError, "needs the name of a field", order="weighted-v1")
    refuses(UsageError, "takes no weights", weights="weight")
    refuses(UsageError, "'ballanced-v1'.*'balanced-v1'", order="ballanced-v1")
    refuses(DataError, "'wait'.*'weight'", order="weighted-v1", weights="wait")
    pack({"x": np.zeros((5, 2)), "w": np.float32([1, -1, 1, 1, 1])}, tmp_path)
    bare = open_dataset(tmp_path)
    refuses(DataError, "label with classes", bare, order="balanced-v1")
    refuses(UsageError, "'x' cannot weigh", bare, order="weighted-v1", weights="x")
    loader = Loader(bare, "train", 2, order="weighted-v1", weights="w")
    with pytest.raises(DataError, match="-1.0 to 1.0"):
        list(loader.epoch(0))


# ---- transforms ----


def test_l8_words_depend_on_seed_epoch_and_sample():
    ids = np.arange(1000)
    drawn = words(7, 2, ids, 3)
    assert drawn.shape == (1000, 3) and len(np.unique(drawn)) == 3000
    np.testing.assert_array_equal(words(7, 2, ids[::-1][:5], 3), drawn[::-1][:5])
    for seed, epoch in ((8, 2), (7, 3)):
        assert not (words(seed, epoch, ids, 3) == drawn).any()
    bits = np.unpackbits(drawn.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.005


def test_l8_augmentation_does_not_depend_on_ranks(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 6, 5, 3)).astype(np.uint8)
    pack({"image": image}, tmp_path, block_samples=4, shuffle=False)
    dataset = open_dataset(tmp_path)
    more = {"transform": FlipAndShift("image", 2)}
    samples, fields = gathered(dataset, 1, 1, **more)
    by_sample = fields["image"][np.argsort(samples)]
    for size in (2, 5):
        again = gathered(dataset, size, 1, **more)
        np.testing.assert_array_equal(again[1]["image"][np.argsort(again[0])], by_sample)
    assert (by_sample != image).any()
    assert (gathered(dataset, 1, 2, **more)[1]["image"] != fields["image"]).any()
    np.testing.assert_array_equal(dataset.read("train", "image"), image)


def test_flip_and_shift_moves_pixels():
    image = np.zeros((200, 5, 5), np.uint8)
    image[:, 2, 1] = 9
    out = FlipAndShift("image", 1)({"image": image, "y": 0}, np.arange(200), 0, 0)
    places = np.argwhere(out["image"] == 9)
    assert len(places) == 200 and out["y"] == 0
    assert {tuple(p) for p in places[:, 1:].tolist()} == {
        (r, c) for r in (1, 2, 3) for c in (0, 1, 2, 3, 4)
    }  # fmt: skip
    still = FlipAndShift("image", 0, flip=False)({"image": image}, np.arange(200), 0, 0)
    np.testing.assert_array_equal(still["image"], image)


# ---- figures and reading ahead ----


def test_figures(tmp_path):
    dataset = make(tmp_path, 40)
    loader = Loader(dataset, "train", 8)
    assert loader.figures.hit_rate == loader.figures.read_amplification == 0
    list(loader.epoch(0))
    figures = loader.figures
    assert (figures.samples, figures.bytes_served, figures.bytes_read) == (40, 800, 800)
    assert figures.blocks_read == loader.blocks_read == 12  # of 4, 4 and 2 in each shard
    assert figures.read_amplification == 1 and 0 < figures.misses <= 40
    assert figures.read_seconds > 0 and figures.megabytes_per_second > 0
    list(loader.epoch(1))
    assert figures.read_amplification == 0.5 and figures.hit_rate >= 0.5
    assert figures.wait_seconds > 0 and figures.wait_fraction(1e9) < 1e-6


def test_the_next_window_is_read_ahead(tmp_path):
    """With room for two windows no batch after the first window finds a block missing."""
    dataset = make(tmp_path, 400, 4, 100)
    small = Loader(dataset, "train", 4, window=10, max_bytes=(10 * 4 + 4 * 4 + 4) * 20)
    large = Loader(dataset, "train", 4, window=10, max_bytes=(20 * 4 + 4 * 4 + 4) * 20)
    batches = [[b.samples.tolist() for b in loader.epoch(0)] for loader in (small, large)]
    assert batches[0] == batches[1]
    assert large.figures.misses <= 40 < small.figures.misses
    assert large.blocks_read == 100


def test_blocks_around():
    order = BlockWindowOrder(np.arange(0, 81, 4), 0, 0, 8)
    first, last = order.blocks_around(0), order.blocks_around(79)
    assert len(first) == 8 and len(last) == 4
    assert len(order.blocks_around(16)) == 12 and len(order.blocks_around(80)) == 0
    assert order.blocks_around(31)[:8].tolist() == first.tolist()
