"""Packing: the same bytes for the same input, nothing lost, nothing overwritten, safe to kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from data_sets import make, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import Ragged, open_dataset, pack, verify
from hpctrain.data.shard_write import chunk_shape
from hpctrain.errors import DataError, UsageError


def contents(folder):
    """Every file below a folder: relative name -> bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def packed_rows(dataset, split):
    return dataset.read(split, "x")[:, 0].astype(int).tolist()


@pytest.mark.parametrize("more", [{}, {"gzip": True}, {"splits": {"train": 0.7, "test": 0.3}}])
def test_bytes_depend_on_input_and_arguments_only(tmp_path, more):
    make(tmp_path / "a", 60, **more)
    os.utime(tmp_path / "a", (1, 1))
    if not more:
        time.sleep(1.1)  # HDF5 counts time stamps in seconds
    make(tmp_path / "b", 60, **more)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(make(tmp_path / "c", 60, seed=1, **more).path)


def test_bytes_do_not_depend_on_the_process(tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'tests'); from data_sets import make; make(sys.argv[1], 60)"
    )
    command = [sys.executable, "-c", program, tmp_path / "b"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "77"}, timeout=60)
    make(tmp_path / "a", 60)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_nothing_but_shards_and_manifest_is_left(tmp_path):
    make(tmp_path, 25)
    names = [f"train/shard-0000{i}.h5" for i in range(3)]
    assert list(contents(tmp_path)) == ["manifest.json", *names]


@settings(deadline=None, max_examples=12)
@given(st.integers(2, 80), st.integers(1, 9), st.integers(9, 40), st.booleans(), st.data())
def test_every_sample_comes_out_once(tmp_path_factory, n, block, shard, shuffle, data):
    share = data.draw(st.sampled_from([0.5, 0.8]))
    folder = tmp_path_factory.mktemp("pack")
    try:
        splits = {"train": share, "test": 1 - share}
        dataset = make(folder, n, block, shard, shuffle=shuffle, splits=splits)
    except DataError as error:
        assert "got no samples" in str(error) and n < 20
        return
    train, test = packed_rows(dataset, "train"), packed_rows(dataset, "test")
    assert sorted(train + test) == list(range(n))
    assert sum(dataset.splits.values()) == n
    if not shuffle:
        assert train == sorted(train)
    assert list(verify(folder)) == []


def test_split_is_stable_when_rows_are_appended(tmp_path):
    splits = {"train": 0.8, "valid": 0.1, "test": 0.1}
    small = make(tmp_path / "small", 500, splits=splits, shard=1000)
    large = make(tmp_path / "large", 700, splits=splits, shard=1000)
    for split in splits:
        old = {row for row in packed_rows(large, split) if row < 500}
        assert old == set(packed_rows(small, split))
    assert abs(large.splits["train"] - 560) < 60


def test_given_splits_stay_apart(tmp_path):
    pack({"train": rows(20), "test": rows(7)}, tmp_path, block_samples=4)
    dataset = open_dataset(tmp_path)
    assert dataset.splits == {"train": 20, "test": 7}
    assert sorted(packed_rows(dataset, "test")) == list(range(7))
    assert len({*dataset.keys("train"), *dataset.keys("test")}) == 27


def test_shuffle_mixes_and_seed_decides(tmp_path):
    orders = [packed_rows(make(tmp_path / str(s), 60, seed=s), "train") for s in range(2)]
    assert orders[0] != orders[1]
    assert sum(a == b for a, b in zip(orders[0], sorted(orders[0]), strict=True)) < 10


def test_statistics_are_those_of_the_training_split(tmp_path):
    x = np.random.default_rng(0).normal(5, 2, (300, 4)).astype(np.float32)
    x[7, 2] = np.nan
    test = {"x": 100 + x, "label": np.arange(300) % 3}
    pack({"test": test, "train": {**test, "x": x}}, tmp_path, block_samples=16)
    dataset = open_dataset(tmp_path)
    stats, finite = dataset.fields["x"].stats, x[np.isfinite(x)].astype(np.float64)
    assert stats.count == 1199 and stats.min == finite.min() and stats.max == finite.max()
    np.testing.assert_allclose([stats.mean, stats.std], [finite.mean(), finite.std()], rtol=1e-12)
    np.testing.assert_allclose(dataset.moments("x"), [finite.mean(), finite.std()], rtol=1e-12)


def test_moments_of_a_table_are_by_column(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(8, 3) ** 2
    pack({"x": x}, tmp_path, columns={"x": ["a", "b", "c"]}, block_samples=3)
    dataset = open_dataset(tmp_path)
    assert [column.name for column in dataset.fields["x"].columns] == ["a", "b", "c"]
    mean, std = dataset.moments("x")
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64))
    np.testing.assert_allclose(std, x.std(0, dtype=np.float64))


