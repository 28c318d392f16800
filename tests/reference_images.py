"""What the kernels on images, samples and tables compute, in plain NumPy.

Images are (N, H, W, C). A geometry is (kernel, stride, padding), each (vertical, horizontal). Sums
are evaluated in float64 and rounded to the inputs' dtype at the end.
"""

from __future__ import annotations

import numpy as np


def output_size(size, geometry):
    """(OH, OW) of images of `size` (H, W)."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, *geometry, strict=True))


def windows(size, geometry):
    """Yields (oh, ow, i, j, h, w): tap (i, j) of output pixel (oh, ow) is the image's (h, w)."""
    kernel, stride, padding = geometry
    out = output_size(size, geometry)
    for oh, ow, i, j in np.ndindex(*out, *kernel):
        h, w = oh * stride[0] - padding[0] + i, ow * stride[1] - padding[1] + j
        if 0 <= h < size[0] and 0 <= w < size[1]:
            yield oh, ow, i, j, h, w


def columns(x, geometry):
    """(N, OH, OW, I, J, C): the pixels under every tap, 0 outside the image."""
    n, *size, c = x.shape
    cols = np.zeros((n, *output_size(size, geometry), *geometry[0], c), x.dtype)
    for oh, ow, i, j, h, w in windows(size, geometry):
        cols[:, oh, ow, i, j] = x[:, h, w]
    return cols


def columns_backward(cols, dx, geometry):
    """dx + what every pixel receives from the columns, in their order and in their dtype."""
    dx = dx.copy()
    for oh, ow, i, j, h, w in windows(dx.shape[1:3], geometry):
        dx[:, h, w] += cols[:, oh, ow, i, j]
    return dx


def conv2d(x, weight, geometry):
    """(N, OH, OW, K); weight (K, I, J, C)."""
    return np.tensordot(columns(x, geometry), weight, ((3, 4, 5), (1, 2, 3)))


# Winograd's F(2x2, 3x3): input, taps, output
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])


def both_sides(matrix, array):
    """matrix array matrix^T over the first two dims."""
    return np.einsum("pi,ij...,qj->pq...", matrix, array.astype(np.float64), matrix)


def patches(x, size, step, grid, padding):
    """(size, size, N, tiles_h, tiles_w, C): patches of images, `step` apart, 0 outside."""
    n, height, width, c = x.shape
    out = np.zeros((size, size, n, *grid, c), x.dtype)
    for i, j, a, b in np.ndindex(size, size, *grid):
        h, w = a * step - padding[0] + i, b * step - padding[1] + j
        if 0 <= h < height and 0 <= w < width:
            out[i, j, :, a, b] = x[:, h, w]
    return out


def max_pool(x, geometry):
    """(y, argmax): argmax is h W + w; the first of equals, and NaN is larger than all."""
    n, height, width, c = x.shape
    shape = (n, *output_size((height, width), geometry), c)
    y, argmax = np.zeros(shape, x.dtype), np.full(shape, -1, np.int32)
    for oh, ow, _, _, h, w in windows((height, width), geometry):
        value, top, where = x[:, h, w], y[:, oh, ow], argmax[:, oh, ow]
        larger = (where < 0) | (value > top) | np.isnan(value)
        top[larger], where[larger] = value[larger], h * width + w
    return y, argmax


def max_pool_backward(dy, argmax, size):
    """dx of images of `size`; windows are added in their order."""
    n, out_height, out_width, c = dy.shape
    dx = np.zeros((n, size[0] * size[1], c), dy.dtype)
    for m, oh, ow, k in np.ndindex(n, out_height, out_width, c):
        dx[m, argmax[m, oh, ow, k], k] += dy[m, oh, ow, k]
    return dx.reshape(n, *size, c)


def average_pool(x, geometry):
    """The mean over the pixels inside the image."""
    n, *size, c = x.shape
    total = np.zeros((n, *output_size(size, geometry), c))
    count = np.zeros((*total.shape[1:3], 1))
    for oh, ow, _, _, h, w in windows(size, geometry):
        total[:, oh, ow] += x[:, h, w]
        count[oh, ow] += 1
    return (total / count).astype(x.dtype)


def average_pool_backward(dy, size, geometry):
    """dx of images of `size`."""
    n, out_height, out_width, c = dy.shape
    count = np.zeros((out_height, out_width))
    for oh, ow, *_ in windows(size, geometry):
        count[oh, ow] += 1
    dx = np.zeros((n, *size, c))
    for oh, ow, _, _, h, w in windows(size, geometry):
        dx[:, h, w] += dy[:, oh, ow] / count[oh, ow]
    return dx.astype(dy.dtype)


def filled(groups):
    """(first, last) of the groups that have rows."""
    return [(a, b) for a, b in zip(groups[:-1], groups[1:], strict=True) if a < b]


def batch_norm(x, groups, gamma, beta, epsilon, relu=False, shortcut=None):
    """y of rows x (rows, C); groups: the first row of each and the end."""
    y = np.zeros(x.shape)
    for first, last in filled(groups):
        part = x[first:last].astype(np.float64)
        mean, variance = part.mean(axis=0), part.var(axis=0)
        y[first:last] = gamma * (part - mean) / np.sqrt(variance + epsilon) + beta
    if shortcut is not None:
        y += shortcut
    return np.maximum(y, 0) if relu else y


def batch_norm_backward(x, dz, groups, gamma, epsilon):
    """(dx, dgamma, dbeta) for the gradient dz behind gamma xhat + beta."""
    dx, dgamma, dbeta = np.zeros(x.shape), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for first, last in filled(groups):
        part, dpart = x[first:last].astype(np.float64), dz[first:last].astype(np.float64)
        rstd = 1 / np.sqrt(part.var(axis=0) + epsilon)
        xhat = (part - part.mean(axis=0)) * rstd
        dgamma += (dpart * xhat).sum(axis=0)
        dbeta += dpart.sum(axis=0)
        centred = dpart - dpart.mean(axis=0) - xhat * (dpart * xhat).mean(axis=0)
        dx[first:last] = gamma * rstd * centred
    return dx, dgamma, dbeta


def philox(counter, key):
    """Philox4x32-10: four 32-bit words for a counter (4 words) and a key (2 words), as integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def dropout_mask(sample_keys, per_sample, keep, seed):
    """bool (samples, per_sample): whether an element stays."""
    mask = np.zeros((len(sample_keys), per_sample), bool)
    for s, sample in enumerate(int(k) % 2**64 for k in sample_keys):
        for e in range(per_sample):
            block, word, lane = e // 128, e % 128 // 32, e % 32
            counter = (sample & 0xFFFFFFFF, sample >> 32, block * 32 + lane, 0)
            words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
            mask[s, e] = words[word] < keep * 2**32
    return mask


def embedding_backward(dy, ids, table):
    """table + rows of dy at their ids, in the order of the batch and in their dtype."""
    table = table.copy()
    for row, index in zip(dy, ids, strict=True):
        table[index] += row
    return table
