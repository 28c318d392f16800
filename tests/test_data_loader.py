"""What the loader promises, on ranks simulated in one process: it is given rank and size only.

L1 exactly once, L2 no rank enters the order, L4 and L5 resume, L6 refusals, L8 ids, L9 memory,
L11 the thread, L12 evaluation: the guarantees of the data set format, by their numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from data_sets import make, no_thread_left, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import Loader, Ragged, open_dataset, pack
from hpctrain.errors import DataError, UsageError

SIZES = (1, 2, 3, 4, 7)


@pytest.fixture(autouse=True)
def threads():
    with no_thread_left():
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """53 samples in ragged shards of 10 and blocks of 4."""
    return make(tmp_path_factory.mktemp("loader") / "set", 53)


def loaders(dataset, size, batch_size=12, microbatch=3, **more):
    return [Loader(dataset, "train", batch_size, microbatch, r, size, **more) for r in range(size)]


def global_batches(dataset, size, epoch=0, position=None, **more):
    """Per step the list of microbatches (lists of ids) of all ranks, put together by rank."""
    ranks = [
        list(loader.epoch(epoch, position=position)) for loader in loaders(dataset, size, **more)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    steps = []
    for parts in zip(*ranks, strict=True):
        assert len({(part.step, part.position, part.global_samples) for part in parts}) == 1
        micro = [
            part.samples[a:b].tolist()
            for part in parts
            for a, b in zip(part.groups[:-1], part.groups[1:], strict=True)
        ]
        assert sum(map(len, micro)) == parts[0].global_samples == sum(map(len, parts))
        steps.append(micro)
    return steps


def flat(steps):
    return [sample for micro in steps for group in micro for sample in group]


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_l1_l2_every_sample_once_in_an_order_without_ranks(data):
    draw = data.draw
    n, block, shard = draw(st.integers(1, 60)), draw(st.integers(1, 9)), draw(st.integers(9, 25))
    batch_size = draw(st.integers(1, 40))
    more = {
        "batch_size": batch_size,
        "microbatch": draw(st.integers(1, batch_size)),
        "window": draw(st.sampled_from([1, 2, 5, "all"])),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 3)),
    }
    with tempfile.TemporaryDirectory() as folder:
        dataset = make(folder, n, block, shard)
        one = global_batches(dataset, 1, **more)
        assert sorted(flat(one)) == list(range(n))
        assert len(one) == -(-n // batch_size)
        for size in SIZES[1:]:
            assert global_batches(dataset, size, **more) == one


def test_l1_more_ranks_than_samples(tmp_path):
    dataset = make(tmp_path, 3)
    one = global_batches(dataset, 1, batch_size=2, microbatch=1)
    assert global_batches(dataset, 7, batch_size=2, microbatch=1) == one
    empty = next(iter(loaders(dataset, 7, 2, 1)[0].epoch(0)))
    assert empty.fields["x"].shape == (0, 3) and empty.fields["label"].shape == (0,)
    assert empty.groups.tolist() == [0] and empty.global_samples == 2


def test_fields_belong_to_their_samples(dataset):
    whole = {name: dataset.read("train", name) for name in ("x", "label")}
    for loader in loaders(dataset, 3, window=2):
        for batch in loader.epoch(1):
            for name, array in batch.fields.items():
                np.testing.assert_array_equal(array, whole[name][batch.samples])
                assert array.flags.c_contiguous and array.dtype == whole[name].dtype
    number = whole["x"][:, 0].astype(int)  # the row of the source
    assert sorted(number) == list(range(53))
    np.testing.assert_array_equal(whole["label"], number % 5)
    np.testing.assert_array_equal(whole["x"][:, 2], 3 * number)


def test_reads_only_the_fields_asked_for(dataset):
    batch = next(iter(Loader(dataset, "train", 4, fields=["label"]).epoch(0)))
    assert list(batch.fields) == ["label"]


def test_l3_epochs_differ_and_repeat(dataset):
    loader = Loader(dataset, "train", 53)
    first, second, again = (next(iter(loader.epoch(e))).samples.tolist() for e in (0, 1, 0))
    assert first == again != second


@pytest.mark.parametrize("chain", [[1, 2, 3], [2, 1], [4, 4, 4]])
def test_l4_resume_chain_is_one_run(dataset, chain):
    """Saved and restored in mid-epoch again and again, on another number of ranks each time."""
    expected = flat(global_batches(dataset, 1, epoch=2, window=2))
    seen, state = [], Loader(dataset, "train", 12, 3, window=2).state(2)
    for size in chain:
        state = json.loads(json.dumps(state))
        ranks = loaders(dataset, size, window=2)
        epoch, position = ranks[0].restore(state)
        seen += flat(global_batches(dataset, size, epoch=epoch, position=position, window=2)[:1])
        state = ranks[0].state(epoch, position=position + 12)
    ranks = loaders(dataset, 3, window=2)
    epoch, position = ranks[0].restore(state)
    seen += flat(global_batches(dataset, 3, epoch=epoch, position=position, window=2))
    assert seen == expected


def test_l5_another_batch_size_from_the_position_on(dataset):
    expected = flat(global_batches(dataset, 1, window=3))
    loader = Loader(dataset, "train", 5, 2, window=3)
    _, position = loader.restore(Loader(dataset, "train", 12, 3, window=3).state(0, 2))
    assert position == 24
    rest = list(loader.epoch(0, start_step=2, position=position))
    assert [s for batch in rest for s in batch.samples.tolist()] == expected[24:]
    assert [batch.step for batch in rest] == list(range(2, 2 + len(rest)))
    assert rest[-1].position + rest[-1].global_samples == 53


def test_start_step_is_the_rest_of_the_epoch(dataset):
    loader = Loader(dataset, "train", 12, 3)
    whole = [batch.samples.tolist() for batch in loader.epoch(4)]
    rest = list(loader.epoch(4, start_step=3))
    assert [batch.samples.tolist() for batch in rest] == whole[3:]
    assert [batch.step for batch in rest] == [3, 4] and loader.steps == 5


def test_the_end_of_an_epoch_is_the_begin_of_the_next(dataset):
    loader = Loader(dataset, "train", 12, 3)
    assert loader.restore(loader.state(2, loader.steps)) == (3, 0)
    assert list(loader.epoch(2, start_step=loader.steps)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 9}, "seed was 9, is 0"),
        ({"window": 5}, "window was 5, is all"),
        ({"order": "sequential"}, "order was sequential"),
        ({"dataset_id": "sha256:0"}, "dataset_id was sha256:0, is sha256:"),
        ({"split": "test"}, "split was test"),
        ({"position": 54}, "53 samples"),
        ({"position": -1}, "53 samples"),
    ],
)
def test_l6_refuses_to_go_on_with_other_data(dataset, change, says):
    loader = Loader(dataset, "train", 12)
    with pytest.raises(DataError, match=says):
        loader.restore(loader.state(0, 1) | change)


def test_l6_refuses_a_state_with_parts_missing(dataset):
    with pytest.raises(DataError, match="no dataset_id, order"):
        Loader(dataset, "train", 12).restore(
            {"epoch": 0, "position": 0, "seed": 0, "window": "all", "split": "train"}
        )


def test_l8_keys_name_samples_whatever_the_packing(tmp_path):
    """The key of a sample depends on its row only; augmentation is keyed by it."""
    found = []
    for name, more in {"a": {}, "b": {"seed": 5, "block": 7, "shard": 13}}.items():
        dataset = make(tmp_path / name, 40, **more)
        x, keys = dataset.read("train", "x"), dataset.keys("train")
        found.append({int(row[0]): int(key) for row, key in zip(x, keys, strict=True)})
    assert found[0] == found[1] and len(set(found[0].values())) == 40


def test_l9_too_little_memory_is_refused_with_the_sum(dataset):
    # 16 blocks of at most 4 samples + 4 batches of 12 + 1 block of 4, 20 bytes each
    Loader(dataset, "train", 12, 3, max_bytes=2320)
    with pytest.raises(UsageError, match=r"16 blocks x 4 samples.*= 2320; raise it, or set .* 15"):
        Loader(dataset, "train", 12, 3, max_bytes=2319)
    with pytest.raises(UsageError, match="raise it$"):
        Loader(dataset, "train", 12, 3, max_bytes=10)


@pytest.mark.parametrize("order", ["blockwin-v1", "sequential"])
def test_l9_small_memory_gives_the_same_batches(dataset, order):
    def batches(**more):
        return global_batches(dataset, 2, batch_size=20, order=order, window=3, **more)

    small = (4 * 12 + 4 + 6 * 4) * 20
    assert batches(max_bytes=small) == batches()


RSS = """
import resource, sys
from hpctrain.data import Loader, open_dataset
dataset = open_dataset(sys.argv[1])
loader = Loader(dataset, "train", 64, window=4, max_bytes=6 << 20)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
next(iter(Loader(dataset, "train", 64, window=1, max_bytes=3 << 20).epoch(0)))
before, samples = peak(), 0
for batch in loader.epoch(0):
    samples += len(batch)
