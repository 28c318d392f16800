"""Stopping early and going on: signals, time limits, the files STOP, SAVE and DONE."""

import json
import os
import signal
import time

import numpy as np
import pytest
from launching import mpirun, running, session_pids
from test_train_resume import is_rank, wait_for
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.config import from_text
from hpctrain.errors import UsageError
from hpctrain.train import stop
from hpctrain.train.stop import Limits, Stopping, at_start, limits, mark_done, seconds_of

LONG = "[checkpoint]\nevery_epochs = 0\n"
MINIMAL = '[data]\npath = "d"\n[model]\nname = "mlp"\n'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data")


def status(folder):
    return json.loads((folder / "run/STATUS.json").read_text())


def config(more=""):
    return from_text(MINIMAL + more).config


def begun(folder):
    """A step was recorded or reported: the run is in its loop."""
    return lambda: (folder / "run/STATUS.json").exists()


def test_signal_to_mpirun_stops_with_75_and_the_run_goes_on_the_same(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, more=LONG)
    long = ("--set", "run.epochs=150")
    with running(2, "-m", "hpctrain", "train", str(file), *long) as job:
        wait_for(begun(tmp_path))
        os.kill(job.pid, signal.SIGUSR1)
        text, _ = job.communicate(timeout=30)
    assert job.returncode == 75, text
    found = status(tmp_path)
    assert (found["state"], found["reason"]) == ("resubmit", "a signal")
    at = found["step"]
    assert (tmp_path / f"run/checkpoints/step_{at:08d}/state.json").is_file()
    assert len(steps(tmp_path / "run")) == at < 1200
    more = ("--set", f"run.steps={at + 10}", "--resume", "auto")
    done = hpctrain(3, "train", file, *long, *more)
    assert done.returncode == 0, done.stdout
    whole = run_file(tmp_path / "whole.toml", data, more=LONG)
    folder = ("--set", f"run.folder={tmp_path / 'whole'}", *long, *more[:2])
    assert hpctrain(1, "train", whole, *folder).returncode == 0
    np.testing.assert_allclose(steps(tmp_path / "run"), steps(tmp_path / "whole"), rtol=1e-9)


def test_signal_to_one_rank_stops_all(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, more=LONG)
    with running(3, "-m", "hpctrain", "train", str(file), "--set", "run.epochs=1000") as job:
        wait_for(begun(tmp_path))
        ranks = [pid for pid in session_pids(job.pid) if is_rank(pid)]
        os.kill(ranks[-1], signal.SIGUSR2)
        text, _ = job.communicate(timeout=30)
    assert job.returncode == 75, text
    assert "stopped after" in text and "--resume auto" in text


LEAVING = """
import os, signal, sys
from mpi4py import MPI
from hpctrain.train.stop import leave
code = leave(MPI.COMM_WORLD)
os.kill(os.getpid(), signal.SIGTERM)  # as srun does when another rank has ended with 75
sys.exit(code)
"""


def test_a_rank_that_leaves_with_75_does_so_whatever_the_launcher_sends(tmp_path):
    assert mpirun(2, "-c", LEAVING).returncode == 75


def test_files_save_and_stop(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, more=LONG)
    command = ("train", str(file), "--resume", "auto", "--set", "run.epochs=3000")
    with running(2, "-m", "hpctrain", *command) as job:
        wait_for(begun(tmp_path))
        (tmp_path / "run/SAVE").touch()
        wait_for(lambda: not (tmp_path / "run/SAVE").exists())
        assert job.poll() is None
        saved = list((tmp_path / "run/checkpoints").glob("step_*"))
        assert len(saved) == 1
        (tmp_path / "run/STOP").touch()
        text, _ = job.communicate(timeout=30)
    assert job.returncode == 75, text
    assert status(tmp_path)["state"] == "stopped"
    again = hpctrain(2, *command)
    assert again.returncode == 75
    assert "STOP is there; remove it to go on" in again.stdout
    (tmp_path / "run/STOP").unlink()
    at = status(tmp_path)["step"]
    done = hpctrain(2, *command, "--set", f"run.steps={at + 1}")
    assert done.returncode == 0, done.stdout
    steps(tmp_path / "run")


