"""A failure on one rank ends the job, quickly, and says where; a wrong launcher is found."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment, mpirun

from hpctrain.errors import DivergedError, LaunchError
from hpctrain.mpi.start import check_launcher, local_rank_from_environment

SECONDS = 15  # far more than a failing job takes, far less than a time limit


def run(n, text, **env):
    """Run a script that has started and knows `world`; returns (exit code, output)."""
    start = time.monotonic()
    script = f"from hpctrain.mpi.start import start\nworld = start()\n{text}\n"
    done = mpirun(n, "-c", script, timeout=SECONDS, env=env)
    assert time.monotonic() - start < SECONDS
    return done.returncode, done.stdout


def test_an_exception_on_one_rank_ends_all():
    code, text = run(3, "if world.rank == 1: 1 / 0\nworld.Barrier()")
    assert code == 1
    assert "rank 1 of 3" in text and text.count("ZeroDivisionError") == 1
    assert 'File "<string>", line 3' in text


def test_an_exception_in_a_thread_ends_all():
    """The main threads of all ranks are sitting in MPI calls, which never return."""
    code, text = run(
        2,
        "import threading, time\n"
        "def load(): time.sleep(0.3); raise OSError('disk on fire')\n"
        "if world.rank == 1: threading.Thread(target=load, name='loader').start()\n"
        "world.Recv(bytearray(8), 1 - world.rank)",
    )
    assert code == 1
    assert "rank 1 of 2" in text and ", thread loader:" in text
    assert text.count("OSError: disk on fire") == 1 and "in load" in text


def test_an_error_for_the_user_is_its_message():
    code, text = run(
        2,
        "from hpctrain.errors import DivergedError\n"
        "if world.rank == 1: raise DivergedError('the loss is nan')\nworld.Barrier()",
    )
    assert code == DivergedError.exit_code
    assert "error on rank 1 of 2: the loss is nan" in text and "Traceback" not in text


def test_an_error_of_all_ranks_is_told_once():
    code, text = run(4, "from hpctrain.errors import UsageError\nraise UsageError('no such key')")
    assert code == 2 and text.count("no such key") == 1
    assert "error: no such key" in text


def test_an_exception_with_a_thread_still_running():
    code, text = run(
        2,
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=[60]).start()\n"
        "if world.rank == 0: raise KeyError('x')\nworld.Barrier()",
    )
    assert code == 1 and "rank 0 of 2" in text and "KeyError: 'x'" in text


def test_the_hook_can_be_turned_off():
    code, text = run(
        2,
        "import sys; sys.stdout.write(f'{sys.excepthook is sys.__excepthook__}\\n')",
        HPCTRAIN_ABORT_ON_EXCEPTION="0",
    )
    assert code == 0 and text.split() == ["True", "True"]


def test_one_process_keeps_python_s_behaviour():
    code, text = run(1, "import sys; print(world.size, sys.excepthook is sys.__excepthook__)")
    assert code == 0 and text.split() == ["1", "True"]


def test_a_launcher_of_another_mpi_is_an_error():
    """As MPICH's mpiexec looks to Open MPI: PMI_SIZE is 4, the world is one rank."""
    script = "from hpctrain.mpi.start import start; start()"
    for allowed in (False, True):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script.replace("()", f"({allowed})")],
            env=environment({"PMI_SIZE": "4"}),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == (0 if allowed else 1), done.stderr
    # the last one was allowed; the first said why not
    with pytest.raises(LaunchError, match=r"4 ranks \(PMI_SIZE=4\), but this one is rank 0 of 1"):
        check_launcher(1, "Open MPI v5.0.11", {"PMI_SIZE": "4"})


def test_a_process_without_mpirun_leaves_nothing_in_dev_shm():
    script = (
        "from hpctrain.mpi.start import start; start()\n"
        "maps = [line.split(maxsplit=5)[-1] for line in open('/proc/self/maps')]\n"
        "print(*[path.strip() for path in maps if '/dev/shm/' in path], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    assert not done.stderr
    assert not [path for path in done.stdout.split("\n") if path and Path(path).exists()]


@pytest.mark.parametrize(
    "size, environment",
    [
        (4, {"OMPI_COMM_WORLD_SIZE": "4"}),
        (1, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}),
        (1, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}),  # a batch script without a launcher
        (1, {"PMI_SIZE": "1"}),
        (1, {}),
    ],
)
def test_launchers_that_fit(size, environment):
    check_launcher(size, "Open MPI v5.0.11", environment)


@pytest.mark.parametrize(
    "environment",
    [{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "2"}],
)
def test_launchers_that_do_not(environment):
    with pytest.raises(LaunchError, match=r"\(MPICH 5.0.2\).*mpirun"):
        check_launcher(1, "MPICH 5.0.2", environment)


@pytest.mark.parametrize(
    "environment, rank",
    [
        ({}, None),
        ({"SLURM_LOCALID": "3"}, 3),
        ({"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        ({"MPI_LOCALRANKID": "1", "SLURM_LOCALID": "0"}, 1),
        ({"PALS_LOCAL_RANKID": ""}, None),
    ],
)
def test_local_rank_of_every_launcher(environment, rank):
    assert local_rank_from_environment(environment) == rank
