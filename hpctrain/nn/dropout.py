"""Dropout: zeroing elements at random, as a function of the sample and not of who computes it.

The mask of a sample depends on the run's seed, the step, the number of dropouts before this one in
the forward pass, and the sample's id. It is computed again for the gradient, never stored.

Layer: nn. Knows nothing of modules, ranks and optimizers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpctrain.autograd import Tape, Variable
from hpctrain.errors import UsageError
from hpctrain.nn.initialize import key_of

__all__ = ["dropout"]

Array = Any
BLOCK = 128  # elements of a sample that a warp handles at a time


def dropout(tape: Tape, x: Variable, rate: float) -> Variable:
    """y = x / (1 - rate) where the element stays, 0 with probability `rate`; x without training.

    x: (N, ...), one row per id of `tape.samples`. Raises `UsageError` for a rate outside [0, 1), or
    where the tape was not told the samples' ids.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"the dropout rate is {rate}; it must be at least 0 and less than 1")
    if not tape.training or rate == 0:
        return x
    samples = x.shape[0]
    if tape.samples is None or len(tape.samples) != samples:
        known = "none" if tape.samples is None else str(len(tape.samples))
        raise UsageError(
            f"dropout needs the ids of the batch's {samples} samples and the tape has {known}; "
            "give Tape(samples=...), one id per row"
        )
    device, n = tape.device, x.value.size
    layer = tape.draws
    tape.draws += 1
    seed = key_of("dropout", tape.seed, tape.step, layer) % 2**64
    keys = device.from_host(np.ascontiguousarray(tape.samples, np.int64))
    per_sample = n // samples if samples else 0
    work = samples * -(-per_sample // BLOCK)

    def mask(array: Array, out: Array) -> None:
        device.launch("dropout", array, out, keys, samples, per_sample, 1 - rate, seed, work=work)

    y = device.empty(x.shape, x.value.dtype)
    mask(x.value, y)
    return tape.record(y, (x,), lambda dy: tape.accumulate(x, lambda out: mask(dy, out)))
