"""Gradients of operations against central differences in float64."""

from __future__ import annotations

import numpy as np
from tested_device import DEVICE, get, put, variable

from hpctrain.autograd import Tape
from hpctrain.nn.losses import mean_squared_error

STEP = 1e-6
ELEMENTS = 40  # of each input that are moved


def new_tape(**options):
    """A tape on the device of the tests."""
    return Tape(DEVICE, **options)


def gradients(operation, values, tape=new_tape, wanted=None, seed=0):
    """(y, total loss, gradients) of operation(tape, *variables) behind a squared error.

    `wanted`: which inputs need a gradient; the others' is None. Places hold NaN beforehand.
    """
    wanted = [True] * len(values) if wanted is None else wanted
    variables = [variable(value, need) for value, need in zip(values, wanted, strict=True)]
    record = tape()
    y = operation(record, *variables)
    target = np.random.default_rng(seed).standard_normal(y.shape).astype(y.value.dtype)
    loss = mean_squared_error(record, y, put(target))
    if any(wanted):
        record.backward(loss)
    record.finish([variable for variable in variables if variable.needs_grad])
    places = [None if v.place is None else get(v.place) for v in variables]
    return get(y.value), float(get(loss.value).sum()), places


def check_gradients(operation, *values, tape=new_tape, wanted=None, rtol=1e-6):
    """Move some elements of every input and compare the loss with what the gradient promises."""
    values = [np.ascontiguousarray(value, np.float64) for value in values]
    _, _, found = gradients(operation, values, tape, wanted)
    rng = np.random.default_rng(1)
    for value, gradient in zip(values, found, strict=True):
        if gradient is None:
            continue
        flat, scale = value.reshape(-1), max(np.abs(gradient).max(initial=0), 1e-3)
        chosen = rng.permutation(flat.size)[:ELEMENTS]
        for index in chosen:
            losses, before = [], flat[index]
            for step in (STEP, -STEP):
                flat[index] = before + step
                losses.append(gradients(operation, values, tape, [False] * len(values))[1])
            flat[index] = before
            slope = (losses[0] - losses[1]) / (2 * STEP)
            np.testing.assert_allclose(
                gradient.reshape(-1)[index], slope, rtol=rtol, atol=3e-8 + rtol * scale
            )
