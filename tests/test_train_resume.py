"""Stopping and going on: killed runs, damaged checkpoints, another number of ranks."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from launching import running, session_pids
from training import hpctrain, make_digits, records, run_file, steps

CHECKPOINTS = "[checkpoint]\nevery_steps = 5\nevery_epochs = 0\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The losses of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = hpctrain(2, "train", run_file(folder / "run.toml", data, more=CHECKPOINTS))
    assert done.returncode == 0, done.stdout
    return steps(folder / "run")


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize("ranks_after", [2, 3])
def test_killed_rank_ends_the_job_and_resume_reaches_the_same_loss(
    tmp_path, data, whole, ranks_after
):
    file = run_file(tmp_path / "run.toml", data, more=CHECKPOINTS)
    saved = tmp_path / "run/checkpoints/step_00000005"
    # Open MPI leaves its own 16 MiB files behind when a rank is killed: not in /dev/shm, please.
    left = {"OMPI_MCA_btl_sm_backing_directory": str(tmp_path)}
    with running(2, "-m", "hpctrain", "train", str(file), env=left) as job:
        wait_for(saved.exists)
        ranks = [pid for pid in session_pids(job.pid) if is_rank(pid)]
        os.kill(ranks[-1], signal.SIGKILL)
        begun = time.monotonic()
        job.communicate(timeout=20)
        assert time.monotonic() - begun < 10
        assert job.returncode != 0
    done = hpctrain(ranks_after, "train", file, "--resume", "auto")
    assert done.returncode == 0, done.stdout
    assert "resuming at step" in done.stdout
    np.testing.assert_allclose(steps(tmp_path / "run"), whole, rtol=1e-9)
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "finished"


def is_rank(pid):
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"hpctrain" in words and b"-n" not in words


def test_resume_in_mid_epoch_on_other_ranks_and_again(tmp_path, data, whole):
    """Three stops, none at the end of an epoch, each going on with another number of ranks."""
    file = run_file(tmp_path / "run.toml", data, more=CHECKPOINTS)
    for ranks, stop in ((1, 3), (3, 10), (4, 13), (2, 0)):
        done = hpctrain(ranks, "train", file, "--resume", "auto", "--set", f"run.steps={stop}")
        assert done.returncode == 0, done.stdout
    np.testing.assert_allclose(steps(tmp_path / "run"), whole, rtol=1e-9)
    assert [record["ranks"] for record in records(tmp_path / "run", "start")] == [1, 3, 4, 2]


@pytest.mark.parametrize("damage", ["cut", "flip", "state"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, data, whole, damage):
    file = run_file(tmp_path / "run.toml", data, more=CHECKPOINTS)
    assert hpctrain(1, "train", file, "--set", "run.steps=10").returncode == 0
    newest = tmp_path / "run/checkpoints/step_00000010"
    tensors = newest / "parameters.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-9] ^= 1
        tensors.write_bytes(content)
    else:
        (newest / "state.json").unlink()
    done = hpctrain(2, "train", file, "--resume", "auto")
    assert done.returncode == 0, done.stdout
    assert "step_00000010" in done.stdout
    assert "resuming at step 5" in done.stdout
    np.testing.assert_allclose(steps(tmp_path / "run"), whole, rtol=1e-9)


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data)
    assert hpctrain(1, "train", file, "--set", "run.steps=2").returncode == 0
    again = hpctrain(2, "train", file)
    assert again.returncode == 2
    assert "holds a run already" in again.stdout
    assert "Traceback" not in again.stdout
    over = hpctrain(2, "train", file, "--overwrite", "--set", "run.steps=3")
    assert over.returncode == 0, over.stdout
    assert len(steps(tmp_path / "run")) == 3


def test_evaluation_is_the_same_on_any_number_of_ranks(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, "mlp")
    assert hpctrain(2, "train", file).returncode == 0
    trained = records(tmp_path / "run", "evaluation")[-1]
    for ranks in (1, 3):
        done = hpctrain(ranks, "eval", tmp_path / "run", "--json")
        assert done.returncode == 0, done.stdout
        found = json.loads(next(t for t in done.stdout.splitlines() if t.startswith("{")))
        assert found["accuracy"] == trained["accuracy"]
        assert found["samples"] == trained["samples"]
        np.testing.assert_allclose(found["loss"], trained["loss"], rtol=1e-9)
