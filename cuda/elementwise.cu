// elementwise.cu -- filling, adding, scaling and converting flat arrays; ReLU; adding a bias to rows.
//
//     fill             y[i] <- a                       scale       y[i] <- a y[i]
//     add              z[i] <- x[i] + y[i]             add_into    y[i] <- y[i] + x[i]
//     relu_forward     y[i] <- max(x[i], 0)
//     relu_backward    dx[i] <- dy[i] where y[i] > 0, else 0
//     add_bias         y[r, c] <- y[r, c] + b[c]
//     from_bytes       y[i] <- a x[i] + b              x: uint8
//     narrow           y[i] <- x[i], rounded           x: wide
//     add_widened      y[i] <- y[i] + x[i]             y: wide
//     round_mantissa   y[i] <- x[i] rounded to `bits` bits of mantissa, to nearest, ties to even
//
// Buffers    contiguous, n = rows * cols elements. Outputs may be the same array as an input of the
//            same type, and must not overlap it otherwise. NaN stays NaN through relu_forward.
// Launch     ELEMENTS, any grid and block. add_bias: ROWS, work = rows.
// Cost       one read per input, one write per output: 4 n bytes each in float32; at most 2 flops an
//            element: bandwidth.
// Exactness  no sums: the same bits for every launch shape and split.
// Source     elementary.
// Reference  tests/reference.py    Test  tests/test_kernels_elementwise.py

#include "kernel.h"

ELEMENTS_KERNEL fill(real* __restrict__ y, wide a, int64 n)
{
    GRID_STRIDE(i, n) y[i] = a;
}

ELEMENTS_KERNEL scale(real* __restrict__ y, wide a, int64 n)
{
    GRID_STRIDE(i, n) y[i] = y[i] * a;
}

ELEMENTS_KERNEL add(const real* x, const real* y, real* z, int64 n)
{
    GRID_STRIDE(i, n) z[i] = x[i] + y[i];
}

ELEMENTS_KERNEL add_into(real* y, const real* x, int64 n)
{
    GRID_STRIDE(i, n) y[i] = y[i] + x[i];
}

ELEMENTS_KERNEL relu_forward(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) {
        const wide value = x[i];
        y[i] = kept(!(value < 0), value);
    }
}

ELEMENTS_KERNEL relu_backward(const real* y, const real* dy, real* dx, int64 n)
{
    GRID_STRIDE(i, n) dx[i] = kept(y[i] > 0, (wide)dy[i]);
}

ROWS_KERNEL add_bias(real* __restrict__ y, const real* __restrict__ b, int64 rows, int64 cols)
{
    FOR_ROWS(row, rows) {
        real* __restrict__ y_row = y + row * cols;
        FOR_LANES(c, cols) y_row[c] = y_row[c] + b[c];
    }
}

ELEMENTS_KERNEL from_bytes(const uint8* __restrict__ x, real* __restrict__ y, wide a, wide b, int64 n)
{
    GRID_STRIDE(i, n) y[i] = a * (wide)x[i] + b;
}

ELEMENTS_KERNEL narrow(const wide* __restrict__ x, real* __restrict__ y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = x[i];
}

ELEMENTS_KERNEL add_widened(const real* __restrict__ x, wide* __restrict__ y, int64 n)
{
    GRID_STRIDE(i, n) y[i] += x[i];
}

ELEMENTS_KERNEL round_mantissa(const real* __restrict__ x, real* __restrict__ y, int32 bits, int64 n)
{
    typedef Format<wide>::Bits Bits;
    const int32 drop = Format<wide>::MANTISSA - bits;
    const Bits half = ((Bits)1 << (drop - 1)) - 1, mask = ~(((Bits)1 << drop) - 1);
    GRID_STRIDE(i, n) {
        const wide value = x[i];
        const Bits whole = bits_of(value);
        const wide rounded = from_bits((whole + half + (whole >> drop & 1)) & mask);
        y[i] = value != value ? value : rounded;
    }
}
