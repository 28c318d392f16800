"""The parameters of a network from times: least squares of relative errors.

The prediction is the price of the schedule that was timed. Its logarithm is made linear in the
logarithms of the parameters again and again (Gauss-Newton with damping, [NW06] chapter 10), so all
parameters stay positive and a microsecond counts as much as a second. Times that no parameters
explain, such as those another program disturbed, count less (Huber's weights [H64]). What no time
depends on keeps the value it had.

Layer: collectives. Knows nothing of how times are taken.

References:
    [NW06] J. Nocedal, S. J. Wright, "Numerical Optimization", 2nd ed., Springer, 2006.
    [H64] P. J. Huber, "Robust estimation of a location parameter", Ann. Math. Stat. 35(1), 1964.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.cost import price
from hpctrain.collectives.network import COMMON, Network
from hpctrain.collectives.schedule import Schedule
from hpctrain.errors import UsageError

__all__ = ["PARAMETERS", "Observation", "fit", "predictions"]

Array = NDArray[np.float64]

PARAMETERS = (
    ("inside", "latency_seconds"),
    ("inside", "seconds_per_byte"),
    ("inside", "message_seconds"),
    ("inside", "read_seconds_per_byte"),
    ("inside", "fence_seconds"),
    ("between", "latency_seconds"),
    ("between", "seconds_per_byte"),
    ("between", "message_seconds"),
    ("between", "burst_bytes"),
    ("rank", "launch_seconds"),
    ("rank", "add_seconds_per_byte"),
    ("rank", "copy_seconds_per_byte"),
    ("node", "memory_seconds_per_byte"),
)

STEP = 0.1  # of a logarithm, for derivatives
TRUSTED = 0.25  # relative error from which a time counts less
PRIOR = 0.02  # pull towards the start, for what times hardly depend on
ROUNDS = 12
SMALLEST = 1e-14


@dataclass(frozen=True)
class Observation:
    """What a schedule took on the ranks at hand."""

    schedule: Schedule
    seconds: float


def predictions(network: Network, found: Sequence[Observation]) -> Array:
    """Seconds of each, shape (observations,)."""
    return np.array([price(one.schedule, network).seconds for one in found])


def fit(found: Sequence[Observation], start: Network = COMMON) -> Network:
    """The network that explains the times best.

    Args:
        start: where to begin; NICs, duplex and cores are taken from it as they are.

    Raises:
        UsageError: nothing to fit to, or a time that is not positive.
    """
    if not found or min(one.seconds for one in found) <= 0:
        raise UsageError("a fit needs times above 0: measure with larger --sizes")
    measured = np.log([one.seconds for one in found])
    first = at = _vector(start)
    damping, error = 1e-2, np.inf
    for _ in range(ROUNDS):
        residual = _logarithms(at, start, found) - measured
        weights = np.minimum(1.0, TRUSTED / np.maximum(np.abs(residual), TRUSTED))
        jacobian = _jacobian(at, residual + measured, start, found)
        error = _loss(residual, at - first, weights)
        while damping < 1e4:
            step = _step(jacobian, residual, at - first, weights, damping)
            after = _logarithms(at + step, start, found) - measured
            if _loss(after, at + step - first, weights) < error:
                break
            damping *= 10
        else:
            break
        at, damping = at + step, damping / 10
        if np.abs(step).max() < 1e-3:
            break
    return _with(start, at)


def _loss(residual: Array, away: Array, weights: Array) -> float:
    return float(np.sum(weights * residual**2) + PRIOR**2 * np.sum(away**2))


def _step(jacobian: Array, residual: Array, away: Array, weights: Array, damping: float) -> Array:
    """The minimum of the linear model, not too far away."""
    root = np.sqrt(weights)
    identity = np.eye(len(away))
    rows = np.vstack([jacobian * root[:, None], PRIOR * identity, np.sqrt(damping) * identity])
    right = np.concatenate([-residual * root, -PRIOR * away, np.zeros(len(away))])
    solution: Array = np.linalg.lstsq(rows, right, rcond=None)[0]
    return np.clip(solution, -1.5, 1.5)


def _jacobian(at: Array, here: Array, start: Network, found: Sequence[Observation]) -> Array:
    columns = []
    for index in range(len(at)):
        moved = at.copy()
        moved[index] += STEP
        columns.append((_logarithms(moved, start, found) - here) / STEP)
    return np.stack(columns, axis=1)


def _logarithms(at: Array, start: Network, found: Sequence[Observation]) -> Array:
    return np.log(predictions(_with(start, at), found))


def _vector(network: Network) -> Array:
    values = [getattr(getattr(network, section), key) for section, key in PARAMETERS]
    return np.log(np.maximum(values, SMALLEST))


def _with(network: Network, at: Array) -> Network:
    """The network with other parameters."""
    changed = {
        name: {
            key: float(np.exp(x))
            for (section, key), x in zip(PARAMETERS, at, strict=True)
            if section == name
        }
        for name in dict.fromkeys(section for section, _ in PARAMETERS)
    }
    sections = {
        name: msgspec.structs.replace(getattr(network, name), **values)
        for name, values in changed.items()
    }
    return msgspec.structs.replace(network, **sections)
