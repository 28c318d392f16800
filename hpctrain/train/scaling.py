"""The scale of the loss in float16: small gradients are not lost, and large ones not infinite.

float16 ends at 6e-8 and at 65504. So the gradients of a pass are those of the loss times a scale,
which the update divides out again. The scale is found by trying: it doubles after `PERIOD` steps
that went well; where a gradient is not finite, it halves and nothing is updated in this step. All
ranks do the same, since they look at one number, the norm of the gradient over all ranks.

Other types have the range of float32 and a scale of 1 for good.

Source: Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2.
Layer: train. Knows nothing of ranks and arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LossScale", "loss_scale_of"]

START = 2.0**12
MOST = 2.0**24
PERIOD = 1000  # steps without a skipped one until the scale doubles


@dataclass
class LossScale:
    """The scale of the next step, and what led to it.

    Attributes:
        scale: a power of two.
        dynamic: whether it changes.
        good: steps since it changed.
        skipped: steps of the whole run that updated nothing.
    """

    scale: float = 1.0
    dynamic: bool = False
    good: int = 0
    skipped: int = 0

    def keep(self) -> None:
        """A step went well."""
        self.good += 1
        if self.dynamic and self.good >= PERIOD:
            self.scale, self.good = min(2 * self.scale, MOST), 0

    def skip(self) -> bool:
        """A step's gradient was not finite: halve the scale. False where that cannot help."""
        if not self.dynamic or self.scale <= 1:
            return False
        self.scale, self.good = self.scale / 2, 0
        self.skipped += 1
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty where there is nothing to keep."""
        if not self.dynamic:
            return {}
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; from the start if the run had no dynamic scale then."""
        if self.dynamic and state:
            self.scale, self.good = float(state["scale"]), int(state["good"])
            self.skipped = int(state["skipped"])


def loss_scale_of(dtype: str) -> LossScale:
    """The scale that a run in this dtype starts with."""
    return LossScale(START, dynamic=True) if dtype == "float16" else LossScale()
