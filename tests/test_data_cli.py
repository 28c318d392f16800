"""`hpctrain data pack`, `info` and `verify` as a user runs them."""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from data_sets import flip_chunk_byte, rows
from launching import mpirun

from hpctrain.cli import data as command
from hpctrain.cli import data_pack
from hpctrain.data import Ragged, open_dataset, pack
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
    assert f"test: {test} samples in 1 shard; classes " in text
    status, text = run("info", out)
    assert status == 0 and dataset.dataset_id in text
    assert re.search(r"^x +input +float32 +3 ", text, re.MULTILINE)
    assert re.search(rf"^train +{train} +3 +3 ", text, re.MULTILINE)
    assert "from a.npz" in text
    status, text = run("verify", out)
    assert status == 0 and "sound; 200 samples in 4 shards" in text


def test_messages_say_the_way_out(run, tmp_path):
    (tmp_path / "a.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match="'a;b', as if cells were separated by ';'; .csv is read"):
        run("pack", tmp_path / "a.csv", "--out", tmp_path / "set")
    (tmp_path / "b.csv").write_text("a,b\n1,2.5\n")
    with pytest.raises(UsageError, match="cannot stratify by 'b': it must be"):
        run("pack", tmp_path / "b.csv", "--out", tmp_path / "set", "--stratify", "b", "--mask", "b")
    with pytest.raises(DataError, match="a folder of text is read with --as text"):
        run("pack", tmp_path, "--out", tmp_path / "set")


def test_a_dry_run_says_what_would_be_written(run, archive, tmp_path):
    out = tmp_path / "set"
    words = ("pack", archive, "--out", out, "--label", "target", "--split", "train=0.8,test=0.2")
    status, text = run(*words, "--dry-run")
    nbytes = 200 * (3 * 4 + 8 + 2 * 8)  # x, target, junk
    assert status == 0 and f"{nbytes:,} bytes; nothing was written" in text
    assert not out.exists()
    assert run(*words)[1].splitlines()[:2] == text.splitlines()[:2]  # the counts


def test_a_dry_run_counts_the_bytes_of_ragged_fields(tmp_path):
    words = Ragged.of([np.zeros(i, np.uint16) for i in range(20)])
    manifest = pack({"word": words}, tmp_path / "set", shard_samples=8, dry_run=True)
    lengths = sum(range(20)) * 2 + (20 + 3) * 8
    assert sum(s.bytes for s in manifest.splits["train"].shards) == lengths


def test_progress_in_a_log(run, archive, tmp_path, monkeypatch):
    """Where nobody watches a terminal: a line now and then, here after every shard."""
    monkeypatch.setattr(data_pack, "LOG_EVERY", 0)
    said = []
    monkeypatch.setattr(data_pack, "print", lambda *words, **_: said.append(*words), raising=False)
    assert run("pack", archive, "--out", tmp_path / "set", "--shard-samples", 50)[0] == 0
    assert said[:4] == [f"packing: {part:4.0%}" for part in (0.25, 0.5, 0.75, 1)]


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


def test_key_group_and_strata(run, tmp_path):
    lines = [f"r{i},p{i % 40},{i},{'yes' if i % 10 == 0 else 'no'}" for i in range(400)]
    (tmp_path / "t.csv").write_text("\n".join(["id,patient,x,label", *lines]))
    words = ["--key", "id", "--group", "patient", "--stratify", "label", "--input", "features"]
    pack = ("pack", tmp_path / "t.csv", "--out", tmp_path / "set", *words, "--shard-samples", 50)
    status, text = run(*pack, "--split", "train=0.7,test=0.3", "--dry-run")
    assert status == 0 and "would hold features (input) float32 1" in text
    assert not (tmp_path / "set").exists()
    status, text = run(*pack, "--split", "train=0.7,test=0.3")
    dataset = open_dataset(tmp_path / "set")
    assert status == 0 and list(dataset.fields) == ["features", "label"]
    counts = [shard.class_counts for shard in dataset.split("train").shards]
    assert (np.ptp(counts, axis=0) <= 1).all()
    train = set((dataset.read("train", "features")[:, 0] % 40).tolist())
    assert not train & set((dataset.read("test", "features")[:, 0] % 40).tolist())
    assert re.search(r"train: \d+ samples in \d shards; classes [\d.]+% [\d.]+%", text)
    assert re.search(r"\d+ \([\d.]+%\) \d+ \([\d.]+%\)", run("info", tmp_path / "set")[1])


def test_missing_numbers_have_a_mask(run, tmp_path):
    (tmp_path / "t.csv").write_text("a,label\n1,x\n,y\n")
    run("pack", tmp_path / "t.csv", "--out", tmp_path / "set")
    assert open_dataset(tmp_path / "set").named("mask") == ["features_missing"]


def test_texts_by_split(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "ham").mkdir(parents=True)
        (tmp_path / name / "ham/a.txt").write_text(name)
        (tmp_path / name / "b.txt").write_text(name)
    words = ["--as", "text", "--label-pattern", "/(ham|b)"]
    sources = [f"train:{tmp_path / 'one'}", f"test:{tmp_path / 'two'}"]
    status, _ = run("pack", *sources, "--out", tmp_path / "set", *words)
    dataset = open_dataset(tmp_path / "set")
    assert status == 0 and dataset.splits == {"train": 2, "test": 2} and dataset.classes == 2
    assert dataset.fields["text"].tokens == 256
    with pytest.raises(UsageError, match="no image|64x64"):
        run("pack", *sources, "--out", tmp_path / "other", "--as", "images", "--size", "8")


def test_packing_under_mpirun_gives_the_same_bytes(archive, tmp_path):
    words = ["data", "pack", archive, "--shard-samples", "30", "--split", "train=0.8,test=0.2"]
    for name, ranks in (("one", 1), ("four", 4)):
        done = mpirun(ranks, "-m", "hpctrain", *map(str, words), "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    files = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "four")
    }
    assert files["one"] == files["four"] and len(files["one"]) > 6


def test_view(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (12, 6, 5)).astype(np.uint8)
    pack({"image": image, "word": np.array(["a", "bc"] * 6)}, tmp_path / "set", shuffle=False)
    status, text = run("view", tmp_path / "set", "-n", 5, "--start", 2, "--png", tmp_path / "a.png")
    assert status == 0 and "train 2\n" in text and "word: bc" in text and "6x5: " in text
    assert text.endswith("a.png: 5 images\n")
    raw = (tmp_path / "a.png").read_bytes()
    width, height = struct.unpack(">2I", raw[16:24])
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and (width, height) == (3 * 7 + 2, 2 * 8 + 2)
    size = struct.unpack(">I", raw[33:37])[0]
    lines = np.frombuffer(zlib.decompress(raw[41 : 41 + size]), np.uint8).reshape(height, -1)
    pixels = lines[:, 1:].reshape(height, width, 3)
    np.testing.assert_array_equal(pixels[2:8, 2:7, 1], image[2])
    np.testing.assert_array_equal(pixels[10:16, 9:14, 0], image[6])
    with pytest.raises(UsageError, match="has 12"):
        run("view", tmp_path / "set", "--start", 12)


def test_view_of_text_tables_and_volumes(run, tmp_path):
    (tmp_path / "a.txt").write_text("hello\nworld " + "x" * 300)
    run("pack", tmp_path / "a.txt", "--out", tmp_path / "text")
    assert r"text: 'hello\nworld xxx" in run("view", tmp_path / "text")[1]
    with pytest.raises(UsageError, match="leave out --png"):
        run("view", tmp_path / "text", "--png", tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("a,b,label\n1.5,,x\n3,4,y\n")
    run("pack", tmp_path / "t.csv", "--out", tmp_path / "table", "--no-shuffle")
    text = run("view", tmp_path / "table")[1]
    assert "features: a=1.5  b=nan\n" in text and "label: y\n" in text
    (tmp_path / "s.fa").write_text(">s\nACGTN\n")
    run("pack", tmp_path / "s.fa", "--out", tmp_path / "dna")
    assert "sequence: ACGTN\n" in run("view", tmp_path / "dna")[1]
    fields = {"v": np.arange(2 * 4 * 6 * 5, dtype=np.int16).reshape(2, 4, 6, 5)}
    pack(fields, tmp_path / "volume")
    assert "2 images" in run("view", tmp_path / "volume", "--png", tmp_path / "v.png")[1]


def test_stage(run, archive, tmp_path):
    run("pack", archive, "--out", tmp_path / "set")
    words = ("stage", tmp_path / "set", "--to", tmp_path / "local")
    status, text = run(*words)
    folder, size = re.match(r"(.*): ([\d,]+) bytes in", text).groups()
    assert status == 0 and int(size.replace(",", "")) > 1000
    assert run("verify", folder)[0] == 0
    assert run(*words)[1] == f"{folder}: there already\n"
