"""What kernels compute, written in NumPy as plainly as it can be said.

Sums and functions are evaluated in float64 and rounded to the inputs' dtype at the end; where the
kernel promises exact bits, the reference does the same operations in the same order and dtype.
"""

from __future__ import annotations

import numpy as np

# ---- flat arrays: elementwise.cu, gelu.cu, sgd.cu, adamw.cu, sums.cu


def relu(x):
    return np.where(x < 0, x.dtype.type(0), x)  # NaN stays


def gelu(x):
    t = x.astype(np.longdouble)
    u = np.sqrt(2 / np.pi) * (t + 0.044715 * t**3)
    return (0.5 * t * (1 + np.tanh(u))).astype(x.dtype)


def gelu_gradient(x, dy):
    t = x.astype(np.longdouble)
    u = np.sqrt(2 / np.pi) * (t + 0.044715 * t**3)
    du = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * t**2)
    slope = 0.5 * (1 + np.tanh(u)) + 0.5 * t * (1 - np.tanh(u) ** 2) * du
    return (dy * slope).astype(x.dtype)


def sgd(p, g, v, lr, momentum, weight_decay, scale, nesterov):
    """New (p, v)."""
    g = scale * g.astype(np.float64)
    new_v = momentum * v + g
    step = g + momentum * new_v if nesterov else new_v
    new_p = p - lr * weight_decay * p.astype(np.float64) - lr * step
    return new_p.astype(p.dtype), new_v.astype(p.dtype)


def adamw(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, scale):
    """New (p, m, v) after step number `step` = 1, 2, ..."""
    g = scale * g.astype(np.float64)
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g**2
    m_hat = new_m / (1 - beta1**step)
    v_hat = new_v / (1 - beta2**step)
    new_p = p - lr * weight_decay * p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return new_p.astype(p.dtype), new_m.astype(p.dtype), new_v.astype(p.dtype)


def sum_in_order(arrays):
    """((a[0] + a[1]) + a[2]) + ..., each addition rounded to the dtype."""
    total = np.zeros_like(arrays[0])
    for array in arrays:
        total = total + array
    return total


def column_sum(x):
    return sum_in_order(list(x))


# ---- rows: layer_norm.cu, softmax_cross_entropy.cu, mean_squared_error.cu


def layer_norm(x, gamma, beta, eps):
    """y of shape (rows, cols), mean and 1 / deviation of shape (rows,)."""
    t = x.astype(np.float64)
    mean = t.mean(axis=1)
    rstd = 1 / np.sqrt(t.var(axis=1) + eps)
    y = (t - mean[:, None]) * rstd[:, None] * gamma + beta
    return y.astype(x.dtype), mean.astype(x.dtype), rstd.astype(x.dtype)


def layer_norm_gradient(x, gamma, mean, rstd, dy):
    """dx, and the terms of dgamma and dbeta, each of shape (rows, cols)."""
    normed = (x.astype(np.float64) - mean[:, None]) * rstd[:, None]
    g = dy * gamma.astype(np.float64)
    dx = g - g.mean(axis=1, keepdims=True)
    dx -= normed * (g * normed).mean(axis=1, keepdims=True)
    return (rstd[:, None] * dx).astype(x.dtype), dy * normed, dy.astype(np.float64)


def softmax_cross_entropy(logits, labels, weights, ignore):
    """loss (rows,), its gradient (rows, cols), and whether the largest logit is the label's."""
    z = logits.astype(np.float64)
    rows = np.arange(len(z))
    kept = labels != ignore
    safe = np.where(kept, labels, 0)
    w = np.where(kept, 1.0 if weights is None else weights, 0.0)
    shifted = z - z.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1)
    loss = w * (np.log(total) - shifted[rows, safe])
    gradient = np.exp(shifted) / total[:, None]
    gradient[rows, safe] -= 1
    gradient *= w[:, None]
    correct = kept & (z.argmax(axis=1) == safe)
    return loss.astype(logits.dtype), gradient.astype(logits.dtype), correct.astype(np.uint8)


def mean_squared_error(y, target, weights):
    """loss (rows,) and its gradient (rows, cols)."""
    w = np.ones(len(y)) if weights is None else weights.astype(np.float64)
    difference = y.astype(np.float64) - target
    loss = w * (difference**2).mean(axis=1)
    gradient = w[:, None] * 2 / y.shape[1] * difference
    return loss.astype(y.dtype), gradient.astype(y.dtype)
