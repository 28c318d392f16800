"""Disks that are really full, while packing and while staging: a small tmpfs in a namespace.

Each test runs a script in a mount namespace of its own, which ends with it: nothing stays mounted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from launching import ROOT, environment

from hpctrain.data import open_dataset, pack, verify

pytestmark = pytest.mark.slow
OWN = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture
def on_small_disk(tmp_path):
    """Run lines of shell where $DISK is a tmpfs with the given options; their output."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tried = ["sh", "-c", f"mount -t tmpfs none {disk}"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*OWN, *tried], capture_output=True).returncode
    ):
        pytest.skip("a file system cannot be mounted in a namespace here (unshare --mount)")

    def run(options, *lines):
        begin = [f"mount -t tmpfs -o {options} none {disk}", f"export DISK={disk}", *FUNCTIONS]
        done = subprocess.run(
            [*OWN, "sh", "-c", "\n".join([*begin, *lines])], cwd=ROOT, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(),
        )  # fmt: skip
        return done.stdout

    return run


FUNCTIONS = (
    f'data() {{ {sys.executable} -m hpctrain data "$@"; echo "status $?"; }}',
    'dates() { find "$DISK/set" "$DISK"/*/train -name "*.h5" -printf "%f %T@\\n" | sort -u; }',
)


@pytest.fixture
def source(tmp_path):
    """6 MiB of numbers that do not compress: 6 shards of 1 MiB."""
    numbers = np.random.default_rng(0).integers(0, 256, (6144, 1024), np.uint8)
    np.save(tmp_path / "x.npy", numbers)
    return tmp_path / "x.npy"


@pytest.mark.parametrize("ranks", [1, 2])
def test_packing_onto_a_full_disk_and_going_on(on_small_disk, source, ranks):
    """There is room for 3 shards and some of the next: they are kept, no manifest is written."""
    launch = f"timeout 60 mpirun -n {ranks} " if ranks > 1 else ""
    pack_it = f"data pack {source} --out $DISK/set --shard-samples 1024"
    functions = f'data() {{ {launch}{sys.executable} -m hpctrain data "$@"; echo "status $?"; }}'
    said = on_small_disk(
        "size=8m", functions, "head -c 4800000 /dev/zero > $DISK/filler", pack_it,
        "echo FULL; ls $DISK/set $DISK/set/train; dates > $DISK/../before",
        "echo LATER", "data info $DISK/set", pack_it,
        "rm $DISK/filler; echo RESUMED", pack_it + " --resume", "data verify $DISK/set",
        "dates > $DISK/../after; echo kept $(wc -l < $DISK/../before)",
        "echo changed $(comm -23 $DISK/../before $DISK/../after)",
    )  # fmt: skip
    first, rest = said.split("FULL")
    listed, rest = rest.split("LATER")
    later, resumed = rest.split("RESUMED")
    assert "No space left on device" in first and "is the disk full? Make room" in first
    assert "cannot write" in first and ".h5.part" in first and "Traceback" not in first
    assert "status 0" not in first
    assert "manifest.json" not in listed and ".part" not in listed
    assert "packing was not finished" in later and "--resume keeps those that are right" in later
    assert "status 0" not in later
    assert resumed.count("status 0") == 2 and "sound; 6144 samples in 6 shards" in resumed
    *_, kept, changed = resumed.splitlines()
    assert kept in ("kept 2", "kept 3") and changed == "changed"  # whole shards are as they were


@pytest.fixture
def packed(source, tmp_path):
    pack({"x": np.load(source)}, tmp_path / "set", shard_samples=1024)
    return tmp_path / "set"


def test_staging_onto_a_disk_that_is_too_small(on_small_disk, packed):
    said = on_small_disk("size=20m", f"data stage {packed} --to $DISK", "find $DISK -type f")
    assert "bytes are to be copied and" in said and "stage to another disk, or train from" in said
    assert "Traceback" not in said and said.splitlines()[-1].startswith("status ")
    assert not said.endswith("status 0\n")  # and no file is left


def test_staging_onto_a_disk_that_fills_up_and_going_on(on_small_disk, packed):
    """Bytes are free, but room for no more than 3 files: what the check before cannot see."""
    said = on_small_disk(
        "size=64m,nr_inodes=6", f"data stage {packed} --to $DISK",
        "echo FULL; find $DISK -type f -printf '%f\\n'",
        "mount -o remount,nr_inodes=40 $DISK; echo RESUMED", f"data stage {packed} --to $DISK",
        "data verify $DISK/*/",
    )  # fmt: skip
    first, rest = said.split("FULL")
    full, resumed = rest.split("RESUMED")
    assert "cannot copy" in first and "No space left on device" in first
    assert "is the disk full?" in first and "Traceback" not in first
    assert "manifest.json" not in full and ".part" not in full and "shard-00000.h5" in full
    assert resumed.count("status 0") == 2 and "sound; 6144 samples in 6 shards" in resumed
    copied = int(resumed.split(" bytes in ")[0].split(": ")[-1].replace(",", ""))
    whole = sum(shard.bytes for shard in open_dataset(packed).split("train").shards)
    assert 0 < copied < whole  # the files that were whole are used
    assert list(verify(packed)) == []
