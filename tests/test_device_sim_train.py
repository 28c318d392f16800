"""Training on simulated GPUs: the CPU's losses, on any ranks, in any order that CUDA allows."""

import functools

import numpy as np
import pytest
from training import hpctrain, make_digits, records, run_file, steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture(scope="module")
def losses(data, tmp_path_factory):
    """losses(model, ranks, device, *overrides, **environment): of 20 steps."""

    def train(model, ranks, device, *overrides, order="late"):
        folder = tmp_path_factory.mktemp("run")
        file = run_file(folder / "run.toml", data, model)
        settings = (f"run.device={device}", "run.steps=20", *overrides)
        options = [word for setting in settings for word in ("--set", setting)]
        done = hpctrain(ranks, "train", file, *options, HPCTRAIN_SIM_ORDER=order)
        assert done.returncode == 0, done.stdout
        return steps(folder / "run")

    return train


@pytest.fixture(scope="module")
def expected(losses):
    """expected(model): the CPU's losses on one rank."""
    return functools.cache(lambda model: losses(model, 1, "cpu"))


MESSAGES = "parallel.reduction=messages"
RUNS = [
    ("mlp", 1, "late"),
    ("mlp", 2, "late"),
    ("mlp", 2, "2", MESSAGES, "parallel.gpu_mpi=on"),
    ("convnet", 2, "late", MESSAGES, "parallel.gpu_mpi=off"),
]
MORE = [
    ("convnet", 1, "1"),
    *(
        (model, ranks, order, reduction, f"parallel.gpu_mpi={gpu_mpi}")
        for model in ("mlp", "convnet")
        for ranks in (1, 2)
        for order in ("late", "early", "3", "4", "5")
        for reduction in ("parallel.reduction=auto", MESSAGES, "parallel.reduction=allreduce")
        for gpu_mpi in ("on", "off")
        if ranks == 2 or (reduction == MESSAGES and gpu_mpi == "off")
    ),
]
MORE = [run for run in MORE if run not in RUNS]


@pytest.mark.parametrize(
    ("model", "ranks", "order", "overrides"),
    [pytest.param(*run[:3], run[3:], id=" ".join(map(str, run))) for run in RUNS]
    + [
        pytest.param(*run[:3], run[3:], id=" ".join(map(str, run)), marks=pytest.mark.slow)
        for run in MORE
    ],
)
def test_the_losses_are_the_cpus(losses, expected, model, ranks, order, overrides):
    """float64: 1e-9 over 20 steps, with and without memory of GPUs given to MPI."""
    found = losses(model, ranks, "sim", *overrides, order=order)
    np.testing.assert_allclose(found, expected(model), rtol=1e-9)


def test_time_spent_on_launching_is_recorded_on_a_gpu(data, tmp_path):
    for device in ("sim", "cpu"):
        (tmp_path / device).mkdir()
        file = run_file(tmp_path / device / "run.toml", data, "mlp")
        sets = ("--set", f"run.device={device}", "--set", "run.steps=2")
        assert hpctrain(1, "train", file, *sets).returncode == 0
        found = records(tmp_path / device / "run", "step")
        assert all((record.get("launch_seconds", 0) > 0) == (device == "sim") for record in found)
