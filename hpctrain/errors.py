"""Exceptions of hpctrain, as a tree.

    HpctrainError            anything a user can act on; the command line exits with 1
    |- UsageError            a wrong option, key or value (exit 2)
    |- DataError             a data set that is missing, damaged or does not fit
    |- CheckpointError       a checkpoint that is missing, damaged or does not fit
    |- KernelError           a kernel that cannot be compiled, loaded or launched
    |- DeviceError           a device that is missing or cannot do what was asked
    |- LaunchError           MPI and its launcher do not belong together
    `- DivergedError         the loss or a gradient is not finite (exit 3)

Every message names the value, the rule it breaks and the way out. Programming mistakes inside
the package stay ordinary Python exceptions.

Layer 0: imports nothing of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "DivergedError",
    "HpctrainError",
    "KernelError",
    "LaunchError",
    "UsageError",
    "nearest",
]


class HpctrainError(Exception):
    """Base of all errors that a user can act on. `exit_code` is the command's exit status."""

    exit_code = 1


class UsageError(HpctrainError):
    """A wrong option, key or value: nothing was started."""

    exit_code = 2


class DataError(HpctrainError):
    """A data set that is missing, damaged or does not fit the run."""


class CheckpointError(HpctrainError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class KernelError(HpctrainError):
    """A kernel that cannot be compiled, loaded or launched."""


class DeviceError(HpctrainError):
    """A device that is missing or cannot do what was asked."""


class LaunchError(HpctrainError):
    """MPI and the launcher that started the process do not belong together."""


class DivergedError(HpctrainError):
    """The loss or a gradient is not finite."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
