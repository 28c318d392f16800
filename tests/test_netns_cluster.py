"""tools/netns-cluster: real nodes on one machine, and what schedules really send between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, environment

TOOL = [sys.executable, str(ROOT / "tools" / "netns-cluster")]
SKIPPED, TIMED_OUT = 77, 124
OVERHEAD = 1.07  # headers of TCP, IP and Ethernet, and acknowledgements

# Adds up `repeat` times; rank 0 prints what each node's interface sent meanwhile, what the same
# time without a collective costs, and what the schedule says its ranks send to other nodes.
ADDING = """
import json, sys, time
import numpy as np
from hpctrain.collectives.algorithms import PRESETS, all_reduce
from hpctrain.collectives.buffers import Buffers
from hpctrain.collectives.interpreter import Interpreter, node_list
from hpctrain.collectives.schedule import Send
from hpctrain.device.cpu import CpuDevice
from hpctrain.mpi import start
from hpctrain.mpi.topology import topology

def sent():
    [line] = [line for line in open("/proc/net/dev") if "eth0:" in line]
    return int(line.split(":")[1].split()[8])

n, repeat = 1 << 20, 4
world, device, found = start.start(), CpuDevice(), []
with topology(world) as where:
    device.prepare(["float32"], world)
    nodes = node_list(where)
    for name, by_node in (("two-level", True), ("ring", True), ("ring", False)):
        schedule = all_reduce(nodes, n, 4, PRESETS[name], by_node=by_node)
        buffers = Buffers(where, device, n, "float32")
        array = buffers.array
        program = Interpreter(where, device, schedule, array, buffers.peers)
        begun, counts = time.perf_counter(), []
        for times in (0, repeat):
            where.comm.Barrier()
            counts.append(-sent())
            where.comm.Barrier()  # nobody sends before all have read their counters
            for _ in range(times):
                array[:] = where.rank + 1
                program.run()
            where.comm.Barrier()
            counts[-1] += sent()
        assert (array == sum(range(1, where.size + 1))).all()
        assert program.moved == schedule.traffic(where.rank)
        crossing = sum(
            schedule.nbytes(m) for turn in schedule.rounds(where.rank) for m in turn.messages
            if isinstance(m, Send) and nodes[m.peer] != nodes[where.rank]
        )
        leaders = where.leaders
        total = where.node.allreduce(crossing)
        row = (total, (counts[1] - counts[0]) / repeat)
        rows = leaders.gather(row) if leaders else None
        found.append({"name": name, "by_node": by_node, "nodes": nodes, "rows": rows})
if world.rank == 0:
    print("found", json.dumps(found), flush=True)
"""


def cluster(*args, timeout=60):
    """Run the tool; skip the test where the machine does not allow clusters."""
    env = environment({"PRTE_MCA_rmaps_default_mapping_policy": None})
    done = subprocess.run(
        [*TOOL, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    return done


def nothing_is_left(name=None):
    """No namespace, no state and no process of clusters whose owner is gone."""
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    folders = {path.name for path in Path("/run/hpctrain-netns").glob(name or "hpc*")}
    names = {line.partition("-")[0] for line in spaces.splitlines() if line.startswith("hpc")}
    alive = {f"hpc{entry.name}" for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return not (folders | names) - alive


def test_a_machine_that_does_not_allow_it_is_told_why():
    env = os.environ | {"PATH": "/nonexistent"}
    done = subprocess.run([*TOOL, "run", "2x1", "--", "true"], env=env, capture_output=True)
    assert done.returncode == SKIPPED
    assert b"not possible here" in done.stderr and (b"root" in done.stderr or b"ip" in done.stderr)


@pytest.mark.parametrize("args", [["run", "2", "--", "true"], ["run", "0x2", "--", "true"], []])
def test_usage(args):
    done = subprocess.run([*TOOL, *args], capture_output=True)
    assert done.returncode == 2


@pytest.mark.slow
def test_schedules_send_what_their_formula_says():
    program = [sys.executable, "-c", ADDING]
    done = cluster("run", "2x2", "--rate", "400mbit", "--timeout", "50", "--", *program)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    size = 4 << 20
    # Between two nodes 2 (M - 1) / M of the buffer; round the ring of four 2 (P - 1) / P, by one
    # rank of each node where ranks are in the order of nodes.
    shares = {("two-level", True): 1.0, ("ring", True): 1.5}
    for found in json.loads(line.removeprefix("found ")):
        share = shares.get((found["name"], found["by_node"]), 1.5)
        assert found["nodes"] == [0, 0, 1, 1]
        for payload, counted in found["rows"]:
            assert payload == share * size, found
            assert payload <= counted <= OVERHEAD * payload, found
    assert nothing_is_left()


@pytest.mark.slow
def test_ranks_placed_round_robin_send_more_by_a_ring_in_rank_order():
    program = [sys.executable, "-c", ADDING]
    args = ["run", "2x2", "--round-robin", "--rate", "400mbit", "--timeout", "50"]
    done = cluster(*args, "--", *program)
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    shares = [payload / (4 << 20) for row in json.loads(line[6:]) for payload, _ in row["rows"]]
    assert shares == [1, 1, 1.5, 1.5, 3, 3]


@pytest.mark.slow
def test_links_have_the_rate_and_nodes_their_names():
    program = (
        "import platform, time; from mpi4py import MPI; import numpy as np; c = MPI.COMM_WORLD; "
        "x = np.zeros(4 << 20, np.uint8); c.Barrier(); t = time.perf_counter(); "
        "c.Send(x, 1) if c.rank == 0 else c.Recv(x, 0); "
        "print(f'{platform.node()} {x.nbytes / (time.perf_counter() - t):.0f}', flush=True)"
    )
    done = cluster("run", "2x1", "--rate", "100mbit", "--", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    rates = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
    assert rates.keys() == {"n0", "n1"}
    assert 8e6 < float(rates["n1"]) < 14e6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "hangs", "is stopped"])
def test_nothing_is_left_whatever_happens(how):
    program = "import sys, time; sys.exit(3)" if how == "fails" else "import time; time.sleep(60)"
    limit = "3" if how == "hangs" else "50"
    command = [*TOOL, "run", "2x1", "--timeout", limit, "--", sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as running:
        if how == "is stopped":
            time.sleep(2)
            running.send_signal(signal.SIGTERM)
        text = running.communicate(timeout=30)[1].decode()
    if running.returncode == SKIPPED:
        pytest.skip(text)
    expected = {"fails": 3, "hangs": TIMED_OUT, "is stopped": 128 + signal.SIGTERM}[how]
    assert running.returncode == expected, text
    assert nothing_is_left()
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"hpc{running.pid}" not in spaces


@pytest.mark.slow
def test_a_cluster_that_stays():
    done = cluster("up", "2", "1gbit")
    name = done.stdout.strip()
    try:
        assert cluster("enter", name, "n1", "--", "hostname").stdout == "n1\n"
        ping = cluster("enter", name, "n0", "--", "sh", "-c", "getent hosts n1; df /dev/shm")
        assert "10.77.0.2" in ping.stdout and "tmpfs" in ping.stdout or "shm" in ping.stdout
        counts = json.loads(cluster("counts", name).stdout)
        assert [row["node"] for row in counts] == ["n0", "n1"]
    finally:
        cluster("down", name)
    assert not Path("/run/hpctrain-netns", name).exists()
