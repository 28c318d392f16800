"""Staging: a copy is whole or has no manifest, on one rank and on several."""

from __future__ import annotations

import subprocess
import sys

import pytest
from data_sets import flip_chunk_byte, make

from hpctrain.data import open_dataset, verify
from hpctrain.data import stage as module
from hpctrain.data.stage import stage
from hpctrain.errors import DataError


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "set", 40)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}


def test_a_copy_is_the_same_data_set(dataset, tmp_path):
    (dataset.path / "text.tokenizer.json").write_text("{}")
    staged = stage(dataset, tmp_path / "local")
    assert staged.path.parent == tmp_path / "local" and staged.seconds > 0
    assert staged.bytes_copied == sum(s.bytes for s in dataset.split("train").shards)
    copy = open_dataset(staged.path)
    assert copy.dataset_id == dataset.dataset_id and list(verify(staged.path)) == []
    assert (staged.path / "text.tokenizer.json").read_text() == "{}"
    before = times(staged.path)
    assert stage(dataset, tmp_path / "local").bytes_copied == 0
    assert times(staged.path) == before


def test_an_unfinished_copy_is_finished(dataset, tmp_path):
    folder = stage(dataset, tmp_path / "local").path
    (folder / "manifest.json").unlink()
    (folder / "train/shard-00001.h5").rename(folder / "train/shard-00001.h5.part")
    before = times(folder)
    with pytest.raises(DataError, match="not finished"):
        open_dataset(folder)
    assert stage(dataset, tmp_path / "local").bytes_copied > 0
    assert before.items() <= times(folder).items() and list(verify(folder)) == []


def test_a_damaged_file_is_not_copied(dataset, tmp_path):
    flip_chunk_byte(dataset.path / "train/shard-00002.h5", "fields/x", 0)
    with pytest.raises(DataError, match="shard-00002.h5: its sha256 is"):
        stage(dataset, tmp_path / "local")
    assert not list((tmp_path / "local").glob("*/manifest.json"))
    assert not list((tmp_path / "local").rglob("*.part"))


def test_too_little_room(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MARGIN", 1 << 60)
    with pytest.raises(DataError, match="bytes are to be copied and .* are free"):
        stage(dataset, tmp_path / "local")


FULL = """
import resource, signal, sys
from hpctrain.data import open_dataset
from hpctrain.data.stage import stage
from hpctrain.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    stage(open_dataset(sys.argv[1]), sys.argv[2])
except DataError as error:
    print(error)
"""


def test_a_disk_that_is_full_while_staging(dataset, tmp_path):
    command = [sys.executable, "-c", FULL, dataset.path, tmp_path / "local"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "cannot copy" in done.stdout and "is the disk full?" in done.stdout
    assert not list((tmp_path / "local").glob("*/manifest.json"))
    assert list(verify(stage(dataset, tmp_path / "local").path)) == []


def test_a_file_in_the_way(dataset, tmp_path):
    (tmp_path / "local").write_text("a file")
    with pytest.raises(DataError, match="cannot stage"):
        stage(dataset, tmp_path / "local")


@pytest.fixture
def shared(comm, tmp_path):
    """(data set, folder), the same for all ranks."""
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        make(folder / "set", 40)
    comm.Barrier()
    yield open_dataset(folder / "set", comm), folder
    comm.Barrier()


@pytest.mark.ranks(3)
def test_ranks_copy_different_files(comm, shared):
    dataset, folder = shared
    staged = stage(dataset, folder / "local", comm)
    assert staged.bytes_copied == sum(s.bytes for s in dataset.split("train").shards)
    assert list(verify(staged.path, comm)) == []
    assert stage(dataset, folder / "local", comm).bytes_copied == 0


@pytest.mark.ranks(3)
def test_a_damaged_file_fails_all_ranks_and_is_found_by_all(comm, shared):
    dataset, folder = shared
    if comm.rank == 0:
        flip_chunk_byte(dataset.path / "train/shard-00001.h5", "fields/x", 1)
        (dataset.path / "train/shard-00002.h5").unlink()
    comm.Barrier()
    with pytest.raises(DataError, match="shard-0000"):
        stage(dataset, folder / "local", comm)
    found = list(verify(dataset.path, comm))
    assert found == list(verify(dataset.path)) and len(found) == 3
    assert "shard-00001.h5: field 'x', block 1" in found[1] and "is missing" in found[2]
