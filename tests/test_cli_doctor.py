"""`hpctrain doctor`: each planted fault is found and named, and nothing makes it crash."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import ROOT, environment, launcher, mpirun

from hpctrain.cli import checks_files, checks_machine, checks_mpi, findings
from hpctrain.device import build

CALL = (
    "import argparse, sys; from hpctrain.cli import doctor; p = argparse.ArgumentParser(); "
    "doctor.add_parser(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))"
)


def doctor(*args, **changes):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", CALL, "doctor", *args],
        env=environment(changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def named(report, section, what):
    return next(f for f in report["findings"] if (f["section"], f["what"]) == (section, what))


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


def test_a_sound_machine_passes(tmp_path):
    done = doctor("--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "FAIL: 0" in done.stdout
    for section in ("Python", "MPI", "C++ compiler", "BLAS", "GPU", "HDF5", "Shared memory"):
        assert f"\n{section}" in done.stdout
    assert "[ok]   launcher: none: started alone, 1 rank" in done.stdout
    assert "elementwise.cu compiles" in done.stdout


def test_each_line_that_is_not_ok_has_a_remedy():
    lines = doctor(CXX="no-such-compiler", OMP_NUM_THREADS="9999").stdout.splitlines()
    marked = [
        i for i, line in enumerate(lines) if line.lstrip().startswith(("[note", "[warn", "[F"))
    ]
    assert len(marked) >= 2
    assert all(lines[i + 1].lstrip().startswith("-> ") for i in marked)


def test_json_and_the_launcher_of_another_mpi():
    done = doctor("--json", PMI_SIZE="4", PMI_RANK="0")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["status"] == "FAIL"
    found = named(report, "MPI", "launcher")
    assert found["status"] == "FAIL"
    assert "PMI_SIZE=4" in found["value"]
    assert found["remedy"].startswith("start with that library's own mpirun")


def test_of_several_rank_0_of_1_one_speaks():
    done = doctor(PMI_SIZE="4", PMI_RANK="3")
    assert (done.returncode, done.stdout) == (1, "")


def test_ranks_give_one_report_with_their_differences():
    rank = "(os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ.get('PMI_RANK'))"
    odd = "os.environ.update(OPENBLAS_CORETYPE='Zen', HPCTRAIN_CACHE='/proc/none')"
    code = f"import os; {rank} == '1' and {odd}; {CALL}"
    done = mpirun(2, "-c", code, "doctor", env={"OPENBLAS_CORETYPE": "Haswell"})
    assert done.stdout.count("hpctrain 0") == 1
    assert "2 ranks" in done.stdout
    assert "rank 1: /proc/none (proc): No such file or directory" in done.stdout
    assert "OPENBLAS_CORETYPE: rank 0: Haswell; rank 1: Zen" in done.stdout
    assert "[FAIL] kernel cache" in done.stdout
    assert "launcher: 2 ranks" in done.stdout
    assert done.returncode == 1


def test_no_compiler_and_an_empty_cache(no_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("HPCTRAIN_CACHE", str(tmp_path))
    assert checks_machine.compiler().status == "warn"
    assert "CXX=no-such-compiler" in checks_machine.compiler().value
    answer = checks_machine.compiles()
    assert answer.status == "FAIL"
    assert "not in the cache" in answer.value


def test_no_compiler_but_a_full_cache(no_compiler, monkeypatch):
    monkeypatch.setattr(build, "build_all", lambda dtypes, level: None)
    assert checks_machine.compiles().status == "note"


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    program = tmp_path / "g++"
    program.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo odd 1.0 || { echo broken >&2; exit 1; }\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("HPCTRAIN_CACHE", "stays")
    assert checks_machine.compiler().value == f"{program} (odd 1.0)"
    answer = checks_machine.compiles()
    assert answer.status == "FAIL" and "broken" in answer.value
    assert os.environ["HPCTRAIN_CACHE"] == "stays"


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("HPCTRAIN_CACHE", "/proc/none")
    answer = checks_files.cache()
    assert answer.status == "FAIL" and "/proc/none" in answer.value
    assert "HPCTRAIN_CACHE" in answer.remedy


def test_run_folders(tmp_path):
    assert checks_files.run_folder(tmp_path / "new" / "run").status == "ok"
    assert not (tmp_path / "new").exists()
    answer = checks_files.run_folder(Path("/proc/none"))
    assert answer.status == "FAIL" and "run.folder" in answer.remedy


def test_hdf5_where_nothing_can_be_written(tmp_path):
    assert checks_files.hdf5_file(tmp_path).status == "ok"
    answer = checks_files.hdf5_file(Path("/proc/none"))
    assert answer.status == "FAIL" and "HDF5_USE_FILE_LOCKING" in answer.value
    assert list(tmp_path.iterdir()) == []


def test_hdf5_without_checksums(monkeypatch):
    import h5py

    there = h5py.h5z.filter_avail
    missing = h5py.h5z.FILTER_FLETCHER32
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda n: n != missing and there(n))
    assert checks_files.hdf5_filters().status == "FAIL"


def test_a_missing_and_an_old_package(monkeypatch):
    monkeypatch.setitem(checks_machine.REQUIRED, "numpy", ("numpy", "99"))
    monkeypatch.setitem(checks_machine.REQUIRED, "absent_module", ("absent", "1"))
    answer = checks_machine.packages()
    assert answer.status == "FAIL"
    assert "absent (missing)" in answer.value
    assert "'numpy>=99'" in answer.remedy


def test_packages_are_those_of_the_metadata():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = {
        tuple(part.strip() for part in line.split(">="))
        for line in setup["options"]["install_requires"].split("\n")
        if line.strip()
    }
    assert set(checks_machine.REQUIRED.values()) == wanted


def test_little_memory(monkeypatch):
    monkeypatch.setattr("hpctrain.mpi.memory.available_memory", lambda: 1 << 20)
    assert checks_files.memory().status == "warn"


@pytest.mark.parametrize(
    "asked, chosen, status",
    [("", "Haswell", "note"), ("Haswell", "Haswell", "ok"), ("Zen9", "Haswell", "warn")],
)
def test_the_kernels_of_openblas(monkeypatch, asked, chosen, status):
    library = {"internal_api": "openblas", "architecture": chosen}
    monkeypatch.setattr(checks_machine, "_blas", lambda: library)
    monkeypatch.setenv("OPENBLAS_CORETYPE", asked)
    assert checks_machine.coretype().status == status


def mpi_ranks(monkeypatch, launcher, version, library="Open MPI v5.0.11", size=1):
    monkeypatch.setattr("hpctrain.mpi.facts.library", lambda: library)
    world = SimpleNamespace(size=size, rank=0)
    return SimpleNamespace(launcher=launcher, launcher_text=version, world=world, topology=None)


@pytest.mark.parametrize(
    "launcher, version, status",
    [
        ("/x/mpirun", "mpirun (Open MPI) 5.0.11", "ok"),
        ("/x/mpirun", "mpirun (Open MPI) 4.1.4", "warn"),
        ("/x/mpirun", "HYDRA of MPICH 5.0.2", "FAIL"),
        ("/x/mpirun", "", "note"),
        (None, "", "warn"),
        ("/x/mpirun", "Intel(R) MPI Library for Linux* OS, Version 2021.18", "FAIL"),
    ],
)
def test_the_mpirun_must_be_of_the_library(monkeypatch, launcher, version, status):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert checks_mpi.mpirun(mpi_ranks(monkeypatch, launcher, version)).status == status


@pytest.mark.parametrize(
    "library, status", [("MPICH 4.0.2", "FAIL"), ("MPICH 5.0.2", "warn"), ("Open MPI v5", "warn")]
)
def test_more_ranks_than_cores(monkeypatch, library, status):
    """Debian's MPICH cannot be used then."""
    ranks = mpi_ranks(monkeypatch, None, "", library)
    node = SimpleNamespace(allgather=lambda mine: [{0, 1}] * 4)
    ranks.topology = SimpleNamespace(local_size=4, local_rank=0, node=node)
    found = checks_mpi.cores(ranks)
    assert found.status == status and "start fewer ranks" in found.remedy


