"""`hpctrain submit`: the shipped scripts filled in, for every scheduler."""

from __future__ import annotations

import os
import subprocess

import pytest
from launching import ROOT

from hpctrain.cli.main import main

RUN = str(ROOT / "jobs/runs/digits.toml")
SITE = """
account = "abc123"
partition = "gpu"
time = "1d2h"
ranks_per_node = 2
cores_per_rank = 6
gpus_per_node = 0
python = "/opt/my env/bin/python"
setup = ["module load openmpi", "source ~/env/bin/activate"]
"""


@pytest.fixture(autouse=True)
def nothing_of_mine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HPCTRAIN_SITE", raising=False)
    monkeypatch.chdir(tmp_path)


def shown(capsys, *arguments, status=0):
    assert main(["submit", RUN, *arguments]) == status
    taken = capsys.readouterr()
    return taken.out if status == 0 else taken.err


WANTED = {
    "slurm": ["#SBATCH --account=abc123", "#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=2",
              "#SBATCH --time=1560", "#SBATCH --cpus-per-task=6", "#SBATCH --job-name=digits"],
    "pbs": ["#PBS -A abc123", "#PBS -l select=3:ncpus=12:mpiprocs=2", "per_node=2",
            "#PBS -l walltime=26:00:00", "minutes=1560", "script=runs/digits/job.sh"],
    "lsf": ["#BSUB -P abc123", "#BSUB -nnodes 3", "#BSUB -W 1560", "nodes=3", "cores=6", "gpus=0"],
    "flux": ["# flux: --bank=abc123", "# flux: --nodes=3", "# flux: --time-limit=1560m", "gpus=0"],
}  # fmt: skip


@pytest.mark.parametrize("scheduler", WANTED)
def test_a_script_is_filled_in_from_run_file_and_site_file(capsys, tmp_path, scheduler):
    (tmp_path / "site.toml").write_text(SITE)
    where = ("--site", "site.toml", "--scheduler", scheduler, "--nodes", "3", "--dry-run")
    text = shown(capsys, *where)
    lines = text.splitlines()
    common = [f"run={RUN}", "folder=runs/digits", "python='/opt/my env/bin/python'"]
    assert [line for line in WANTED[scheduler] + common if line not in lines] == []
    at = lines.index("module load openmpi")
    assert lines[at + 1] == "source ~/env/bin/activate"
    assert "EDIT" not in text.replace("# -- EDIT --", "")
    assert "gpus-per-node" not in text and "ngpus" not in text
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    assert not (tmp_path / "runs").exists()


def test_lines_that_a_site_does_not_need_are_left_out(capsys):
    text = shown(capsys, "--scheduler", "slurm", "--dry-run")
    assert "--account" not in text and "--partition" not in text
    assert "#SBATCH --gpus-per-node=4" in text
    assert "gpus=1" in shown(capsys, "--scheduler", "flux", "--dry-run").splitlines()


def test_relaunch_asks_for_a_spare_node(capsys):
    launcher = ("--launcher", "relaunch", "--nodes", "2", "--time", "30m")
    lines = shown(capsys, "--scheduler", "slurm", *launcher, "--dry-run").splitlines()
    # the launcher of the command line counts as the site's
    assert "#SBATCH --signal=USR1@300" in lines
    assert "#SBATCH --nodes=3" in lines and "nodes=2" in lines and "#SBATCH --time=30" in lines


@pytest.mark.parametrize(
    ("scheduler", "line"),
    [
        (("slurm",), "#SBATCH --signal=USR1@"),
        (("slurm", "--launcher", "mpirun"), "#SBATCH --signal=B:USR1@"),
        (("flux",), "# flux: --signal=SIGUSR1@"),
    ],
)
def test_a_short_job_does_not_begin_with_the_warning(capsys, scheduler, line):
    text = shown(capsys, "--scheduler", *scheduler, "--time", "2m", "--dry-run")
    [found] = [other for other in text.splitlines() if other.startswith(line)]
    assert found.removeprefix(line).rstrip("s") == "30"


@pytest.mark.parametrize("scheduler", WANTED)
def test_the_script_goes_to_the_schedulers_command(capfd, monkeypatch, tmp_path, scheduler):
    command = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub", "flux": "flux"}[scheduler]
    place = tmp_path / "bin"
    place.mkdir()
    (place / command).write_text('#!/bin/sh\necho "args: $*"\nhead -c 11 </dev/stdin\nexit $CODE\n')
    (place / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    for code in (0, 3):
        monkeypatch.setenv("CODE", str(code))
        assert main(["submit", RUN, "--scheduler", scheduler]) == code
        out, err = capfd.readouterr()
        assert ("submitted by" in out) == (code == 0) and ("refused" in err) == (code != 0)
        script = {"slurm": "runs/digits/job.sh", "flux": "batch runs/digits/job.sh"}
        wanted = script.get(scheduler, "" if scheduler == "lsf" else "runs/digits/job.sh")
        assert f"args: {wanted}\n" in out
        if scheduler == "lsf":
            assert out.count("#!/bin/bash") == 2  # shown, and given as standard input
    written = tmp_path / "runs/digits/job.sh"
    assert os.access(written, os.X_OK) and written.read_text() in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give --scheduler"),
        (("--scheduler", "slurm", "--launcher", "srum"), "did you mean 'srun'"),
        (("--scheduler", "slurm", "--nodes", "0"), "--nodes is 0"),
        (("--scheduler", "slurm", "--time", "4:00"), "time is '4:00'"),
        (("--scheduler", "slurm", "--time", "20s"), "at least a minute"),
        (("--site", "nowhere.toml"), "cannot read the site file"),
        (("--site", "wrong.toml"), "did you mean 'partition'"),
        (("--scheduler", "slurm"), "sbatch is not in PATH"),
    ],
)
def test_what_is_wrong_is_said(capsys, monkeypatch, tmp_path, arguments, says):
    (tmp_path / "wrong.toml").write_text('scheduler = "slurm"\npartitoin = "gpu"\n')
    if "PATH" in says:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert says in shown(capsys, *arguments, status=2)
    assert not (tmp_path / "runs").exists()
