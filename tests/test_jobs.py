"""The job scripts of jobs/, with stand-ins for schedulers and launchers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launching import ROOT

SCRIPTS = sorted((ROOT / "jobs").rglob("*.sh"))
JOBS = [path for path in SCRIPTS if path.parent.name != "jobs"]
BESIDE = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
SHELLCHECK = shutil.which("shellcheck", path=BESIDE)  # that of PyPI, else the system's
SELF_SUBMITTING = {"pbs": "qsub", "lsf": "bsub", "flux": "flux"}

# Every command is called by its name; it notes its arguments and does what the test laid down.
STAND_IN = """#!/bin/bash
name=$(basename "$0")
case "$*" in *" --nodelist="*" true") # does this node answer?
    words=$*
    node=${words% true}
    ! grep -qx "${node##*=}" "$PLACE/dead" 2>/dev/null
    exit ;;
esac
echo "$name $*" >>"$LOG"
if [ "$name" = "$LAUNCHER" ] && { [ "$name" != flux ] || [ "$1" = run ]; }; then
    [ ! -e "$PLACE/action.sh" ] || source "$PLACE/action.sh"
    read -r status <"$PLACE/statuses" && sed -i 1d "$PLACE/statuses"
    if [ "$status" = 0 ]; then mkdir -p "$PLACE/runs/run" && touch "$PLACE/runs/run/DONE"; fi
    if [ "$status" = nothing ]; then exit 0; fi
    exit "$status"
fi
[ ! -e "$PLACE/$name.says" ] || cat "$PLACE/$name.says"
"""
COMMANDS = (
    "srun",
    "mpirun",
    "mpiexec",
    "jsrun",
    "flux",
    "qsub",
    "bsub",
    "scontrol",
    "sinfo",
    "squeue",
)


class Site:
    """A cluster of stand-ins in a folder."""

    def __init__(self, place):
        self.place = place
        (place / "bin").mkdir()
        for name in COMMANDS:
            (place / "bin" / name).write_text(STAND_IN)
            (place / "bin" / name).chmod(0o755)
        (place / "hosts").write_text("n0\n" * 4)
        (place / "log").touch()
        (place / "jobs").symlink_to(ROOT / "jobs")

    def start(self, script, launcher, statuses, **more):
        (self.place / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        environment = {
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "LOG": str(self.place / "log"),
            "PLACE": str(self.place),
            "LAUNCHER": launcher,
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_JOB_NODELIST": "n[0-2]",
            "PBS_NODEFILE": str(self.place / "hosts"),
            "RELAUNCH_PAUSE": "0",
        } | more
        return subprocess.Popen(
            ["bash", str(script)],
            cwd=self.place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *args, **more):
        process = self.start(*args, **more)
        text, _ = process.communicate(timeout=20)
        return process.returncode, text

    def log(self, name):
        lines = (self.place / "log").read_text().splitlines()
        return [line for line in lines if line.split()[0] == name]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def launcher_of(script):
    name = script.stem
    return name if name in COMMANDS else "srun"


def name_of(path):
    return str(path.relative_to(ROOT / "jobs"))


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed (no wheel for this CPU)")
def test_shellcheck():
    """All shell scripts of the checkout, with what they source."""
    others = [path for path in (ROOT / "tools").iterdir() if path.is_file() and is_shell(path)]
    assert len(others) >= 5
    scripts = [*SCRIPTS, *others, *(ROOT / ".ci").iterdir()]
    done = subprocess.run([SHELLCHECK, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def is_shell(path):
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return path.suffix == ".sh" or first.startswith("#!") and first.endswith("sh")


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_have_a_title_and_stop_at_errors(path):
    text = path.read_text()
    assert text.startswith(f"#!/bin/bash\n# {path.name} -- ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_jobs_have_an_edit_block_and_one_launch_line(path):
    text = path.read_text()
    edit, _, rest = text.partition("# -- end of what is to be edited")
    assert rest and "# -- EDIT --" in edit and "EDIT" not in rest.upper().replace("--", "")
    assert rest.count("-m hpctrain train") == 1
    assert rest.rstrip().endswith('exit "$status"')


def test_the_loop_that_waits_is_one_text():
    """It is in four scripts, as a submitted script cannot count on files beside it."""
    begin, end = "# A signal that is trapped", 'if [ "$caught" -eq 0 ]; then break; fi\ndone\n'
    texts = [path.read_text() for path in JOBS]
    loops = {text[text.index(begin) : text.index(end)] for text in texts if begin in text}
    assert len(loops) == 1


@pytest.mark.parametrize("path", JOBS, ids=name_of)
@pytest.mark.parametrize("status", [0, 1, 3, 75])
def test_the_exit_status_is_the_runs(site, path, status):
    attempts = 3  # of relaunch.sh
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\n")
    code, text = site.run(path, launcher_of(path), [status] * attempts)
    assert code == status, text
    scheduler = SELF_SUBMITTING.get(path.parent.name, "scontrol")
    again = [line for line in site.log(scheduler) if " run " not in line and "show" not in line]
    wanted = status == 75 and path.stem != "chain"
    assert len(again) == wanted, again
    if wanted and scheduler == "scontrol":
        assert again == ["scontrol requeue 7"]


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_stop_keeps_a_job_out_of_the_queue(site, path):
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\n")
    (site.place / "runs/run").mkdir(parents=True)
    (site.place / "runs/run/STOP").touch()
    code, text = site.run(path, launcher_of(path), [75])
    assert code == 75, text
    lines = (site.place / "log").read_text()
    assert not any(word in lines for word in ("requeue", "qsub", "bsub", "batch"))


@pytest.mark.parametrize("path", [p for p in JOBS if "(srun" in p.read_text()], ids=name_of)
def test_a_launch_that_started_nothing_is_no_success(site, path):
    """Slurm's srun returns 0 when the step was aborted before its tasks started."""
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\n")
    assert site.run(path, "srun", ["nothing"] * 3)[0] == 1


