"""`hpctrain` where rank 2's clock is 50 ms ahead of the others', and gains 1 ms a second.

As on a machine of its own: every reading of the clock in the process shows it. Knows nothing of
what is done.
"""

from __future__ import annotations

import os
import sys
import time

AHEAD, DRIFT, RANK = 0.05, 1e-3, 2


def start() -> None:
    """Put the clock forward on that rank, and do as the command line says."""
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
    rank = next((int(os.environ[name]) for name in names if name in os.environ), 0)
    if rank == RANK:
        right, begun = time.perf_counter, time.perf_counter()
        time.perf_counter = lambda: (now := right()) + AHEAD + DRIFT * (now - begun)
    from hpctrain.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    start()
