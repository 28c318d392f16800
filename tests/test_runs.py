"""Every file in jobs/runs/ trains: two steps, two ranks, random data of its data set's shape."""

from __future__ import annotations

import json

import numpy as np
import pytest
from launching import ROOT, mpirun

from hpctrain.config import from_text
from hpctrain.data import pack

SHAPES = {"digits": (8, 8), "fashion-mnist": (28, 28), "rrna-genes": (256,), "sba-loans": (12,)}
RUNS = sorted((ROOT / "jobs" / "runs").glob("*.toml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_file_trains(path, tmp_path):
    rng = np.random.default_rng(0)
    section = from_text(path.read_text(encoding="utf-8"), str(path)).config.data
    sample = rng.integers(0, 255, (300, *SHAPES[path.stem]), np.uint8)
    fields = {section.input: sample, section.label: rng.integers(0, 10, 300)}
    roles = {section.label: "label"}
    pack(fields, tmp_path / "data", splits={"train": 0.9, "test": 0.1}, roles=roles)

    settings = {"run.folder": tmp_path / "run", "data.path": tmp_path / "data", "run.steps": 2}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = mpirun(2, "-m", "hpctrain", "train", str(path), *options, timeout=120)

    assert done.returncode == 0, done.stdout
    status = json.loads((tmp_path / "run" / "STATUS.json").read_text(encoding="utf-8"))
    assert status["state"] == "finished" and status["step"] == 2
    assert np.isfinite(status["evaluation"]["loss"])
