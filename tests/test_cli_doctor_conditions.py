"""`hpctrain doctor` where things are really wrong: file systems, compiler, filters, cores.

One report of a mount namespace in which everything is wrong at once; every line of it is a test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from launching import ROOT, environment, mpirun

SCRIPT = """
set -e
mount -t tmpfs -o size=8m tmpfs /dev/shm
mount --bind "$HOME" "$HOME"
mount -o remount,ro,bind "$HOME"
mount -t tmpfs -o size=64k tmpfs "$FULL"
head -c 100000 /dev/zero >"$FULL/fill" 2>/dev/null || true
exec "$@"
"""
DOCTOR = (
    "import h5py, sys; h5py.h5z.unregister_filter(h5py.h5z.FILTER_LZF); "
    "from hpctrain.cli.main import main; sys.exit(main(['doctor', *sys.argv[1:]]))"
)
# Section, line, status, a part of the value, a part of the remedy.
WRONG = [
    ("Shared memory", "/dev/shm", "warn", "8 MB free of 8;", "--shm-size"),
    ("Memory and folders", "home", "note", "home (", "HPCTRAIN_CACHE"),
    ("Memory and folders", "home", "note", "Read-only file system", "CUPY_CACHE_DIR"),
    ("Memory and folders", "run directory", "FAIL", "No space left on device", "run.folder"),
    ("HDF5", "file locking", "FAIL", "No space left on device", "--folder"),
    ("HDF5", "filters", "note", "missing: lzf", "h5py from PyPI"),
    ("C++ compiler", "compiler", "warn", "none in PATH", "install g++"),
    ("C++ compiler", "kernels", "FAIL", "not in the cache", "install a C++ compiler"),
    ("BLAS and threads", "cores", "warn", "OMP_NUM_THREADS=9999", "set OMP_NUM_THREADS to at most"),
]


def namespaces():
    """Whether this user may make a mount namespace and mount in it."""
    unshare = shutil.which("unshare")
    probe = [unshare, "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(unshare) and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if not namespaces():
        pytest.skip("needs root and mount namespaces (unshare -m)")
    place = tmp_path_factory.mktemp("wrong")
    for name in ("home", "full", "bin"):
        (place / name).mkdir()
    for name in ("mount", "head", "sh"):
        (place / "bin" / name).symlink_to(shutil.which(name))
    changes = {
        "HOME": str(place / "home"),
        "FULL": str(place / "full"),
        "PATH": str(place / "bin"),
        "OMP_NUM_THREADS": "9999",
        **dict.fromkeys(("CXX", "HPCTRAIN_CACHE", "XDG_CACHE_HOME")),
    }
    program = [sys.executable, "-c", DOCTOR, "--json", "--folder", str(place / "full")]
    done = subprocess.run(
        [shutil.which("unshare"), "-m", "sh", "-c", SCRIPT, "sh", *program],
        env=environment(changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("section", "what", "status", "value", "remedy"), WRONG)
def test_what_is_wrong_is_found(report, section, what, status, value, remedy):
    found = next(f for f in report["findings"] if (f["section"], f["what"]) == (section, what))
    assert found["status"] == status
    assert value in found["value"] and remedy in found["remedy"]


def test_more_ranks_than_cores_are_found():
    """Both ranks on one core."""
    core = min(os.sched_getaffinity(0))
    done = mpirun(2, "-c", f"import os; os.sched_setaffinity(0, [{core}]); {DOCTOR}")
    assert "[warn] cores: 1 for this rank, 1 for the 2 ranks of its node" in done.stdout
    assert "start fewer ranks per node" in done.stdout
