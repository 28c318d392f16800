"""Dropout: masks follow samples, layers and steps differ, gradients take the same mask."""

from __future__ import annotations

import numpy as np
import pytest
from gradient_check import check_gradients, gradients, new_tape

from hpctrain.errors import UsageError
from hpctrain.nn.dropout import dropout

ONES = np.ones((4, 3, 60))


def outcome(samples, rate=0.25, layers=1, **options):
    """ones behind `layers` dropouts."""

    def operation(tape, x):
        results = [dropout(tape, x, rate) for _ in range(layers)]
        return results[-1]

    samples = None if samples is None else np.array(samples)
    options = {"seed": 1, "step": 2, "samples": samples} | options
    y, _, _ = gradients(operation, [ONES], lambda: new_tape(**options), wanted=[False])
    return y


def test_what_stays_is_scaled():
    y = outcome([5, 6, 7, 8])
    assert set(np.unique(y)) == {0, 1 / 0.75}
    assert 0.6 < (y > 0).mean() < 0.9


def test_a_mask_follows_its_sample_and_depends_on_seed_step_and_layer():
    base = outcome([5, 6, 7, 8])
    np.testing.assert_array_equal(base, outcome([5, 6, 7, 8]))
    np.testing.assert_array_equal(base[[2, 0]], outcome([7, 5, 1, 2])[:2])
    for other in ({"seed": 3}, {"step": 3}, {"layers": 2}):
        assert (outcome([5, 6, 7, 8], **other) != base).any()


def test_gradients():
    x = np.random.default_rng(0).standard_normal((3, 50))
    samples = np.array([9, 1, 4])
    check_gradients(
        lambda tape, v: dropout(tape, v, 0.4), x, tape=lambda: new_tape(samples=samples)
    )


def test_without_training_nothing_is_dropped():
    tape = new_tape(training=False)
    y, _, _ = gradients(lambda t, x: dropout(t, x, 0.5), [ONES], lambda: tape, wanted=[False])
    np.testing.assert_array_equal(y, ONES)
    np.testing.assert_array_equal(outcome([1, 2, 3, 4], rate=0), ONES)


def test_an_empty_batch_passes():
    tape = new_tape(samples=np.zeros(0, np.int64))
    y, _, _ = gradients(lambda t, x: dropout(t, x, 0.5), [ONES[:0]], lambda: tape)
    assert y.shape == (0, 3, 60)


def test_rates_and_missing_ids_are_refused():
    with pytest.raises(UsageError, match="rate is 1"):
        outcome([1, 2, 3, 4], rate=1)
    with pytest.raises(UsageError, match="4 samples and the tape has 3"):
        outcome([1, 2, 3])
    with pytest.raises(UsageError, match="the tape has none"):
        outcome(None)