def test_deadline_then_chain_to_the_end_then_done(tmp_path, data):
    """Like a chain of short jobs: 75 until the run is finished, then 0 at once."""
    file = run_file(tmp_path / "run.toml", data, more=LONG)
    command = ("train", file, "--resume", "auto", "--set", "run.epochs=4000")
    first = hpctrain(1, *command, "--stop-after", "2s", "--stop-margin", "0.5")
    assert first.returncode == 75, first.stdout
    assert status(tmp_path)["reason"] == "the time limit"
    told = {"SLURM_JOB_END_TIME": str(int(time.time()) + 3)}
    second = hpctrain(1, *command, "--stop-margin", "1", **told)
    assert second.returncode == 75, second.stdout
    at = status(tmp_path)["step"]
    assert len(steps(tmp_path / "run")) == at
    short = (*command, "--set", f"run.steps={at + 5}")
    assert hpctrain(1, *short).returncode == 0
    assert status(tmp_path)["state"] == "finished"
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    done = hpctrain(2, *short)
    assert done.returncode == 0
    assert "DONE is there" in done.stdout
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    longer = hpctrain(1, *command, "--set", f"run.steps={at + 7}")
    assert longer.returncode == 0 and len(steps(tmp_path / "run")) == at + 7


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data)
    assert hpctrain(1, "train", file, "--set", "run.epochs=1").returncode == 0
    metrics = tmp_path / "run/metrics.jsonl"
    [before] = records(tmp_path / "run", "evaluation")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"evaluation"' not in line))
    done = hpctrain(1, "train", file, "--set", "run.epochs=2", "--resume", "auto")
    assert done.returncode == 0, done.stdout
    after = records(tmp_path / "run", "evaluation")
    assert [record["step"] for record in after] == [before["step"], 2 * before["step"] + 1]
    assert after[0]["loss"] == pytest.approx(before["loss"], rel=1e-12)


def test_wrong_times_are_usage_errors(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data)
    done = hpctrain(1, "train", file, "--stop-after", "3:50")
    assert done.returncode == 2 and "stop.after is '3:50'" in done.stdout, done.stdout
    with pytest.raises(UsageError, match="stop.margin is 'soon'"):
        limits(config('[stop]\nmargin = "soon"\n'))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("90s", 90), ("3h50m", 13800), ("1d", 86400), ("1d2h3m4s", 93784)],
)
def test_lengths_of_time(text, seconds):
    assert seconds_of(text, "x") == seconds


@pytest.mark.parametrize("text", ["", "h", "3m2h", "-3m", "3 h", "1.5h"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(UsageError):
        seconds_of(text, "x")


def test_the_earlier_end_counts_and_only_where_it_is_told():
    now = time.time()
    assert limits(config(), {}).end is None
    assert limits(config(), {"SLURM_JOB_END_TIME": ""}).end is None
    own = limits(config('[stop]\nafter = "1d"\n'), {}).end
    assert now + 86400 - 3600 < own <= now + 86400  # from the start of this process
    job = {"SLURM_JOB_END_TIME": "1000", "HPCTRAIN_END_TIME": "900"}
    assert limits(config('[stop]\nafter = "1d"\n'), job).end == 900
    assert limits(config("[stop]\nat_job_end = false\n"), job).end is None


def test_margin_is_twice_the_longest_step_and_checkpoint(monkeypatch, tmp_path):
    clock = [1000.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stop.time, "time", lambda: clock[0])
    stopping = Stopping(Limits(2000.0, None), tmp_path, first_rank=True)
    assert stopping.margin() == 2 * 30
    stopping.wants()
    for seconds in (3, 5, 2):
        clock[0] += seconds
        stopping.wants()
    clock[0] += 10 + 4
    stopping.paused(10)
    stopping.saved(10)
    assert not any(stopping.wants())
    assert stopping.margin() == 2 * (5 + 10)
    clock[0] = 2000 - 31
    stopping._last = clock[0]
    assert not any(stopping.wants())
    clock[0] = 2000 - 30
    stopping.agree(stopping.wants())
    assert stopping.reason == "the time limit"


def test_another_rank_sees_what_the_first_found(tmp_path):
    first = Stopping(Limits(None, None), tmp_path, first_rank=True)
    other = Stopping(Limits(0.0, None), tmp_path, first_rank=False)
    (tmp_path / "SAVE").touch()
    asked = np.add(first.wants(), other.wants())  # what the all-reduce of a step does
    for stopping in (first, other):
        stopping.agree(asked)
        assert stopping.save and not stopping.reason


def test_done_is_of_a_run_of_this_length(tmp_path):
    mark_done(tmp_path, config(), 10)
    assert at_start(tmp_path, config()) == "DONE"
    assert at_start(tmp_path, config("[run]\nepochs = 9\n")) == ""
    assert at_start(tmp_path, config()) == ""  # the other one has removed it
    (tmp_path / "DONE").touch()  # by hand: whatever the length
    (tmp_path / "STOP").touch()
    assert at_start(tmp_path, config()) == "DONE"
