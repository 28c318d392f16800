"""The device that tests of operations, update rules and training compute on: the only place.

The CPU, or what $HPCTRAIN_RUN_DEVICE says: tests/test_device_sim_suite.py runs the files that
import this module again on simulated GPUs. Opened on import, which is before MPI starts.

Knows nothing of what the tests assert.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.autograd import Variable
from hpctrain.parallel.communicator import open_chosen_device

__all__ = ["DEVICE", "get", "put", "set_values", "variable"]

DEVICE = open_chosen_device(os.environ.get("HPCTRAIN_RUN_DEVICE", "cpu"))


def put(array: Any) -> Any:
    """A copy on the device."""
    return DEVICE.from_host(np.asarray(array))


def get(array: Any) -> NDArray[Any]:
    """A copy on the host, after all work so far."""
    return DEVICE.to_host(array)


def set_values(place: Any, values: Any) -> None:
    """Write host values into an array on the device, or into a view of one."""
    values = np.ascontiguousarray(np.broadcast_to(values, place.shape), place.dtype)
    DEVICE.copy(place, put(values))


def variable(value: Any, needs_grad: bool = False) -> Variable:
    """A variable on the device. The place for its gradient holds NaN, which must not be left."""
    place = put(np.full_like(value, np.nan)) if needs_grad else None
    return Variable(put(value), needs_grad, place)
