"""A disk that really fills up under a run: the code, the message, and going on afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from launching import ROOT, environment
from training import make_digits, run_file

pytestmark = pytest.mark.slow
MOUNT = 'mount -t tmpfs -o size=3m tmpfs "$1" && shift && exec "$@"'


def namespaces():
    """Whether this user may make a mount namespace and mount in it."""
    unshare = shutil.which("unshare")
    probe = [unshare, "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(unshare) and subprocess.run(probe, capture_output=True).returncode == 0


# Nothing fits; the metrics fit, and a checkpoint does not.
@pytest.mark.parametrize(
    ("left", "told"),
    [
        (0, "run/metrics.jsonl cannot be written: No space left on device; make room"),
        (65536, "checkpoint step_00000015 cannot be written to {disk}/run/checkpoints: 1.4 MB are"),
    ],
)
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(tmp_path, left, told):
    if not namespaces():
        pytest.skip("needs root and mount namespaces (unshare -m)")
    run = run_file(tmp_path / "run.toml", make_digits(tmp_path / "data"))
    run.write_text(run.read_text().replace("hidden = [32]", "hidden = [256]"))
    disk = tmp_path / "disk"
    disk.mkdir()
    program = [sys.executable, str(ROOT / "tests/full_disk.py"), str(run), str(disk), str(left)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", MOUNT, "sh", str(disk), *program],
        env=environment({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["codes"] == [0, 1, 0], found["text"] + found["again"]
    assert told.format(disk=disk) in found["text"] and "make room" in found["text"]
    assert "Traceback" not in found["text"]
    assert found["valid"] == "step_00000010" and found["parts"] == []
    assert found["steps"] == 20
