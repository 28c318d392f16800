"""The learning rate as a pure function of the step, so that a resumed run needs no state.

Layer: optim. Knows nothing of rules and ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpctrain.errors import UsageError, nearest

__all__ = ["NAMES", "Schedule"]

NAMES = ("constant", "cosine", "linear", "step")


@dataclass(frozen=True)
class Schedule:
    """lr(step) = base rate x warm-up x decay, for step 0, 1, ..., total_steps - 1.

    The warm-up rises linearly over `warmup_steps` steps, from 1 / warmup_steps to 1. Then:

        constant   1
        cosine     from 1 to `final`, half a cosine (Loshchilov and Hutter, "SGDR", ICLR 2017)
        linear     from 1 to `final`
        step       `factor` to the power of the number of `milestones` that were reached

    After `total_steps` the rate stays at its last value.
    """

    name: str = "constant"
    total_steps: int = 1
    warmup_steps: int = 0
    final: float = 0.0
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UsageError(
                f"no schedule is called {self.name!r}{nearest(self.name, NAMES)}; "
                f"there are {', '.join(NAMES)}"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise UsageError(f"milestones {self.milestones} must rise")

    def rate(self, base: float, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return base * (step + 1) / self.warmup_steps
        if self.name == "step":
            return base * self.factor ** sum(step >= at for at in self.milestones)
        if self.name == "constant":
            return base
        span = max(self.total_steps - 1 - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / span, 1.0)
        left = 1 - done if self.name == "linear" else (1 + math.cos(math.pi * done)) / 2
        return base * (self.final + (1 - self.final) * left)
