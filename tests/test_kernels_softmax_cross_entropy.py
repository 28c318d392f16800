"""softmax_cross_entropy.cu: loss, gradient, hits; what is ignored and what must show."""

from __future__ import annotations

import cases_rows  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

CASES = ("cross_entropy", "cross_entropy_weighted", "cross_entropy_loss_only")
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split(*CASES)


def run(logits, labels, gradient=None):
    """(loss, gradient, correct); `gradient` may be given to alias the logits."""
    rows, cols = logits.shape
    gradient = np.empty_like(logits) if gradient is None else gradient
    loss, correct = np.empty(rows, logits.dtype), np.empty(rows, np.uint8)
    args = [logits, np.array(labels, np.int64), None, loss, gradient, correct, rows, cols, -1, 1.0]
    device_for().launch("softmax_cross_entropy", *args, work=rows)
    return loss, gradient, correct


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_logits_do_not_overflow(dtype):
    logits = np.array([[1e30, 0, -1e30], [-1e30, -1e30, -1e30], [800, 799, 0]], dtype)
    loss, gradient, _ = run(logits, [0, 1, 1])
    np.testing.assert_allclose(loss, [0, np.log(3), 1 + np.log1p(np.exp(-1))], rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1, 40])
def test_what_is_not_finite_shows_in_its_row(bad, place):
    logits = np.zeros((3, 50), np.float32)
    logits[1, place] = bad
    loss, gradient, correct = run(logits, [0, 0, 0])
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=1), [False, True, False])
    assert correct[1] == 0


def test_minus_infinity_masks_a_class():
    logits = np.array([[0, -np.inf, 0], [0, -np.inf, 0]])
    loss, gradient, _ = run(logits, [0, 1])
    np.testing.assert_allclose(loss, [np.log(2), np.inf])
    np.testing.assert_allclose(gradient, [[-0.5, 0, 0.5], [0.5, -1, 0.5]])


@pytest.mark.parametrize("label", [-2, 3, 2**40])
def test_a_label_out_of_range_gives_nan_and_reads_nothing(label):
    loss, gradient, correct = run(np.zeros((1, 3)), [label])
    assert np.isnan(loss).all()
    assert np.isnan(gradient).all()
    assert correct[0] == 0


def test_ties_go_to_the_first_class_as_argmax_does():
    logits = np.zeros((5, 5), np.float32)
    _, _, correct = run(logits, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(correct, [1, 0, 0, 0, 0])


def test_gradient_may_replace_the_logits():
    logits = np.random.default_rng(0).standard_normal((4, 70))
    _, expected, _ = run(logits, [0, 5, 69, -1])
    run(logits, [0, 5, 69, -1], gradient=logits)
    np.testing.assert_array_equal(logits, expected)
