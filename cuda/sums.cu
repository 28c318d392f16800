// sums.cu -- sums down columns, sums of squares, sums over the ranks of a node, running averages.
//
//     column_partials      part[q, c] <- sum of x[r, c] over the rows of part q, in order
//     column_sum           y[c] <- sum_r x[r, c], in order
//     column_merge         y[c] <- sum_q part[q, c], in order
//     square_sum_partials  part[b] <- sum of x[i]^2, 4096 b <= i < 4096 (b + 1)
//     sum_peers            out[i] <- peers[0][offset + i] + peers[1][offset + i] + ..., in order
//     sum_widened          out[i] <- first[i] + others[0][offset + i] + others[1][offset + i] + ...
//     average_update       y[i] <- y[i] + momentum (sum[i] / weight - y[i])
//
// Buffers    contiguous; part q holds rows_per_part rows, the last one what is left. part:
//            (ceil(rows / rows_per_part), cols), or (ceil(n / 4096),) for squares. `out` of sum_peers
//            may be peers[k] + offset for one k; no other overlap. sum_widened adds count + 1 arrays:
//            with none of the others it is a conversion to wide.
// Launch     ROWS: column_partials work = parts * ceil(cols / 32), column_sum and column_merge
//            ceil(cols / 32), square_sum_partials ceil(n / 4096). ELEMENTS: sum_peers,
//            sum_widened, average_update n.
// Cost       each input is read once and each output written once, 4 bytes an element in float32:
//            bandwidth.
// Exactness  columns and peers: plain order, so a column's sum depends on rows_per_part only. Squares
//            32 lanes, then a tree (kernel.h). The same bits for every launch shape.
// Source     elementary.
// Reference  tests/reference.py    Test  tests/test_kernels_sums.py

#include "kernel.h"

ROWS_KERNEL column_partials(const real* __restrict__ x, wide* __restrict__ part, int64 rows,
                            int64 cols, int64 rows_per_part)
{
    const int64 parts = (rows + rows_per_part - 1) / rows_per_part;
    const int64 tiles = (cols + COLUMNS - 1) / COLUMNS;
    FOR_ROWS(unit, parts * tiles) {
        const int64 q = unit / tiles, first = q * rows_per_part;
        const int64 last = first + rows_per_part < rows ? first + rows_per_part : rows;
        sum_tile(part + q * cols, unit % tiles, cols, first, last,
                 [&](int64 r, int64 c) { return x[r * cols + c]; });
    }
}

ROWS_KERNEL column_sum(const real* __restrict__ x, real* __restrict__ y, int64 rows, int64 cols)
{
    FOR_ROWS(tile, (cols + COLUMNS - 1) / COLUMNS)
        sum_tile(y, tile, cols, 0, rows, [&](int64 r, int64 c) { return x[r * cols + c]; });
}

ROWS_KERNEL column_merge(const wide* __restrict__ part, real* __restrict__ y, int64 rows, int64 cols)
{
    FOR_ROWS(tile, (cols + COLUMNS - 1) / COLUMNS)
        sum_tile(y, tile, cols, 0, rows, [&](int64 r, int64 c) { return part[r * cols + c]; });
}

ROWS_KERNEL square_sum_partials(const real* __restrict__ x, wide* __restrict__ part, int64 n)
{
    const int64 block = 4096;
    FOR_ROWS(b, (n + block - 1) / block) {
        const real* __restrict__ x_block = x + b * block;
        const int64 count = n - b * block < block ? n - b * block : block;
        const wide sum = row_sum(count, [&](int64 i) { return x_block[i] * x_block[i]; });
        if (LANE_LEADER) part[b] = sum;
    }
}

// Who is added up, in order: `first`, if there is one, then those of the table.
struct Peers {
    const real* first;
    const real* const* table;
    int64 offset;
    DEVICE_MEMBER const real* operator[](int64 k) const
    {
        if (first) return k ? table[k - 1] + offset : first;
        return table[k] + offset;
    }
};

// Any number of peers: tiles that stay in the cache, STEP peers at a time
template <int STEP, class T>
DEVICE void sum_of_many(Peers peers, int64 count, T* out, int64 n)
{
    FOR_ROWS(tile, (n + COLUMNS - 1) / COLUMNS) {
        const int64 start = tile * COLUMNS, width = n - start;
        Columns<wide> total(0);
        int64 k = 0;
        for (; k + STEP <= count; k += STEP) {
            const real* x[STEP];
            for (int j = 0; j < STEP; j++) x[j] = peers[k + j] + start;
            total.first(width, [&](int i, wide& sum) {
                for (int j = 0; j < STEP; j++) sum += x[j][i];
            });
        }
        for (; k < count; k++) {
            const real* x = peers[k] + start;
            total.first(width, [&](int i, wide& sum) { sum += x[i]; });
        }
        total.first(width, [&](int i, wide& sum) { out[start + i] = sum; });
    }
}

#if defined(HPCTRAIN_HOST)
#define MOST 16
#else
#define MOST 8  // a pointer takes two registers: more would halve the number of threads
#endif

// One loop for each number of peers from COUNT to MOST: all of them read at once, in long streams
template <int COUNT, class T> DEVICE void sum_of(Peers peers, int64 count, T* out, int64 n)
{
    if constexpr (COUNT > MOST) {
        sum_of_many<8>(peers, count, out, n);
    } else if (count != COUNT) {
        sum_of<COUNT + 1>(peers, count, out, n);
    } else {
        const real* x[COUNT];
        for (int k = 0; k < COUNT; k++) x[k] = peers[k];
        GRID_STRIDE(i, n) {
            wide sum = x[0][i];
            for (int k = 1; k < COUNT; k++) sum += x[k][i];
            out[i] = sum;
        }
    }
}

ELEMENTS_KERNEL sum_peers(const real* const* peers, int64 count, int64 offset, real* out, int64 n)
{
    sum_of<1>(Peers{nullptr, peers, offset}, count, out, n);
}

ELEMENTS_KERNEL sum_widened(const real* first, const real* const* others, int64 count, int64 offset,
                            wide* __restrict__ out, int64 n)
{
    sum_of<1>(Peers{first, others, offset}, count + 1, out, n);
}

ELEMENTS_KERNEL average_update(wide* __restrict__ y, const wide* __restrict__ sum, wide weight,
                               wide momentum, int64 n)
{
    GRID_STRIDE(i, n) y[i] += momentum * (sum[i] / weight - y[i]);
}
