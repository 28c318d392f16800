"""Small training runs for tests: a data set, run files, and what a run recorded.

Knows nothing of what the tests assert.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from launching import mpirun

from hpctrain.data import pack

__all__ = ["MODELS", "hpctrain", "make_digits", "records", "run_file", "steps"]

MODELS = {
    "mlp": 'name = "mlp"\nhidden = [32]\nnorm = "batch"\ndropout = 0.3\nactivation = "gelu"',
    "convnet": 'name = "convnet"\nwidths = [4, 8]\ndropout = 0.1',
}


def make_digits(folder: Path, samples: int = 400) -> Path:
    """The first of scikit-learn's 8 x 8 digits as a packed data set with small, uneven shards."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    fields = {
        "image": digits.images[:samples].astype(np.uint8),
        "label": digits.target[:samples].astype(np.int32),
    }
    pack(fields, folder, splits={"train": 0.75, "test": 0.25}, block_samples=16, shard_samples=112)
    return folder


def run_file(path: Path, data: Path, model: str = "mlp", more: str = "") -> Path:
    """A run file beside its run folder; `more` is appended, for further sections."""
    path.write_text(
        f'[data]\npath = "{data}"\n[model]\n{MODELS[model]}\n'
        f'[run]\nfolder = "{path.parent / "run"}"\nepochs = 3\ndtype = "float64"\n'
        "[batch]\nsize = 40\nmicrobatch = 8\n" + more
    )
    return path


def hpctrain(
    ranks: int, *arguments: str | Path, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`hpctrain *arguments` under mpirun; standard output and error together in `.stdout`."""
    command = ("-m", "hpctrain", *map(str, arguments))
    return mpirun(ranks, *command, timeout=timeout, env=environment)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def steps(folder: Path) -> list[float]:
    """The loss of every step; also checks that steps are 0, 1, 2, ... without gap or repeat."""
    found = records(folder, "step")
    assert [record["step"] for record in found] == list(range(len(found)))
    return [record["loss"] for record in found]