print(samples, (peak() - before) // 1024)
"""


def test_l9_memory_stays_below_the_bound(tmp_path):
    """48 MiB of samples through 6 MiB."""
    x = np.zeros((12288, 1024), np.float32)
    pack({"x": x}, tmp_path, block_samples=256, shard_samples=2048)
    command = [sys.executable, "-c", RSS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    samples, grown = map(int, done.stdout.split())
    assert samples == 12288
    assert grown <= 6 + 6  # MiB: the bound, and what the allocator rounds up


def test_l11_leaving_an_epoch_and_starting_another(dataset):
    loader = Loader(dataset, "train", 4)
    for _ in loader.epoch(0):
        break
    with loader.epoch(1) as batches:
        next(batches)
    assert sum(len(batch) for batch in loader.epoch(2)) == 53
    loader.close()
    assert sum(len(batch) for batch in loader.epoch(3)) == 53


@pytest.mark.parametrize("size", SIZES)
def test_l12_evaluation_is_in_order_and_exact(dataset, size):
    steps = global_batches(dataset, size, order="sequential", epoch=5)
    assert flat(steps) == list(range(53))


def test_ragged_fields_are_left_out_or_refused(tmp_path):
    words = Ragged.of([np.arange(i % 4, dtype=np.uint8) for i in range(9)])
    pack({**rows(9), "word": words}, tmp_path)
    dataset = open_dataset(tmp_path)
    assert list(next(iter(Loader(dataset, "train", 9).epoch(0))).fields) == ["x", "label"]
    with pytest.raises(DataError, match="'word'.*ragged"):
        Loader(dataset, "train", 9, fields=["word"])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"split": "trian"}, DataError, "'trian'.*'train'"),
        ({"fields": ["labels"]}, DataError, "'labels'.*'label'"),
        ({"batch_size": 0}, UsageError, "batch_size 0"),
        ({"microbatch": 13}, UsageError, "microbatch 13"),
        ({"rank": 2, "size": 2}, UsageError, "rank 2"),
        ({"order": "random"}, UsageError, "'random'"),
        ({"window": 0}, UsageError, "window 0"),
    ],
)
def test_refuses(dataset, change, error, says):
    with pytest.raises(error, match=says):
        Loader(**{"dataset": dataset, "split": "train", "batch_size": 12} | change)


def test_refuses_a_negative_position(dataset):
    with pytest.raises(UsageError, match="-1"):
        Loader(dataset, "train", 12).epoch(0, position=-1)
