// elementwise.cu -- filling, adding, scaling and converting flat arrays; ReLU; adding a bias to rows.
//
//     fill             y[i] <- a                       scale       y[i] <- a y[i]
//     add              z[i] <- x[i] + y[i]             add_into    y[i] <- y[i] + x[i]
//     relu_forward     y[i] <- max(x[i], 0)
//     relu_backward    dx[i] <- dy[i] where y[i] > 0, else 0
//     add_bias         y[r, c] <- y[r, c] + b[c]
//     from_bytes       y[i] <- a x[i] + b              x: uint8
//
// Buffers    contiguous, n = rows * cols elements. Outputs may be the same array as an input of the
//            same type, and must not overlap it otherwise. NaN stays NaN through relu_forward.
// Launch     ELEMENTS, any grid and block. add_bias: ROWS, work = rows.
// Cost       one read per input, one write per output; at most 2 flops an element: bandwidth.
// Exactness  no sums: the same bits for every launch shape and split.
// Source     elementary.
// Reference  tests/reference.py    Test  tests/test_kernels_elementwise.py

#include "kernel.h"

ELEMENTS_KERNEL fill(real* __restrict__ y, real a, int64 n)
{
    GRID_STRIDE(i, n) y[i] = a;
}

ELEMENTS_KERNEL scale(real* __restrict__ y, real a, int64 n)
{
    GRID_STRIDE(i, n) y[i] *= a;
}

ELEMENTS_KERNEL add(const real* x, const real* y, real* z, int64 n)
{
    GRID_STRIDE(i, n) z[i] = x[i] + y[i];
}

ELEMENTS_KERNEL add_into(real* y, const real* x, int64 n)
{
    GRID_STRIDE(i, n) y[i] += x[i];
}

ELEMENTS_KERNEL relu_forward(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = x[i] < 0 ? (real)0 : x[i];
}

ELEMENTS_KERNEL relu_backward(const real* y, const real* dy, real* dx, int64 n)
{
    GRID_STRIDE(i, n) dx[i] = y[i] > 0 ? dy[i] : (real)0;
}

ROWS_KERNEL add_bias(real* __restrict__ y, const real* __restrict__ b, int64 rows, int64 cols)
{
    FOR_ROWS(row, rows) {
        real* __restrict__ y_row = y + row * cols;
        FOR_LANES(c, cols) y_row[c] += b[c];
    }
}

ELEMENTS_KERNEL from_bytes(const uint8* __restrict__ x, real* __restrict__ y, real a, real b, int64 n)
{
    GRID_STRIDE(i, n) y[i] = a * (real)x[i] + b;
}
