"""`hpctrain bench`: the figures add up, the sums are really checked, no kernel is left out."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from launching import ROOT, environment, mpirun
from simulated import open_sim

from hpctrain.cli import bench
from hpctrain.collectives.algorithms import PRESETS
from hpctrain.device.signatures import kernel_named, kernel_table
from hpctrain.errors import UsageError

CALL = (
    "import argparse, sys; from hpctrain.cli import bench; p = argparse.ArgumentParser(); "
    "bench.add_parser(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))"
)
ALLREDUCE = ["-c", CALL, "bench", "allreduce", "--sizes"]


def parsed(*args):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *args])


def test_sizes():
    assert parsed("allreduce", "--sizes", "4K,1M,2GiB,12").sizes == [4096, 1 << 20, 2 << 30, 12]
    assert parsed("allreduce").sizes[-1] == 64 << 20


@pytest.mark.parametrize("text", ["", "4X", "0", "1M,,2M", "-4K"])
def test_wrong_sizes(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("allreduce", f"--sizes={text}")
    assert stop.value.code == 2
    assert "is not a size" in capsys.readouterr().err


def test_the_table_is_aligned():
    lines = bench.table(["name", "time"], [["a", "1.5"], ["long name", "12.25"]])
    assert lines == ["name        time", "a            1.5", "long name  12.25"]


def test_figures_that_cannot_be_written(capsys):
    with pytest.raises(UsageError, match="/proc/none"):
        bench.report("/proc/none", {}, ["text"])
    assert capsys.readouterr().out == "text\n"


def test_allreduce_under_mpirun(tmp_path):
    file = tmp_path / "figures.json"
    plot = tmp_path / "bus.svg"
    arguments = [*ALLREDUCE, "4K,256K", "--repeat", "1", "--json", str(file), "--plot", str(plot)]
    done = mpirun(2, *arguments)
    assert done.returncode == 0, done.stdout
    figures = json.loads(file.read_text())
    assert figures["ranks"] == 2
    rows = figures["results"]
    assert [row["bytes"] for row in rows] == [4096] * 4 + [256 << 10] * 4
    assert [row["algorithm"] for row in rows[:4]] == [
        "MPI_Allreduce in place",
        "MPI_Allreduce",
        "slices (shared)",
        "slices (shared) + copy",
    ]
    for row in rows:
        assert row["wrong"] == 0
        assert row["bus_bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["copy_seconds"] > 0
        assert (row["count"], row["type"], row["redop"]) == (row["bytes"] // 4, "float32", "sum")
    [head, units, first, *_] = [row for row in done.stdout.splitlines() if row[:1] != "#"]
    columns = "size algorithm count type redop time algbw busbw #wrong copy speed"
    assert head.split() == columns.split()
    assert first.split()[:6] == ["4096", "MPI_Allreduce", "in", "place", "1024", "float32"]
    assert "us" in units.split()
    drawn = ElementTree.parse(plot).getroot()
    assert len(drawn.findall("{*}polyline")) == 4


@pytest.mark.parametrize(
    "gpu_mpi, nodes",
    [
        ("on", "2x1"),
        ("auto", "1x2"),
        pytest.param("off", "2x1", marks=pytest.mark.slow),
        pytest.param("on", "2x2", marks=pytest.mark.slow),
        pytest.param("off", "3+1", marks=pytest.mark.slow),
    ],
)
def test_allreduce_on_the_simulated_device(gpu_mpi, nodes, tmp_path):
    """Every algorithm, with reads of peers where ranks share a node; all sums are exact."""
    ranks, plot = 2 if nodes in ("2x1", "1x2") else 4, tmp_path / "bus.svg"
    arguments = [*ALLREDUCE, "4K", "--device", "sim", "--gpu-mpi", gpu_mpi, "--repeat", "1"]
    arguments += ["--algorithm", "all", "--json", "-", "--plot", str(plot)]
    env = {"HPCTRAIN_TOPOLOGY": nodes, "HPCTRAIN_SIM_KERNELS": "host"}
    done = mpirun(ranks, *arguments, env=env)
    assert done.returncode == 0, done.stdout
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["device"] == "sim" and figures["gpu_mpi"] == gpu_mpi
    mode = "messages" if nodes == "2x1" else "ipc"
    assert [(row["algorithm"], row["wrong"]) for row in figures["results"]] == [
        ("MPI_Allreduce in place", 0),
        (f"slices ({mode})", 0),
        (f"slices ({mode}) + copy", 0),
        *((name, 0) for name in PRESETS),
    ]
    assert len(ElementTree.parse(plot).getroot().findall("{*}polyline")) == 3 + len(PRESETS)


def test_json_on_the_terminal_is_nothing_but_json():
    done = mpirun(1, *ALLREDUCE, "64", "--dtype", "float64", "--json", "-")
    figures = json.loads(done.stdout)
    assert figures["dtype"] == "float64"
    assert figures["results"][0]["bus_bytes_per_second"] == 0


def test_a_size_that_is_no_whole_number_of_elements():
    done = mpirun(1, *ALLREDUCE, "6")
    assert done.returncode != 0
    assert "6 bytes is no whole number of float32 elements" in done.stdout


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("kind", ["InPlace", "OutOfPlace", "Slices", "CopiedSlices"])
def test_a_wrong_element_is_counted(comm, kind):
    """A number that is wrong on one rank is found in every contender's result."""
    from hpctrain.cli import bench_allreduce
    from hpctrain.collectives.slices import SliceReduction
    from hpctrain.device.cpu import CpuDevice
    from hpctrain.mpi.topology import topology

    n = 1000
    ranks = [bench_allreduce._whole_numbers(rank, n, "float32") for rank in range(comm.size)]
    expected = np.sum(ranks, axis=0)
    assert not np.array_equal(ranks[0], ranks[1])
    source = ranks[comm.rank]
    device = CpuDevice()
    device.prepare(["float32"], comm)
    with topology(comm) as where:
        slices = SliceReduction(where, device, n, "float32")
        first = slices if "Slices" in kind else comm
        contender = getattr(bench_allreduce, kind)(first, source, expected)

        def wrong():
            contender.fill()
            comm.Barrier()
            contender.add()
            return sum(comm.allgather(contender.wrong()))

        assert wrong() == 0
        if comm.rank == 1:
            source[[3, 999]] += 1
        assert wrong() == (2 if kind == "Slices" else 2 * comm.size)
        comm.Barrier()
        slices.free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["ring", "two-level"])
