"""The tape: contributions are written first and added later, whatever the graph's shape."""

import numpy as np
import pytest

from hpctrain.autograd import Tape, Variable
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import UsageError
from hpctrain.nn.losses import mean_squared_error
from hpctrain.nn.operations import add, linear, relu, reshape

DEVICE = CpuDevice()


def parameter(value):
    place = np.full_like(value, np.nan)  # whatever was there must be overwritten
    return Variable(value, needs_grad=True, place=place)


def loss_of(tape, y):
    target = np.zeros(y.shape, y.value.dtype)
    return mean_squared_error(tape, y, target)


def test_first_contribution_is_written_and_later_ones_are_added():
    rng = np.random.default_rng()
    w = parameter(rng.standard_normal((3, 3)))
    x = Variable(rng.standard_normal((4, 3)))
    tape = Tape(DEVICE)
    y = linear(tape, linear(tape, x, w), w)  # a tied weight
    tape.backward(loss_of(tape, y))
    tape.finish([w])

    dy = 2 * y.value / 3
    hidden = x.value @ w.value.T
    expected = dy.T @ hidden + (dy @ w.value).T @ x.value
    np.testing.assert_allclose(w.place, expected, rtol=1e-12)


def test_a_shared_gradient_is_not_written_to():
    """add() lends the same array to both inputs; adding to one must not change the other."""
    x, y = (parameter(np.arange(6.0).reshape(2, 3) + k) for k in (1, 2))
    tape = Tape(DEVICE)
    a, b = relu(tape, x), relu(tape, y)
    z = add(tape, add(tape, a, b), a)
    tape.backward(loss_of(tape, z))
    tape.finish([x, y])
    np.testing.assert_allclose(x.place, 2 * y.place)
    np.testing.assert_allclose(y.place, 2 * z.value / 3)


def test_parameters_without_a_contribution_get_zero():
    used, unused = parameter(np.ones((1, 2))), parameter(np.ones(5))
    tape = Tape(DEVICE)
    tape.backward(loss_of(tape, linear(tape, Variable(np.ones((1, 2))), used)))
    tape.finish([used, unused])
    assert (unused.place == 0).all()
    assert (used.place != 0).all()


def test_a_second_pass_starts_anew():
    w = parameter(np.ones((1, 2)))
    for _ in range(2):
        tape = Tape(DEVICE)
        tape.backward(loss_of(tape, linear(tape, Variable(np.ones((1, 2))), w)))
        tape.finish([w])
        np.testing.assert_array_equal(w.place, [[4, 4]])


def test_several_losses_add_up():
    w = parameter(np.ones((1, 2)))
    tape = Tape(DEVICE)
    losses = [loss_of(tape, linear(tape, Variable(np.full((1, 2), c)), w)) for c in (1.0, 2.0)]
    tape.backward(*losses)
    tape.finish([w])
    np.testing.assert_array_equal(w.place, [[4 + 16, 4 + 16]])


def test_nothing_is_recorded_when_not_training():
    w = parameter(np.ones((1, 2)))
    tape = Tape(DEVICE, training=False)
    loss = loss_of(tape, linear(tape, Variable(np.ones((1, 2))), w))
    with pytest.raises(UsageError, match="training=True"):
        tape.backward(loss)


def test_a_batch_of_no_samples_gives_gradients_of_zero():
    w, b = parameter(np.ones((4, 3))), parameter(np.ones(4))
    tape = Tape(DEVICE)
    y = relu(tape, linear(tape, Variable(np.ones((0, 3))), w, b))
    tape.backward(loss_of(tape, reshape(tape, y, (0, 2, 2))))
    tape.finish([w, b])
    assert (w.place == 0).all()
    assert (b.place == 0).all()


def test_memory_of_a_pass_is_used_again():
    device = CpuDevice()
    w = parameter(np.ones((256, 256)))
    x = Variable(np.ones((64, 256)))

    def run():
        tape = Tape(device)
        y = x
        for _ in range(4):
            y = relu(tape, linear(tape, y, w))
        tape.backward(loss_of(tape, y))
        tape.finish([w])

    run()
    reserved = device._pool.reserved
    for _ in range(3):
        run()
    assert device._pool.reserved == reserved
