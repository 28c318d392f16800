"""A rank of a probing job whose operations are broken as those of real MPI libraries were.

python tests/probe_faults.py OPERATION BYTES DEVICE

The faults strike only in device memory: the same operation in host memory is right.
"""

import ctypes
import sys
import time

import numpy as np

from hpctrain.cli import probe_rank
from hpctrain.mpi import probe


def on_the_device(fault):
    """The exchange of neighbours, or `fault` where it is given device memory."""

    def operation(comm, array, received):
        if not isinstance(array, np.ndarray):
            fault(comm)
        return probe._sendrecv(comm, array, received)

    return operation


def crash(comm):
    if comm.rank == 1:
        ctypes.string_at(8)  # reads address 8: a segmentation fault


def hang(comm):
    if comm.rank == 1:
        time.sleep(600)


def fail(comm):
    raise RuntimeError("MPI_ERR_OTHER: unknown error")


def slow(comm):
    time.sleep(0.02)


def wrong(comm, array, received):
    """What was sent, in the place of what should have come."""
    return array if not isinstance(array, np.ndarray) else probe._sendrecv(comm, array, received)


probe.OPERATIONS = {
    "right": probe.OPERATIONS["Sendrecv"],
    "crash": on_the_device(crash),
    "hang": on_the_device(hang),
    "fail": on_the_device(fail),
    "slow": on_the_device(slow),
    "wrong": wrong,
}

if __name__ == "__main__":
    sys.exit(probe_rank.main(sys.argv[1:]))
