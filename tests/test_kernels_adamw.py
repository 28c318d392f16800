"""adamw.cu: against the reference over several steps, and at the edges."""

from __future__ import annotations

import cases_flat  # noqa: F401  (registers the cases)
import numpy as np
import reference
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

test_matches_reference = matches_reference("adamw")
test_same_on_all_levels = same_on_all_levels("adamw")
test_same_when_split = same_when_split("adamw")

OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def corrections(step):
    return 1 / (1 - OPTIONS["beta1"] ** step), 1 / (1 - OPTIONS["beta2"] ** step)


def test_ten_steps_follow_the_reference():
    rng = np.random.default_rng(1)
    p, m, v = rng.standard_normal(100), np.zeros(100), np.zeros(100)
    expected = p.copy(), m.copy(), v.copy()
    for step in range(1, 11):
        g = rng.standard_normal(100)
        expected = reference.adamw(expected[0], g, *expected[1:], step=step, scale=0.5, **OPTIONS)
        args = [p, g, m, v, *OPTIONS.values(), *corrections(step), 0.5, 100]
        device_for().launch("adamw", *args, work=100)
    for found, wanted in zip((p, m, v), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-16)


def test_first_step_has_the_size_of_lr():
    """Bias correction makes the first step lr * sign(g), whatever the size of g."""
    p, m, v = (np.zeros(3, np.float32) for _ in range(3))
    g = np.array([1e-3, -1.0, 1e3], np.float32)
    options = {**OPTIONS, "weight_decay": 0.0}
    device_for().launch("adamw", p, g, m, v, *options.values(), *corrections(1), 1.0, 3, work=3)
    np.testing.assert_allclose(p, -1e-3 * np.sign(g), rtol=2e-5)
