"""`hpctrain data pack`, `info` and `verify` as a user runs them."""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from data_sets import flip_chunk_byte, rows

from hpctrain.cli import data as command
from hpctrain.data import open_dataset
from hpctrain.errors import DataError, UsageError


@pytest.fixture
def run(capsys):
    """Run `hpctrain data ...`: (exit status, output)."""

    def run(*words):
        parser = argparse.ArgumentParser(prog="hpctrain")
        command.add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["data", *map(str, words)])
        return args.run(args), capsys.readouterr().out

    return run


@pytest.fixture
def archive(tmp_path):
    content = rows(200)
    path = tmp_path / "a.npz"
    np.savez(path, x=content["x"], target=content["label"], junk=np.zeros((200, 2)))
    return path


def test_pack_info_verify(run, archive, tmp_path):
    out = tmp_path / "set"
    pack = ("pack", archive, "--out", out, "--input", "x", "--label", "target")
    status, text = run(*pack, "--split", "train=0.8,test=0.2", "--shard-samples", 64)
    dataset = open_dataset(out)
    assert status == 0 and dataset.named("label") == ["target"] and dataset.named("input") == ["x"]
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train + test == 200 and 140 < train < 180
    assert "left out: junk" in text and f"train: {train} samples in 3 shards" in text
    assert f"test: {test} samples in 1 shard\n" in text
    status, text = run("info", out)
    assert status == 0 and dataset.dataset_id in text
    assert re.search(r"^x +input +float32 +3 ", text, re.MULTILINE)
    assert re.search(rf"^train +{train} +3 +3 ", text, re.MULTILINE)
    assert "from a.npz" in text
    status, text = run("verify", out)
    assert status == 0 and "sound; 200 samples in 4 shards" in text


def test_verify_names_what_is_damaged(run, archive, tmp_path):
    out = tmp_path / "set"
    run("pack", archive, "--out", out, "--block-samples", 50)
    flip_chunk_byte(out / "train/shard-00000.h5", "fields/junk", 3)
    status, text = run("verify", out)
    assert status == 1
    assert "shard-00000.h5: field 'junk', block 3 (rows 150 to 199)" in text
    assert "2 problems" in text


def test_idx_files_with_given_splits(run, tmp_path):
    def idx(name, array):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (tmp_path / name).write_bytes(header + array.tobytes())
        return tmp_path / name

    words = []
    for split, n in (("train", 30), ("test", 11)):
        image = idx(f"{split}-images", np.zeros((n, 4, 4), np.uint8))
        label = idx(f"{split}-labels", np.arange(n, dtype=np.uint8) % 3)
        words += [f"{split}:image={image}", f"{split}:label={label}"]
    status, _ = run("pack", "--out", tmp_path / "set", *words)
    dataset = open_dataset(tmp_path / "set")
    assert status == 0 and dataset.splits == {"train": 30, "test": 11} and dataset.classes == 3
    assert len(dataset.manifest.provenance.sources) == 4
    with pytest.raises(UsageError, match="already name their split"):
        run("pack", "--out", tmp_path / "other", *words, "--split", "a=1")


def test_csv(run, tmp_path):
    lines = [f"{i},{i * 2},{'abc'[i % 3]},{i % 2}" for i in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["id,v,kind,label", *lines]))
    out = tmp_path / "set"
    status, _ = run("pack", tmp_path / "t.csv", "--out", out, "--drop", "id", "--no-shuffle")
    dataset = open_dataset(out)
    assert status == 0 and list(dataset.fields) == ["features", "kind", "label"]
    assert [c.name for c in dataset.fields["features"].columns] == ["v"]
    assert dataset.fields["label"].role == "label"
    np.testing.assert_array_equal(dataset.read("train", "features")[:, 0], np.arange(20) * 2)
    assert "kind: 3 words: a b c" in run("info", out)[1]


def test_resume_and_force(run, archive, tmp_path):
    pack = ("pack", archive, "--out", tmp_path / "set", "--gzip", "--licence", "CC0")
    run(*pack)
    with pytest.raises(DataError, match="--force"):
        run(*pack)
    assert run(*pack, "--resume")[0] == 0
    assert run(*pack, "--force", "--seed", 3)[0] == 0
    assert open_dataset(tmp_path / "set").manifest.provenance.seed == 3
    assert "licence: CC0" in run("info", tmp_path / "set")[1]


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["{}", "--label", "targt"], UsageError, "'targt'.*'target'"),
        (["{}", "train:{}"], UsageError, "or none does"),
        (["{}", "{}"], UsageError, "'junk' comes from another source"),
        (["{}", "--split", "train"], UsageError, "train=0.8,test=0.2"),
        (["{}", "--split", "a=0.5,a=0.5"], UsageError, "names a split twice"),
        (["{}", "--split", "a=0.5,b=x"], UsageError, "train=0.8,test=0.2"),
        (["nowhere.npz"], DataError, "no file nowhere.npz"),
        (["{}", "--input", "x", "--drop", "x"], UsageError, "both packed and dropped"),
    ],
)
def test_refuses(run, archive, tmp_path, words, error, says):
    with pytest.raises(error, match=says):
        run("pack", "--out", tmp_path / "set", *[w.format(archive) for w in words])
    assert not (tmp_path / "set").exists()


def test_help_is_light():
    program = (
        "import argparse, sys\n"
        "from hpctrain.cli.data import add_parser\n"
        "parser = argparse.ArgumentParser()\n"
        "add_parser(parser.add_subparsers())\n"
        "print(sorted({'numpy', 'h5py', 'mpi4py', 'msgspec'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
