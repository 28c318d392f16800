"""What ends a run how, under the MPI that is installed: the table of docs/jobs.md, row by row.

`tools/check --mpi NAME tests/test_train_signals.py --slow -s` prints the column of another MPI.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from launching import running, session_pids
from stop_table import EVENTS, documented, outcome
from test_train_resume import is_rank, wait_for
from training import make_digits, run_file

pytestmark = pytest.mark.slow
SIGNALS = {"USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2, "TERM": signal.SIGTERM}
# What MPI.Get_library_version() begins with, and the table's name of it. Debian's Open MPI is 4.
LIBRARIES = {
    "Open MPI v5": "Open MPI 5",
    "Open MPI v4": "Open MPI 4",
    "MPICH": "MPICH 5",
    "Intel": "Intel MPI",
}


@pytest.fixture(scope="module")
def launcher():
    """The name of the MPI in the table; asked of another process, as MPI is not started here."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    name = next((name for start, name in LIBRARIES.items() if done.stdout.startswith(start)), "")
    if not name:
        pytest.skip(f"the table has no column for {done.stdout[:40]!r}")
    return name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.mark.parametrize("event", EVENTS)
def test_what_ends_a_run_is_as_the_page_says(tmp_path, data, launcher, event):
    file = run_file(tmp_path / "run.toml", data, more="[checkpoint]\nevery_epochs = 0\n")
    command = ["train", str(file), "--set", "run.epochs=100000"]
    if "limit" in event:
        command += ["--stop-after", "4s", "--stop-margin", "0.5"]
    with running(3, "-m", "hpctrain", *command) as job:
        wait_for((tmp_path / "run/STATUS.json").exists, 120)
        if "STOP" in event:
            (tmp_path / "run/STOP").touch()
        elif "limit" not in event:
            number = SIGNALS[event.partition(" ")[0]]
            ranks = [pid for pid in session_pids(job.pid) if is_rank(pid)]
            os.kill(ranks[-1] if "rank" in event else job.pid, number)
        text, _ = job.communicate(timeout=120)
        assert not [pid for pid in session_pids(job.pid) if is_rank(pid)]
    found = outcome(job.returncode, tmp_path / "run")
    print(f"\n{launcher}: | {event} | {found} |")
    assert found == documented(launcher)[event] and job.returncode != 0, text
