"""Packing from iterables, by key and group, stratified, on several ranks, on a full disk."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_sets import make, rows

from hpctrain.data import Ragged, open_dataset, pack, verify
from hpctrain.data.identity import deal
from hpctrain.errors import DataError, UsageError


def sums(folder):
    """sha256 of every file below a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def samples(n):
    """An iterable, not a list: it can be read once."""
    for i in range(n):
        yield {
            "x": np.float32([i, 2 * i, 3 * i]),
            "label": i % 5,
            "word": ["red", "green", "blue"][i % 3],
            "text": b"a" * (i % 4),
            "map": np.full((1 + i % 2, 3), i, np.uint8),
            "even": i % 2 == 0,
        }


def test_an_iterable_of_samples(tmp_path):
    pack(samples(23), tmp_path / "set", block_samples=4, shard_samples=10)
    dataset = open_dataset(tmp_path / "set")
    x = dataset.read("train", "x")
    number = x[:, 0].astype(int)
    assert sorted(number) == list(range(23)) and x.dtype == np.float32
    np.testing.assert_array_equal(dataset.read("train", "label"), number % 5)
    assert dataset.fields["label"].dtype == "int64" and dataset.classes == 5
    vocab = dataset.fields["word"].vocab
    assert vocab == ("blue", "green", "red")
    words = [vocab[code] for code in dataset.read("train", "word")]
    assert words == [["red", "green", "blue"][i % 3] for i in number]
    text, maps, shapes = (dataset.read("train", name) for name in ("text", "map", "map_shape"))
    for place, i in enumerate(number):
        assert text[place].tobytes() == b"a" * (i % 4)
        assert shapes[place].tolist() == [1 + i % 2, 3]
        np.testing.assert_array_equal(maps[place], np.full(3 + 3 * (i % 2), i))
    np.testing.assert_array_equal(dataset.read("train", "even"), number % 2 == 0)
    assert list(verify(tmp_path / "set")) == []
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"manifest.json", "train"}


def test_an_iterable_gives_the_bytes_of_its_arrays(tmp_path):
    content = rows(60)
    each = ({name: array[i] for name, array in content.items()} for i in range(60))
    pack(each, tmp_path / "a", block_samples=4, shard_samples=10)
    make(tmp_path / "b", 60)
    assert sums(tmp_path / "a") == sums(tmp_path / "b")


BOUNDED = """
import re, resource, sys
import numpy as np
from hpctrain.data import pack
each = ({"x": np.full(1 << 18, i, np.float32)} for i in range(96))
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (60 << 20),) * 2)
pack(each, sys.argv[1], shard_samples=8)
"""


def test_an_iterable_is_read_in_bounded_memory(tmp_path):
    """96 MiB of samples with 60 MiB of memory: one shard of 8 and its copies."""
    command = [sys.executable, "-c", BOUNDED, tmp_path / "set"]
    subprocess.run(command, timeout=60, check=True)
    assert open_dataset(tmp_path / "set").splits == {"train": 96}


def test_a_bad_sample_is_named_and_nothing_is_left(tmp_path):
    def pack_all(each):
        pack(iter(each), tmp_path / "set")

    for each, says in [
        ([{"x": 1}, {"y": 1}], "sample 1 has the fields y; the first one has x"),
        ([{"x": 1}, {"x": 1.5}], "'x' of sample 1 has dtype float64"),
        ([{"x": [1]}, {"x": 1}], "'x' of sample 1 has 0 dims"),
        ([{"x": 1}, {"x": "a"}], "'x' of sample 1 has a word"),
        ([{"x": {}}], "'x' of sample 0 has dtype object"),
        ([], "gave no samples"),
    ]:
        with pytest.raises(DataError, match=says):
            pack_all(each)
        assert not (tmp_path / "set").exists()


