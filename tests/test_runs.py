"""Every file in jobs/runs/ trains: two steps, two ranks, random data of its data set's shape."""

from __future__ import annotations

import json

import numpy as np
import pytest
from launching import ROOT, mpirun

from hpctrain.config import from_text
from hpctrain.data import Ragged, pack

SHAPES = {"digits": (8, 8), "fashion-mnist": (28, 28), "rrna-genes": (256,), "sba-loans": (12,)}
HALVES = {"train": 0.9, "test": 0.1}
RUNS = sorted((ROOT / "jobs" / "runs").glob("*.toml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_file_trains(path, tmp_path):
    section = from_text(path.read_text(encoding="utf-8"), str(path)).config.data
    pack_random(path.stem, section, tmp_path / "data")

    settings = {"run.folder": tmp_path / "run", "data.path": tmp_path / "data", "run.steps": 2}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = mpirun(2, "-m", "hpctrain", "train", str(path), *options, timeout=120)

    assert done.returncode == 0, done.stdout
    status = json.loads((tmp_path / "run" / "STATUS.json").read_text(encoding="utf-8"))
    assert status["state"] == "finished" and status["step"] == 2
    assert not section.test or np.isfinite(status["evaluation"]["loss"])


def pack_random(name, section, folder):
    """Random data of the shape that a run file is for."""
    rng = np.random.default_rng(0)
    if section.text_window:
        text = [rng.integers(1, 256, 600, np.uint8) for _ in range(40)]
        pack({section.input: Ragged.of(text)}, folder, splits=HALVES, tokens={section.input: 256})
        return
    if section.patch:
        volumes = {n: rng.integers(0, 100, (8, 20, 21, 22), np.uint8) for n in ("t1", "atlas")}
        pack(volumes, folder, splits={"train": 0.5, "test": 0.5}, roles={section.label: "label"})
        return
    sample = rng.integers(0, 255, (300, *SHAPES[name]), np.uint8)
    fields = {section.input: sample, section.label: rng.integers(0, 10, 300)}
    pack(fields, folder, splits=HALVES, roles={section.label: "label"})
