"""Saving: what is left after failures, kills and full disks, on one rank or all."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import (
    ALONE,
    NAMES,
    Run,
    check_alone,
    cut,
    filled,
    layout_of,
    save_alone,
    shared_folder,
)
from launching import ROOT, running

from hpctrain.checkpoint import Part, latest_valid, read_tensors, save
from hpctrain.errors import CheckpointError


@pytest.fixture
def folder(comm):
    """A path for checkpoints that all ranks share."""
    with shared_folder(comm) as path:
        yield path


@pytest.fixture
def memory():
    """A folder where saving takes no time, for tests that save often."""
    with shared_folder(ALONE) as path:
        path.mkdir()
        yield path


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_alone(tmp_path, step)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    save_alone(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step_00000004"]


def test_newer_ones_stay_after_going_back(tmp_path):
    for step in (10, 20, 5, 6, 7):
        check_alone(save_alone(tmp_path, step), step)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (6, 7, 10, 20)]


def test_the_same_step_is_replaced_and_leftovers_go(tmp_path):
    path = save_alone(tmp_path, 2)
    (path / "parameters.safetensors").write_bytes(b"damaged")
    for leftover in (".tmp-step_00000002", ".tmp-step_00000001", ".replaced-step_00000002"):
        (tmp_path / leftover / "inner").mkdir(parents=True)
    check_alone(save_alone(tmp_path, 2), 2)
    assert names(tmp_path) == ["step_00000002"]
    assert set(names(path)) == NAMES


def test_too_small_a_disk_is_found_before_writing(tmp_path, monkeypatch):
    save_alone(tmp_path, 1)
    real = os.statvfs(tmp_path)
    few = os.statvfs_result([real.f_bsize, 4096, 1000, 200, 100, *list(real)[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    with pytest.raises(
        CheckpointError, match=r"1\.1 MB are needed and 0\.4 MB are free; make room"
    ):
        save_alone(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001"]


def test_an_old_checkpoint_that_cannot_be_removed_is_only_a_warning(tmp_path, monkeypatch, caplog):
    save_alone(tmp_path, 1)

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    check_alone(save_alone(tmp_path, 2, keep=1), 2)
    assert "step_00000001 cannot be removed: Permission denied" in caplog.text


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"file": "a/b"}, "cannot be called 'a/b'"),
        ({"owned": (0, 8)}, r"parameters: elements 8 up to \d+ are owned by no rank"),
        ({"owned": (0, 10**6)}, r"range \(0, 1000000\) is not within 0 to"),
        ({"begin": 8}, r"an array of elements 8 up to \d+ does not hold the range"),
        (
            {"array": np.zeros(300)},
            "a flat array of float32 is needed, got 1 dimensions of float64",
        ),
        ({"layout": layout_of("complex64")}, "elements of complex64 cannot be stored"),
    ],
)
def test_parts_that_make_no_sense_are_refused(tmp_path, change, reason):
    layout = layout_of("float32")
    whole = (0, layout.size)
    values = {"file": "parameters", "prefix": "", "layout": layout, "owned": whole, "begin": 0}
    values |= {"array": filled(layout, 1)} | change
    if "layout" in change:
        values["array"] = filled(change["layout"], 1)
        values["owned"] = (0, change["layout"].size)
    with pytest.raises(CheckpointError, match=reason):
        save(tmp_path / "new", 1, [Part(**values)], {}, ALONE)
    assert not (tmp_path / "new").exists()


def test_two_tensors_of_one_name_and_keep_none_are_refused(tmp_path):
    one, other = layout_of("float32", [("a", (2,))]), layout_of("float32", [("a", (2,))])
    parts = [Part("parameters", "", layout, filled(layout, 1), (0, 16)) for layout in (one, other)]
    with pytest.raises(CheckpointError, match="two tensors are called 'a'"):
        save(tmp_path, 1, parts, {}, ALONE)
    with pytest.raises(CheckpointError, match="keep is 0"):
        save(tmp_path, 1, parts[:1], {}, ALONE, keep=0)


def test_large_tensors_go_in_chunks(tmp_path, monkeypatch):
    """Also: a part for each of several ranges, and arrays only reachable through `to_host`."""
    monkeypatch.setattr("hpctrain.checkpoint.parts.CHUNK", 256)
    layout = layout_of("float64", [("a", (1000,)), ("b", (3,)), ("c", (77,))])
    array, sizes = filled(layout, 5), []

    def to_host(piece):
        sizes.append(piece.nbytes)
        return piece.copy()

    bounds = [0, 100, 100, 1003, layout.size]
    ranges = zip(bounds[:-1], bounds[1:], strict=True)
    parts = [Part("parameters", "", layout, array[a:b], (a, b), begin=a) for a, b in ranges]
    path = save(tmp_path, 1, parts, {}, ALONE, to_host=to_host)
    assert max(sizes) == 256 and sum(sizes) == array.nbytes
    tensors = read_tensors(path)
    for entry in layout.entries:
        expected = array[entry.offset : entry.offset + entry.size]
        np.testing.assert_array_equal(tensors[entry.name], expected)


def test_a_save_that_dies_anywhere_leaves_a_whole_checkpoint(memory):
    with running(1, str(ROOT / "tests/dying_saves.py"), str(memory)) as job:
        text, _ = job.communicate(timeout=60)
    assert job.returncode == 0, text
    counts = [int(line) for line in text.split()]
    assert len(counts) == 2 and min(counts) > 20


SAVING = """
import os, sys, random
from mpi4py import MPI
from checkpoint_cases import Run, cut
from hpctrain.checkpoint import save
import numpy as np
comm, run = MPI.COMM_WORLD, Run()
os.write(1, f"pid {os.getpid()}\\n".encode())  # in one piece: ranks' lines must not mix
for step in range(1, 100000):
    rng = np.random.default_rng(step)
    owned = [cut(rng, stop, comm.size)[comm.rank] for _, stop in run.whole()]
    save(sys.argv[1], step, run.saved(step, owned), {"at": step}, comm)
    if comm.rank == 0:
        os.write(1, f"saved {step}\\n".encode())
