"""Real data sets, packed as the head of their run files says, verified, loaded, trained on.

Nothing is downloaded: a set is skipped where its files are not found. They are looked for below
HPCTRAIN_REAL_DATA (packages unpacked there) and where the packages install them.
"""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT
from test_data_cli import run  # noqa: F401  (a fixture)
from training import hpctrain
from training import steps as losses_of

from hpctrain.data import Loader, Patches, Windows, open_dataset

pytestmark = pytest.mark.slow
ROOTS = [Path(p) for p in (os.environ.get("HPCTRAIN_REAL_DATA", "/nowhere"), "/")]
BRAIN = "usr/share/mricron/templates"


def found(*places):
    """The first of some files that is there, or skip."""
    for root in ROOTS:
        for place in places:
            if (root / place).exists():
                return root / place
    pytest.skip(f"{places[0]} is not here: unpack its package below $HPCTRAIN_REAL_DATA")


def sound(run, folder):  # noqa: F811
    status, text = run("verify", folder)
    assert status == 0 and "sound" in text
    return open_dataset(folder)


def trained(name, data, folder, steps, *settings):
    """Losses of a run file's first steps on two ranks, and its evaluation."""
    values = {"data.path": data, "run.folder": folder / "run", "run.steps": steps}
    words = [f"{key}={value}" for key, value in values.items()] + list(settings)
    options = [word for setting in words for word in ("--set", setting)]
    done = hpctrain(2, "train", ROOT / "jobs/runs" / f"{name}.toml", *options, timeout=280)
    assert done.returncode == 0, done.stdout
    status = json.loads((folder / "run/STATUS.json").read_text(encoding="utf-8"))
    losses = losses_of(folder / "run")
    assert len(losses) == steps and np.mean(losses[-5:]) < np.mean(losses[:5])
    return status["evaluation"]


def commonest(split):
    """The part of a split that is of its commonest class: what guessing would get right."""
    counts = np.array([shard.class_counts for shard in split.shards]).sum(axis=0)
    return counts.max() / counts.sum()


