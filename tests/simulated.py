"""Simulated GPUs for tests, and the orders in which their work may be done.

Knows nothing of what the tests assert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpctrain.device.sim import Machine, SimDevice

__all__ = ["ORDERS", "open_sim", "outcomes", "peek"]

ORDERS = ("late", "early", *(str(seed) for seed in range(20)))


def open_sim(order: str = "late", kernels: str = "host", devices: int = 2) -> SimDevice:
    """Device 0 of a simulated machine of its own."""
    return SimDevice(0, Machine(order, kernels, devices))


def outcomes(program: Callable[[SimDevice], Any]) -> dict[str, Any]:
    """What a program returns in every order; the text of its error where it raises one."""
    results: dict[str, Any] = {}
    for order in ORDERS:
        try:
            results[order] = program(open_sim(order))
        except Exception as error:
            results[order] = f"{type(error).__name__}: {error}"
    return results


def peek(array: Any) -> Any:
    """What MPI would read in device memory now, whatever is pending."""
    return np.array(array._view)
