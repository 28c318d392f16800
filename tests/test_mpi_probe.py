"""The probe of GPU-aware MPI: every way in which an operation fails is told apart, and survived."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment, launcher, session_pids

from hpctrain.cli import checks_gpu
from hpctrain.cli.checks_gpu import Row, recommendation, refuse_ranks
from hpctrain.errors import DeviceError, UsageError
from hpctrain.mpi import probe
from hpctrain.mpi.probe import Outcome, Verdict, classify, report, run_job

FAULTS = [launcher(), "-n", "2", sys.executable, str(Path(__file__).with_name("probe_faults.py"))]


@pytest.fixture
def children(monkeypatch):
    """Jobs get the tests' environment."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "operation, word, detail",
    [
        ("right", "right", ""),
        ("wrong", "wrong", "another result than in host memory"),
        ("crash", "crash", "Segmentation fault|signal 11"),
        ("fail", "crash", "MPI_ERR_OTHER: unknown error"),
        ("hang", "hang", "killed at the time limit"),
    ],
)
def test_real_jobs_with_planted_faults(children, operation, word, detail):
    begun = time.monotonic()
    outcome = run_job([*FAULTS, operation, "1024", "sim"], 5 if word == "hang" else 60)
    assert time.monotonic() - begun < 60
    verdict = classify(outcome)
    assert verdict.word == word, outcome.text
    assert verdict.detail == detail or any(part in verdict.detail for part in detail.split("|"))


def test_a_slow_operation_is_slow(children):
    """It sleeps for 20 ms; through the host it takes far less than 10."""
    outcome = run_job([*FAULTS, "slow", "64", "sim"], 60)
    facts = json.loads(outcome.text.split(probe.MARK)[1].splitlines()[0])
    assert facts["right"] and facts["direct"] >= 0.02
    assert classify(outcome).word == ("slow" if facts["direct"] > 2 * facts["staged"] else "right")


def test_nothing_is_left_of_a_job_that_hangs(tmp_path):
    """Also not of its children that ignore SIGTERM, in process groups of their own."""
    stubborn = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(os.getsid(0), flush=True); "
        "sys.argv[1:] or subprocess.Popen([sys.executable, '-c', sys.orig_argv[2], 'x'], "
        "process_group=0); time.sleep(600)"
    )
    outcome = run_job([sys.executable, "-c", stubborn], 1.5)
    assert outcome.code is None
    sessions = set(outcome.text.split())
    assert len(sessions) == 1 and len(outcome.text.split()) == 2
    assert session_pids(int(sessions.pop())) == []


@pytest.mark.parametrize(
    "outcome, word, detail",
    [
        (Outcome(0, report({"right": True, "direct": 1.0, "staged": 0.6})), "right", ""),
        (Outcome(0, report({"right": True, "direct": 3.0, "staged": 1.0})), "slow", "3.0 times"),
        (Outcome(0, report({"right": False, "direct": 9.0, "staged": 1.0})), "wrong", "another"),
        (Outcome(0, report({"right": True, "direct": 1.0, "staged": 0.0})), "right", ""),
        (Outcome(None, report({"right": True})), "hang", "killed"),
        (Outcome(139, report({"right": True})), "crash", "PROBE"),  # at its end
        (Outcome(0, ""), "crash", "exit code 0 and no output"),
        (Outcome(1, "x\nerror on rank 1 of 2: no GPU\n---\n"), "crash", "no GPU"),
        (Outcome(1, "Traceback\nhpctrain.errors.DeviceError: no CuPy\n"), "crash", "no CuPy"),
        (Outcome(139, "*** Signal: Segmentation fault (11)\n"), "crash", "Segmentation fault"),
        (Outcome(6, "some words\n-----\n"), "crash", "some words"),
    ],
)
def test_classification(outcome, word, detail):
    verdict = classify(outcome)
    assert verdict.word == word and detail in verdict.detail


def test_small_operations_are_never_slow():
    outcome = Outcome(0, report({"right": True, "direct": 3.0, "staged": 1.0}))
    assert classify(outcome, judge_speed=False).word == "right"


@pytest.mark.parametrize(
    "words, on, says",
    [
        (["right", "right"], True, "--gpu-mpi on, or HPCTRAIN_GPU_MPI=on"),
        (["right", "slow"], False, "off (right everywhere, but B of 64 MiB takes because"),
        (["slow", "hang"], False, "off (B of 64 MiB: hang, because)"),
        (["crash", "right"], False, "off (A of 64 MiB: crash, because)"),
        (["wrong", "slow"], False, "off (A of 64 MiB: wrong, because)"),
    ],
)
def test_recommendation(words, on, says):
    rows = [
        Row(name, 64 << 20, Verdict(word, {}, "because"))
        for name, word in zip("AB", words, strict=True)
    ]
    assert recommendation(rows, "cuda")[0] == on
    assert says in recommendation(rows, "cuda")[1]


