// mean_squared_error.cu -- mean squared error of rows, and its gradient.
//
//     loss[r]  <- w_r / cols sum_c (y[r, c] - target[r, c])^2
//     dy[r, c] <- 2 scale w_r / cols (y[r, c] - target[r, c])
//
// Buffers    y, target, dy: (rows, cols); loss: (rows,); weights: (rows,) or null for all ones. dy may
//            be null, or be y. No other overlap. `scale` is that of the loss in 16-bit training, else 1.
// Launch     ROWS, work = rows, any grid and block of whole warps.
// Cost       12 rows cols bytes in float32 (8 without dy), 5 flops an element: bandwidth.
// Exactness  sums over 32 lanes, then a tree (kernel.h): the same bits for every launch shape.
// Source     elementary.
// Reference  tests/reference.py    Test  tests/test_kernels_mean_squared_error.py

#include "kernel.h"

ROWS_KERNEL mean_squared_error(const real* y, const wide* __restrict__ target,
                               const wide* __restrict__ weights, wide* __restrict__ loss, real* dy,
                               int64 rows, int64 cols, wide scale)
{
    FOR_ROWS(row, rows) {
        const real* a = y + row * cols;
        const wide* b = target + row * cols;
        const wide factor = (weights ? weights[row] : (wide)1) / (wide)cols;
        const wide sum = row_sum(cols, [&](int64 c) { return (a[c] - b[c]) * (a[c] - b[c]); });
        if (LANE_LEADER) loss[row] = factor * sum;
        if (!dy) continue;
        real* d = dy + row * cols;
        const wide slope = 2 * scale * factor;
        FOR_LANES(c, cols) d[c] = slope * (a[c] - b[c]);
    }
}
