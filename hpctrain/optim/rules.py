"""Update rules: SGD and AdamW, each one kernel launch per range of equal weight decay.

A rule holds numbers only. Its state (momentum and such) lies in flat arrays that the caller owns
and passes in, one range per rank.

Layer: optim. Knows nothing of ranks, layers and schedules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from hpctrain.device import Device
from hpctrain.errors import UsageError

__all__ = ["SGD", "AdamW", "Range", "Rule", "square_sum"]

Array = Any
PARTIAL = 4096  # elements whose squares one warp adds up; as in cuda/sums.cu


@dataclass(frozen=True, slots=True)
class Range:
    """A range of flat arrays that is updated alike: `parameters`, `gradients` and states, (n,).

    `decay` tells whether weight decay applies to it.
    """

    parameters: Array
    gradients: Array
    states: Mapping[str, Array]
    decay: bool


class Rule(Protocol):
    """How a range of parameters follows its gradient."""

    states: ClassVar[tuple[str, ...]]  # names of the flat state arrays, each zero at the start

    @property
    def lr(self) -> float:
        """The base learning rate."""

    def update(self, device: Device, part: Range, *, step: int, lr: float, scale: float) -> None:
        """Update the range's parameters and states in place, from `scale` times its gradients.

        `step` counts from 0.
        """


@dataclass(frozen=True)
class SGD:
    """v <- momentum v + g;  p <- p - lr v, or with Nesterov p - lr (g + momentum v).

    Weight decay is decoupled: p <- p - lr weight_decay p. Source: Sutskever et al., "On the
    importance of initialization and momentum in deep learning", ICML 2013.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    states: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        _at_least_zero(lr=self.lr, weight_decay=self.weight_decay)
        _fractions(momentum=self.momentum)

    def update(self, device: Device, part: Range, *, step: int, lr: float, scale: float) -> None:
        """See `Rule`."""
        n = part.parameters.size
        device.launch(
            "sgd", part.parameters, part.gradients, part.states["momentum"], lr, self.momentum,
            self.weight_decay if part.decay else 0.0, scale, int(self.nesterov), n, work=n,
        )  # fmt: skip


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    states: ClassVar[tuple[str, ...]] = ("mean", "square")

    def __post_init__(self) -> None:
        _at_least_zero(lr=self.lr, weight_decay=self.weight_decay, epsilon=self.epsilon)
        _fractions(beta1=self.betas[0], beta2=self.betas[1])

    def update(self, device: Device, part: Range, *, step: int, lr: float, scale: float) -> None:
        """See `Rule`."""
        n, states = part.parameters.size, part.states
        beta1, beta2 = self.betas
        device.launch(
            "adamw", part.parameters, part.gradients, states["mean"], states["square"], lr, beta1,
            beta2, self.epsilon, self.weight_decay if part.decay else 0.0,
            1 / (1 - beta1 ** (step + 1)), 1 / (1 - beta2 ** (step + 1)), scale, n, work=n,
        )  # fmt: skip


def square_sum(device: Device, x: Array) -> float:
    """Sum of the squares of a flat device array, as float64 on the host. Synchronizes."""
    n = x.size
    parts = -(-n // PARTIAL)
    if parts == 0:
        return 0.0
    partial = device.empty(parts, x.dtype)
    device.launch("square_sum_partials", x, partial, n, work=parts)
    return float(device.to_host(partial).sum(dtype=np.float64))


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is {value}; it must be a finite number, 0 or more")


def _fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 0 and less than 1")
