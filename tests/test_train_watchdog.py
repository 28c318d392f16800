"""Hangs end with 124, in time, and the right rank is named."""

import json
import os
import signal
import time

import pytest
from launching import ROOT, mpirun, running, session_pids
from test_train_resume import is_rank, wait_for
from training import make_digits, run_file

from hpctrain.mpi.calls import Log, compact, expand
from hpctrain.train.verdict import silent_nodes, verdict
from hpctrain.train.watchdog import Watchdog

SCRIPT = str(ROOT / "tests" / "hanging_run.py")


def hangs(tmp_path, what):
    # Open MPI leaves its own 16 MiB files behind when a job is aborted: not in /dev/shm, please.
    left = {"OMPI_MCA_btl_sm_backing_directory": str(tmp_path)}
    done = mpirun(3, SCRIPT, str(tmp_path / "run"), what, timeout=25, env=left)
    assert done.returncode == 124 and "killed" not in done.stdout, done.stdout
    assert "ended" not in done.stdout
    return done.stdout


def test_a_rank_that_is_stuck_in_io_is_named_with_its_place(tmp_path):
    text = hangs(tmp_path, "skipped")
    assert "ranks 0,2 in Barrier #7 of ranks 0-2 (1)" in text
    assert "rank 1 did not enter it" in text
    assert "blocked outside MPI" in text and "in stuck_reading" in text
    for rank in range(3):
        stacks = (tmp_path / f"run/hang/rank{rank}.txt").read_text()
        assert json.loads(stacks.partition("\n")[0])["rank"] == rank
        assert ("stuck_reading" in stacks) == (rank == 1) and "in main" in stacks
    assert "rank 1" in json.loads((tmp_path / "run/STATUS.json").read_text())["error"]
    assert (tmp_path / "run/bad_nodes.txt").read_text() == ""  # the node gave signs of life


@pytest.mark.slow
def test_a_rank_that_computes_is_named_and_waited_for_but_not_for_ever(tmp_path):
    text = hangs(tmp_path, "busy")
    assert text.count("the run goes on; it ends in") == 1
    slow, _, ended = text.partition("the run goes on; it ends in")
    assert "but rank 1 is computing" in slow and "so slow rather than hung" in slow
    assert "but rank 1 is computing" in ended and "stacks of the ranks are in" in ended


def test_ranks_wait_for_one_that_gets_on_for_long(tmp_path):
    """For longer than the limit, without MPI and without a core of its own: as a drain does."""
    done = mpirun(3, SCRIPT, str(tmp_path / "run"), "alive", timeout=40)
    assert done.returncode == 0 and done.stdout.count("ended") == 3, done.stdout
    assert "nothing has gone on" not in done.stdout
    assert not (tmp_path / "run/hang/verdict.txt").exists()


def test_a_skipped_collective_is_found_among_several(tmp_path):
    text = hangs(tmp_path, "other")
    assert "Barrier #7 of ranks 0-2 (1)" in text  # which rank 1 has left out
    assert "rank 1 did not enter it" in text
    assert "rank 1 in Barrier #5 of ranks 0-1 (1)" in text  # because it is here
    assert "rank 0 did not enter it" in text


def test_a_run_that_goes_on_is_left_alone(tmp_path):
    done = mpirun(2, SCRIPT, str(tmp_path / "run"), "fine", timeout=25)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ended") == 2
    assert not (tmp_path / "run").exists()


def test_a_stopped_rank_ends_a_training_run_with_124(tmp_path):
    data = make_digits(tmp_path / "data")
    file = run_file(tmp_path / "run.toml", data, more="[checkpoint]\nevery_epochs = 0\n")
    left = {"OMPI_MCA_btl_sm_backing_directory": str(tmp_path)}
    command = ("train", str(file), "--set", "run.epochs=5000", "--hang-after", "2s")
    with running(3, "-m", "hpctrain", *command, env=left) as job:
        wait_for((tmp_path / "run/STATUS.json").exists)
        stopped = [pid for pid in session_pids(job.pid) if is_rank(pid)][1]
        rank = int(rank_of(stopped))
        os.kill(stopped, signal.SIGSTOP)
        begun = time.monotonic()
        text, _ = job.communicate(timeout=30)
        assert time.monotonic() - begun < 20
        assert job.returncode == 124, text
    assert "did not enter it" in text, text
    assert f"rank {rank} (" in text and "no sign of life" in text
    assert text.count("no sign of life") <= 2  # told by one rank; on a slow machine by both
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "failed"


def rank_of(pid):
    with open(f"/proc/{pid}/environ") as file:  # noqa: PTH123
        words = dict(word.partition("=")[::2] for word in file.read().split("\0"))
    return words.get("OMPI_COMM_WORLD_RANK") or words["PMI_RANK"]


def record(rank, inside="Bcast", group="0-3 (1)", number=7, counts=None, cpu=0.0):
    return {
        "rank": rank, "inside": inside, "last": "Bcast", "group": group, "number": number,
        "counts": counts or {group: number}, "cpu": cpu, "at": "x.py:1 in f",
    }  # fmt: skip


def test_verdict_on_silent_ranks_and_nodes():
    found = {0: record(0), 1: record(1)}
    text = "\n".join(verdict(found, ["a", "a", "b", "b"], 600))
    assert "nothing has gone on for 600 s" in text
    assert "ranks 0-1 in Bcast #7 of ranks 0-3 (1)\n  ranks 2-3 did not enter it" in text
    assert "rank 2 (b): no sign of life" in text
    assert silent_nodes(found, ["a", "a", "b", "b"]) == ["b"]
    assert silent_nodes(found, ["a", "a", "a", "b"]) == ["b"]
    assert silent_nodes({}, ["a", "b"]) == []


def test_verdict_on_ranks_that_disagree_about_a_collective():
    found = {rank: record(rank) for rank in range(3)} | {3: record(3, inside="Allgather")}
    text = "\n".join(verdict(found, ["a"] * 4, 600))
    assert "ranks 0-3 in Allgather and Bcast #7" in text
    assert "rank 3 (a): waits in Allgather; at x.py:1 in f" in text


def test_a_suspended_job_is_not_a_hang(monkeypatch, tmp_path):
    """The clock jumps by an hour in one tick: everything was stopped."""
    ended = []
    jumps = iter([0, 0, 3600] + [3600] * 10**6)
    real = time.monotonic
    monkeypatch.setattr("hpctrain.train.watchdog.time.monotonic", lambda: real() + next(jumps))
    with Watchdog(Log(), tmp_path, 0, ["a"], 30, ended.append) as dog:
        dog._tick = 0.05
        time.sleep(0.4)
    assert not ended and not (tmp_path / "hang").exists()


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2], [0, 2, 3, 9], [5, 4]])
def test_lists_of_ranks(ranks):
    assert expand(compact(ranks) + " (2)") == ranks


@pytest.mark.ranks(2, 3)
def test_watched_communicators_count_and_their_children_too(comm):
    from hpctrain.mpi.watched import watch

    log = Log()
    watched = watch(comm, log)
    everyone = compact(range(comm.size))
    assert watched.allreduce(1) == comm.size and watched.bcast(comm.rank) == 0
    twin = watched.Dup()
    twin.Barrier()
    assert log.counts == {f"{everyone} (1)": 3, f"{everyone} (2)": 1}
    half = twin.Split(comm.rank % 2, comm.rank)
    half.Barrier()
    mine = compact(range(comm.rank % 2, comm.size, 2))
    assert (log.last, log.group, log.inside) == ("Barrier", f"{mine} (1)", "")
    assert log.seconds > 0 and log.events == 12
    half.Free()
    twin.Free()
