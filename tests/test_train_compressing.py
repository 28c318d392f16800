"""Compressed runs: stopped and resumed, on the same ranks and on others; what they record."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from launching import running, session_pids
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.optim import SGD
from hpctrain.train import compressing

SECTION = (
    '[compress]\nmethod = "{}"\ndensity = 0.05\nmin_size = 256\n'
    "[checkpoint]\nevery_steps = 4\nevery_epochs = 0\n[log]\nevaluate_every_epochs = 0\n"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data", 320)


def train(file, ranks, nodes, *more):
    done = hpctrain(
        ranks, "train", file, "--set", "run.dtype=float32", "--set", "run.epochs=2", *more,
        timeout=120, HPCTRAIN_TOPOLOGY=nodes,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def made(folder, data, method):
    folder.mkdir()
    return run_file(folder / "run.toml", data, more=SECTION.format(method))


def check_resumed(tmp_path, data, method, *more):
    """Stopped after 5 of 12 steps and resumed: the same losses to the last bit."""
    whole = made(tmp_path / "whole", data, method)
    train(whole, 2, "2x1", *more)
    expected = steps(tmp_path / "whole/run")
    assert len(expected) == 12
    cut = made(tmp_path / "cut", data, method)
    train(cut, 2, "2x1", "--set", "run.steps=5", *more)
    said = train(cut, 2, "2x1", "--resume", "auto", *more)
    assert "resuming at step 5" in said
    assert steps(tmp_path / "cut/run") == expected
    return cut


def test_a_resumed_run_has_the_same_bits_and_records_what_it_sent(tmp_path, data):
    check_resumed(tmp_path, data, "topk", "--set", "compress.memory=momentum")
    rows = records(tmp_path / "cut/run", "step")
    assert ["asked for" in row.get("compress_why", [""])[0] for row in rows[:3]] == [
        True,
        False,
        False,
    ]
    assert all(row["compress"] == ["topk"] and row["density"] == 0.05 for row in rows)
    assert 0 < rows[0]["between_bytes"] < 8 * 64 * 32  # a fraction of the first layer's


@pytest.mark.slow
@pytest.mark.parametrize("method", ["topk", "oktopk", "powersgd", "int8", "sign"])
def test_the_same_with_other_methods(tmp_path, data, method):
    check_resumed(tmp_path, data, method)


@pytest.mark.slow
def test_auto_says_what_it_measured(tmp_path, data):
    """Once, after all methods were tried."""
    file = made(tmp_path / "run1", data, "auto")
    said = train(file, 2, "2x1", "--set", "run.epochs=3")
    assert said.count("compression of 1 buckets: ") == 1
    whys = [row["compress_why"] for row in records(tmp_path / "run1/run", "step")
            if "compress_why" in row]  # fmt: skip
    assert len(whys) == 1
    assert "measured: dense " in whys[0][0]


@pytest.mark.slow
def test_a_run_goes_on_on_a_gpu_and_back(tmp_path, data):
    """Residuals and velocities are the device's; the losses are those of the CPU alone."""
    memory = ("--set", "compress.memory=momentum")
    whole = made(tmp_path / "whole", data, "topk")
    train(whole, 2, "2x1", "--set", "run.device=cpu", *memory)
    cut = made(tmp_path / "cut", data, "topk")
    for device, stop in (("sim", 5), ("cpu", 9), ("sim", 12)):
        sets = ("--set", f"run.device={device}", "--set", f"run.steps={stop}")
        train(cut, 2, "2x1", "--resume", "auto", *sets, *memory)
    found, expected = steps(tmp_path / "cut/run"), steps(tmp_path / "whole/run")
    assert len(found) == 12
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("cpu",) * 4, ("sim", "cpu", "sim", "cpu")])
def test_a_killed_run_goes_on_on_other_nodes(tmp_path, data, devices):
    file = made(tmp_path / "run1", data, "topk")
    saved = tmp_path / "run1/run/checkpoints/step_00000004"
    command = ["-m", "hpctrain", "train", str(file), "--set", "run.dtype=float32"]
    command += ["--set", f"run.device={devices[0]}"]
    with running(4, *command, env={"HPCTRAIN_TOPOLOGY": "2x2"}) as job:
        deadline = time.monotonic() + 100
        while not saved.exists():
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.02)
        for pid in session_pids(job.pid)[-1:]:
            os.kill(pid, signal.SIGKILL)
        job.communicate(timeout=60)
    others = ((3, "2+1", 9), (3, "3x1", 11), (2, "1x2", 12))
    for device, (ranks, nodes, stop) in zip(devices[1:], others, strict=True):
        sets = ("--set", f"run.steps={stop}", "--set", f"run.device={device}")
        said = train(file, ranks, nodes, "--resume", "auto", *sets)
        assert "resuming at step" in said
    losses = steps(tmp_path / "run1/run")
    assert len(losses) >= 12
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("nodes, method, momentum", [(2, 0.9, 0), (1, 0.9, 0.9), (2, 0, 0.9)])
def test_momentum_is_applied_once(monkeypatch, nodes, method, momentum):
    """Where memories between nodes gather it, the update rule has none."""
    monkeypatch.setattr(compressing, "rule_of", lambda config: SGD(momentum=0.9))
    compression = SimpleNamespace(settings=SimpleNamespace(momentum=method))
    session = SimpleNamespace(config=None, topology=SimpleNamespace(node_count=nodes))
    assert compressing.rule_beside(compression, session).momentum == momentum


@pytest.mark.parametrize(
    "change, says",
    [
        ("parallel.reduction=allreduce", "leaves all to MPI"),
        ("parallel.wire=bfloat16", 'use wire = "same"'),
        ("parallel.algorithm=ring", 'use algorithm = "auto"'),
        ("run.dtype=float64", "gradients of float64 are not compressed"),
        ("run.dtype=bfloat16", "gradients of bfloat16 are not compressed"),
        ("run.dtype=float16", "gradients of float16 are not compressed"),
        ("compress.method=topc", "topc"),
        ("compress.memory=momentum optimizer.momentum=0", "set optimizer.momentum above 0"),
        ("compress.memory=momentum compress.method=sign", "does not go with 'sign'"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, data, change, says):
    file = made(tmp_path / "run1", data, "topk")
    sets = [part for one in ("run.dtype=float32", *change.split()) for part in ("--set", one)]
    done = hpctrain(1, "train", file, *sets)
    assert done.returncode == 2, done.stdout
    assert says in done.stdout