def test_a_simulated_device_says_nothing_of_a_gpu():
    rows = [Row("A", 1024, Verdict("right", {}))]
    assert "says nothing of a GPU" in recommendation(rows, "sim")[1]


def test_an_operation_that_hung_is_not_tried_again(monkeypatch):
    tried = []

    def job(command, limit):
        tried.append(command[-3:])
        return Outcome(None if command[-3] == "Sendrecv" else 0, report({"right": True}))

    monkeypatch.setattr(probe, "run_job", job)
    rows = checks_gpu.try_all(["x"], "cuda", [1, 2], 1.0)
    assert len(rows) == len(tried) == 2 * len(probe.OPERATIONS) - 1
    assert [row.verdict.word for row in rows if row.operation == "Sendrecv"] == ["hang"]


@pytest.mark.parametrize(
    "variables, refused",
    [
        ({}, False),
        ({"PMI_SIZE": "1"}, False),  # srun --pty bash
        ({"PMI_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, True),  # Open MPI starts no job from a rank
    ],
)
def test_not_from_a_rank(variables, refused):
    if not refused:
        refuse_ranks(variables)
        return
    with pytest.raises(UsageError, match="this is a rank of one.*without mpirun.*--probe-launch"):
        refuse_ranks(variables)


@pytest.mark.ranks(1)
def test_not_where_mpi_runs(comm):
    with pytest.raises(UsageError, match="MPI runs in this process already.*of its own"):
        refuse_ranks({})


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", list(probe.OPERATIONS))
def test_operations_do_what_they_say(comm, name):
    """On host memory, against what MPI defines."""
    rank, size = comm.rank, comm.size
    n = 16 * size * 3
    every = [np.arange(n, dtype=np.float32) + 1000 * k for k in range(size)]
    array, received = every[rank].copy(), np.full(n, -1, np.float32)
    if name == "gathering of parts":
        array[: n // size * rank] = array[n // size * (rank + 1) :] = -1
    result = probe.OPERATIONS[name](comm, array, received)
    part = n // size
    if name == "exchange of parts":
        expected = np.full((size, part), -1, np.float32)
        for k in set(range(size)) - {rank}:
            expected[k] = every[k][part * rank : part * (rank + 1)]
        expected = expected.reshape(-1)
    elif name == "gathering of parts":
        expected = np.concatenate([every[k][part * k : part * (k + 1)] for k in range(size)])
    elif name == "Allreduce":
        expected = sum(every)
    else:
        expected = every[rank - 1]
    np.testing.assert_array_equal(result, expected)


def doctor(*arguments, **changes):
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", "doctor", "--probe-gpu-mpi", *arguments],
        env=environment(changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_says_why_it_cannot_begin():
    done = doctor(OMPI_COMM_WORLD_SIZE="2")
    assert done.returncode == 2 and "this is a rank of one (OMPI_COMM_WORLD_SIZE=2)" in done.stderr
    done = doctor("--device", "sim", "--probe-launch", "no-such-launcher -n 2")
    assert done.returncode == 2 and "cannot start no-such-launcher" in done.stderr
    done = doctor("--device", "sim", "--probe-launch", f"{launcher()} -n 1")
    assert done.returncode == 2 and "starts 1 rank" in done.stderr


def test_the_command_without_a_gpu():
    done = doctor(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == DeviceError.exit_code
    assert "only opens the device cuda and starts MPI ends in a crash" in done.stderr


def test_the_command_on_the_simulated_device(children, monkeypatch, capsys):
    """Two of the operations; `--slow` tries all."""
    names = ("Isend, Irecv", "exchange of parts")
    few = {name: probe.OPERATIONS[name] for name in names}
    monkeypatch.setattr(probe, "OPERATIONS", few)
    monkeypatch.setitem(checks_gpu.LARGE, "sim", 1 << 20)
    from hpctrain.cli.main import parser

    arguments = parser().parse_args(["doctor", "--probe-gpu-mpi", "--device", "sim"])
    assert arguments.run(arguments) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "2 ranks by `mpirun -n 2`" in lines[0] and "device sim" in lines[0]
    assert lines[1].startswith("--gpu-mpi auto decides: ")
    assert sum(" right " in line for line in lines) == 4
    assert lines[-1].startswith("Recommended for the simulated device: --gpu-mpi on.")


@pytest.mark.slow
def test_the_whole_command_as_json():
    done = doctor("--device", "sim", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["recommended"] == "on" and document["ranks"] == 2
    assert len(document["operations"]) == 2 * len(probe.OPERATIONS)
    assert {row["verdict"] for row in document["operations"]} == {"right"}
