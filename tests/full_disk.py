"""A run whose folder is on a disk that fills up; started in a mount namespace by test_full_disk.py.

    python full_disk.py RUN.toml FOLDER LEFT

FOLDER is a small file system of its own. Trains to step 10, fills the disk but for LEFT bytes, goes
on to step 20, makes room, goes on again; prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from checkpoint_cases import ALONE
from training import hpctrain, steps

from hpctrain.checkpoint import latest_valid


def main(run_file: str, folder: str, left: str) -> None:
    """See above."""
    run = Path(folder, "run")
    common = ["train", run_file, "--set", f"run.folder={run}", "--set", "checkpoint.every_steps=5"]
    first = hpctrain(2, *common, "--set", "run.steps=10")
    fill = Path(folder, "fill")
    with fill.open("wb", buffering=0) as file:
        space = os.statvfs(folder)
        file.write(bytes(max(space.f_bavail * space.f_frsize - int(left), 0)))
    longer = [*common, "--set", "run.steps=20", "--resume", "auto"]
    full = hpctrain(2, *longer)
    valid = latest_valid(run / "checkpoints", ALONE)
    parts = [path.name for path in run.rglob(".*.part")]
    fill.unlink()
    again = hpctrain(2, *longer)
    told = {
        "codes": [first.returncode, full.returncode, again.returncode],
        "text": full.stdout,
        "again": again.stdout,
        "valid": valid.name if valid else "",
        "parts": parts,
        "steps": len(steps(run)),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
