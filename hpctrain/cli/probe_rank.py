"""One rank of a job that tries an MPI operation on GPU memory: `hpctrain doctor --probe-gpu-mpi`.

    mpirun -n 2 python -m hpctrain.cli.probe_rank Allreduce 1024 cuda

The operation runs in host memory, in GPU memory, and in host memory with copies from and to the
GPU; rank 0 prints whether the results agree and what the last two take. "start" instead of an
operation only starts, and reports what --gpu-mpi auto decides. It may crash or hang: that is what
it is for.

Layer: cli. Knows nothing of the report.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.collectives.carry import settle
from hpctrain.mpi import messages, probe
from hpctrain.mpi.facts import library
from hpctrain.mpi.gpu import decide
from hpctrain.mpi.start import start
from hpctrain.parallel.communicator import open_chosen_device

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.device import Device

__all__ = ["main", "measure"]

ROUNDS = 5  # of which the first does not count


def main(arguments: Sequence[str]) -> int:
    """Try one operation. Arguments: its name, bytes per rank, device."""
    name, nbytes, device_name = arguments
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not a file
    device = open_chosen_device(device_name)
    comm = start()
    if name == "start":
        decision = decide(comm, device.name)
        facts: dict[str, Any] = {
            "ranks": comm.size,
            "auto": decision.on,
            "reason": decision.reason,
            "library": library(),
        }
    else:
        facts = measure(comm, device, probe.OPERATIONS[name], int(nbytes))
    if comm.rank == 0:
        print(probe.report(facts), flush=True)
    return 0


def measure(
    comm: MPI.Intracomm, device: Device, operation: probe.Operation, nbytes: int
) -> dict[str, Any]:
    """Whether `operation` is right in device memory, and its seconds there and through the host.

    Collective. Every rank contributes `nbytes`, rounded up to lines of 64 bytes for every rank.
    """
    unit = messages.LINE * comm.size
    n = -(-nbytes // unit) * unit // 4
    mine = ((np.arange(n) * 7 + comm.rank * 11) % 101).astype(np.float32)
    nothing = np.full(n, -1, np.float32)
    expected = np.array(operation(comm, mine.copy(), nothing.copy()))
    array, received = device.shared(n, np.float32), device.shared(n, np.float32)

    def fill() -> None:
        device.copy(array, device.from_host(mine))
        device.copy(received, device.from_host(nothing))
        settle(device)

    fill()
    result = device.to_host(operation(comm, array, received))
    right = comm.allreduce(int(np.array_equal(result, expected))) == comm.size
    host = [device.staging(mine.nbytes).view(np.float32) for _ in range(2)]

    def staged() -> None:
        device.download(array, host[0]).wait()
        device.upload(operation(comm, *host), received).wait()

    def direct() -> None:
        settle(device)
        operation(comm, array, received)

    fill()
    return {
        "right": right,
        "direct": _seconds(comm, direct),
        "staged": _seconds(comm, staged),
    }


def _seconds(comm: MPI.Intracomm, run: Callable[[], None]) -> float:
    """The median over rounds of the slowest rank's time. Collective."""
    times = []
    for _ in range(ROUNDS):
        comm.Barrier()
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return float(np.median(np.max(comm.allgather(times[1:]), axis=0)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
