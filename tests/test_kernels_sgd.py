"""sgd.cu: plain, momentum, Nesterov; decoupled decay."""

from __future__ import annotations

import cases_flat  # noqa: F401  (registers the cases)
import numpy as np
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

CASES = ("sgd_plain", "sgd_momentum", "sgd_nesterov")
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split(*CASES)


def test_decay_does_not_enter_the_velocity():
    p, g, v = np.full(3, 2.0), np.zeros(3), np.zeros(3)
    device_for().launch("sgd", p, g, v, 0.5, 0.9, 0.1, 1.0, 0, 3, work=3)
    np.testing.assert_allclose(p, 2 - 0.5 * 0.1 * 2)
    np.testing.assert_array_equal(v, 0)
