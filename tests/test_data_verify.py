"""A check that was cut short goes on: sound shards are noted, changed ones are looked at again."""

from __future__ import annotations

import os

import pytest
from data_sets import flip_chunk_byte, make

from hpctrain.data import verify
from hpctrain.data.shard import ShardReader


@pytest.fixture
def reads(monkeypatch):
    """The shards whose blocks are read, one entry each."""
    seen = []
    read = ShardReader.read_block

    def counted(self, name, block, out):
        if name == "x" and block == 0:
            seen.append(self.path.name)
        return read(self, name, block, out)

    monkeypatch.setattr(ShardReader, "read_block", counted)
    return seen


def test_sound_shards_are_not_read_again(tmp_path, reads):
    dataset, notes = make(tmp_path / "set", 53), tmp_path / "notes"
    reads.clear()
    checking = verify(dataset.path, notes=notes)
    flip_chunk_byte(dataset.path / "train/shard-00003.h5", "fields/x", 0)
    assert "shard-00003" in next(checking)
    checking.close()  # cut short: three shards are noted
    assert reads == [f"shard-0000{i}.h5" for i in range(3)]
    assert len((tmp_path / "notes.0").read_text().splitlines()) == 3
    reads.clear()
    assert "shard-00003.h5" in " ".join(verify(dataset.path, notes=notes))
    assert reads == [f"shard-0000{i}.h5" for i in (3, 4, 5)]
    flip_chunk_byte(dataset.path / "train/shard-00003.h5", "fields/x", 0)  # as it was
    reads.clear()
    assert list(verify(dataset.path, notes=notes)) == [] and reads == ["shard-00003.h5"]
    assert not list(tmp_path.glob("notes*"))


def test_a_shard_that_changed_is_checked_again(tmp_path, reads):
    dataset, notes = make(tmp_path / "set", 53), tmp_path / "notes"
    first = dataset.path / "train/shard-00000.h5"
    other = dataset.path / "train/shard-00001.h5"
    content = other.read_bytes()
    other.write_bytes(b"")
    assert list(verify(dataset.path, notes=notes))
    other.write_bytes(content)
    os.utime(first, ns=(1, 1))
    reads.clear()
    assert list(verify(dataset.path, notes=notes)) == []
    assert sorted(reads) == ["shard-00000.h5", "shard-00001.h5"]


@pytest.mark.ranks(2, 3)
def test_ranks_share_the_notes(comm, tmp_path):
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        make(folder / "set", 53)
        flip_chunk_byte(folder / "set/train/shard-00003.h5", "fields/x", 0)
    comm.Barrier()
    for _ in range(2):
        found = list(verify(folder / "set", comm, folder / "notes"))
        assert len(found) == 2 and all("shard-00003.h5" in problem for problem in found)
        comm.Barrier()
    lines = [line for file in folder.glob("notes.*") for line in file.read_text().splitlines()]
    assert len(lines) == 5
    comm.Barrier()
