"""One rank fails, in its main thread or another, while the other waits in a collective."""

import sys
import threading

from hpctrain.mpi.start import start


def planted_failure():
    return 1 / 0


comm = start()
if comm.rank == 1:
    if sys.argv[1] == "main":
        planted_failure()
    threading.Thread(target=planted_failure).start()
comm.Barrier()