def test_fashion_mnist(run, tmp_path):  # noqa: F811
    first = found("usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
    sources = [
        f"{split}:{field}={first.with_name(f'{file}-{kind}-ubyte.gz')}"
        for split, file in (("train", "train"), ("test", "t10k"))
        for field, kind in (("image", "images-idx3"), ("label", "labels-idx1"))
    ]
    assert run("pack", *sources, "--out", tmp_path / "set")[0] == 0
    dataset = sound(run, tmp_path / "set")
    assert dataset.splits == {"train": 60_000, "test": 10_000} and dataset.classes == 10
    accuracy = trained("fashion-mnist", tmp_path / "set", tmp_path, 60)["accuracy"]
    assert accuracy > 0.3  # guessing: 0.1


def test_sba_loans(run, tmp_path):  # noqa: F811
    table = found("train.csv", "gbc_model/datasets/train.csv", "sba/gbc_model/datasets/train.csv")
    out = tmp_path / "set"
    drop = ["ChgOffDate", "ChgOffPrinGr", "BalanceGross", "Name", "City", "Bank", "ApprovalDate",
            "DisbursementDate"]  # fmt: skip
    words = ["--label", "MIS_Status", "--require", "MIS_Status", "--key", "LoanNr_ChkDgt",
             "--stratify", "MIS_Status", "--split", "train=0.8,test=0.2"]  # fmt: skip
    for column in drop:
        words += ["--drop", column]
    assert run("pack", table, "--out", out, *words, "--shard-samples", "100000")[0] == 0
    dataset = sound(run, out)
    assert sum(dataset.splits.values()) == 899_164 - 1_997
    counts = np.array([s.class_counts for s in dataset.split("train").shards])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert abs(counts.sum(0)[0] / counts.sum() - 0.1756) < 0.001
    assert "DisbursementGross" in [c.name for c in dataset.fields["features"].columns]
    loader = Loader(dataset, "train", 4096, order="balanced-v1", fields=["MIS_Status"])
    rate = next(iter(loader.epoch(0))).fields["MIS_Status"].mean()
    assert abs(rate - 0.5) < 0.04
    assert trained("sba-loans", out, tmp_path, 200)["accuracy"] > 0.84  # always "paid": 0.824


def test_rrna_genes(run, tmp_path):  # noqa: F811
    index = found(
        "usr/share/ncbi/data/Combined16SrRNA.nin", "deb/usr/share/ncbi/data/Combined16SrRNA.nin"
    )
    assert run("pack", index, "--out", tmp_path / "all", "--no-shuffle")[0] == 0
    dataset = sound(run, tmp_path / "all")
    values = [shard.values["sequence"] for shard in dataset.split("train").shards]
    assert dataset.splits == {"train": 220_243} and sum(values) == 333_049_215
    pattern = " (?!Uncultured|Unidentified|Marine)([A-Z][a-z]+) [a-z]+"
    words = ["--label-pattern", pattern, "--label-least", "100", "--kmers", "4",
             "--split", "train=0.8,test=0.2"]  # fmt: skip
    assert run("pack", index, "--out", tmp_path / "genera", *words)[0] == 0
    genera = sound(run, tmp_path / "genera")
    assert genera.classes > 100 and genera.fields["kmers"].shape == (256,)
    assert "Bacillus" in genera.fields["label"].vocab
    most = commonest(genera.split("test"))
    accuracy = trained("rrna-genes", tmp_path / "genera", tmp_path, 200)["accuracy"]
    assert most < 0.1 < 0.5 < accuracy


def test_standard_library_as_text(run, tmp_path):  # noqa: F811
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        path for path in sorted(folder.glob("*/")) if path.name in ("json", "email", "idlelib")
    ]
    out = tmp_path / "set"
    split = ["--split", "train=0.9,test=0.1", "--shard-samples", "100"]
    assert run("pack", *sources, "--as", "text", "--out", out, *split)[0] == 0
    dataset = sound(run, out)
    files = [path for source in sources for path in source.rglob("*.py")]
    assert sum(dataset.splits.values()) >= len(files) > 100
    loader = Loader(dataset, "train", 64, 16, view=Windows("text", 128))
    seen = np.concatenate([b.fields["text"][:, :-1].ravel() for b in loader.epoch(0)])
    total = sum(shard.values["text"] for shard in dataset.split("train").shards)
    assert 0 <= total - len(seen) < 2 * 128 * len(dataset.split("train").shards)
    assert (seen < 128).mean() > 0.99 and (seen == ord(" ")).mean() > 0.1
    evaluation = trained("standard-library", out, tmp_path, 60, "data.node_cache_mib=1")
    assert evaluation["loss"] < 3.5 and evaluation["accuracy"] > 0.2  # of 256 bytes; spaces: 0.2


def test_brain_with_its_atlas(run, tmp_path):  # noqa: F811
    head = found(f"{BRAIN}/ch2.nii.gz", f"deb/{BRAIN}/ch2.nii.gz")
    out = tmp_path / "set"
    sources = [f"t1={head}", f"atlas={head.with_name('aal.nii.gz')}"]
    assert run("pack", *sources, "--out", out, "--label", "atlas")[0] == 0
    dataset = sound(run, out)
    assert dataset.fields["t1"].shape == dataset.fields["atlas"].shape == (181, 217, 181)
    assert dataset.fields["atlas"].stats.max == 116
    view = Patches((32, 32, 32))
    loader = Loader(dataset, "train", 8, 2, fields=["t1", "atlas"], view=view, window=2)
    t1, atlas = (dataset.read("train", name)[0] for name in ("t1", "atlas"))
    for batch in loader.epoch(0):
        for sample, patch, regions in zip(
            batch.samples, batch.fields["t1"], batch.fields["atlas"], strict=True
        ):
            _, x, y, z = loader._view.corner(int(sample))
            box = np.s_[x : x + 32, y : y + 32, z : z + 32]
            np.testing.assert_array_equal(patch, t1[box])
            np.testing.assert_array_equal(regions, atlas[box])
    assert loader.samples == 6 * 7 * 6
    cut = ["--label", "atlas", "--slab", "9", "--split", "train=0.6,test=0.4"]
    assert run("pack", *sources, "--out", tmp_path / "slabs", *cut)[0] == 0
    slabs = sound(run, tmp_path / "slabs")
    assert sum(slabs.splits.values()) == 181 // 9 and slabs.splits["test"] == 5
    assert slabs.fields["t1"].shape == (181, 217, 9)
    assert trained("brain", tmp_path / "slabs", tmp_path, 40)["loss"] < 2.5  # guessing: 4.8