def test_moments_of_nothing_finite_are_refused(tmp_path):
    pack({"x": np.full((3, 2), np.nan)}, tmp_path)
    with pytest.raises(DataError, match="'x' has no finite value"):
        open_dataset(tmp_path).moments("x")


def test_classes_are_counted_per_shard(tmp_path):
    dataset = make(tmp_path, 33)
    assert dataset.classes == 5 and dataset.named("label") == ["label"]
    for index, shard in enumerate(dataset.split("train").shards):
        with dataset.shard("train", index) as reader:
            labels = reader.read_index("label")
            assert labels.dtype == np.int32
        assert tuple(np.bincount(labels, minlength=5)) == shard.class_counts


@pytest.mark.parametrize("label", [np.arange(-1, 4), np.linspace(0, 1, 5), np.eye(5, dtype=int)])
def test_labels_that_are_no_classes(tmp_path, label):
    pack({"x": np.zeros(5), "label": label}, tmp_path)
    dataset = open_dataset(tmp_path)
    assert dataset.classes is None and dataset.split("train").shards[0].class_counts is None


def test_dtypes_and_shapes(tmp_path):
    fields = {
        "flag": np.array([True, False, True]),
        "big": np.arange(6, dtype=">i4").reshape(3, 2),
        "half": np.arange(3, dtype=np.float16),
        "volume": np.arange(3 * 2 * 3 * 4, dtype=np.uint16).reshape(3, 2, 3, 4),
        "word": np.array(["no", "yes", "no"]),
    }
    pack(fields, tmp_path, roles={"word": "label"}, shuffle=False, block_samples=2)
    dataset = open_dataset(tmp_path)
    for name in ("flag", "big", "half", "volume"):
        np.testing.assert_array_equal(dataset.read("train", name), fields[name])
    assert dataset.fields["flag"].dtype == "uint8" and dataset.fields["big"].dtype == "int32"
    assert dataset.read("train", "word").tolist() == [0, 1, 0]
    assert dataset.fields["word"].vocab == ("no", "yes") and dataset.classes == 2


def test_one_vocabulary_for_all_splits(tmp_path):
    parts = {"train": {"w": np.array(["b", "c"])}, "test": {"w": np.array(["c", "a"])}}
    pack(parts, tmp_path, shuffle=False)
    dataset = open_dataset(tmp_path)
    assert dataset.fields["w"].vocab == ("a", "b", "c")
    assert dataset.read("train", "w").tolist() == [1, 2]
    assert dataset.read("test", "w").tolist() == [2, 0]


def test_ragged_fields(tmp_path):
    words = [np.arange(i % 5, dtype=np.uint8) + i for i in range(23)]
    fields = {"word": Ragged.of(words), "row": np.arange(23)}
    pack(fields, tmp_path, block_samples=4, shard_samples=10, gzip=True)
    dataset = open_dataset(tmp_path)
    assert dataset.manifest.required_features == ("gzip", "ragged")
    found, order = dataset.read("train", "word"), dataset.read("train", "row")
    assert len(found) == 23 and found.values.dtype == np.uint8
    for sample, row in enumerate(order):
        np.testing.assert_array_equal(found[sample], words[row])
    assert list(verify(tmp_path)) == []


def test_blocks_are_chunks_with_checksums(tmp_path):
    make(tmp_path, 25, block=4, shard=10, gzip=True)
    with h5py.File(tmp_path / "train/shard-00000.h5", "r", locking=False) as file:
        field = file["fields/x"]
        assert field.chunks == (4, 3) and field.fletcher32 and field.compression == "gzip"
        assert file["index/key"].chunks == (10,) and file["index/key"].fletcher32
        assert file.attrs["complete"] == 1 and list(file.attrs["format_version"]) == [1, 0]


def test_large_samples_are_cut_into_slabs():
    assert chunk_shape(100, 8, (28, 28), 1) == (8, 28, 28)
    assert chunk_shape(3, 8, (), 8) == (3,)
    assert chunk_shape(9, 1, (200, 1024, 1024), 4) == (1, 1, 256, 1024)
    assert chunk_shape(9, 1, (256, 256, 256), 1) == (1, 16, 256, 256)
    assert chunk_shape(9, 1, (2, 4096, 4096), 1) == (1, 1, 256, 4096)


def test_default_blocks_are_about_a_mebibyte(tmp_path):
    fields = {"image": np.zeros((10, 28, 28), np.uint8), "label": np.zeros(10, np.uint8)}
    assert pack(fields, tmp_path).block_samples == 1024


def test_refuses_to_overwrite(tmp_path):
    old = make(tmp_path, 30).dataset_id
    with pytest.raises(DataError, match="--force"):
        make(tmp_path, 20)
    assert open_dataset(tmp_path).dataset_id == old and list(verify(tmp_path)) == []
    new = make(tmp_path, 12, force=True)
    assert new.dataset_id != old and list(verify(tmp_path)) == []
    with pytest.raises(DataError, match="other arguments"):
        make(tmp_path, 12, seed=4, resume=True)


