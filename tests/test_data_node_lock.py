"""A lock between processes: no addition is lost, and a holder that dies does not keep it."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from test_data_node_cache import topology

from hpctrain.data.node_lock import LOCK_BYTES, NodeLock

TIMES = 20


@pytest.mark.ranks(2, 4)
def test_additions_of_all_ranks_are_counted(comm):
    """Others come between reading and writing: without the lock most would be lost."""
    from hpctrain.mpi.window import NodeWindow

    node = topology(comm)
    window = NodeWindow(node, LOCK_BYTES + 8 if comm.rank == 0 else 0)
    memory = window.segment(0)
    lock = NodeLock(memory[:LOCK_BYTES], create=comm.rank == 0)
    window.fence()
    total = memory[LOCK_BYTES:].view(np.int64)
    for _ in range(TIMES):
        with lock:
            value = int(total[0])
            time.sleep(1e-3)
            total[0] = value + 1
    comm.Barrier()
    assert total[0] == TIMES * comm.size
    node.free()


DIES = """
import mmap, os
import numpy as np
from hpctrain.data.node_lock import LOCK_BYTES, NodeLock
lock = NodeLock(np.frombuffer(mmap.mmap(-1, LOCK_BYTES), np.uint8), create=True)
child = os.fork()
if not child:
    lock.__enter__()
    os._exit(0)
os.waitpid(child, 0)
for _ in range(2):
    with lock:
        print("mine")
"""


def test_a_lock_whose_holder_died_goes_to_the_next():
    command = [sys.executable, "-c", DIES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "mine\nmine\n"), done.stderr


def test_refuses_memory_that_is_too_small_or_askew():
    memory = np.zeros(2 * LOCK_BYTES, np.uint8)
    for part in (memory[: LOCK_BYTES - 8], memory[1 : LOCK_BYTES + 1]):
        with pytest.raises(ValueError, match="64 bytes on a boundary of 8"):
            NodeLock(part, create=True)
