"""The shipped job scripts on a real Slurm: two nodes of two ranks, and what goes wrong with them.

The long run is submitted first and looked at last; the others come and go beside it. With
HPCTRAIN_TRANSCRIPT=docs/slurm.md the jobs' output is put into that page.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import tarfile
from pathlib import Path

import pytest
import slurm as support
from launching import ROOT
from slurm import Slurm, edited, ledger
from stop_table import EVENTS, documented, outcome
from training import make_digits, records, run_file, steps

REASON = support.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

STEPS, PAUSE = 64, 2.0  # of the long run: more than two minutes, in a job of one
SAMPLES, BATCH = 297, 40  # of the training split, by its keys; the last batch of an epoch is short
TWO_BY_TWO = {
    "#SBATCH --account=": "-",
    "#SBATCH --partition=": "main",
    "#SBATCH --nodes=": "2",
    "#SBATCH --ntasks-per-node=": "2",
    "#SBATCH --gpus-per-node=": "2",
    "#SBATCH --cpus-per-task=": "1",
    "#SBATCH --time=": "10",
}


class Place:
    """A folder with a cluster, a data set, and run files."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder, self.slurm = folder, slurm
        self.data = make_digits(folder / "data")
        self.jobs: dict[str, str] = {}

    def python(self, name: str, pause: float) -> Path:
        """What a job script has as its Python: keeps a ledger, in steps of so many seconds."""
        notes = self.folder / f"{name}-ledger"
        notes.mkdir()
        words = [sys.executable, str(ROOT / "tests/ledger_run.py"), str(notes), str(pause)]
        path = self.folder / f"{name}-python"
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o755)
        return path

    def run_file(self, name: str, steps: int, more: str = "") -> Path:
        path = run_file(self.folder / f"{name}.toml", self.data, more=more)
        text = path.read_text().replace(f"{self.folder}/run", self.run(name).as_posix())
        path.write_text(text.replace("epochs = 3", f"epochs = 999\nsteps = {steps}"))
        return path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def script(self, script: str, name: str, steps: int, pause: float, **more: str) -> str:
        """A shipped script with its EDIT block filled in by hand, submitted."""
        changes = TWO_BY_TWO | {
            "#SBATCH --job-name=": name,
            "run=": str(self.run_file(name, steps, "[checkpoint]\nevery_steps = 10\n")),
            "folder=": str(self.run(name)),
            "python=": str(self.python(name, pause)),
        }
        changes |= {f"#SBATCH --{key}=": value for key, value in more.items()}
        path = edited(script, self.folder / f"{name}.sh", changes)
        self.jobs[name] = self.slurm.submit("sbatch", str(path))
        return self.jobs[name]

    def submit(self, name: str, steps: int, pause: float, *options: str) -> str:
        """The same by `hpctrain submit`."""
        site = self.folder / f"{name}-site.toml"
        site.write_text(
            'scheduler = "slurm"\npartition = "main"\nranks_per_node = 2\ngpus_per_node = 2\n'
            f'cores_per_rank = 1\npython = "{self.python(name, pause)}"\n'
        )
        run = self.run_file(name, steps)
        command = (sys.executable, "-m", "hpctrain", "submit", str(run), "--site", str(site))
        self.jobs[name] = self.slurm.submit(*command, "--nodes", "2", *options)
        return self.jobs[name]

    def output(self, name: str) -> str:
        [path] = self.folder.glob(f"{name}-{self.jobs[name]}.out")
        return path.read_text()

    def wait_for_steps(self, name: str, count: int = 3) -> None:
        """Until ranks have taken steps up to a number."""
        notes = self.folder / f"{name}-ledger"
        self.slurm.wait(lambda: max(ledger(notes), default=0) >= count, 180)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with Slurm(folder, 6) as slurm:
        place = Place(folder, slurm)
        place.submit("long", STEPS, PAUSE, "--time", "1m")
        yield place
        if "HPCTRAIN_TRANSCRIPT" in os.environ:
            write_transcript(place, Path(os.environ["HPCTRAIN_TRANSCRIPT"]))


# What teaches nothing: progress, averages of epochs, and Slurm's and Open MPI's notices.
LEFT_OUT = re.compile(r"step \d+/|epoch |results are in|srun: (launch/|First|Terminating)|\s|-|$")


