"""Jobs that tests start end in time, with every process of theirs, and show what went wrong."""

from __future__ import annotations

import subprocess
import sys

from launching import ROOT, end, environment, mpirun, running, session_pids

DEADLOCK = "from mpi4py import MPI; c = MPI.COMM_WORLD; c.rank or c.Barrier(); c.Recv(bytearray(8))"


def test_a_deadlock_ends_and_leaves_no_process():
    with running(2, "-c", DEADLOCK) as job:
        try:
            job.wait(1.5)
        except subprocess.TimeoutExpired:
            assert len(session_pids(job.pid)) >= 3  # the launcher, or two of it, and the ranks
        known = session_pids(job.pid)
        end(job)
        assert job.returncode is not None and not session_pids(job.pid, known)


def test_a_job_past_its_time_is_killed_and_says_so():
    done = mpirun(2, "-c", "import time; print('started', flush=True); time.sleep(60)", timeout=2)
    assert done.returncode == 124
    assert done.stdout.count("started") == 2
    assert done.stdout.endswith("killed: not finished after 2 s\n")


def test_the_user_s_environment_comes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment()["OMP_NUM_THREADS"] == "3"
    assert environment({"OMP_NUM_THREADS": None}).get("OMP_NUM_THREADS") is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment()["OMP_NUM_THREADS"] == "1"


FAILING = """
import pytest

@pytest.mark.ranks(2)
def test_it(comm):
    {body}
    comm.Barrier()
"""


def failing_test(tmp_path, body, limit=60):
    """Run one test on two ranks, with this suite's conftest.py and a limit in seconds."""
    for name in ("conftest.py", "launching.py"):
        text = (ROOT / "tests" / name).read_text()
        (tmp_path / name).write_text(text.replace("False: 60,", f"False: {limit},"))
    test = tmp_path / "test_it.py"
    test.write_text(FAILING.format(body=body))
    return mpirun(2, "-m", "pytest", "-q", "-c", str(ROOT / "setup.cfg"), str(test), timeout=30)


def test_a_failure_on_one_rank_is_shown_and_ends_all(tmp_path):
    done = failing_test(tmp_path, "assert comm.rank != 1, 'only rank one'")
    assert done.returncode == 1
    assert "rank 1 of 2" in done.stdout and "only rank one" in done.stdout


def test_a_warning_is_a_failure(tmp_path):
    done = failing_test(tmp_path, "__import__('warnings').warn('odd')")
    assert done.returncode == 1 and "UserWarning: odd" in done.stdout


def test_a_hanging_test_shows_where(tmp_path):
    done = failing_test(tmp_path, "comm.Recv(bytearray(8))", limit=1)
    assert done.returncode in (1, 255)  # Intel MPI's launcher: 255 whatever the ranks' is
    assert "Timeout (0:00:01)!" in done.stdout and "test_it.py" in done.stdout


def test_this_process_has_no_mpi():
    assert "mpi4py.MPI" not in sys.modules
