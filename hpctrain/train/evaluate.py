"""Evaluation: every sample of a split exactly once, whatever the number of ranks.

Layer: train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpctrain.train.session import Session

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Weighted means over a split; accuracy is nan for a regression."""

    split: str
    samples: int
    loss: float
    accuracy: float

    def __str__(self) -> str:
        accuracy = "" if math.isnan(self.accuracy) else f"   accuracy {self.accuracy:.2%}"
        return f"{self.split}: {self.samples} samples   loss {self.loss:.4f}{accuracy}"


def evaluate(session: Session, split: str, alive: Callable[[], None] | None = None) -> Evaluation:
    """Evaluate the model, as bound, on a split. Collective; the same result on all ranks.

    `alive` is called after each batch: ranks exchange nothing until the end.
    """
    totals = np.zeros(4)  # loss, weight, correct, samples
    loader = session.loader(split, order="sequential")
    try:
        for batch in loader.epoch(0):
            for part in batch.split(session.config.batch.accumulate):
                tape = session.tape(part, step=0, training=False)
                output = session.model(tape, session.task.inputs(session.device, part))
                _, sums = session.task.loss(tape, output, part)
                totals += [sums.loss, sums.weight, sums.correct, len(part)]
            if alive is not None:
                alive()
    finally:
        loader.close()
    session.all_reduce(totals)
    loss, weight, correct, samples = totals.tolist()
    accuracy = correct / weight if session.task.classes and weight else math.nan
    return Evaluation(split, int(samples), loss / weight if weight else math.nan, accuracy)
