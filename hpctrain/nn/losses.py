"""Loss operations: one loss per row, already weighted, and its gradient in the same pass.

A loss ends a network: `Tape.backward` starts from it. Nothing is averaged here: the losses are
summed over all samples of a step, whichever rank holds them, and divided once, after the
reduction, by the sum of the weights.

Layer: nn. Knows nothing of ranks.
"""

from __future__ import annotations

from typing import Any

from hpctrain.autograd import Tape, Variable
from hpctrain.device.dtypes import wide_dtype
from hpctrain.errors import UsageError

__all__ = ["IGNORE", "mean_squared_error", "softmax_cross_entropy"]

Array = Any
IGNORE = -100  # a label that no class has: such a row counts nowhere


def softmax_cross_entropy(
    tape: Tape, logits: Variable, labels: Array, weights: Array | None = None, ignore: int = IGNORE
) -> tuple[Variable, Array]:
    """loss[r] = weights[r] (log sum_c exp(logits[r, c]) - logits[r, labels[r]]).

    Args:
        logits: (..., classes); leading dims are rows.
        labels: int64 device array, one per row, in [0, classes) or equal to `ignore`. Not checked
            here, on the device: the caller checks them where they are read.
        weights: device array, one per row, of the wide dtype of the logits'; None for ones.

    Returns:
        the losses, (rows,), in the wide dtype, 0 where the label is `ignore`; and a uint8 array
        (rows,) of whether the largest logit is the label's.
    """
    device, dtype = tape.device, logits.value.dtype
    classes = logits.shape[-1]
    rows = logits.value.size // classes
    _check_rows("softmax_cross_entropy", labels, weights, rows)
    loss, correct = device.empty(rows, wide_dtype(dtype)), device.empty(rows, "uint8")
    wanted = tape.training and logits.needs_grad
    gradient = device.empty(logits.shape, dtype) if wanted else None
    device.launch(
        "softmax_cross_entropy", logits.value, labels, weights, loss, gradient, correct, rows,
        classes, ignore, tape.loss_scale, work=rows,
    )  # fmt: skip
    output = tape.record(loss, (logits,), lambda _: tape.pass_on(logits, gradient))
    return output, correct


def mean_squared_error(
    tape: Tape, x: Variable, target: Array, weights: Array | None = None
) -> Variable:
    """loss[r] = weights[r] mean_c (x[r, c] - target[r, c])^2, of shape (N,).

    x, target: (N, ...); weights: (N,) or None for ones. Target, weights and loss are of the wide
    dtype of x.
    """
    device, dtype = tape.device, x.value.dtype
    if tuple(target.shape) != x.shape:
        raise UsageError(f"mean_squared_error: x is {x.shape}, the target {tuple(target.shape)}")
    rows = x.shape[0]
    cols = x.value.size // rows if rows else 1
    _check_rows("mean_squared_error", None, weights, rows)
    loss = device.empty(rows, wide_dtype(dtype))
    wanted = tape.training and x.needs_grad
    gradient = device.empty(x.shape, dtype) if wanted else None
    device.launch(
        "mean_squared_error", x.value, target, weights, loss, gradient, rows, cols,
        tape.loss_scale, work=rows,
    )  # fmt: skip
    return tape.record(loss, (x,), lambda _: tape.pass_on(x, gradient))


def _check_rows(name: str, labels: Array | None, weights: Array | None, rows: int) -> None:
    for what, array in (("labels", labels), ("weights", weights)):
        if array is not None and array.size != rows:
            raise UsageError(f"{name}: {rows} rows but {array.size} {what}; give one per row")
