"""`hpctrain bench allreduce --fit`, `--predict` and `--algorithm auto`, on ranks."""

from __future__ import annotations

import argparse
import json

import pytest
from launching import mpirun
from simulated import open_sim

from hpctrain.collectives.algorithms import PRESETS
from hpctrain.collectives.cost_choice import load_choices
from hpctrain.collectives.network import load_network

QUICK = ["--sizes", "4K,64K", "--repeat", "1"]
NODES = {"HPCTRAIN_TOPOLOGY": "1+1"}  # both on this machine, but messages cross between them


def bench(*options, ranks=2, env=NODES):
    return mpirun(ranks, "-m", "hpctrain", "bench", "allreduce", *options, env=env, timeout=120)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(network file, choices file, what --predict found) after a fit and a prediction."""
    folder = tmp_path_factory.mktemp("fit")
    network, choices, figures = (folder / name for name in ("network.toml", "choices.toml", "json"))
    done = bench("--fit", str(network), *QUICK)
    assert done.returncode == 0, done.stdout
    assert "between.seconds_per_byte = " in done.stdout and "# error: median" in done.stdout
    options = ["--predict", str(network), "--choices", str(choices), "--json", str(figures)]
    done = bench(*options, *QUICK)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" picked\n") == 2 and "times the best" in done.stdout
    return network, choices, json.loads(figures.read_text())


def test_a_fit_is_a_network(fitted):
    network = load_network(fitted[0])
    assert network.between.seconds_per_byte > 0 and "fitted to probes" in network.source
    assert network.name.endswith("2x1")


def test_predictions_stand_beside_times(fitted):
    results = fitted[2]["results"]
    assert [(row["bytes"], row["algorithm"]) for row in results] == [
        (size, name) for size in (4096, 65536) for name in PRESETS
    ]
    assert all(row["seconds"] > 0 and row["predicted_seconds"] > 0 for row in results)
    picked = [row for row in results if row["picked"]]
    for row in picked:
        same = [other for other in results if other["bytes"] == row["bytes"]]
        assert row["predicted_seconds"] == min(other["predicted_seconds"] for other in same)
    kept = [(choice.nbytes, choice.algorithm) for choice in load_choices(fitted[1])]
    assert kept == [(row["bytes"], row["algorithm"]) for row in picked]


def test_auto_takes_the_choice(fitted, tmp_path):
    figures = tmp_path / "figures.json"
    options = ["--algorithm", "auto", "--choices", str(fitted[1]), "--json", str(figures)]
    done = bench(*options, "--sizes", "4K", "--repeat", "1")
    assert done.returncode == 0, done.stdout
    [choice] = [choice for choice in load_choices(fitted[1]) if choice.nbytes == 4096]
    rows = json.loads(figures.read_text())["results"]
    assert f"auto: {choice.algorithm}" in [row["algorithm"] for row in rows]
    done = bench(*options, "--sizes", "8K", "--repeat", "1")
    assert done.returncode == 2 and "has no choice for 8,192 bytes" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_a_fit_and_a_prediction_on_simulated_gpus(gpu_mpi, tmp_path):
    """The times are the simulator's; the sums are checked."""
    network, figures = tmp_path / "network.toml", tmp_path / "json"
    env = {"HPCTRAIN_TOPOLOGY": "2x2", "HPCTRAIN_SIM_KERNELS": "host"}
    options = [*QUICK, "--device", "sim", "--gpu-mpi", gpu_mpi, "--json", str(figures)]
    for what in ("--fit", "--predict"):
        done = bench(what, str(network), *options, ranks=4, env=env)
        assert done.returncode == 0, done.stdout
        rows = json.loads(figures.read_text())["results"]
        assert not any(row["wrong"] for row in rows)
        names = {row.get("algorithm", row.get("schedule")) for row in rows}
        assert set(PRESETS) <= names
    assert "memory of the device sim" in load_network(network).source


@pytest.mark.ranks(2)
def test_a_wrong_sum_is_counted_while_times_are_taken(comm, monkeypatch):
    """On GPUs whose exchanges do not wait for what was launched."""
    from hpctrain.cli.bench import add_parser
    from hpctrain.cli.bench_fit import Bench
    from hpctrain.collectives import interpreter
    from hpctrain.mpi.topology import topology

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    wanted = ["--predict", "-", "--algorithm", "ring", "--gpu-mpi", "on", *QUICK]
    args = parser.parse_args(["bench", "allreduce", *wanted])
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(interpreter, "settle", lambda device, idle: None)
        with topology(comm, "2x1") as where:
            bench = Bench(where, open_sim("late"), args)
            [timed] = bench.measured(bench._all(1000))
            assert (timed.wrong > 0) == (bench.wrong > 0) == broken
            bench.free()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fit", "x.toml", "--predict", "y.toml"], "not allowed with"),
        (["--fit", "x.toml", "--sizes", "6"], "no whole number"),
        (["--predict", "none.toml", "--sizes", "4K"], "cannot read the network"),
        (["--algorithm", "auto", "--sizes", "4K"], "needs --choices FILE"),
    ],
)
def test_wrong_options(options, says):
    done = mpirun(1, "-m", "hpctrain", "bench", "allreduce", *options)
    assert done.returncode == 2 and says in done.stdout
