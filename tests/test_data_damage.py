"""Damaged data sets: a clear error that names file, field and block; never wrong data, no hang."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest
from data_sets import flip_chunk_byte, make, no_thread_left

from hpctrain.data import Loader, open_dataset, verify
from hpctrain.errors import DataError

SHARD = "train/shard-00001.h5"


@pytest.fixture
def dataset(tmp_path):
    """25 samples in shards of 10, 10 and 5, blocks of 4."""
    return make(tmp_path / "set", 25)


def read_all(dataset):
    """Read an epoch; the samples of the batches that came before the error, if any."""
    with no_thread_left():
        return sum(len(batch) for batch in Loader(dataset, "train", 5).epoch(0))


def test_sound(dataset):
    assert read_all(dataset) == 25 and list(verify(dataset.path)) == []


def test_flipped_byte(dataset):
    path = dataset.path / SHARD
    flip_chunk_byte(path, "fields/x", 2)
    with pytest.raises(DataError) as error:
        read_all(dataset)
    for part in (str(path), "field 'x', block 2 (rows 8 to 9)", "`hpctrain data verify "):
        assert part in str(error.value)
    found = list(verify(dataset.path))
    assert len(found) == 2 and all(str(path) in line for line in found)
    assert "sha256" in found[0] and "field 'x', block 2" in found[1]


def test_flipped_byte_in_a_field_that_is_not_read(dataset):
    flip_chunk_byte(dataset.path / SHARD, "fields/label", 0)
    assert len(list(Loader(dataset, "train", 5, fields=["x"]).epoch(0))) == 5


@pytest.mark.parametrize("index", ["key", "label"])
def test_flipped_byte_in_an_index(dataset, index):
    flip_chunk_byte(dataset.path / SHARD, f"index/{index}", 0)
    assert any(f"index '{index}'" in line for line in verify(dataset.path))
    with pytest.raises(DataError, match=f"{SHARD}: index '{index}'"):
        dataset.shard("train", 1).read_index(index)


@pytest.mark.parametrize("size", [0, 100, -1, -3000])
def test_truncated_shard(dataset, size):
    path = dataset.path / SHARD
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(DataError, match=rf"{SHARD}: is truncated \(\d+ bytes, {len(content)} in"):
        read_all(dataset)
    assert any("is truncated" in line for line in verify(dataset.path))


def test_longer_shard(dataset):
    path = dataset.path / SHARD
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataError, match="is too long"):
        read_all(dataset)


def test_missing_shard(dataset):
    (dataset.path / SHARD).unlink()
    with pytest.raises(DataError, match=f"{SHARD}: is missing"):
        read_all(dataset)
    assert [line for line in verify(dataset.path) if SHARD in line and "is missing" in line]


def rewritten(dataset, change):
    """Change a shard with h5py, and keep its size as the manifest has it."""
    path = dataset.path / SHARD
    size = path.stat().st_size
    with h5py.File(path, "r+") as file:
        change(file)
    content = path.read_bytes()
    path.write_bytes(content[:size].ljust(size, b"\0"))


def test_missing_field(dataset):
    rewritten(dataset, lambda file: file.move("fields/x", "fields/y"))
    with pytest.raises(DataError, match=f"{SHARD}: has no readable field 'x'"):
        read_all(dataset)
    assert any("no readable field 'x'" in line for line in verify(dataset.path))


def test_field_of_another_shape(dataset):
    def change(file):
        del file["fields/label"]
        file["fields/label"] = np.zeros(9, np.int64)

    rewritten(dataset, change)
    with pytest.raises(DataError, match=r"field 'label' does not fit the manifest .*\(9,\)"):
        read_all(dataset)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("split", np.bytes_(b"other"), "split is"),
        ("shard_index", np.int64(7), "shard_index is"),
        ("format_version", np.array([2, 0]), "format_version is"),
        ("complete", np.int64(0), "was not written to its end"),
    ],
)
def test_another_shard_in_its_place(dataset, name, value, says):
    rewritten(dataset, lambda file: file.attrs.modify(name, value))
    with pytest.raises(DataError, match=f"{SHARD}: .*{says}"):
        read_all(dataset)


def test_no_hdf5_at_all(dataset):
    path = dataset.path / SHARD
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=f"{SHARD}: cannot be opened"):
        read_all(dataset)


def test_shards_swapped(dataset):
    """Same size, same schema: only the shard's number and its sha256 tell."""
    a, b = (dataset.path / f"train/shard-0000{i}.h5" for i in (0, 1))
    a_content, b_content = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_content)
    b.write_bytes(a_content)
    with pytest.raises(DataError, match="shard_index is 1, not 0|shard_index is .*1.*, not .*0"):
        read_all(dataset)


def test_verify_goes_on_after_a_problem_and_finds_strays(dataset):
    flip_chunk_byte(dataset.path / "train/shard-00000.h5", "fields/label", 1)
    (dataset.path / SHARD).unlink()
    (dataset.path / "train/shard-00009.h5").write_bytes(b"")
    found = "\n".join(verify(dataset.path))
    assert "shard-00000.h5: field 'label', block 1" in found
    assert "shard-00001.h5: is missing" in found
    assert "shard-00009.h5: is not in the manifest" in found


def test_verify_counts_keys_and_classes(dataset, monkeypatch):
    from hpctrain.data.shard import ShardReader

    read_index = ShardReader.read_index
    monkeypatch.setattr(ShardReader, "read_index", lambda self, name: 0 * read_index(self, name))
    found = list(verify(dataset.path))
    assert f"{dataset.path}: 24 samples have a key that another sample has too" in found
    assert sum("class counts" in line for line in found) == 3


@pytest.mark.parametrize("part", ["data", "offsets"])
def test_flipped_byte_in_a_ragged_field(tmp_path, part):
    from hpctrain.data import Ragged, pack

    words = Ragged.of([np.arange(i % 4, dtype=np.int16) for i in range(9)])
    pack({"word": words}, tmp_path, block_samples=4)
    flip_chunk_byte(tmp_path / "train/shard-00000.h5", f"fields/word/{part}", 0)
    with pytest.raises(DataError, match="field 'word', block 0"):
        open_dataset(tmp_path).read("train", "word")
    assert any("field 'word', block 0" in line for line in verify(tmp_path))


def test_missing_filter(tmp_path, monkeypatch):
    dataset = make(tmp_path / "set", 25, gzip=True)
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: code != h5py.h5z.FILTER_DEFLATE)
    with pytest.raises(DataError, match="set was packed with the HDF5 filter gzip, which this"):
        read_all(dataset)


FORKED = """
import os, sys
from hpctrain.data import Loader, open_dataset
from hpctrain.errors import DataError
loader = Loader(open_dataset(sys.argv[1]), "train", 5)
if os.fork() == 0:
    try:
        list(loader.epoch(0))
    except DataError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_loader_does_not_survive_a_fork(dataset):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, dataset.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "was forked from" in done.stdout and "make the loader after the fork" in done.stdout


def test_full_disk_says_so_for_the_manifest(tmp_path, monkeypatch):
    """The last write of all fails: no manifest, and a resume that is right."""
    from hpctrain.data import write

    def full(directory, manifest):
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(write, "write_manifest", full)
    with pytest.raises(DataError, match="No space left on device"):
        make(tmp_path / "set", 25)
    monkeypatch.undo()
    with pytest.raises(DataError, match="not finished"):
        open_dataset(tmp_path / "set")
    assert list(verify(make(tmp_path / "set", 25, resume=True).path)) == []
