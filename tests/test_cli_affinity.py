"""`hpctrain doctor --affinity`: planted placements exactly, and real ranks bound by hand."""

from __future__ import annotations

import json
import os

import pytest
from launching import mpirun

from hpctrain.cli import affinity
from hpctrain.cli.affinity import Place, table_of, warnings_of


def place(rank, node, local, cores, numa=(0,), gpu="", gpu_numa=-1, threads=1):
    return Place(rank, node, f"n{node}", local, tuple(cores), numa, gpu, gpu_numa, threads)


def test_nodes_that_are_alike_are_one_line_per_local_rank():
    """Ranks 0, 2 and 4 on three nodes; the last has its ranks the other way round."""
    bound = [(range(4), (0,)), (range(4, 8), (1,))]
    places = []
    for node in range(3):
        for local in (0, 1):
            cores, numa = bound[local if node < 2 else 1 - local]
            gpu = f"GPU-{node}{local}"
            places.append(place(2 * node + local, node, local, cores, numa, gpu, local, 4))
    assert table_of(places) == [
        "nodes   local  ranks  cores  NUMA  GPU         BLAS threads",
        "n0, n1  0      0,2    0-3    0     0 (NUMA 0)             4",
        "        1      1,3    4-7    1     1 (NUMA 1)             4",
        "n2      0      4      4-7    1     0 (NUMA 0)             4",
        "        1      5      0-3    0     1 (NUMA 1)             4",
    ]
    (far,) = warnings_of(places)
    assert far.startswith("n2: rank 4 has a GPU at NUMA node 0 and cores of 1")
    assert far.endswith("(and 1 more)")


def test_a_good_placement_has_no_warning():
    places = [place(0, 0, 0, (0, 1), threads=2), place(1, 0, 1, (2, 3), threads=2)]
    assert warnings_of(places) == []
    assert warnings_of([place(0, 0, 0, (0, 1), threads=2)]) == []


@pytest.mark.parametrize(
    "masks, threads, told",
    [
        (((0, 1), (1, 2)), 1, "n0: ranks 0 and 1 share cores 1:"),
        (((0, 1), (0, 1)), 1, "n0: the 2 ranks all may use cores 0-1: they are not bound"),
        (((0, 1), (2, 3)), 3, "n0: 2 ranks with 6 BLAS threads in all have 4 cores: "),
    ],
)
def test_what_is_wrong_is_named(masks, threads, told):
    places = [place(n, 0, n, mask, threads=threads) for n, mask in enumerate(masks)]
    (warning,) = warnings_of(places)
    assert warning.startswith(told)


def test_more_ranks_than_cores():
    warnings = warnings_of([place(n, 0, n, (0,)) for n in range(3)])
    assert len(warnings) == 2 and warnings[1].endswith("start fewer ranks per node")


def test_two_ranks_with_one_gpu():
    places = [place(n, 0, n, (n,), gpu="GPU-1") for n in range(2)]
    assert warnings_of(places)[0].startswith("n0: ranks 0-1 have the same GPU")


def test_what_sysfs_tells(tmp_path):
    for number, cores in enumerate(("0-3,8", "4-7", "")):
        folder = tmp_path / f"devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    assert affinity.numa_of_cores({8}, tmp_path) == (0,)
    assert affinity.numa_of_cores({3, 4}, tmp_path) == (0, 1)
    assert affinity.numa_of_cores({3}, tmp_path / "none") == ()
    gpu = tmp_path / "bus/pci/devices/0000:3b:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    assert affinity.numa_of_gpu("GPU-00ff-0000:3B:00.0", tmp_path) == 1
    assert affinity.numa_of_gpu("GPU-00ff-0000:3c:00.0", tmp_path) == -1
    assert affinity.numa_of_gpu("", tmp_path) == -1


def test_real_ranks():
    """Each binds itself to the same one core before it looks."""
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os, sys; os.sched_setaffinity(0, [{core}]); from hpctrain.cli.main import main; "
        "sys.exit(main(['doctor', '--affinity', *sys.argv[1:]]))"
    )
    done = mpirun(2, "-c", code, "--json", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    told = [(p["rank"], p["local_rank"], p["cores"], p["threads"]) for p in found["ranks"]]
    assert told == [(0, 0, [core], 1), (1, 1, [core], 1)]
    assert len(found["warnings"]) == 2
    text = mpirun(2, "-c", code, env={"OMP_NUM_THREADS": "1", "HPCTRAIN_TOPOLOGY": "2x1"}).stdout
    assert f"0-1    {core}" in text and "[warn]" not in text
