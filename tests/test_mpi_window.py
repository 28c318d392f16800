"""Shared memory of a node: sizes, visibility, too little of it, and nothing left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from launching import running, session_pids

from hpctrain.mpi import memory, window
from hpctrain.mpi.memory import available_memory
from hpctrain.mpi.topology import topology
from hpctrain.mpi.window import NodeWindow, WindowError


@pytest.mark.ranks(1, 2, 3, 4)
def test_ranks_see_each_other_s_memory(comm):
    """Segments of different sizes, one of them empty."""
    with topology(comm) as where:
        memory = NodeWindow(where, 10_000 * comm.rank)
        mine = memory.segment(comm.rank)
        assert mine.size == 10_000 * comm.rank and not mine.any()
        mine[:] = comm.rank + 1
        memory.fence()
        for rank in range(comm.size):
            segment = memory.segment(rank)
            assert segment.size == 10_000 * rank and (segment == rank + 1).all()
            assert segment.size == 0 or segment.ctypes.data % 4096 == 0
        memory.fence()
        if comm.rank == 0 and comm.size > 1:
            memory.segment(1)[0] = 77
        memory.fence()
        assert comm.rank != 1 or mine[0] == 77


@pytest.mark.ranks(4)
def test_nodes_have_windows_of_their_own(comm):
    with topology(comm, "0,1,0,1") as where:
        memory = NodeWindow(where, 8)
        memory.segment(where.local_rank).view(np.int64)[0] = comm.rank
        memory.fence()
        seen = [int(memory.segment(k).view(np.int64)[0]) for k in range(2)]
        assert seen == [where.node_index, where.node_index + 2]


@pytest.mark.ranks(2)
def test_arrays_outlive_their_window(comm):
    with topology(comm) as where:
        segment = NodeWindow(where, 100).segment(1 - comm.rank)
    segment[:] = 5
    assert segment.sum() == 500


@pytest.mark.ranks(3)
def test_too_little_memory_is_an_error_on_all_ranks(comm, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_SHM_LIMIT", "2999")
    with topology(comm) as where:
        with pytest.raises(WindowError, match=r"^rank 0: 3,000 bytes .* 2,999 can be had"):
            NodeWindow(where, 1000)
        NodeWindow(where, 999)
        monkeypatch.delenv("HPCTRAIN_SHM_LIMIT")
        with pytest.raises(WindowError, match="of this node's memory"):
            NodeWindow(where, 1 << 50)


@pytest.mark.ranks(3)
def test_a_rank_that_cannot_map_fails_all(comm, monkeypatch):
    """As in containers that cannot see each other's processes."""
    with topology(comm) as where:
        if comm.rank == 1:
            monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(WindowError, match=r"rank 0: .*process 1\b"):
            NodeWindow(where, 1000)
        if comm.rank == 2:
            monkeypatch.delattr(os, "memfd_create")
        with pytest.raises(WindowError, match=r"rank 2: cannot reserve 1,000 bytes"):
            NodeWindow(where, 1000)


@pytest.mark.ranks(2)
def test_a_window_holds_a_descriptor_per_segment_while_it_lives(comm):
    """Python's mmap keeps one; the limit of open files must not be reached over many windows."""
    with topology(comm) as where:
        before = len(os.listdir("/proc/self/fd"))
        kept = NodeWindow(where, 1000)
        assert len(os.listdir("/proc/self/fd")) == before + where.local_size
        del kept
        assert len(os.listdir("/proc/self/fd")) == before


KILLED = """
import time
from hpctrain.mpi.start import start
from hpctrain.mpi.topology import topology
from hpctrain.mpi.window import NodeWindow
where = topology(start())
memory = NodeWindow(where, 50_000_000)
memory.segment(where.local_rank)[:] = 1
memory.fence()
print("ready", flush=True)
time.sleep(60)
"""


def mapped(pid):
    """Paths of the files a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}


LEFT_BY_MPI = ("mpich_shm_", "Intel_MPI")  # these libraries leave their own


def is_ours(path):
    return path.startswith("/memfd:hpctrain")


def test_sigkill_of_all_ranks_leaves_nothing_in_dev_shm():
    """Our memory never has a name there; Open MPI's own files are removed by mpirun."""
    with running(2, "-c", KILLED) as job:
        ready = 0
        while ready < 2:
            assert (line := job.stdout.readline()), "the job ended before it was ready"
            ready += line.count("ready")  # both may come in one line
        files = {
            pid: mapped(pid) for pid in session_pids(job.pid)
        }  # MPICH: also the launcher's own
        ranks = [pid for pid, paths in files.items() if any(map(is_ours, paths))]
        paths = set().union(*(files[pid] for pid in ranks))
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        assert job.wait(20) != 0
    assert len(ranks) == 2
    left = [Path(path) for path in paths if path.startswith("/dev/shm/") and Path(path).exists()]
    for path in left:
        path.unlink()
    assert all(path.name.startswith(LEFT_BY_MPI) for path in left)


def test_available_memory_is_that_of_the_narrowest_cgroup(tmp_path):
    """Version 2: the limit may be that of a group around our own."""
    job = tmp_path / "job"
    (job / "step").mkdir(parents=True)
    for folder, top in ((job, "1000"), (job / "step", "max")):
        (folder / "memory.max").write_text(f"{top}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert memory._cgroup_headrooms(own, tmp_path) == [600]
    own.write_text("7:cpu:/x\n0::/\n")
    assert memory._cgroup_headrooms(own, tmp_path) == []


def test_available_memory_of_an_old_cgroup(tmp_path):
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("500")
    (folder / "memory.usage_in_bytes").write_text("600")
    (folder / "memory.stat").write_text("cache 0")
    own = tmp_path / "cgroup"
    own.write_text("5:cpu,memory:/job\n")
    assert memory._cgroup_headrooms(own, tmp_path) == [0]


def test_available_memory_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= total


def test_the_file_behind_a_process_number_is_checked():
    """In a container with PIDs of its own the number may be that of another process, even ours."""
    descriptor, problem = window._reserve(100)
    assert not problem
    status = os.fstat(descriptor)
    file = (status.st_dev, status.st_ino)
    (segment,), problem = window._map_all([(os.getpid(), descriptor, file, 100)])
    assert segment.shape == (100,) and not problem
    other = (status.st_dev, status.st_ino + 1)
    segments, problem = window._map_all([(os.getpid(), descriptor, other, 100)])
    assert not segments and "is another one here" in problem
    os.close(descriptor)
