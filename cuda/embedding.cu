// embedding.cu -- rows of a table, chosen by ids, and the gradient of the table.
//
//     embedding_forward    y[i] <- table[ids[i]]
//     embedding_backward   dtable[unique[u]] <- dtable[unique[u]] + sum of dy[order[i]] over
//                          starts[u] <= i < starts[u + 1], in that order
//
// Buffers    table, dtable (vocabulary, dim); ids int64 (n,), each in [0, vocabulary): checked by the
//            caller; y, dy (n, dim). order int64 (n,) sorts the ids, stably; unique int64 (distinct,)
//            are the different ids and starts int64 (distinct + 1,) where each begins in `order`.
// Launch     ROWS, any grid and block: work = n (forward), distinct * ceil(dim / 32) (backward).
// Cost       bytes in float32: forward 8 n dim; backward 4 n dim, and 8 dim for each row of dtable
//            that occurs.
// Exactness  a row of the table sums its contributions in the order of the batch.
// Source     elementary.
// Reference  tests/reference_images.py    Test  tests/test_kernels_embedding.py

#include "channels.h"

ROWS_KERNEL embedding_forward(const real* __restrict__ table, const int64* __restrict__ ids,
                              real* __restrict__ y, int64 n, int64 dim)
{
    FOR_ROWS(row, n) {
        const real* __restrict__ from = table + ids[row] * dim;
        real* __restrict__ to = y + row * dim;
        FOR_LANES(c, dim) to[c] = from[c];
    }
}

ROWS_KERNEL embedding_backward(const real* __restrict__ dy, const int64* __restrict__ order,
                               const int64* __restrict__ starts, const int64* __restrict__ unique,
                               real* __restrict__ dtable, int64 distinct, int64 dim)
{
    FOR_ROWS(unit, distinct * channel_tiles(dim)) {
        const int64 u = unit / channel_tiles(dim), first = unit % channel_tiles(dim) * LANES;
        real* __restrict__ out = dtable + unique[u] * dim + first;
        with_width(lower(dim - first, LANES), [&](auto w) {
            Lanes<wide> sum(0);
            w.each(sum, [&](int c, wide& s) { s = out[c]; });
            for (int64 i = starts[u]; i < starts[u + 1]; i++) {
                const real* __restrict__ in = dy + order[i] * dim + first;
                w.each(sum, [&](int c, wide& s) { s += in[c]; });
            }
            w.each(sum, [&](int c, wide& s) { out[c] = s; });
        });
    }
}