"""


def test_a_rank_killed_in_a_save_leaves_a_whole_checkpoint(memory):
    draw = random.Random(1)
    for _ in range(3):
        pids, saved = [], 0
        env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        env["OMPI_MCA_btl_sm_backing_directory"] = str(memory.parent)  # a killed rank leaves files
        with running(2, "-c", SAVING, str(memory), env=env) as job:
            while saved < 3:
                kind, number = job.stdout.readline().split()
                pids, saved = (pids + [int(number)], saved) if kind == "pid" else (pids, saved + 1)
            time.sleep(draw.uniform(0, 0.03))
            os.kill(draw.choice(pids), signal.SIGKILL)
            text, _ = job.communicate(timeout=20)
            assert job.returncode != 0
        done = [int(line.split()[1]) for line in text.splitlines() if line.startswith("saved ")]
        path = latest_valid(memory, ALONE)
        step = int(path.name[5:])
        assert step >= max(done, default=3)
        check_alone(path, step)
        assert len([name for name in names(memory) if name.startswith("step_")]) in (2, 3)


def failing(comm, number):
    """A stand-in for os.pwrite that fails in the data of the optimizer's file on the last rank."""
    real, calls = os.pwrite, 0

    def pwrite(descriptor, data, offset):
        nonlocal calls
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        calls += name == "optimizer.safetensors"
        if comm.rank == comm.size - 1 and calls == 2:
            raise OSError(number, os.strerror(number))
        return real(descriptor, data, offset)

    return pwrite


