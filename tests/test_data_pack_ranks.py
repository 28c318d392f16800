"""Every kind of source packed by all ranks: the bytes are those of one rank."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from test_data_cli import run  # noqa: F401  (a fixture)
from test_data_readers import write_nifti

from hpctrain.cli import data_pack

pytestmark = [pytest.mark.ranks(4), pytest.mark.slow]


def write_table(folder):
    lines = [f"{i},{i % 3},w{i % 5},{'' if i % 7 == 0 else i / 4}" for i in range(60)]
    (folder / "a.csv").write_text("\n".join(["id,label,word,x", *lines]) + "\n")
    return ["a.csv", "--label", "label", "--key", "id", "--stratify", "label"]


def write_text(folder):
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / f"texts/{i}.txt").write_text(f"document {i}\n" * i)
    return ["texts", "--as", "text"]


def write_images(folder):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(30):
        path = folder / f"images/class{i % 3}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8 + i % 2, 9, 3), np.uint8)).save(path)
    return ["images"]


def write_sequences(folder):
    lines = [f">s{i} Genus{i % 2} species\n{'ACGTN'[i % 5] * (i + 1)}\n" for i in range(40)]
    (folder / "a.fasta").write_text("".join(lines))
    return ["a.fasta", "--label-pattern", "(Genus[0-9])"]


def write_volumes(folder):
    rng = np.random.default_rng(1)
    for i in range(4):
        values = rng.integers(0, 99, (4, 5, 12)).astype(np.int16)
        write_nifti(folder / f"v{i}.nii.gz", values)
    return [*(f"v{i}.nii.gz" for i in range(4)), "--slab", "2"]


def sums(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "write", [write_table, write_text, write_images, write_sequences, write_volumes]
)
def test_bytes_do_not_depend_on_the_number_of_ranks(comm, run, tmp_path, monkeypatch, write):  # noqa: F811
    if write is write_images:
        pytest.importorskip("PIL")  # on all ranks
    folder = comm.bcast(tmp_path)
    words = comm.bcast(write(folder) if comm.rank == 0 else None)
    monkeypatch.chdir(folder)
    more = ["--split", "train=0.7,test=0.3", "--shard-samples", "5", "--block-samples", "2"]
    assert run("pack", *words, *more, "--out", "many")[0] == 0
    assert run("verify", "many")[0] == 0
    comm.Barrier()
    if comm.rank == 0:
        monkeypatch.setattr(data_pack, "launched", lambda: None)
        assert run("pack", *words, *more, "--out", "one")[0] == 0
        found = sums(folder / "one")
        assert len(found) > 4 and found == sums(folder / "many")
    comm.Barrier()