def test_a_wrong_element_of_a_schedule_is_counted(comm, name):
    """On simulated GPUs that read each other, too."""
    from hpctrain.cli import bench_allreduce, bench_schedules
    from hpctrain.mpi.topology import topology

    n, gpu = 1000, open_sim()
    numbers = [bench_allreduce._whole_numbers(rank, n, "float32") for rank in range(2)]
    for planted in (0, 2):
        source = numbers[comm.rank].copy()
        if comm.rank == 1:
            source[[3, 999][:planted]] += 1
        with topology(comm, "1x2") as where:
            schedules = bench_schedules.schedules_named(where, n, 4, (name,))
            placed, expected = gpu.from_host(source), numbers[0] + numbers[1]
            [contender], buffers = bench_schedules.scheduled(
                where, gpu, schedules, placed, expected
            )
            contender.fill()
            contender.add()
            assert contender.wrong() == planted
            buffers.free()


def test_figures_of_rounds():
    from hpctrain.cli.bench_allreduce import _figures

    seconds = np.array([[2.0, 4, 1, 1], [4, 4, 1, 1], [6, 4, 2, 3]])
    rows = _figures(8, 4, ["in place", "plain", "slices", "copy"], seconds, np.array([0, 1, 2, 0]))
    assert [row["seconds"] for row in rows] == [4, 4, 1]
    assert rows[2]["speedup"] == 3  # median of 2/1, 4/1, 6/2
    assert rows[2]["bus_bytes_per_second"] == 12
    assert [row["wrong"] for row in rows] == [0, 1, 2]
    assert {row["copy_seconds"] for row in rows} == {1}


def test_every_kernel_has_a_launch():
    from hpctrain.cli.bench_kernels import all_launches

    assert list(all_launches()) == list(kernel_table())


def test_every_kernel_is_measured(tmp_path):
    """All launches are accepted by the device, at real sizes."""
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-c", CALL, "bench", "kernels", "--repeat", "1", "--json", str(file)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert {row["kernel"] for row in figures["kernels"]} == set(kernel_table())
    for row in figures["kernels"]:
        assert row["bytes"] > 0 and row["seconds"] > 0 and row["of_copy"] > 0, row
        assert f"\n{row['kernel']} " in done.stdout


def test_an_unknown_kernel():
    args = parsed("kernels", "--only", "gelu_forwards")
    with pytest.raises(UsageError, match="did you mean 'gelu_forward'"):
        args.run(args)


@pytest.mark.parametrize(
    "name, elements",
    [("fill", 1), ("add", 3), ("add_into", 3), ("adamw", 7), ("sgd", 5), ("gelu_backward", 3)],
)
def test_bytes_are_those_of_the_kernel_s_header(name, elements):
    from hpctrain.cli.bench_launches import LAUNCHES, SIZES, Maker
    from hpctrain.device.cpu import CpuDevice

    launch = LAUNCHES[name](Maker(CpuDevice(), "float32"))
    assert launch.bytes(name) == 4 * elements * SIZES.n
    assert len(launch.args) == len(kernel_named(name).parameters)


def test_rounds_alternate():
    from hpctrain.cli.bench_kernels import timed

    calls = []
    seconds = timed([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert seconds.shape == (3, 2) and (seconds > 0).all()
    order = [call for i, call in enumerate(calls) if i == 0 or calls[i - 1] != call]
    assert order == ["a", "b"] * 4  # once to see how long it takes, then three rounds


def test_schedules_beside_mpi():
    done = mpirun(2, *ALLREDUCE, "4K", "--repeat", "1", "--algorithm", "all", "--json", "-")
    assert done.returncode == 0, done.stdout
    rows = json.loads(done.stdout)["results"]
    assert [row["algorithm"] for row in rows[4:]] == list(PRESETS)
    assert not any(row["wrong"] for row in rows)
    unknown = mpirun(1, *ALLREDUCE, "4K", "--algorithm", "rings")
    assert unknown.returncode != 0 and "did you mean 'ring'" in unknown.stdout
