"""`hpctrain bench scaling`: the arithmetic exactly, and real runs on one and two ranks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from launching import ROOT, environment
from training import make_digits, run_file

from hpctrain.cli import bench, bench_scaling, bench_scaling_figures, bench_scaling_plot
from hpctrain.cli.bench_scaling import Setting
from hpctrain.cli.bench_scaling_figures import Figures
from hpctrain.errors import HpctrainError, UsageError


def scaling(*arguments, **changes):
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", "bench", "scaling", *map(str, arguments)],
        env=environment(changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_is_run():
    both = bench_scaling.plan([2, 1, 2], 64, "both")
    assert both == [
        Setting(1, 64, ("strong", "weak")),
        Setting(2, 64, ("strong",)),
        Setting(2, 128, ("weak",)),
    ]
    assert [s.batch for s in bench_scaling.plan([2, 4], 10, "weak")] == [20, 40]
    assert str(both[2]) == "weak scaling on 2 ranks (batch 128)"


def test_how_ranks_are_started(monkeypatch):
    command = bench_scaling.launch_command("srun -n {n} --label '--x={n} y'", 3)
    assert command == ["srun", "-n", "3", "--label", "--x=3 y"]
    with pytest.raises(UsageError, match="{n}"):
        bench_scaling.launch_command("srun -n 4", 4)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("hpctrain.cli.checks_mpi.find_launcher", lambda: "/x/mpirun")
    assert bench_scaling.launch_command(None, 2) == ["/x/mpirun", "-n", "2"]
    monkeypatch.setattr("hpctrain.cli.checks_mpi.find_launcher", lambda: None)
    with pytest.raises(UsageError, match="no mpirun"):
        bench_scaling.launch_command(None, 2)


def test_not_in_a_rank(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UsageError, match="PMI_SIZE=2"):
        bench_scaling.refuse_ranks()


def record(ranks, *steps):
    names = ("data_seconds", "step_seconds", "exchange_seconds", "update_seconds")
    start = {"ranks": ranks, "nodes": 1, "threads": 1, "device": "cpu", "host": "n0"}
    return SimpleNamespace(
        folder="runs/x", starts=[start], steps=[dict(zip(names, s, strict=True)) for s in steps]
    )


def test_figures_of_a_run():
    """The first fifth is left out; the phases add up to the mean step."""
    run = record(2, (9, 9, 9, 9), (1, 8, 2, 1), (1, 8, 2, 1), (1, 8, 2, 1), (5, 16, 2, 5))
    figures = bench_scaling_figures.figures_of(run, 2)
    assert figures.phases == {"compute": 6, "data": 2, "exchange": 2, "update": 2}
    assert figures.seconds == 12 == sum(figures.phases.values())
    with pytest.raises(HpctrainError, match="on 2 ranks, not a run on 4"):
        bench_scaling_figures.figures_of(run, 4)
    with pytest.raises(HpctrainError, match="0 steps on 2 ranks"):
        bench_scaling_figures.figures_of(record(2), 2)


def figures(seconds, threads=1, host="n0"):
    phases = dict.fromkeys(bench_scaling_figures.PHASES, seconds / 4)
    return Figures(seconds, phases, 1, threads, "cpu", host)


def test_speedup_and_efficiency():
    """Strong: 2 ranks take half as long plus a half of that. Weak: as long plus a quarter."""
    found = {
        Setting(1, 64, ("strong", "weak")): [figures(8.0), figures(80.0), figures(4.0)],
        Setting(2, 64, ("strong",)): [figures(6.0)],
        Setting(2, 128, ("weak",)): [figures(10.0)],
        Setting(4, 64, ("strong",)): [],
    }
    rows = bench_scaling_figures.rows_of(found)
    told = [(r.kind, r.ranks, r.seconds, r.speedup, r.efficiency) for r in rows]
    assert told == [
        ("strong", 1, 8.0, 1.0, 1.0),
        ("strong", 2, 6.0, 8 / 6, 4 / 6),
        ("weak", 1, 8.0, 1.0, 1.0),
        ("weak", 2, 10.0, 1.6, 0.8),
    ]
    assert rows[0].runs == [8.0, 80.0, 4.0]
    later = bench_scaling_figures.rows_of({k: v for k, v in found.items() if k.ranks == 2})
    assert [r.efficiency for r in later] == [1.0, 1.0]


def test_notes(monkeypatch):
    monkeypatch.setattr(bench_scaling_figures, "cores_here", lambda: (1, 2))
    here = bench_scaling_figures.os.uname().nodename
    found = {
        Setting(1, 96, ("strong",)): [figures(1.0, 2, here)],
        Setting(2, 96, ("strong",)): [figures(1.0, 1, here)],
    }
    rows = bench_scaling_figures.rows_of(found)
    crowded, threads, uneven = bench_scaling_figures.notes_of(rows, 32, "a CPU")
    assert crowded.startswith("2 ranks ran on 1 core with 2 hardware threads (a CPU)")
    assert "1: 2, 2: 1" in threads and "parallel.threads=1" in threads
    assert "3 microbatches of 32: on 2 ranks one has 2" in uneven and "75%" in uneven
    monkeypatch.setattr(bench_scaling_figures, "cores_here", lambda: (2, 2))
    assert bench_scaling_figures.notes_of(rows[:1], 32, "a CPU") == []


def test_the_plot_has_a_bar_for_each_row():
    found = {Setting(n, 64, ("strong",)): [figures(8.0 / n)] for n in (1, 2, 4)}
    rows = bench_scaling_figures.rows_of(found)
    tree = ElementTree.fromstring(bench_scaling_plot.plot(rows, "a < b"))
    titles = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 * len(bench_scaling_figures.PHASES)
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    ElementTree.fromstring(bench_scaling_plot.plot([], "nothing"))
    with pytest.raises(UsageError, match="/proc/none"):
        bench_scaling_plot.write_plot("/proc/none", rows, "a")


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,x"])
def test_wrong_numbers_of_ranks(text, capsys):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["bench", "scaling", "x.toml", f"--ranks={text}"])
    assert "is not a number" in capsys.readouterr().err


def test_real_runs(tmp_path):
    """On 1 and 2 ranks; what is recorded is what train recorded."""
    file = run_file(tmp_path / "run.toml", make_digits(tmp_path / "data"))
    out, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    options = ["--ranks", "1,2", "--steps", 10, "--repeat", 1, "--folder", tmp_path / "runs"]
    done = scaling(file, *options, "--json", out, "--plot", plot)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    told = [(row["kind"], row["ranks"], row["batch"]) for row in found["rows"]]
    assert told == [("strong", 1, 40), ("strong", 2, 40), ("weak", 1, 40), ("weak", 2, 80)]
    for row in found["rows"]:
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"])
        assert all(row["phases"][phase] > 0 for phase in ("compute", "exchange", "update"))
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    assert found["failures"] == []
    assert "weak scaling (one batch for each rank)" in done.stdout
    metrics = (tmp_path / "runs" / "ranks2-batch80-1" / "metrics.jsonl").read_text()
    samples = [json.loads(line).get("samples") for line in metrics.splitlines()]
    assert samples.count(80) == 8  # of 300 samples an epoch has three of them, and a rest
    assert "NaN" not in plot.read_text()


def test_a_run_that_fails_is_named(tmp_path):
    """The others are shown all the same."""
    file = run_file(tmp_path / "run.toml", tmp_path / "none")
    launch = "sh -c 'echo error: no slots for {n}; echo bye; exit 9' sh"
    options = ["--ranks", "2", "--kind", "weak", "--folder", tmp_path / "runs"]
    done = scaling(file, *options, "--launch", launch)
    assert done.returncode == 1
    failed = "FAILED: weak scaling on 2 ranks (batch 80): exit status 9: error: no slots for 2"
    assert failed in done.stdout
    assert str(tmp_path / "runs" / "ranks2-batch80-1.txt") in done.stdout
    missing = scaling(file, *options, "--launch", "/no/such/program {n}")
    assert missing.returncode == 1 and "cannot run /no/such/program" in missing.stdout


def test_a_wrong_run_file_is_wrong_usage(tmp_path):
    done = scaling(tmp_path / "none.toml")
    assert done.returncode == 2 and "none.toml" in done.stderr