def test_a_task_of_an_array_requeues_itself_by_its_number(site):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert site.run(ROOT / "jobs/slurm/srun.sh", "srun", [75], **array)[0] == 75
    assert site.log("scontrol") == ["scontrol requeue 5_3"]


@pytest.mark.parametrize(
    ("told", "answer", "end"),
    [
        ("", "2026-11-28T04:42:30", "1795840950"),
        ("", "", ""),  # squeue did not answer
        ("", "NONE", ""),  # no limit
        ("1795840000", "2026-11-28T04:42:30", "1795840000"),  # newer versions of Slurm
    ],
)
@pytest.mark.parametrize("path", [p for p in JOBS if p.parent.name == "slurm"], ids=name_of)
def test_the_run_is_told_the_end_of_a_slurm_job(site, path, told, answer, end):
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\n")
    (site.place / "squeue.says").write_text(answer)
    (site.place / "action.sh").write_text('echo "$HPCTRAIN_END_TIME" >"$PLACE/end"\n')
    code, text = site.run(path, launcher_of(path), [0], SLURM_JOB_END_TIME=told, TZ="UTC")
    assert code == 0, text
    assert (site.place / "end").read_text().strip() == end


ON_SIGNAL = """
got=0
trap 'got=$((got + 1)); echo USR1 >>"$PLACE/got"' USR1
touch "$PLACE/ready"
for _ in $(seq 100); do
    if [ "$got" -ge "$SIGNALS" ]; then sleep 0.2; exit 75; fi
    sleep 0.05
done
"""


@pytest.mark.parametrize("path", [p for p in JOBS if "trap" in p.read_text()], ids=name_of)
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_to_the_script_reaches_the_launcher(site, path, count):
    """And the script waits for the real status, however many signals come."""
    (site.place / "action.sh").write_text(ON_SIGNAL)
    process = site.start(path, launcher_of(path), [1], SIGNALS=str(count))
    deadline = time.monotonic() + 10
    while not (site.place / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for number in range(count):
        process.send_signal(signal.SIGUSR1 if number == 0 else signal.SIGUSR2)
        while len(received(site)) <= number and time.monotonic() < deadline:
            time.sleep(0.02)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 75, text
    assert len(received(site)) == count


def received(site):
    path = site.place / "got"
    return path.read_text().split() if path.exists() else []


RELAUNCH = ROOT / "jobs/slurm/relaunch.sh"
PROGRESS = (
    'n=$(wc -l <"$PLACE/statuses"); mkdir -p "$PLACE/runs/run/checkpoints/step_0$((9 - n))"\n'
)


def test_relaunch_leaves_out_nodes_that_are_down_or_bad_or_do_not_answer(site):
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\nn4\nn3\nn10\n")
    (site.place / "dead").write_text("n4\n")
    (site.place / "sinfo.says").write_text("n1\n")
    (site.place / "runs/run").mkdir(parents=True)
    (site.place / "runs/run/bad_nodes.txt").write_text("n0\n")
    assert site.run(RELAUNCH, "srun", [0])[0] == 0
    [line] = site.log("srun")
    assert "--nodelist=n2,n3 " in line and "--ntasks=8 " in line


def test_relaunch_goes_on_while_there_is_progress(site):
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\n")
    (site.place / "action.sh").write_text(PROGRESS)
    code, text = site.run(RELAUNCH, "srun", [1, 137, 1, 1, 0])
    assert code == 0, text
    assert len(site.log("srun")) == 5
    assert "newest checkpoint: step_04" in text


def test_relaunch_ends_without_progress_or_without_nodes(site):
    (site.place / "scontrol.says").write_text("n0\nn1\nn2\n")
    code, _ = site.run(RELAUNCH, "srun", [137] * 9)
    assert code == 137 and len(site.log("srun")) == 2
    (site.place / "sinfo.says").write_text("n0\nn1\n")
    code, text = site.run(RELAUNCH, "srun", [0])
    assert code == 1 and "fewer than 2 good nodes are left: n2" in text


def test_select_gpu():
    script, show = ROOT / "jobs/select_gpu.sh", "echo $CUDA_VISIBLE_DEVICES"

    def chosen(**environment):
        path = {"PATH": os.environ["PATH"]}
        command = [script, "bash", "-c", show]
        done = subprocess.run(command, env=path | environment, capture_output=True, text=True)
        return done.stdout.strip(), done.returncode

    assert chosen(SLURM_LOCALID="2") == ("2", 0)
    assert chosen(SLURM_LOCALID="0", OMPI_COMM_WORLD_LOCAL_RANK="1") == ("1", 0)
    assert chosen(SLURM_LOCALID="5", GPU_ORDER="3,2,1,0") == ("2", 0)
    assert chosen(PMI_LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="4,6") == ("6", 0)
    assert chosen() == ("", 2)