def halves(run, comm):
    """Equal ranges for all ranks."""
    share = [(size * comm.rank // comm.size, size) for _, size in run.whole()]
    return [(start, size * (comm.rank + 1) // comm.size) for start, size in share]


@pytest.mark.ranks(1, 2, 3, 4)
def test_a_disk_full_on_one_rank_fails_on_all(comm, folder, monkeypatch):
    run = Run()
    save(folder, 1, run.saved(1, halves(run, comm)), {}, comm)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(comm, errno.ENOSPC))
        with pytest.raises(CheckpointError) as caught:
            save(folder, 2, run.saved(2, halves(run, comm)), {}, comm)
    texts = comm.allgather(str(caught.value))
    assert set(texts) == {
        f"checkpoint step_00000002 cannot be written to {folder}: "
        f"rank {comm.size - 1}: optimizer.safetensors: No space left on device"
    }
    assert names(folder) == ["step_00000001"]
    comm.barrier()
    save(folder, 2, run.saved(2, halves(run, comm)), {}, comm)  # nothing is in the way
    assert latest_valid(folder, comm).name == "step_00000002"


@pytest.mark.ranks(2)
def test_a_file_size_limit_on_one_rank_fails_on_all(comm, folder):
    run = Run("float64")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if comm.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(CheckpointError, match="rank 1: parameters.safetensors: File too large"):
            save(folder, 1, run.saved(1, halves(run, comm)), {}, comm)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []


@pytest.mark.ranks(1, 2, 3)
def test_other_failures_fail_on_all(comm, folder):
    run, last = Run(), comm.rank == comm.size - 1

    def broken(piece):
        raise MemoryError("no memory")

    to_host = broken if last else np.asarray
    with pytest.raises(CheckpointError, match=f"rank {comm.size - 1}: MemoryError: no memory"):
        save(folder, 1, run.saved(1, halves(run, comm)), {}, comm, to_host=to_host)
    more = {1: "", 2: " (1 other rank failed too)", 3: " (2 other ranks failed too)"}[comm.size]
    with pytest.raises(CheckpointError, match=re.escape(f"rank 0: MemoryError: no memory{more}")):
        save(folder, 1, run.saved(1, halves(run, comm)), {}, comm, to_host=broken)
    wrong = halves(run, comm)
    if last:
        wrong[2] = (-1, 5)
    with pytest.raises(CheckpointError, match=r"optimizer, momentum: range \(-1, 5\)"):
        save(folder, 1, run.saved(1, wrong), {}, comm)
    assert names(folder) == []
    comm.barrier()
    folder.parent.joinpath(f"file{comm.rank}").touch()
    with pytest.raises(CheckpointError, match="rank 0: .*(File exists|Not a directory)"):
        save(folder.parent / "file0", 1, run.saved(1, halves(run, comm)), {}, comm)


@pytest.mark.ranks(2, 3, 4)
def test_ranks_that_do_not_fit_together_are_refused(comm, folder):
    run = Run()
    with pytest.raises(CheckpointError, match="parameters: elements 0 up to 8 are owned more than"):
        owned = halves(run, comm)
        owned[0] = (0, 8)
        save(folder, 1, run.saved(1, owned), {}, comm)
    parts = run.saved(1, halves(run, comm))
    if comm.rank == 1:
        parts[3] = replace(parts[3], prefix="other")
    with pytest.raises(CheckpointError, match="rank 1 passes other parts or layouts than rank 0"):
        save(folder, 1, parts, {}, comm)
    assert not folder.exists()


@pytest.mark.ranks(2, 3, 4)
def test_files_do_not_depend_on_the_ranks(comm, folder):
    run, rng = Run(), np.random.default_rng(3)
    owned = [cut(rng, stop, comm.size)[comm.rank] for _, stop in run.whole()]
    path = save(folder, 1, run.saved(1, owned), {}, comm)
    if comm.rank == 0:
        alone = save_alone(folder.parent / "alone", 1)
        for name in NAMES - {"state.json"}:
            assert (path / name).read_bytes() == (alone / name).read_bytes()
