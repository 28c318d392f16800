"""The tape: contributions are written first and added later, whatever the graph's shape."""

import numpy as np
import pytest
from tested_device import DEVICE, get, variable

from hpctrain.autograd import Tape
from hpctrain.errors import UsageError
from hpctrain.nn.losses import mean_squared_error
from hpctrain.nn.operations import add, linear, relu, reshape


def parameter(value):
    return variable(value, needs_grad=True)


def loss_of(tape, y):
    target = DEVICE.zeros(y.shape, y.value.dtype)
    return mean_squared_error(tape, y, target)


def test_first_contribution_is_written_and_later_ones_are_added():
    rng = np.random.default_rng()
    w = parameter(rng.standard_normal((3, 3)))
    x = variable(rng.standard_normal((4, 3)))
    tape = Tape(DEVICE)
    y = linear(tape, linear(tape, x, w), w)  # a tied weight
    tape.backward(loss_of(tape, y))
    tape.finish([w])

    dy, inputs, weight = 2 * get(y.value) / 3, get(x.value), get(w.value)
    hidden = inputs @ weight.T
    expected = dy.T @ hidden + (dy @ weight).T @ inputs
    np.testing.assert_allclose(get(w.place), expected, rtol=1e-12)


def test_a_shared_gradient_is_not_written_to():
    """add() lends the same array to both inputs; adding to one must not change the other."""
    x, y = (parameter(np.arange(6.0).reshape(2, 3) + k) for k in (1, 2))
    tape = Tape(DEVICE)
    a, b = relu(tape, x), relu(tape, y)
    z = add(tape, add(tape, a, b), a)
    tape.backward(loss_of(tape, z))
    tape.finish([x, y])
    np.testing.assert_allclose(get(x.place), 2 * get(y.place))
    np.testing.assert_allclose(get(y.place), 2 * get(z.value) / 3)


def test_parameters_without_a_contribution_get_zero():
    used, unused = parameter(np.ones((1, 2))), parameter(np.ones(5))
    tape = Tape(DEVICE)
    tape.backward(loss_of(tape, linear(tape, variable(np.ones((1, 2))), used)))
    tape.finish([used, unused])
    assert (get(unused.place) == 0).all()
    assert (get(used.place) != 0).all()


def test_a_second_pass_starts_anew():
    w = parameter(np.ones((1, 2)))
    for _ in range(2):
        tape = Tape(DEVICE)
        tape.backward(loss_of(tape, linear(tape, variable(np.ones((1, 2))), w)))
        tape.finish([w])
        np.testing.assert_array_equal(get(w.place), [[4, 4]])


def test_passes_add_up_until_they_are_finished():
    """Also a parameter that only the first pass used."""
    w, early = parameter(np.ones((1, 2))), parameter(np.ones((1, 2)))
    for c in (1.0, 2.0, 3.0):
        tape = Tape(DEVICE)
        x = variable(np.full((1, 2), c))
        losses = [loss_of(tape, linear(tape, x, v)) for v in ([w, early] if c == 1 else [w])]
        tape.backward(*losses)
    tape.finish([w, early])
    np.testing.assert_array_equal(get(w.place), [[4 + 16 + 36] * 2])
    np.testing.assert_array_equal(get(early.place), [[4, 4]])


def test_several_losses_add_up():
    w = parameter(np.ones((1, 2)))
    tape = Tape(DEVICE)
    losses = [loss_of(tape, linear(tape, variable(np.full((1, 2), c)), w)) for c in (1.0, 2.0)]
    tape.backward(*losses)
    tape.finish([w])
    np.testing.assert_array_equal(get(w.place), [[4 + 16, 4 + 16]])


def test_nothing_is_recorded_when_not_training():
    w = parameter(np.ones((1, 2)))
    tape = Tape(DEVICE, training=False)
    loss = loss_of(tape, linear(tape, variable(np.ones((1, 2))), w))
    with pytest.raises(UsageError, match="training=True"):
        tape.backward(loss)


def test_a_batch_of_no_samples_gives_gradients_of_zero():
    w, b = parameter(np.ones((4, 3))), parameter(np.ones(4))
    tape = Tape(DEVICE)
    y = relu(tape, linear(tape, variable(np.ones((0, 3))), w, b))
    tape.backward(loss_of(tape, reshape(tape, y, (0, 2, 2))))
    tape.finish([w, b])
    assert (get(w.place) == 0).all()
    assert (get(b.place) == 0).all()


@pytest.mark.skipif(DEVICE.name == "cuda", reason="CuPy's pool is CuPy's")
def test_memory_of_a_pass_is_used_again():
    w = parameter(np.ones((256, 256)))
    x = variable(np.ones((64, 256)))

    def run():
        tape = Tape(DEVICE)
        y = x
        for _ in range(4):
            y = relu(tape, linear(tape, y, w))
        tape.backward(loss_of(tape, y))
        tape.finish([w])
        DEVICE.synchronize()

    def most_in_use():
        return DEVICE._pool.reserved if DEVICE.name == "cpu" else DEVICE.counts().peak_bytes

    run()
    most = most_in_use()
    for _ in range(3):
        run()
    assert most_in_use() == most


def test_gradients_are_told_when_they_are_final():
    """After the last use of a tied parameter, while those of earlier layers are still missing."""
    rng = np.random.default_rng(0)
    first, tied, last = (parameter(rng.standard_normal((3, 3))) for _ in range(3))
    unused, seen = parameter(np.ones(3)), []
    names = {id(p): name for p, name in ((first, "first"), (tied, "tied"), (last, "last"))}
    names[id(unused)] = "unused"
    tape = Tape(DEVICE, ready=lambda p: seen.append((names[id(p)], get(p.place).copy())))
    x = variable(rng.standard_normal((4, 3)))
    y = linear(tape, x, first)
    y = linear(tape, linear(tape, y, tied), tied)
    add(tape, unused, unused)  # nothing comes back from here
    tape.backward(loss_of(tape, linear(tape, y, last)))
    assert [name for name, _ in seen] == ["last", "tied", "first"]
    tape.finish([first, tied, last, unused])
    for (_, told), found in zip(seen, (last, tied, first), strict=True):
        np.testing.assert_array_equal(told, get(found.place))
