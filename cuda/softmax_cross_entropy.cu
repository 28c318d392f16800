// softmax_cross_entropy.cu -- loss, gradient and hit of a classifier, row by row.
//
//     loss[r]       <- w_r (ln(sum_c e^x[r, c]) - x[r, label_r])
//     dlogits[r, c] <- scale w_r (e^x[r, c] / sum_c e^x[r, c] - (c == label_r))
//     correct[r]    <- 1 where the first largest logit of row r is the label's, else 0
//     A row whose label is `ignore` gives 0, 0, 0. A NaN or +inf among the logits, and a label that
//     is neither `ignore` nor in [0, cols), give NaN, NaN, 0.
//
// Buffers    logits, dlogits: (rows, cols); labels, loss, correct: (rows,); weights: (rows,) or null
//            for all ones. dlogits may be null, or be logits. No other overlap. `scale` is that of
//            the loss in 16-bit training, else 1.
// Launch     ROWS, work = rows, any grid and block of whole warps.
// Cost       8 rows cols bytes in float32 (4 without dlogits), while a row fits the cache; one
//            exponential an element.
// Exactness  sums over 32 lanes, then a tree (kernel.h): the same bits for every launch shape.
// Source     elementary; the largest logit is subtracted first, so that nothing overflows.
// Reference  tests/reference.py    Test  tests/test_kernels_softmax_cross_entropy.py

#include "kernel.h"

// Whether the terms e^(x - top) are kept in dlogits or, in 16 bits, computed again.
#define TERMS_KEPT (sizeof(real) == sizeof(wide))

// Sum of e^(x - top) over the row; keeps the terms in `terms` unless it is null.
DEVICE wide sum_of_powers(const real* x, real* terms, wide top, int64 cols)
{
    if (!terms || !TERMS_KEPT) return row_sum(cols, [&](int64 c) { return real_exp(x[c] - top); });
    return row_sum(cols, [&](int64 c) { return terms[c] = real_exp(x[c] - top); });
}

DEVICE void fill_row(real* y, wide value, int64 cols)
{
    if (y) FOR_LANES(c, cols) y[c] = value;
}

ROWS_KERNEL softmax_cross_entropy(const real* logits, const int64* __restrict__ labels,
                                  const wide* __restrict__ weights, wide* __restrict__ loss,
                                  real* dlogits, uint8* __restrict__ correct, int64 rows,
                                  int64 cols, int64 ignore, wide scale)
{
    FOR_ROWS(row, rows) {
        const real* x = logits + row * cols;
        real* dx = dlogits ? dlogits + row * cols : nullptr;
        const int64 label = labels[row];
        if (label == ignore || label < 0 || label >= cols) {
            const wide value = label == ignore ? (wide)0 : from_bits(Format<wide>::NOT_A_NUMBER);
            fill_row(dx, value, cols);
            if (LANE_LEADER) loss[row] = value;
            if (LANE_LEADER) correct[row] = 0;
            continue;
        }
        const wide weight = weights ? weights[row] : (wide)1;
        const wide top = row_max(cols, x[0], [&](int64 c) { return x[c]; });
        const wide chosen = x[label];
        bool hit = chosen == top;
        if (hit) hit = label == 0 || row_max(label, x[0], [&](int64 c) { return x[c]; }) < top;
        const wide sum = sum_of_powers(x, dx, top, cols);
        if (LANE_LEADER) loss[row] = weight * (real_log(sum) - (chosen - top));
        if (LANE_LEADER) correct[row] = hit && sum == sum;
        if (!dx) continue;
        const wide scaled = scale * weight, factor = scaled / sum;
        FOR_LANES(c, cols) {
            const wide term = TERMS_KEPT ? (wide)dx[c] : real_exp(x[c] - top);
            dx[c] = factor * term - (c == label ? scaled : (wide)0);
        }
    }
}