def test_keys_follow_from_a_field(tmp_path):
    """A sample keeps its key and its split when the rows are in another order."""
    found = []
    for name, order in {"a": np.arange(300), "b": np.arange(300)[::-1]}.items():
        fields = {"id": order * 7, "x": order.astype(np.float32)}
        pack(fields, tmp_path / name, key="id", splits={"train": 0.7, "test": 0.3})
        dataset = open_dataset(tmp_path / name)
        assert list(dataset.fields) == ["x"]
        found.append({
            (split, int(x), int(key))
            for split in ("train", "test")
            for x, key in zip(dataset.read(split, "x"), dataset.keys(split), strict=True)
        })  # fmt: skip
    assert found[0] == found[1]
    with pytest.raises(DataError, match="200 samples have a 'id'"):
        pack({"id": np.arange(300) % 100, "x": np.zeros(300)}, tmp_path / "c", key="id")


@pytest.mark.parametrize("words", [False, True])
def test_groups_never_straddle_splits(tmp_path, words):
    patient = np.arange(400) % 37
    group = np.array([f"p{p}" for p in patient]) if words else patient
    fields = {"patient": group, "who": patient, "x": np.arange(400)}
    pack(fields, tmp_path, group="patient", splits={"train": 0.6, "test": 0.4})
    dataset = open_dataset(tmp_path)
    train, test = (set(dataset.read(split, "who").tolist()) for split in ("train", "test"))
    assert train | test == set(range(37)) and not train & test and train and test
    with dataset.shard("train", 0) as shard:
        index = shard.read_index("group")
    assert index.dtype == np.int64 and len(set(index.tolist())) == len(train)


def test_groups_of_given_splits_are_checked(tmp_path):
    parts = {s: {"who": np.array(w), "x": np.zeros(2)} for s, w in (("a", [1, 2]), ("b", [2, 3]))}
    with pytest.raises(DataError, match="1 groups are in both 'a' and 'b'"):
        pack(parts, tmp_path / "set", group="who")


def test_deal():
    classes = np.random.default_rng(0).integers(0, 4, 103)
    order, bounds = deal(classes, 5)
    assert sorted(order) == list(range(103)) and bounds.tolist() == [0, 21, 42, 63, 83, 103]
    counts = np.array([
        np.bincount(classes[order[a:b]], minlength=4)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ])  # fmt: skip
    assert (np.ptp(counts, axis=0) <= 1).all()


def test_stratified_shards(tmp_path):
    label = (np.arange(500) < 25).astype(np.int64)
    fields = {"x": np.arange(500), "label": label}
    pack(fields, tmp_path, stratify="label", shard_samples=60, splits={"train": 0.8, "test": 0.2})
    dataset = open_dataset(tmp_path)
    for split in ("train", "test"):
        counts = [shard.class_counts for shard in dataset.split(split).shards]
        assert (np.ptp(counts, axis=0) <= 1).all() and max(map(sum, counts)) <= 60
    x = np.concatenate([dataset.read(s, "x") for s in ("train", "test")])
    assert sorted(x.tolist()) == list(range(500)) and list(verify(tmp_path)) == []
    assert x[:20].tolist() != sorted(x[:20].tolist())


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"key": "idd"}, UsageError, "'idd' is no field.*'id'"),
        ({"key": "x"}, DataError, "'x' cannot be the key"),
        ({"group": "x"}, DataError, "'x' cannot be the group"),
        ({"stratify": "x"}, UsageError, "cannot stratify by 'x'"),
    ],
)
def test_refuses(tmp_path, more, error, says):
    with pytest.raises(error, match=says):
        pack({"id": np.arange(3), "x": np.zeros((3, 2))}, tmp_path / "set", **more)
    assert not (tmp_path / "set").exists()


def test_dry_run_counts_and_writes_nothing(tmp_path):
    more = {"block_samples": 4, "shard_samples": 10, "splits": {"train": 0.7, "test": 0.3}}
    plan = pack(rows(60), tmp_path / "set", dry_run=True, **more)
    assert not (tmp_path / "set").exists()
    manifest = pack(rows(60), tmp_path / "set", **more)
    for split, content in manifest.splits.items():
        assert [(s.file, s.n, s.blocks, s.class_counts) for s in content.shards] == [
            (s.file, s.n, s.blocks, s.class_counts) for s in plan.splits[split].shards
        ]
    pack(samples(9), tmp_path / "other", dry_run=True)
    assert not (tmp_path / "other").exists()


