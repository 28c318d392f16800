"""A lock in memory that the ranks of a node share: what is written under it is seen under it.

A POSIX mutex, process-shared and robust. Locking and unlocking "synchronize memory" (POSIX.1-2017,
4.12) on every processor: one that reads, under the lock, a number that another wrote under it also
sees all that the other wrote before. A plain store of a number promises that on x86-64 only; on
AArch64 or POWER it may be seen before the data that it tells of.

A lock whose holder died is given to the next one: nobody waits for a process that is gone.

Layer: data. Knows nothing of what is locked. Makes no MPI call, so any thread may use it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOCK_BYTES", "NodeLock"]

LOCK_BYTES = 64  # a pthread_mutex_t is 40 or 48 bytes in glibc and musl; a cache line of its own
_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST


class NodeLock:
    """Use it as a context manager, around few instructions: others wait in the kernel.

    About 2 microseconds where nobody else holds it. Not reentrant.
    """

    def __init__(self, memory: NDArray[np.uint8], create: bool) -> None:
        """`memory`: uint8 (LOCK_BYTES,), shared, its begin a multiple of 8 bytes; kept alive here.

        One rank passes `create`, and the others use the lock only after that (a barrier between).
        Raises `OSError` where the system has no such locks.
        """
        if memory.nbytes != LOCK_BYTES or memory.ctypes.data % 8:
            raise ValueError(f"a lock needs {LOCK_BYTES} bytes on a boundary of 8")
        self._memory = memory
        self._mutex = ctypes.c_void_p(memory.ctypes.data)
        self._libc: Any = ctypes.CDLL(None)  # the process itself: the C library is loaded
        if create:
            kind = ctypes.create_string_buffer(LOCK_BYTES)  # a pthread_mutexattr_t is 4 or 8 bytes
            self._certain("pthread_mutexattr_init", kind)
            self._certain("pthread_mutexattr_setpshared", kind, _SHARED)
            self._certain("pthread_mutexattr_setrobust", kind, _ROBUST)
            self._certain("pthread_mutex_init", self._mutex, kind)

    def __enter__(self) -> None:
        status = self._libc.pthread_mutex_lock(self._mutex)
        if status == errno.EOWNERDEAD:  # counters are single numbers: none is half written
            self._certain("pthread_mutex_consistent", self._mutex)
        elif status:
            raise OSError(status, f"cannot lock the node's memory: {os.strerror(status)}")

    def __exit__(self, *exc: object) -> None:
        self._certain("pthread_mutex_unlock", self._mutex)

    def _certain(self, name: str, *arguments: Any) -> None:
        status = getattr(self._libc, name)(*arguments)
        if status:
            raise OSError(status, f"{name} failed: {os.strerror(status)}")
