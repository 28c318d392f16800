"""Batch norm: microbatches, the whole step on several ranks, running statistics, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import reference_images as reference
from gradient_check import check_gradients, gradients, new_tape
from tested_device import DEVICE, variable

from hpctrain.errors import UsageError
from hpctrain.nn.batch_norm import batch_norm
from hpctrain.nn.losses import mean_squared_error
from hpctrain.nn.module import Statistic

GROUPS = np.array([0, 2, 3, 3, 7])
SHAPE = (7, 3, 2, 5)  # 6 pixels of 5 channels


def statistics(channels=5, dtype=np.float64):
    """A mean and a variance with room for their sums."""
    pair = Statistic((channels,), 0.0, 0.1), Statistic((channels,), 1.0, 0.1)
    for index, statistic in enumerate(pair):
        value = np.linspace(0.5, 2, channels).astype(dtype) + index
        statistic.value = DEVICE.from_host(value)
        statistic.sum = DEVICE.from_host(np.full(channels + 1, np.nan, dtype))
    return pair


def sums(pair):
    """The sums of the two statistics, on the host."""
    return [DEVICE.to_host(statistic.sum) for statistic in pair]


def inputs(dtype=np.float64, shape=SHAPE):
    rng = np.random.default_rng(0)
    channels = shape[-1]
    shapes = shape, (channels,), (channels,), shape
    x, gamma, beta, shortcut = (rng.standard_normal(s).astype(dtype) for s in shapes)
    return [3 * x + 1, gamma, beta, shortcut]


def operation(relu=False, whole_step=False, pair=None):
    def apply(tape, x, gamma, beta, shortcut=None):
        return batch_norm(
            tape, x, gamma, beta, *(pair or statistics(x.shape[-1], x.value.dtype)),
            relu=relu, whole_step=whole_step, shortcut=shortcut,
        )  # fmt: skip

    return apply


def grouped_tape():
    return new_tape(groups=GROUPS)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_microbatch_has_its_own_statistics(relu, plus, dtype):
    values = inputs(dtype)[: 4 if plus else 3]
    y, _, _ = gradients(operation(relu), values, grouped_tape, wanted=[False] * len(values))
    rows, gamma, beta, *shortcut = (v.reshape(-1, 5) if v.ndim > 1 else v for v in values)
    expected = reference.batch_norm(rows, GROUPS * 6, gamma, beta, 1e-5, relu, *shortcut)
    np.testing.assert_allclose(y.reshape(-1, 5), expected, atol=300 * np.finfo(dtype).eps)


def test_a_microbatch_has_the_same_bits_alone():
    values = inputs(np.float32)[:3]
    y, _, _ = gradients(operation(), values, grouped_tape, wanted=[False] * 3)
    alone = [values[0][3:7].copy(), *values[1:]]
    part, _, _ = gradients(operation(), alone, wanted=[False] * 3)
    np.testing.assert_array_equal(y[3:7], part)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("whole_step", [False, True])
def test_gradients(relu, plus, whole_step):
    values = inputs()[: 4 if plus else 3]
    check_gradients(operation(relu, whole_step), *values, tape=grouped_tape, rtol=1e-5)


def test_gradient_of_the_shortcut_alone():
    wanted = [False, False, False, True]
    check_gradients(operation(relu=True), *inputs(), tape=grouped_tape, wanted=wanted)


def test_running_statistics_are_weighted_by_rows():
    x, gamma, beta, _ = inputs()
    pair = statistics()
    gradients(operation(pair=pair), [x, gamma, beta], grouped_tape)
    mean, variance = sums(pair)
    parts = [x[a:b].reshape(-1, 5) for a, b in reference.filled(GROUPS)]
    weights = [len(part) for part in parts]
    assert mean[-1] == variance[-1] == sum(weights) == 42
    averages = [np.average([f(p) for p in parts], axis=0, weights=weights) for f in (
        lambda part: part.mean(axis=0), lambda part: part.var(axis=0, ddof=1)
    )]  # fmt: skip
    np.testing.assert_allclose(mean[:-1] / 42, averages[0], rtol=1e-12)
    np.testing.assert_allclose(variance[:-1] / 42, averages[1], rtol=1e-12)


def test_a_microbatch_of_one_row_has_no_variance_to_report():
    values = inputs(shape=(3, 5))[:3]
    pair = statistics()
    tape = new_tape(groups=np.array([0, 1, 3]))
    gradients(operation(pair=pair), values, lambda: tape)
    mean, variance = sums(pair)
    assert (mean[-1], variance[-1]) == (3, 2)
    np.testing.assert_allclose(variance[:-1] / 2, values[0][1:].var(axis=0, ddof=1))


@pytest.mark.parametrize("whole_step", [False, True])
@pytest.mark.parametrize("groups", [[0], [0, 0]])
def test_an_empty_batch_says_nothing(whole_step, groups):
    pair = statistics()
    x, gamma, beta, _ = inputs()
    tape = new_tape(groups=np.array(groups))
    y, _, (dx, dgamma, dbeta) = gradients(
        operation(pair=pair, whole_step=whole_step), [x[:0], gamma, beta], lambda: tape
    )
    assert y.shape == (0, 3, 2, 5) and dx.size == 0
    for zero in (*sums(pair), dgamma, dbeta):
        np.testing.assert_array_equal(zero, 0)


def test_without_training_running_averages_are_used():
    x, gamma, beta, shortcut = inputs()
    pair = statistics()
    mean, variance = (DEVICE.to_host(statistic.value) for statistic in pair)
    tape = new_tape(training=False)
    values = [x, gamma, beta, shortcut]
    y, _, _ = gradients(operation(True, pair=pair), values, lambda: tape, wanted=[False] * 4)
    normal = (x - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(y, np.maximum(gamma * normal + beta + shortcut, 0), rtol=1e-12)
    assert np.isnan(sums(pair)).all()


def test_shapes_that_do_not_fit_are_refused():
    x, gamma, beta, shortcut = inputs()
    with pytest.raises(UsageError, match="5 channels"):
        gradients(operation(), [x, gamma[:4].copy(), beta])
    with pytest.raises(UsageError, match="the shortcut is"):
        gradients(operation(), [x, gamma, beta, shortcut[:2].copy()])


@pytest.mark.ranks(1, 2, 3)
def test_whole_step_is_one_batch_whoever_holds_it(comm):
    """Ranks together have the values, gradients and statistics of one rank with all samples.

    The last rank has none.
    """
    from mpi4py import MPI

    values = inputs()
    one = statistics()
    y, _, found = gradients(operation(True, True, one), values)

    def all_reduce(array):
        comm.Allreduce(MPI.IN_PLACE, array)

    share = -(-7 // max(comm.size - 1, 1))
    mine = slice(comm.rank * share, min((comm.rank + 1) * share, 7))
    part = [values[0][mine].copy(), *values[1:3], values[3][mine].copy()]
    pair = statistics()
    target = np.random.default_rng(0).standard_normal(SHAPE)[mine]
    y_mine, mine_found = step(part, pair, target, all_reduce)
    np.testing.assert_allclose(y_mine, y[mine], rtol=1e-10, atol=1e-12)
    for index in (0, 3):
        np.testing.assert_allclose(mine_found[index], found[index][mine], rtol=1e-8, atol=1e-12)
    for index in (1, 2):
        all_reduce(mine_found[index])
        np.testing.assert_allclose(mine_found[index], found[index], rtol=1e-8, atol=1e-12)
    for total, expected in zip(sums(pair), sums(one), strict=True):
        all_reduce(total)
        np.testing.assert_allclose(total, expected, rtol=1e-10)


def step(values, pair, target, all_reduce):
    """y and gradients of this rank's part of a step."""
    variables = [variable(value, needs_grad=True) for value in values]
    tape = new_tape(all_reduce=all_reduce)
    y = operation(True, True, pair)(tape, *variables)
    tape.backward(mean_squared_error(tape, y, DEVICE.from_host(target)))
    tape.finish(variables)
    return DEVICE.to_host(y.value), [DEVICE.to_host(v.place) for v in variables]
