"""Cases for layer_norm.cu, softmax_cross_entropy.cu and mean_squared_error.cu."""

from __future__ import annotations

import numpy as np
import reference
from kernel_cases import Case, case, normal

SHAPES = ((0, 5), (1, 1), (3, 10), (7, 33), (5, 1000), (40, 96))  # rows, cols
PARTS = ((1, 1, 4), (9, 33, 4), (67, 100, 16), (20, 1100, 16))  # rows, cols, rows_per_part
IGNORE = -100
EPS = 1e-5


def _layer_norm(rng, dtype, rows, cols):
    x = 2 * normal(rng, dtype, rows, cols) + dtype.type(3)
    gamma, beta = normal(rng, dtype, cols), normal(rng, dtype, cols)
    return x, gamma, beta, *reference.layer_norm(x, gamma, beta, EPS)


@case((0, 5), (3, 10), (7, 33), (5, 1000), (40, 96))  # of one column, y is rounding errors
def layer_norm_forward(rng, dtype, shape):
    x, gamma, beta, y, mean, rstd = _layer_norm(rng, dtype, *shape)
    outputs = [np.zeros_like(x), np.zeros_like(mean), np.zeros_like(rstd)]
    args = [x, gamma, beta, *outputs, *shape, EPS]
    expected = {3: y, 4: mean, 5: rstd}
    return Case("layer_norm_forward", args, shape[0], expected, 16, whole=("gamma", "beta"))


@case((0, 5), (3, 10), (7, 33), (5, 1000), (40, 96))
def layer_norm_backward(rng, dtype, shape):
    x, gamma, _, _, mean, rstd = _layer_norm(rng, dtype, *shape)
    dy = normal(rng, dtype, *shape)
    dx, _, _ = reference.layer_norm_gradient(x, gamma, mean, rstd, dy)
    args = [x, gamma, mean, rstd, dy, np.zeros_like(x), *shape]
    return Case("layer_norm_backward", args, shape[0], {5: dx}, 16, whole=("gamma",))


@case(*PARTS)
def layer_norm_parameter_partials(rng, dtype, size):
    rows, cols, rows_per_part = size
    x, gamma, _, _, mean, rstd = _layer_norm(rng, dtype, rows, cols)
    dy = normal(rng, dtype, rows, cols)
    _, *terms = reference.layer_norm_gradient(x, gamma, mean, rstd, dy)
    starts = range(0, rows, rows_per_part)
    dgamma, dbeta = (
        np.array([term[r : r + rows_per_part].sum(axis=0) for r in starts], dtype) for term in terms
    )
    args = [x, mean, rstd, dy, np.zeros_like(dgamma), np.zeros_like(dbeta), *size]
    work = len(dgamma) * -(-cols // 32)
    expected = {4: dgamma, 5: dbeta}
    return Case("layer_norm_parameter_partials", args, work, expected, 16, whole=None)


def _cross_entropy(rng, dtype, shape, weighted, gradient):
    rows, cols = shape
    logits = 3 * normal(rng, dtype, rows, cols)
    labels = rng.integers(0, cols, rows)
    labels[1::3] = logits[1::3].argmax(axis=1)
    labels[2::3] = IGNORE
    weights = rng.random(rows).astype(dtype) if weighted else None
    loss, dlogits, correct = reference.softmax_cross_entropy(logits, labels, weights, IGNORE)
    scale = 8.0 if weighted else 1.0
    outputs = [np.ones_like(loss), np.ones_like(logits) if gradient else None, correct + 7]
    args = [logits, labels, weights, *outputs, rows, cols, IGNORE, scale]
    expected = {3: loss, 5: correct} | ({4: scale * dlogits} if gradient else {})
    return Case("softmax_cross_entropy", args, rows, expected, 16)


@case(*SHAPES)
def cross_entropy(rng, dtype, shape):
    return _cross_entropy(rng, dtype, shape, weighted=False, gradient=True)


@case(*SHAPES)
def cross_entropy_weighted(rng, dtype, shape):
    return _cross_entropy(rng, dtype, shape, weighted=True, gradient=True)


@case(*SHAPES)
def cross_entropy_loss_only(rng, dtype, shape):
    return _cross_entropy(rng, dtype, shape, weighted=True, gradient=False)


def _mean_squared_error(rng, dtype, shape, weighted, gradient):
    y, target = normal(rng, dtype, *shape), normal(rng, dtype, *shape)
    weights = rng.random(shape[0]).astype(dtype) if weighted else None
    loss, dy = reference.mean_squared_error(y, target, weights)
    scale = 8.0 if weighted else 1.0
    outputs = [np.ones_like(loss), np.ones_like(y) if gradient else None]
    args = [y, target, weights, *outputs, *shape, scale]
    expected = {3: loss} | ({4: scale * dy} if gradient else {})
    return Case("mean_squared_error", args, shape[0], expected, 16)


@case(*SHAPES)
def mean_squared_error(rng, dtype, shape):
    return _mean_squared_error(rng, dtype, shape, weighted=False, gradient=True)


@case(*SHAPES)
def mean_squared_error_weighted(rng, dtype, shape):
    return _mean_squared_error(rng, dtype, shape, weighted=True, gradient=True)


@case(*SHAPES)
def mean_squared_error_loss_only(rng, dtype, shape):
    return _mean_squared_error(rng, dtype, shape, weighted=True, gradient=False)
