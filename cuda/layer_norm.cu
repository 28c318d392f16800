// layer_norm.cu -- normalization of rows to mean 0 and variance 1, then a scale and a shift per column.
//
//     mean[r] <- 1/cols sum_c x[r, c]
//     rstd[r] <- 1 / sqrt(1/cols sum_c (x[r, c] - mean[r])^2 + eps)
//     h        = (x[r, c] - mean[r]) rstd[r]
//     layer_norm_forward   y[r, c] <- gamma[c] h + beta[c]
//     layer_norm_backward  dx[r, c] <- rstd[r] (k - mean_c(k) - h mean_c(k h)),  k = gamma[c] dy[r, c]
//     layer_norm_parameter_partials
//         dgamma_part[q, c] <- sum of dy[r, c] h, dbeta_part[q, c] <- sum of dy[r, c], over the rows of
//         part q; column_sum (sums.cu) adds the parts.
//
// Buffers    x, y, dy, dx: (rows, cols); gamma, beta: (cols,); mean, rstd: (rows,); *_part:
//            (ceil(rows / rows_per_part), cols). y may be x, dx may be dy or x; no other overlap.
// Launch     ROWS, work = rows; partials: ceil(rows / rows_per_part) * ceil(cols / 32).
// Cost       float32, rows that fit the cache: 8 rows cols bytes forward, 12 backward, 8 for the
//            partials; 8, 13 and 4 flops an element: bandwidth.
// Exactness  row sums over 32 lanes, then a tree (kernel.h); column sums in plain order of rows. The
//            same bits for every launch shape. The variance takes a second pass: no cancellation.
// Source     J. Ba, J. Kiros and G. Hinton, Layer normalization, arXiv:1607.06450.
// Reference  tests/reference.py    Test  tests/test_kernels_layer_norm.py

#include "kernel.h"

ROWS_KERNEL layer_norm_forward(const real* x, const real* __restrict__ gamma,
                               const real* __restrict__ beta, real* y, wide* __restrict__ mean,
                               wide* __restrict__ rstd, int64 rows, int64 cols, wide eps)
{
    FOR_ROWS(row, rows) {
        const real* x_row = x + row * cols;
        real* y_row = y + row * cols;
        const wide center = row_sum(cols, [&](int64 c) { return x_row[c]; }) / (wide)cols;
        const wide variance = row_sum(cols, [&](int64 c) {
            return (x_row[c] - center) * (x_row[c] - center);
        }) / (wide)cols;
        const wide inverse = 1 / real_sqrt(variance + eps);
        FOR_LANES(c, cols) y_row[c] = (x_row[c] - center) * inverse * gamma[c] + beta[c];
        if (LANE_LEADER) mean[row] = center;
        if (LANE_LEADER) rstd[row] = inverse;
    }
}

ROWS_KERNEL layer_norm_backward(const real* x, const real* __restrict__ gamma,
                                const wide* __restrict__ mean, const wide* __restrict__ rstd,
                                const real* dy, real* dx, int64 rows, int64 cols)
{
    FOR_ROWS(row, rows) {
        const real *x_row = x + row * cols, *dy_row = dy + row * cols;
        real* dx_row = dx + row * cols;
        const wide center = mean[row], inverse = rstd[row];
        wide plain, tilted;
        row_two_sums(
            cols, [&](int64 c) { return gamma[c] * dy_row[c]; },
            [&](int64 c) { return gamma[c] * dy_row[c] * ((x_row[c] - center) * inverse); },
            plain, tilted);
        plain /= (wide)cols;
        tilted /= (wide)cols;
        FOR_LANES(c, cols) {
            const wide normed = (x_row[c] - center) * inverse;
            dx_row[c] = inverse * (gamma[c] * dy_row[c] - plain - normed * tilted);
        }
    }
}

ROWS_KERNEL layer_norm_parameter_partials(
    const real* __restrict__ x, const wide* __restrict__ mean, const wide* __restrict__ rstd,
    const real* __restrict__ dy, wide* __restrict__ dgamma_part, wide* __restrict__ dbeta_part,
    int64 rows, int64 cols, int64 rows_per_part)
{
    const int64 parts = (rows + rows_per_part - 1) / rows_per_part;
    const int64 tiles = (cols + COLUMNS - 1) / COLUMNS;
    FOR_ROWS(unit, parts * tiles) {
        const int64 q = unit / tiles, first = q * rows_per_part;
        const int64 last = first + rows_per_part < rows ? first + rows_per_part : rows;
        sum_two_tiles(
            dgamma_part + q * cols, dbeta_part + q * cols, unit % tiles, cols, first, last,
            [&](int64 r, int64 c) {
                return dy[r * cols + c] * ((x[r * cols + c] - mean[r]) * rstd[r]);
            },
            [&](int64 r, int64 c) { return dy[r * cols + c]; });
    }
}