def write_transcript(place: Place, page: Path) -> None:
    """Put what the jobs have printed into the page, in place of the block that is there."""
    blocks = []
    for name, number in place.jobs.items():
        job, lines = place.slurm.job(number), [f"== {name}.sh"]
        for output in sorted(place.folder.glob(f"{name}-{number}*.out")):
            lines.append(f"-- {output.name}")
            text = output.read_text().replace(f"{place.folder}/", "")
            lines += [line for line in text.splitlines() if not LEFT_OUT.match(line)]
        lines.append(f"-- {job['JobState']}, exit {job['ExitCode']}, restarts {job['Restarts']}")
        blocks.append("\n".join(lines))
    before, _, rest = page.read_text(encoding="utf-8").partition("```text\n")
    after = rest.partition("```\n")[2]
    text = "\n\n".join(blocks)
    page.write_text(f"{before}```text\n{text}\n```\n{after}", encoding="utf-8")


def test_relaunch_goes_on_without_a_node_that_fails(place):
    """And without one in bad_nodes.txt: two run of n2 to n5; the long run has n0 and n1."""
    bad = place.run("spare")
    bad.mkdir(parents=True)
    (bad / "bad_nodes.txt").write_text("n2\n")
    number = place.script("slurm/relaunch.sh", "spare", 60, 0.2, nodes="4")
    place.wait_for_steps("spare", 15)
    place.slurm.kill_node(4)
    job = place.slurm.end(number)
    text = place.output("spare")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert "newest checkpoint: step_" in text
    assert len(steps(place.run("spare"))) == 60
    hosts = {path.name.partition("-")[0] for path in (place.folder / "spare-ledger").iterdir()}
    assert hosts == {"n3", "n4", "n5"}


def test_a_signal_to_the_job_ends_it_with_a_checkpoint_and_requeues_it(place):
    """mpirun.sh: the signal comes to the script, and goes on to mpirun and the ranks."""
    number = place.script("slurm/mpirun.sh", "signal", 80, 0.2)
    place.wait_for_steps("signal")
    place.slurm.do("scancel", "--batch", "--signal=USR1", number)
    job = place.slurm.end(number)
    text = place.output("signal")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), text
    assert "by a signal; go on with --resume auto" in text
    assert "4 ranks on 2 nodes" in text
    taken_once(place, "signal", 80)


def test_the_tasks_of_a_chain_go_on_where_the_one_before_stopped(place):
    number = place.script("slurm/chain.sh", "chain", 80, 0.2, array="1-3%1")
    place.wait_for_steps("chain")
    # Slurm 22.05 signals a task of an array, and returns 229 all the same.
    place.slurm.do("scancel", "--signal=USR1", f"{number}_1", check=False)
    ends = [place.slurm.end(f"{number}_{task}") for task in (1, 2, 3)]
    assert [(end["JobState"], end["ExitCode"]) for end in ends] == [
        ("FAILED", "75:0"),
        ("COMPLETED", "0:0"),
        ("COMPLETED", "0:0"),
    ]
    outputs = [(place.folder / f"chain-{number}_{task}.out").read_text() for task in (1, 2, 3)]
    assert "stopped after" in outputs[0] and "resuming at step" in outputs[1]
    assert "DONE is there" in outputs[2]
    taken_once(place, "chain", 80)


def test_scancel_ends_all_ranks_and_the_run_can_go_on(place):
    number = place.script("slurm/srun.sh", "cancelled", 60, 0.2)
    place.wait_for_steps("cancelled", 12)
    assert len(place.slurm.ranks(place.run("cancelled"))) == 4
    place.slurm.do("scancel", number)
    job = place.slurm.end(number)
    assert job["JobState"] == "CANCELLED"
    place.slurm.wait(lambda: not place.slurm.ranks(place.run("cancelled")), 20)
    again = place.slurm.submit("sbatch", str(place.folder / "cancelled.sh"))
    assert place.slurm.end(again)["ExitCode"] == "0:0"
    assert len(steps(place.run("cancelled"))) == 60
    text = (place.folder / f"cancelled-{again}.out").read_text()
    assert re.search(r"resuming at step \d+ of 60", text), text


def test_a_rank_that_is_killed_fails_the_job_at_once(place):
    number = place.script("slurm/srun.sh", "killed", 200, 0.2)
    place.wait_for_steps("killed")
    ranks = place.slurm.ranks(place.run("killed"))
    os.kill(ranks[-1], signal.SIGKILL)
    job = place.slurm.end(number, 120)
    status = job["ExitCode"].partition(":")[0]  # the highest of the ranks'
    assert job["JobState"] == "FAILED" and status not in ("0", "75"), job
    assert "Killed" in place.output("killed")
    place.slurm.wait(lambda: not place.slurm.ranks(place.run("killed")), 20)


