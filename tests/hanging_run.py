"""Ranks that agree a few times, and then one of them does not come.

mpirun -n 3 python tests/hanging_run.py FOLDER skipped|other|busy|alive|fine
"""

import os
import platform
import sys
import time
from pathlib import Path

from hpctrain.mpi.calls import Log
from hpctrain.mpi.start import start
from hpctrain.mpi.watched import end_all_ranks, watch
from hpctrain.train.watchdog import Watchdog

LATE = 1  # the rank that does not come


def stuck_reading():
    """From a pipe that nobody writes to."""
    end, _ = os.pipe()
    os.read(end, 1)


def computing_for_long():
    until = time.monotonic() + 30
    while time.monotonic() < until:
        sum(range(1000))


def getting_on(log):
    for _ in range(28):  # 2.8 s
        time.sleep(0.1)
        log.alive()


def main(folder, what):
    log = Log()
    comm = watch(start(), log)
    hosts = comm.allgather(platform.node())
    pair = comm.Split(comm.rank // 2, comm.rank)
    with Watchdog(log, Path(folder), comm.rank, hosts, 1.5, end_all_ranks):
        for _ in range(4):
            comm.Barrier()
            pair.allreduce(1)
        if comm.rank == LATE and what == "skipped":
            stuck_reading()
        elif comm.rank == LATE and what == "busy":
            computing_for_long()
        elif comm.rank == LATE and what == "alive":
            getting_on(log)
        elif comm.rank == LATE and what == "other":
            pair.Barrier()
        elif what == "fine":
            time.sleep(1)
        comm.Barrier()
    pair.Free()
    print("ended", flush=True)


main(*sys.argv[1:])
