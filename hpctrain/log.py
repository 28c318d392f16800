"""Messages for people: rank 0 says what happens, other ranks only what is wrong.

Modules log through `logging.getLogger(__name__)`; programs call `set_up` once. Warnings go to
standard error, and those of other ranks carry the rank's number.

Layer 0: knows nothing of the package.
"""

from __future__ import annotations

import logging
import sys

__all__ = ["say", "set_up"]


def set_up(rank: int, size: int) -> None:
    """Print the package's log records of this rank, INFO and up on rank 0, else WARNING and up."""
    logger = logging.getLogger("hpctrain")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    where = "" if rank == 0 else f"rank {rank} of {size}: "
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{where}%(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False


def say(text: str) -> None:
    """Write one line in one call, so that other ranks' lines do not cut it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
