"""The manifest: what is refused, what is read, and that all ranks learn the same."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from data_sets import make

from hpctrain.data import open_dataset
from hpctrain.data.manifest import load_manifest
from hpctrain.errors import DataError


@pytest.fixture
def dataset(tmp_path):
    return make(tmp_path / "set", 25, splits={"train": 0.6, "test": 0.4})


def edit(dataset, **changes):
    path = dataset.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_says_what_is_there(dataset):
    content = json.loads((dataset.path / "manifest.json").read_text())
    assert content["format"] == "hpctrain-shards" and content["format_version"] == [1, 0]
    assert content["order"] == "blockwin-v1" and content["block_samples"] == 4
    assert content["fields"]["x"] == {
        "dtype": "float32",
        "shape": [3],
        "role": "input",
        "stats": content["fields"]["x"]["stats"],
    }
    assert set(content["fields"]["x"]["stats"]) == {"count", "mean", "m2", "min", "max"}
    shard = content["splits"]["train"]["shards"][0]
    assert set(shard) == {"file", "bytes", "sha256", "n", "blocks", "class_counts"}
    assert shard["bytes"] == (dataset.path / shard["file"]).stat().st_size
    assert dataset.splits == {"train": dataset.split("train").n, "test": dataset.split("test").n}


def test_minor_version_and_unknown_keys_are_read(dataset):
    edit(dataset, format_version=[1, 7], colour="blue")
    found = open_dataset(dataset.path)
    assert found.splits == dataset.splits and found.dataset_id == dataset.dataset_id


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": [2, 0], "fields": 7}, "format version 2.0; this hpctrain reads 1.x"),
        ({"required_features": ["gzip", "lzf", "zstd"]}, "needs the features lzf, zstd"),
        ({"format": "tar"}, "format 'tar'"),
        ({"block_samples": 0}, "block_samples 0"),
        ({"block_samples": 5}, "do not add up"),
        ({"block_samples": "4"}, "not a manifest"),
        ({"fields": {"x": {"dtype": "int8", "shape": [3], "role": "input"}}}, "was changed"),
        ({"fields": {"x": {"dtype": "int8", "shape": [3], "role": "answer"}}}, "not a manifest"),
        ({"splits": {"train": {"n": 3, "shards": []}}}, "'train' do not add up"),
    ],
)
def test_refuses(dataset, changes, says):
    edit(dataset, **changes)
    with pytest.raises(DataError, match=says) as error:
        open_dataset(dataset.path)
    assert str(dataset.path) in str(error.value) and "\n" not in str(error.value)


def test_refuses_a_reordered_or_exchanged_shard_list(dataset):
    content = json.loads((dataset.path / "manifest.json").read_text())
    content["splits"]["train"]["shards"].reverse()
    edit(dataset, splits=content["splits"])
    with pytest.raises(DataError, match="was changed after packing"):
        open_dataset(dataset.path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"format": "hpctrain-shards"}'])
def test_half_a_manifest(dataset, text):
    (dataset.path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="not a manifest"):
        load_manifest(dataset.path)


def test_no_data_set(tmp_path):
    with pytest.raises(DataError, match="no such directory; `hpctrain data pack` makes one"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is not a data set: it has no manifest\.json"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match="cannot read"):
        open_dataset(tmp_path)


def test_unknown_names_suggest_the_nearest(dataset):
    with pytest.raises(DataError, match="no field 'labl'.*'label'.*it has x, label"):
        dataset.field("labl")
    with pytest.raises(DataError, match="no split 'tset'.*'test'.*it has train, test"):
        dataset.table("tset")


def test_block_table(dataset):
    table = dataset.table("train")
    n = dataset.splits["train"]
    assert table.starts[0] == 0 and table.starts[-1] == n
    ends = [0, 4, 8, 10] if n >= 10 else []
    assert table.starts[: len(ends)].tolist() == ends
    assert table.shard[:4].tolist() == [0, 0, 0, 1] and table.block[:4].tolist() == [0, 1, 2, 0]


@pytest.mark.ranks(1, 2, 3)
def test_rank_0_reads_for_all(comm):
    with tempfile.TemporaryDirectory() as folder:
        if comm.rank == 0:
            make(folder, 20)
            found = open_dataset(folder, comm)
        else:  # this rank could not read it itself
            found = open_dataset(f"{folder}-not-here", comm)
        assert comm.allgather(found.dataset_id) == [found.dataset_id] * comm.size
        assert found.splits == {"train": 20}
        comm.barrier()


@pytest.mark.ranks(1, 2, 3)
def test_an_error_on_rank_0_is_raised_on_every_rank(comm):
    here = Path(f"/nowhere-{comm.rank}")
    with pytest.raises(DataError, match="no data set at /nowhere-0:"):
        open_dataset(here, comm)