def test_resume_writes_only_what_is_not_right(tmp_path):
    make(tmp_path / "whole", 60)
    folder = tmp_path / "killed"
    make(folder, 60)
    (folder / "manifest.json").unlink()
    shards = sorted(folder.glob("train/*.h5"))
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    shards[3].rename(f"{shards[3]}.part")
    (folder / "train/shard-00099.h5").write_bytes(b"from an earlier attempt")
    kept = [shards[i].stat().st_mtime_ns for i in (0, 4, 5)]
    with pytest.raises(DataError, match="--resume"):
        make(folder, 60)
    make(folder, 60, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")
    assert [shards[i].stat().st_mtime_ns for i in (0, 4, 5)] == kept


def test_resume_does_not_keep_shards_of_other_input(tmp_path):
    make(tmp_path / "a", 60, seed=1)
    (tmp_path / "a" / "manifest.json").unlink()
    make(tmp_path / "a", 60, resume=True)
    assert contents(tmp_path / "a") == contents(make(tmp_path / "b", 60).path)


def test_resume_repairs_a_finished_set(tmp_path):
    make(tmp_path, 60)
    before = contents(tmp_path)
    (tmp_path / "train/shard-00002.h5").unlink()
    make(tmp_path, 60, resume=True)
    assert contents(tmp_path) == before


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, "tests")
from data_sets import make
replace, calls = pathlib.Path.replace, 0
def dying(path, target):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
pathlib.Path.replace = dying
make(sys.argv[1], 60)
"""


@pytest.mark.parametrize("renames", [1, 3, 7], ids=["first", "middle", "manifest"])
def test_killed_packer_leaves_no_manifest_and_resumes(tmp_path, renames):
    """SIGKILL before the first shard, a later one (of six), or the manifest gets its name."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, folder, str(renames)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert len(list(folder.glob("train/*.h5"))) == renames - 1
    with pytest.raises(DataError, match="not finished.*--resume"):
        open_dataset(folder)
    make(folder, 60, resume=True)
    assert contents(folder) == contents(make(tmp_path / "whole", 60).path)


@pytest.mark.parametrize(
    ("fields", "more", "error", "says"),
    [
        ({}, {}, UsageError, "nothing to pack"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, {}, DataError, "'x': 3, 'y': 4"),
        ({"x": np.zeros(3, complex)}, {}, DataError, "complex128"),
        ({"x": np.zeros((3, 0))}, {}, DataError, r"\(3, 0\)"),
        ({"x y": np.zeros(3)}, {}, DataError, "'x y'"),
        ({"x": np.zeros(3)}, {"roles": {"z": "label"}}, UsageError, "no field 'z'"),
        ({"x": np.zeros(3)}, {"roles": {"x": "target"}}, UsageError, "'target'"),
        ({"x": np.zeros(3)}, {"splits": {"a": 0.5, "b": 0.4}}, UsageError, "add up to 1"),
        ({"x": np.zeros(3)}, {"splits": {"a": 1e-4, "b": 0.9999}}, DataError, "'a' got no samples"),
        ({"x": np.zeros(3)}, {"block_samples": 0}, UsageError, "block_samples 0"),
        ({"x": np.zeros(3)}, {"shard_samples": -1}, UsageError, "shard_samples -1"),
        ({"a": {"x": np.zeros(3)}}, {"splits": {"a": 1.0}}, UsageError, "given by the sources"),
        (
            {"a": {"x": np.zeros(3)}, "b": {"x": np.zeros((3, 1))}},
            {},
            DataError,
            "do not have the same fields",
        ),
    ],
)
def test_refuses(tmp_path, fields, more, error, says):
    with pytest.raises(error, match=says):
        pack(fields, tmp_path / "set", **more)
    assert not (tmp_path / "set").exists()


def test_a_full_disk_or_a_file_in_the_way_is_a_data_error(tmp_path):
    (tmp_path / "train").write_text("a file")
    with pytest.raises(DataError, match="cannot write"):
        make(tmp_path, 5)


def test_plans_without_reading(tmp_path):
    """A mapped file is touched only for the rows of the shard being written."""
    path = tmp_path / "large.npy"
    mapped = np.lib.format.open_memmap(path, "w+", np.float32, (1000, 10))
    mapped[:] = np.arange(1000, dtype=np.float32)[:, None]
    mapped.flush()
    del mapped
    pack({"x": np.load(path, mmap_mode="r")}, tmp_path / "set", shard_samples=300)
    found = open_dataset(tmp_path / "set").read("train", "x")
    assert sorted(found[:, 3].astype(int)) == list(range(1000))
