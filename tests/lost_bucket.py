"""Steps in which the last rank's exchange goes wrong while all ranks compute.

mpirun -n 2 python tests/lost_bucket.py FOLDER raises|never
"""

import platform
import sys
import time
from pathlib import Path

from hpctrain.collectives.across import Across, Dense
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device import open_device
from hpctrain.mpi.calls import Log
from hpctrain.mpi.start import start
from hpctrain.mpi.topology import topology
from hpctrain.mpi.watched import end_all_ranks, watch
from hpctrain.train.watchdog import Watchdog


class Planted(Across):
    """Fails at the third call."""

    calls = 0

    def reduce(self):
        self.calls += 1
        if self.calls == 3:
            planted_failure()
        super().reduce()


class Failing(Dense):
    def __call__(self, column):
        return Planted(column)


def planted_failure():
    return 1 / 0


def never_comes():
    time.sleep(60)


def main(folder, what):
    log = Log()
    comm = watch(start(), log)
    device, last = open_device("cpu"), comm.rank == comm.size - 1
    device.prepare(["float32"], comm)
    crossing = Failing() if last and what == "raises" else Dense()
    with (
        topology(comm, f"{comm.size}x1") as where,
        Watchdog(log, Path(folder), comm.rank, [platform.node()] * comm.size, 1.5, end_all_ranks),
    ):
        slices = SliceReduction(
            where, device, 64, "float32", buckets=[(0, 32), (32, 64)], crossing=crossing,
            overlap="on",
        )  # fmt: skip
        for step in range(4):
            slices.begin(1)
            if step == 2 and last and what == "never":
                never_comes()
            slices.reduce()
            slices.gather(wait=False)
        slices.free()
    print("ended", flush=True)


main(*sys.argv[1:])
