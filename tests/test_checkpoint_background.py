"""Checkpoints that training does not wait for: nothing lost, nothing torn, errors on all ranks."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_cases import Run, shared_folder
from launching import ROOT, environment
from simulated import open_sim

from hpctrain.checkpoint import Saver, background, latest_valid, load, newest_valid, open_folder
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import CheckpointError
from hpctrain.mpi.topology import topology


@pytest.fixture
def folder(comm):
    """A path for checkpoints that all ranks share."""
    with shared_folder(comm) as path:
        yield path


def halves(run, comm):
    """Equal ranges for all ranks."""
    share = [(size * comm.rank // comm.size, size) for _, size in run.whole()]
    return [(start, size * (comm.rank + 1) // comm.size) for start, size in share]


def train_on(saver, comm, run, parts):
    """What a run does between two boundaries, until nothing is under way: everything changes."""
    saver.settle()
    for part in parts:
        part.array[:] = -7
    found = []
    while saver.busy:
        found.append(saver.agree(comm.allreduce(saver.wants())))
    return [saved for saved in found if saved]


def check(path, comm, step):
    run = Run()
    parts = run.wanted(run.whole())
    assert load(path, parts, comm) == {"at": step, "step": step}
    run.check(parts, step)


def opened(comm, folder, shape="", **more):
    where = topology(comm, shape or f"1x{comm.size}")
    local = open_folder(more.pop("local"), folder, where) if "local" in more else None
    return where, local, Saver(folder, where, CpuDevice(), local=local, **more)


def begin(saver, comm, step, level="shared"):
    run = Run()
    parts = run.saved(step, halves(run, comm))
    saver.reserve(parts)
    assert saver.begin(step, parts, {"at": step}, level) is None
    return run, parts


@pytest.mark.ranks(1, 2, 3, 4)
def test_what_was_copied_is_saved_though_training_goes_on(comm, folder):
    where, _, saver = opened(comm, folder)
    for step in (1, 2, 3):
        run, parts = begin(saver, comm, step)
        [saved] = train_on(saver, comm, run, parts)
        assert (saved.step, saved.level) == (step, "shared")
        assert 0 < saved.blocked <= saved.total
        assert saved.nbytes == sum(f.stat().st_size for f in _files(folder, step))
    comm.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"]
    check(latest_valid(folder, comm), comm, 3)
    saver.close(orderly=True)
    where.free()


def _files(folder, step):
    return (folder / f"step_{step:08d}").glob("*.safetensors")


@pytest.mark.ranks(1, 2)
def test_a_checkpoint_has_its_name_only_when_it_is_whole(comm, folder, monkeypatch):
    where, _, saver = opened(comm, folder)
    gate, real = threading.Event(), os.pwrite

    def slow(*args):
        assert gate.wait(30)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    begin(saver, comm, 1)
    saver.settle()
    assert comm.allreduce(saver.wants()) == comm.size
    assert saver.agree(comm.size) is None and saver.busy
    assert latest_valid(folder, comm) is None
    with pytest.raises(CheckpointError, match="step 1 is still being saved"):
        begin(saver, comm, 2)
    gate.set()
    assert saver.finish().step == 1 and not saver.busy and saver.finish() is None
    check(latest_valid(folder, comm), comm, 1)
    where.free()


@pytest.mark.ranks(1, 2, 3)
def test_a_full_disk_is_an_error_on_all_ranks_at_the_next_boundary(comm, folder, monkeypatch):
    where, _, saver = opened(comm, folder)
    begin(saver, comm, 1)
    saver.finish()
    real = os.pwrite

    def full(descriptor, data, offset):
        if comm.rank == comm.size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        run, parts = begin(saver, comm, 2)
        with pytest.raises(CheckpointError) as caught:
            train_on(saver, comm, run, parts)
    [text] = set(comm.allgather(str(caught.value)))
    assert f"rank {comm.size - 1}: parameters.safetensors: No space left on device" in text
    assert not saver.busy
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    comm.barrier()
    begin(saver, comm, 2)
    assert saver.finish().step == 2  # nothing is in the way
    where.free()


@pytest.mark.ranks(2)
def test_a_file_size_limit_in_the_thread_of_one_rank_fails_on_all(comm, folder):
    where, _, saver = opened(comm, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin(saver, comm, 1)
    try:
        if comm.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(CheckpointError, match="rank 1: parameters.safetensors: File too large"):
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    where.free()


@pytest.mark.ranks(1)
def test_copies_from_a_gpu_are_complete_after_settle_in_any_order(comm, folder):
    where = topology(comm)
    for step, order in enumerate(("late", "early", "1", "2"), 1):
        device = open_sim(order)
        saver, run = Saver(folder, where, device), Run()
        parts = run.saved(step, run.whole())
        parts = [replace(part, array=device.from_host(part.array)) for part in parts]
        saver.reserve(parts)
        saver.begin(step, parts, {"at": step})
        saver.settle()
        for part in parts:
            device.copy(part.array, device.zeros(part.array.shape, part.layout.dtype))
        device.synchronize()
        saver.finish()
        check(latest_valid(folder, comm), comm, step)
        saver.close(orderly=True)
    where.free()


@pytest.mark.ranks(1, 2)
def test_without_memory_for_copies_training_waits(comm, folder, monkeypatch, caplog):
    monkeypatch.setattr(background, "available_memory", lambda: 1000)
    where, _, saver = opened(comm, folder)
    run = Run()
    parts = run.saved(1, halves(run, comm))
    saver.reserve(parts)
    assert not saver.staged
    assert ("0.0 MB can be had" in caplog.text) == (comm.rank == 0)
    saved = saver.begin(1, parts, {"at": 1})
    assert saved.step == 1 and saved.blocked == saved.total and not saver.busy
    check(latest_valid(folder, comm), comm, 1)
    where.free()


SHAPES = {1: ["1x1"], 2: ["2x1", "1x2"], 3: ["2+1", "3x1"], 4: ["2x2", "3+1", "1+3"]}


def nodes_of(local):
    return sorted(Path(local).glob("run-*/node_*"))


def wipe(comm, path):
    """The disk of a node is lost."""
    comm.barrier()
    if comm.rank == 0:
        for file in [p for p in path.rglob("*") if p.is_file()]:
            file.unlink()
    comm.barrier()


@pytest.mark.ranks(1, 2, 3, 4)
def test_checkpoints_on_nodes_survive_the_loss_of_any_one_node(comm, folder):
    for index, shape in enumerate(SHAPES[comm.size]):
        shared, disks = folder / f"shared{index}", folder.parent / f"disks{index}"
        where, local, saver = opened(comm, shared, shape, local=str(disks))
        begin(saver, comm, 1)
        saver.finish()
        for step in (2, 3):
            run, parts = begin(saver, comm, step, "local")
            [saved] = train_on(saver, comm, run, parts)
            assert (saved.step, saved.level) == (step, "local")
        for node in nodes_of(disks):  # those before are gone
            assert [path.name[:13] for path in node.iterdir()] == ["step_00000003"]
        check(latest_valid(shared, comm), comm, 1)
        if where.node_count > 1:
            wipe(comm, nodes_of(disks)[index % where.node_count])
        path = newest_valid(shared, where, local)
        assert path.name == "step_00000003"
        check(path, comm, 3)
        saver.close(orderly=True)
        comm.barrier()
        assert not list(disks.iterdir())
        where.free()


@pytest.mark.ranks(2, 4)
def test_damage_on_nodes_is_found_and_a_copy_or_an_older_one_is_taken(comm, folder, caplog):
    disks = folder.parent / "disks"
    where, local, saver = opened(comm, folder, f"2x{comm.size // 2}", local=str(disks))
    begin(saver, comm, 5)
    saver.finish()
    begin(saver, comm, 7, "local")
    saver.finish()
    comm.barrier()
    binaries = sorted(disks.rglob("rank_00000.bin"))
    assert len(binaries) == 2
    for turn, expected in enumerate((7, 5)):
        if comm.rank == 0:
            content = bytearray(binaries[turn].read_bytes())
            content[3] ^= 1
            binaries[turn].write_bytes(content)
            for path in folder.glob("step_00000007"):
                (path / "state.json").unlink()
        comm.barrier()
        path = newest_valid(folder, where, local)
        check(path, comm, expected)
        comm.barrier()
    if comm.rank == 0:
        assert "rank 0's part on node" in caplog.text and "on the nodes is not whole" in caplog.text
    where.free()


@pytest.mark.ranks(1, 2, 3)
def test_no_room_to_put_a_checkpoint_together_is_an_error(comm, folder, monkeypatch):
    """Going on from an older one would only lose more."""
    disks = folder.parent / "disks"
    where, local, saver = opened(comm, folder, f"{comm.size}x1", local=str(disks))
    for step, level in ((1, "shared"), (2, "local")):
        begin(saver, comm, step, level)
        saver.finish()
    comm.barrier()

    real = os.pwrite
    for what in ("parameters.safetensors", "optimizer.safetensors", "state.json"):

        def full(descriptor, data, offset, what=what):
            if Path(f"/proc/self/fd/{descriptor}").readlink().name == what:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(CheckpointError, match="cannot be put together in .*No space left"):
                newest_valid(folder, where, local)
        comm.barrier()
    check(newest_valid(folder, where, local), comm, 2)
    where.free()


@pytest.mark.ranks(2, 3)
def test_half_a_checkpoint_on_nodes_does_not_count(comm, folder):
    disks = folder.parent / "disks"
    where, local, saver = opened(comm, folder, f"{comm.size}x1", local=str(disks))
    assert newest_valid(folder, where, local) is None
    begin(saver, comm, 1, "local")
    saver.settle()
    while comm.allreduce(saver.wants()):  # every byte is there, but no record
        pass
    comm.barrier()
    assert len(list(disks.rglob("rank_*.bin"))) == 2 * comm.size
    assert newest_valid(folder, where, local) is None
    saver.finish()
    check(newest_valid(folder, where, local), comm, 1)
    comm.barrier()
    if comm.rank == 0:  # what another run of this folder left is not taken for this one's
        (folder / "run_id").write_text("00000000\n")
    comm.barrier()
    again = open_folder(str(disks), folder, where)
    comm.barrier()
    assert [path.name[-8:] for path in disks.iterdir()] == ["00000000"]
    assert not list(again.found())
    where.free()


@pytest.mark.ranks(2)
def test_what_one_rank_count_left_on_nodes_another_can_use(comm, folder):
    """Also from nodes that are numbered otherwise now."""
    from mpi4py import MPI

    disks = folder.parent / "disks"
    where, local, saver = opened(comm, folder, "2x1", local=str(disks))
    begin(saver, comm, 4, "local")
    saver.finish()
    comm.barrier()
    if comm.rank == 0:
        alone = topology(MPI.COMM_SELF)
        path = newest_valid(folder, alone, open_folder(str(disks), folder, alone))
        check(path, MPI.COMM_SELF, 4)
    comm.barrier()
    where.free()


LOSS = """
import shutil, sys
from pathlib import Path
from test_checkpoint_background import begin, check, opened
from hpctrain.checkpoint import newest_valid
from hpctrain.mpi.start import start

comm, folder = start(), Path(sys.argv[1])
disks = Path("/dev/shm/checkpoints")  # each node has its own
where, local, saver = opened(comm, folder, "3x1", local=str(disks))
assert where.node_count == 3
for step, lost in ((1, 0), (2, 1), (3, 2)):
    begin(saver, comm, step, "local")
    saver.finish()
    assert len(list(disks.rglob("rank_*.bin"))) == 2, "its own and one copy"
    comm.barrier()
    if where.node_index == lost:
        shutil.rmtree(disks)
    check(newest_valid(folder, where, local), comm, step)
    comm.barrier()
if comm.rank == 0:
    print("survived", where.node_count)
"""


@pytest.mark.slow
def test_the_memory_of_any_real_node_may_be_lost(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "netns-cluster"), "run", "3x1", "--timeout", "100"]
    command = [*tool, "--", sys.executable, "-c", LOSS, str(tmp_path / "checkpoints")]
    env = environment({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=150)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0 and "survived 3" in done.stdout, done.stdout + done.stderr
