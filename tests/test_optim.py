"""Update rules against their equations in NumPy; schedules against values worked out by hand."""

import math

import numpy as np
import pytest
from tested_device import DEVICE, get, put

from hpctrain.errors import UsageError
from hpctrain.optim import SGD, AdamW, Range, Schedule, square_sum


def run(rule, steps=5, decay=True, dtype="float64", n=1000):
    """Parameters after some steps of the rule and, in NumPy, of its equations."""
    rng = np.random.default_rng()
    p = rng.standard_normal(n).astype(dtype)
    gradients = rng.standard_normal((steps, n)).astype(dtype)
    states = {name: DEVICE.zeros(n, dtype) for name in rule.states}
    expected = EQUATIONS[type(rule)](rule, p.copy(), gradients * 0.5, decay)
    p = put(p)
    for step, g in enumerate(gradients):
        part = Range(p, put(g), states, decay)
        rule.update(DEVICE, part, step=step, lr=rule.lr, scale=0.5)
    return get(p), expected


def sgd(rule, p, gradients, decay):
    v = np.zeros_like(p)
    for g in gradients:
        p -= rule.lr * rule.weight_decay * decay * p
        v = rule.momentum * v + g
        p -= rule.lr * (g + rule.momentum * v if rule.nesterov else v)
    return p


def adamw(rule, p, gradients, decay):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m = rule.betas[0] * m + (1 - rule.betas[0]) * g
        v = rule.betas[1] * v + (1 - rule.betas[1]) * g * g
        m_hat, v_hat = m / (1 - rule.betas[0] ** t), v / (1 - rule.betas[1] ** t)
        p -= rule.lr * rule.weight_decay * decay * p
        p -= rule.lr * m_hat / (np.sqrt(v_hat) + rule.epsilon)
    return p


EQUATIONS = {SGD: sgd, AdamW: adamw}


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        SGD(0.1, momentum=0.0),
        SGD(0.1, momentum=0.9, weight_decay=0.01),
        SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        AdamW(0.01),
        AdamW(0.1, betas=(0.5, 0.9), epsilon=1e-3, weight_decay=0.1),
    ],
    ids=str,
)
def test_rules_follow_their_equations(rule, decay):
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
        p, expected = run(rule, decay=decay, dtype=dtype)
        np.testing.assert_allclose(p, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 100_001])
def test_square_sum(n):
    x = np.random.default_rng().integers(-3, 4, n).astype("float32")
    assert square_sum(DEVICE, put(x)) == (x.astype(int) ** 2).sum()


def test_schedules():
    assert [Schedule(warmup_steps=4).rate(8, step) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    linear = Schedule("linear", total_steps=5, final=0.5)
    assert [linear.rate(1, step) for step in (0, 2, 4, 9)] == [1, 0.75, 0.5, 0.5]
    cosine = Schedule("cosine", total_steps=7, warmup_steps=2)
    assert [cosine.rate(1, step) for step in (0, 1, 2)] == [0.5, 1, 1]
    assert math.isclose(cosine.rate(1, 4), 0.5)
    assert math.isclose(cosine.rate(1, 6), 0, abs_tol=1e-15)
    stepped = Schedule("step", milestones=(3, 5), factor=0.5)
    assert [stepped.rate(8, step) for step in (2, 3, 4, 5)] == [8, 4, 4, 2]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(lr=-1), "lr is -1"),
        (lambda: SGD(momentum=1), "momentum is 1"),
        (lambda: AdamW(betas=(0.9, 1.5)), "beta2 is 1.5"),
        (lambda: AdamW(lr=math.nan), "lr is nan"),
        (lambda: Schedule("cosin"), "did you mean 'cosine'"),
        (lambda: Schedule("step", milestones=(5, 3)), "must rise"),
    ],
)
def test_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make()