def test_an_error_of_one_rank_is_the_jobs_status_and_in_its_output(place):
    (place.folder / "wrong-data").mkdir()
    run = place.run_file("wrong", 5)
    number = place.script("slurm/srun.sh", "wrong", 5, 0.0)
    run.write_text(run.read_text().replace(str(place.data), str(place.folder / "wrong-data")))
    job = place.slurm.end(number, 120)
    assert job["JobState"] == "FAILED" and job["ExitCode"] in ("1:0", "2:0"), job
    assert "wrong-data" in place.output("wrong")


@pytest.mark.parametrize("event", EVENTS)
def test_what_ends_a_run_under_srun_is_as_the_page_says(place, event):
    name = f"event{EVENTS.index(event)}"
    run = place.run(name)
    launch = ["srun", "--nodes=2", "--ntasks-per-node=2", "--mpi=pmix", "--kill-on-bad-exit=1"]
    train = [str(place.python(name, 0.1)), "-m", "hpctrain", "train"]
    train += [str(place.run_file(name, 9999)), "--set", f"run.folder={run}"]
    if "limit" in event:
        train += ["--stop-after", "12s", "--stop-margin", "2"]
    with place.slurm.running(*launch, *train) as srun:
        place.wait_for_steps(name)
        if "STOP" in event:
            (run / "STOP").touch()
        elif "limit" not in event:
            number = getattr(signal, f"SIG{event.partition(' ')[0]}")
            to = place.slurm.ranks(run) if "rank" in event else place.slurm.launchers(run)
            os.kill(to[0], number)
        text, _ = srun.communicate(timeout=120)
    found = outcome(srun.returncode, run)
    print(f"\nsrun: | {event} | {found} |")
    assert found == documented("srun, Slurm 22.05")[event] and srun.returncode != 0, text
    place.slurm.wait(lambda: not place.slurm.ranks(run), 20)


def test_gpus_are_asked_for_and_each_rank_of_a_node_gets_another(place):
    launch = ("srun", "--nodes=2", "--ntasks-per-node=2", "--mpi=none", "--gpus-per-node=2")
    show = (str(ROOT / "jobs/select_gpu.sh"), "printenv", "CUDA_VISIBLE_DEVICES")
    assert sorted(place.slurm.do(*launch, *show).split()) == ["0", "0", "1", "1"]
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        place.slurm.do(*launch[:-1], "--gpus-per-node=3", *show)
    asked = place.slurm.job(place.jobs["long"])
    assert "gpu:2" in asked.get("TresPerNode", ""), asked


def test_an_environment_is_staged_to_every_node(place):
    tree = place.folder / "env/bin"
    tree.mkdir(parents=True)
    (tree / "python").write_text("#!/bin/sh\nhostname\n")
    (tree / "python").chmod(0o755)
    archive = place.folder / "env.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(place.folder / "env", ".")
    job = place.folder / "stage.sh"
    job.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output=stage.out\nset -e\n"
        f"export STAGE_FOLDER=/dev/shm\npython=$({ROOT}/jobs/stage-env.sh {archive})\n"
        'srun --mpi=none "$python"\n'
    )
    assert place.slurm.end(place.slurm.submit("sbatch", str(job)))["ExitCode"] == "0:0"
    hosts = (place.folder / "stage.out").read_text().split()
    assert len(set(hosts)) == 2, hosts


def test_a_run_longer_than_its_limit_finishes_and_is_the_run_in_one_piece(place):
    """By `hpctrain submit`, as all of the above is beside it."""
    whole = place.submit("whole", STEPS, 0.0, "--time", "1h")
    job = place.slurm.end(place.jobs["long"], 400)
    text = place.output("long")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert int(job["Restarts"]) >= 2, text
    assert text.count("go on with --resume auto") == int(job["Restarts"])
    assert place.slurm.end(whole)["ExitCode"] == "0:0", place.output("whole")
    assert steps(place.run("long")) == steps(place.run("whole"))  # to the last bit
    assert taken_once(place, "long", STEPS) == taken_once(place, "whole", STEPS)
    for name in ("long", "whole"):
        assert len(records(place.run(name), "step")) == STEPS


def taken_once(place: Place, name: str, count: int) -> dict[int, list[int]]:
    """The ledger of a run, in which every sample is there once in every epoch."""
    taken = ledger(place.folder / f"{name}-ledger")
    assert sorted(taken) == list(range(count))
    length = -(-SAMPLES // BATCH)
    for first in range(0, count - length + 1, length):
        samples = [sample for step in range(first, first + length) for sample in taken[step]]
        assert sorted(samples) == list(range(SAMPLES))
    return taken
