// quantize.cu -- numbers as 16, 8 or 1 bits, and back: what travels in place of float32.
//
//     cast_encode   y[i] <- x[i], rounded to `real`
//     cast_add      y[i] <- y[i] + factor x[i]
//     int8_encode   scales[b] <- max |x[i]| / 127 over block b, q[i] <- x[i] / scales[b], rounded
//     int8_add      y[i] <- y[i] + factor (scales[b] q[i])
//     sign_encode   scales[b] <- mean |x[i]| over block b, bit i <- x[i] < 0
//     sign_add      y[i] <- y[i] + factor (bit i ? -scales[b] : scales[b])
//     orthonormalize  the columns of each matrix p_m, one after the other: v <- v - the parts along the
//                     columns before it (twice), v <- v / |v|, or 0 where little was left of v
//
// where b is i / 512 (int8) or i / 2048 (sign).
//
// Buffers    x, y (n,); scales (ceil(n / 512),) or (ceil(n / 2048),); q: uint8 (n,), the bytes of
//            int8; bits (ceil(n / 8),), the first of eight in the highest bit, ones beyond n are 0.
//            Nothing overlaps. x is finite. cast_encode: a number too large for `real` gives its
//            largest one. int8: a block of zeros has scale 0. Matrix m lies at p + begins[m], with
//            rows[m] rows and ranks[m] columns, C-contiguous.
// Launch     ELEMENTS: cast_encode, cast_add work = n. ROWS: orthonormalize work = matrices, all others
//            work = blocks.
// Cost       x is read once, but by int8_encode and sign_encode twice, the second time from the cache;
//            4 bytes an element in float32, and 2, 1 or 1/8 of the encoded one: bandwidth.
// Exactness  what is said is rounded to `wide` before it is added: with factor -1, x - (what is said)
//            is exact for int8 and for casts. Sums of |x| and products of columns: 32 lanes, then a
//            tree (kernel.h). The same bits for every launch shape.
// Source     F. Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; T. Vogels et al.,
//            "PowerSGD", NeurIPS 2019; W. Hoffmann, "Iterative algorithms for Gram-Schmidt
//            orthogonalization", Computing 41, 1989 (twice is enough).
// Reference  tests/cases_quantize.py    Test  tests/test_kernels_quantize.py

#include "kernel.h"

#include "in_range.h"

#define INT8_BLOCK 512
#define SIGN_BLOCK 2048

DEVICE int64 length_of(int64 n, int64 block, int64 size)
{
    return n - block * size < size ? n - block * size : size;
}

ELEMENTS_KERNEL cast_encode(const wide* __restrict__ x, real* __restrict__ y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = in_range(x[i]);
}

ELEMENTS_KERNEL cast_add(const real* __restrict__ x, wide* __restrict__ y, wide factor, int64 n)
{
    GRID_STRIDE(i, n) y[i] = y[i] + factor * (wide)x[i];
}

// The nearest whole number from -127 to 127, ties to even, as a byte; NaN (of 0 / 0) is 0.
DEVICE uint8 whole_byte(wide x)
{
    const wide number = x == x ? x : (wide)0;
    const wide near = number > 127 ? (wide)127 : number < -127 ? (wide)-127 : number;
    return (uint8)(int32)(near + Format<wide>::ROUND - Format<wide>::ROUND);
}

ROWS_KERNEL int8_encode(const wide* __restrict__ x, wide* __restrict__ scales,
                        uint8* __restrict__ q, int64 n)
{
    FOR_ROWS(block, (n + INT8_BLOCK - 1) / INT8_BLOCK) {
        const wide* __restrict__ part = x + block * INT8_BLOCK;
        uint8* __restrict__ out = q + block * INT8_BLOCK;
        const int64 count = length_of(n, block, INT8_BLOCK);
        const wide most = row_max(count, 0, [&](int64 i) { return real_abs(part[i]); });
        const wide scale = most / 127, inverse = scale > 0 ? 1 / scale : (wide)0;
        FOR_LANES(i, count) out[i] = whole_byte(part[i] * inverse);
        if (LANE_LEADER) scales[block] = scale;
    }
}

ROWS_KERNEL int8_add(const wide* __restrict__ scales, const uint8* __restrict__ q,
                     wide* __restrict__ y, wide factor, int64 n)
{
    FOR_ROWS(block, (n + INT8_BLOCK - 1) / INT8_BLOCK) {
        const uint8* __restrict__ part = q + block * INT8_BLOCK;
        wide* __restrict__ out = y + block * INT8_BLOCK;
        const wide scale = scales[block];
        FOR_LANES(i, length_of(n, block, INT8_BLOCK)) {
            const int32 number = (int32)(part[i] ^ 128) - 128;
            const wide said = scale * (wide)number;
            out[i] = out[i] + factor * said;
        }
    }
}

ROWS_KERNEL sign_encode(const wide* __restrict__ x, wide* __restrict__ scales,
                        uint8* __restrict__ bits, int64 n)
{
    FOR_ROWS(block, (n + SIGN_BLOCK - 1) / SIGN_BLOCK) {
        const wide* __restrict__ part = x + block * SIGN_BLOCK;
        uint8* __restrict__ out = bits + block * (SIGN_BLOCK / 8);
        const int64 count = length_of(n, block, SIGN_BLOCK);
        const wide sum = row_sum(count, [&](int64 i) { return real_abs(part[i]); });
        FOR_LANES(j, (count + 7) / 8) {
            uint32 byte = 0;
            for (int64 i = 8 * j; i < 8 * j + 8; i++)
                byte = byte << 1 | (uint32)(i < count && part[i] < 0);
            out[j] = (uint8)byte;
        }
        if (LANE_LEADER) scales[block] = sum / (wide)count;
    }
}

ROWS_KERNEL sign_add(const wide* __restrict__ scales, const uint8* __restrict__ bits,
                     wide* __restrict__ y, wide factor, int64 n)
{
    FOR_ROWS(block, (n + SIGN_BLOCK - 1) / SIGN_BLOCK) {
        const uint8* __restrict__ part = bits + block * (SIGN_BLOCK / 8);
        wide* __restrict__ out = y + block * SIGN_BLOCK;
        const wide plus = factor * scales[block], minus = -plus;
        FOR_LANES(i, length_of(n, block, SIGN_BLOCK)) {
            const int32 l = (int32)i;
            out[i] = out[i] + ((part[l >> 3] << (l & 7) & 128) ? minus : plus);
        }
    }
}

// A lane has every 32nd row of all columns to itself: only sums pass between lanes.
ROWS_KERNEL orthonormalize(wide* __restrict__ p, const int64* __restrict__ begins,
                           const int64* __restrict__ rows, const int64* __restrict__ ranks,
                           int64 matrices)
{
    FOR_ROWS(m, matrices) {
        wide* __restrict__ matrix = p + begins[m];
        const int64 n = rows[m], rank = ranks[m];
        const auto product = [&](int64 a, int64 b) {
            return row_sum(n, [&](int64 r) { return matrix[r * rank + a] * matrix[r * rank + b]; });
        };
        for (int64 c = 0; c < rank; c++) {
            const wide before = real_sqrt(product(c, c));
            for (int64 other = 0; other < 2 * c; other++) {
                const int64 a = other % c;
                const wide along = product(a, c);
                FOR_LANES(r, n) matrix[r * rank + c] -= along * matrix[r * rank + a];
            }
            const wide norm = real_sqrt(product(c, c));
            const wide scale = norm > (wide)1e-5 * before ? 1 / norm : (wide)0;
            FOR_LANES(r, n) matrix[r * rank + c] *= scale;
        }
    }
}