def test_the_launcher_of_this_environment_says_what_it_is():
    found = checks_mpi.find_launcher()
    assert Path(found).parent == Path(launcher()).parent
    assert checks_mpi.launcher_version(found)
    assert checks_mpi.launcher_version("/no/such/program") == ""


def test_intel_s_mpirun_does_not_pass_signals_on(monkeypatch):
    version = "Intel(R) MPI Library for Linux* OS, Version 2021.18"
    for name, status in (("mpirun", "note"), ("mpiexec.hydra", "ok")):
        ranks = mpi_ranks(monkeypatch, f"/x/{name}", version, "Intel(R) MPI Library 2021.18")
        assert checks_mpi.mpirun(ranks).status == status


def test_a_size_of_another_job_step(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    answer = checks_mpi.launcher(mpi_ranks(monkeypatch, None, "", size=2))
    assert answer.status == "warn" and "OMPI_COMM_WORLD_SIZE=8" in answer.value


def test_mpi_that_does_not_load(monkeypatch):
    def start(allow_singleton):
        raise RuntimeError("cannot load MPI library\nlibmpi.so.40: not found")

    monkeypatch.setattr("hpctrain.mpi.start.start", start)
    ranks = checks_mpi.Ranks()
    answers = [findings.answer_of(check) for check in checks_mpi.checks(ranks)]
    assert answers[0].status == "FAIL" and "cannot load MPI library" in answers[0].value
    assert ranks.speaks
    assert {a.status for a in answers[1:] if a} <= {"ok", "note", "warn"}


def test_a_check_that_raises_is_a_failed_line():
    def broken():
        raise KeyError("MemTotal")

    answer = findings.answer_of(findings.Check("Memory", "memory", broken))
    assert answer.status == "FAIL"
    assert "KeyError: 'MemTotal'" in answer.value
    assert answer.remedy


def test_answers_of_ranks_are_merged():
    checks = [findings.Check("A", name, lambda: None) for name in ("same", "free", "bad", "once")]
    rows = [
        [findings.ok("1"), findings.ok("9 GiB", varies=True), findings.ok("x"), None],
        [findings.ok("1"), findings.ok("8 GiB", varies=True), findings.ok("y"), None],
        [findings.ok("1"), findings.ok("7 GiB", varies=True), findings.fail("z", "do"), None],
        [findings.ok("1"), findings.ok("6 GiB", varies=True), findings.ok("x"), findings.ok("c")],
    ]
    same, free, bad, once = findings.merge(checks, rows)
    assert (same.status, same.value, same.differs) == ("ok", "1", {})
    assert (free.status, free.value) == ("ok", "9 GiB")
    assert bad.value == "ranks 0, 3: x; rank 1: y; rank 2: z"
    assert (bad.status, bad.remedy, bad.differs["x"]) == ("FAIL", "do", [0, 3])
    assert once.value == "c"
    assert findings.worst([same, free]) == "ok"
    rows[2][2] = findings.ok("z")
    assert findings.merge(checks, rows)[2].status == "note"


@pytest.mark.parametrize(
    "ranks, text", [([3], "rank 3"), ([0, 1, 2, 3, 6], "ranks 0-3, 6"), ([0, 2], "ranks 0, 2")]
)
def test_ranks_as_text(ranks, text):
    assert findings.ranks_text(ranks) == text