def test_progress(tmp_path):
    calls = []
    make(tmp_path, 25, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(10, 25), (20, 25), (25, 25)]


def test_ragged_fields_count_their_values(tmp_path):
    words = Ragged.of([np.arange(i % 5, dtype=np.uint8) for i in range(23)])
    pack({"word": words, "x": np.arange(23)}, tmp_path, shard_samples=10)
    shards = open_dataset(tmp_path).split("train").shards
    assert sum(shard.values["word"] for shard in shards) == len(words.values)


FULL = """
import resource, signal, sys
sys.path.insert(0, "tests")
from data_sets import make
from hpctrain.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    make(sys.argv[1], 4000, 500, 1000)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 9000])
def test_a_disk_that_is_full_while_packing(tmp_path, limit):
    """The system refuses a write in a shard: an error that names it, then a correct resume."""
    folder = tmp_path / "set"
    command = [sys.executable, "-c", FULL, folder, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "train/shard-00000.h5.part" in done.stdout and "is the disk full" in done.stdout
    assert done.stderr == "" and not list(folder.glob("*/*.part"))
    with pytest.raises(DataError):
        open_dataset(folder)
    make(folder, 4000, 500, 1000, resume=True)
    assert list(verify(folder)) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_data_write import samples
from hpctrain.data import pack
def dying():
    for number, sample in enumerate(samples(60)):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample
pack(dying(), sys.argv[1])
"""


def test_an_iterable_whose_packing_was_killed(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "killed"]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="has no manifest"):
        open_dataset(tmp_path / "killed")
    for name in ("killed", "whole"):
        pack(samples(60), tmp_path / name)
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")


@pytest.fixture
def shared_folder(comm, tmp_path):
    """A folder that all ranks see."""
    path = comm.bcast(tmp_path)
    yield path
    comm.Barrier()


@pytest.mark.ranks(1, 4)
def test_bytes_do_not_depend_on_the_number_of_ranks(comm, shared_folder):
    """Item 5: the sha256 sums of every file of a data set packed by all ranks and by one."""
    more = {"block_samples": 4, "shard_samples": 7, "stratify": "label"}
    more["splits"] = {"train": 0.7, "test": 0.3}
    folder = shared_folder
    every = samples(60) if comm.rank == 0 else iter(())
    manifest = pack(every, folder / "iterable", comm=comm, **more)
    pack(rows(60), folder / "arrays", comm=comm, **more)
    comm.Barrier()
    if comm.rank == 0:
        for name, source in {"iterable": samples(60), "arrays": rows(60)}.items():
            pack(source, folder / f"{name}-1", **more)
            assert sums(folder / name) == sums(folder / f"{name}-1")
            assert list(verify(folder / name)) == []
    assert manifest == open_dataset(folder / "iterable", comm).manifest


@pytest.mark.ranks(4)
def test_resume_on_another_number_of_ranks(comm, shared_folder):
    folder = shared_folder / "set"
    if comm.rank == 0:
        make(folder, 60)
        make(shared_folder / "whole", 60)
        (folder / "manifest.json").unlink()
        (folder / "train/shard-00004.h5").unlink()
    comm.Barrier()
    with pytest.raises(DataError, match="--resume"):
        make(folder, 60, comm=comm)
    make(folder, 60, comm=comm, resume=True)
    if comm.rank == 0:
        assert sums(folder) == sums(shared_folder / "whole")


@pytest.mark.ranks(3)
def test_a_failing_rank_fails_all(comm, shared_folder):
    """Rank 1 cannot write its shard: every rank raises, none waits."""
    folder = shared_folder / "set"
    if comm.rank == 0:
        (folder / "train/shard-00001.h5.part").mkdir(parents=True)
        (folder / "train/shard-00001.h5.part/keep").touch()
    comm.Barrier()
    with pytest.raises(DataError, match=r"shard-00001.h5.part"):
        make(folder, 60, comm=comm, resume=True)
    comm.Barrier()
    assert not (folder / "manifest.json").exists()
