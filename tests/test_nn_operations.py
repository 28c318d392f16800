"""Operations and losses: gradients against finite differences, values against NumPy."""

import numpy as np
import pytest
from gradient_check import check_gradients, gradients
from tested_device import DEVICE, get, put, variable

from hpctrain.autograd import Tape
from hpctrain.errors import UsageError
from hpctrain.nn.losses import IGNORE, mean_squared_error, softmax_cross_entropy
from hpctrain.nn.operations import add, gelu, layer_norm, linear, relu, reshape, sum_rows


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (0, 7)])
def test_linear(shape):
    check_gradients(linear, normal(*shape), normal(4, 7), normal(4))
    check_gradients(linear, normal(*shape), normal(4, 7))


@pytest.mark.parametrize("operation", [relu, gelu])
@pytest.mark.parametrize("shape", [(33,), (3, 5), (0, 4)])
def test_activations(operation, shape):
    check_gradients(operation, normal(*shape) + 0.01)


def test_add_and_reshape():
    check_gradients(add, normal(3, 4), normal(3, 4) + 1)
    check_gradients(lambda tape, x: add(tape, x, x), normal(3, 4))
    check_gradients(lambda tape, x: reshape(tape, x, (2, 6)), normal(3, 4))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 40), (300, 3), (0, 8)])
def test_layer_norm(shape):
    check_gradients(layer_norm, normal(*shape), normal(shape[-1]), normal(shape[-1]))


def test_layer_norm_value():
    x = normal(6, 50)
    y, _, _ = gradients(layer_norm, [x, np.ones(50), np.zeros(50)])
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1000])
def test_sum_rows(rows):
    x = np.random.default_rng().integers(-9, 9, (rows, 45)).astype("float32")
    out = put(np.full(45, np.nan, "float32"))
    sum_rows(DEVICE, put(x), out)
    np.testing.assert_array_equal(get(out), x.sum(0))


def cross_entropy(logits, labels, weights):
    """Loss and gradient by softmax_cross_entropy, and the total loss as a function of logits."""
    tape = Tape(DEVICE)
    x = variable(logits, needs_grad=True)
    weights = None if weights is None else put(weights)
    loss, correct = softmax_cross_entropy(tape, x, put(labels), weights)
    tape.backward(loss)
    tape.finish([x])
    return get(loss.value), get(correct), get(x.place)


def test_softmax_cross_entropy_by_finite_differences():
    logits, weights = normal(7, 5), np.abs(normal(7))
    labels = np.array([0, 4, IGNORE, 2, 2, 1, 3])
    loss, correct, gradient = cross_entropy(logits, labels, weights)
    counted = labels != IGNORE
    assert (loss[~counted] == 0).all()
    assert (gradient[~counted] == 0).all()
    np.testing.assert_array_equal(correct[counted], logits.argmax(1)[counted] == labels[counted])
    log_sum = np.log(np.exp(logits).sum(1))
    expected = weights * (log_sum - logits[range(7), np.where(counted, labels, 0)])
    np.testing.assert_allclose(loss[counted], expected[counted], rtol=1e-12)
    for index in np.ndindex(7, 5):
        totals = []
        for step in (1e-6, -1e-6):
            moved = logits.copy()
            moved[index] += step
            totals.append(cross_entropy(moved, labels, weights)[0].sum())
        slope = (totals[0] - totals[1]) / 2e-6
        np.testing.assert_allclose(gradient[index], slope, atol=1e-8)


def test_softmax_cross_entropy_of_huge_logits_is_finite():
    logits = np.array([[1e4, -1e4, 0.0], [-1e5, 1e5, 3.0]])
    loss, _, gradient = cross_entropy(logits, np.array([1, 1]), None)
    np.testing.assert_array_equal(loss, [2e4, 0])
    np.testing.assert_array_equal(gradient, [[1, -1, 0], [0, 0, 0]])


def test_mean_squared_error_with_weights():
    x, target, weights = normal(4, 3), np.ones((4, 3)), np.array([0, 1, 2, 0.5])
    tape = Tape(DEVICE)
    moved = variable(x, needs_grad=True)
    loss = mean_squared_error(tape, moved, put(target), put(weights))
    tape.backward(loss)
    np.testing.assert_allclose(get(loss.value), weights * ((x - 1) ** 2).mean(1))
    np.testing.assert_allclose(get(moved.place), weights[:, None] * 2 * (x - 1) / 3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda t: linear(t, variable(normal(2, 3)), variable(normal(4, 5))), "3 features"),
        (lambda t: add(t, variable(normal(2)), variable(normal(3))), "shapes differ"),
        (lambda t: reshape(t, variable(normal(4)), (3,)), "does not hold"),
        (lambda t: mean_squared_error(t, variable(normal(2, 2)), normal(2)), "the target"),
        (
            lambda t: softmax_cross_entropy(t, variable(normal(2, 2)), np.zeros(3, np.int64)),
            "2 rows but 3 labels",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(wrong, says):
    with pytest.raises(UsageError, match=says):
        wrong(Tape(DEVICE))
