// topk.cu -- entries of a sparse vector as a payload, and back; accumulating what is not sent yet;
// taking out what is not selected from.
//
//     topk_encode        entries[j] <- values[j] rounded, offsets[j] <- indices[j] mod 65536
//     topk_counts        counts[b] <- how many indices lie in block b: 65536 b up to 65536 (b + 1)
//     topk_starts        starts[b] <- counts[0] + ... + counts[b - 1], for b = 0 .. blocks
//     topk_add           y[i_j] <- y[i_j] + factor entries[j]
//     topk_mask          u[i_j] <- 0 where 2 |left[i_j]| <= |entries[j]|, and that is not 0
//     keep_residual      x[i] <- residual[i] + g[i], where that is finite, else residual[i]
//     keep_momentum      u[i] <- momentum u[i] + g[i];  x[i] <- residual[i] + u[i]; where one of
//                        them is not finite both stay, x[i] <- residual[i]
//     pieces_take        y[starts[p] + j] <- x[begins[p] + j], and that <- 0
//     pieces_put         x[begins[p] + j] <- y[starts[p] + j], or 0 where y is absent
//
// for all j below starts[p + 1] - starts[p], and where i_j = 65536 b + offsets[j], b the last block with starts[b] <= j.
//
// Buffers    values, entries, offsets (k,); indices int64 (k,), ascending, each once; counts (blocks,)
//            and starts (blocks + 1,) with blocks = ceil(n / 65536); y, x, u, left, residual, g (n,).
//            x may be residual. An entry outside the n elements is left out. Rounding a number that is
//            too large for `real` gives its largest finite one, so what rounding leaves is finite.
//            topk_mask: what was taken back after it was sent keeps its momentum. pieces: begins
//            (pieces,) of places in x, starts (pieces + 1,) of places in y; no piece overlaps.
// Launch     ELEMENTS: work = k; topk_counts blocks; keep_residual, keep_momentum n. ROWS:
//            topk_starts work = 1; pieces_take, pieces_put pieces, of about 1024 elements for a GPU.
// Cost       an entry is 2 bytes and a value; topk_add finds its block by halving, log2(blocks) reads
//            from the cache. keep_residual 12 n bytes in float32, keep_momentum 20 n: bandwidth.
// Exactness  topk_add with factor -1 leaves x - rounded(x), which is a number of `wide` exactly
//            (bfloat16 of any x; float16 of |x| < 2^29). The same bits for every launch shape.
// Source     Y. Lin et al., "Deep gradient compression", ICLR 2018 (momentum and its mask).
// Reference  tests/cases_topk.py    Test  tests/test_kernels_topk.py

#include "kernel.h"

#include "compaction.h"
#include "in_range.h"

#define BLOCK_BITS 16

DEVICE bool is_finite(wide x) { return magnitude(x) < Format<wide>::INF; }

// The block of entry j: the last one that begins at or before it.
DEVICE int64 block_of(const int64* starts, int64 blocks, int64 j)
{
    int64 first = 0, last = blocks;
    while (last - first > 1) {
        const int64 middle = (first + last) / 2;
        if (starts[middle] <= j)
            first = middle;
        else
            last = middle;
    }
    return first;
}

DEVICE int64 lower_bound(const int64* indices, int64 k, int64 value)
{
    int64 first = 0, last = k;
    while (first < last) {
        const int64 middle = (first + last) / 2;
        if (indices[middle] < value)
            first = middle + 1;
        else
            last = middle;
    }
    return first;
}

ELEMENTS_KERNEL topk_encode(const wide* __restrict__ values, const int64* __restrict__ indices,
                            real* __restrict__ entries, uint16* __restrict__ offsets, int64 k)
{
    GRID_STRIDE(j, k) {
        entries[j] = in_range(values[j]);
        offsets[j] = (uint16)(indices[j] & 0xffff);
    }
}

ELEMENTS_KERNEL topk_counts(const int64* __restrict__ indices, uint32* __restrict__ counts, int64 k,
                            int64 blocks)
{
    GRID_STRIDE(b, blocks) {
        const int64 first = lower_bound(indices, k, b << BLOCK_BITS);
        counts[b] = (uint32)(lower_bound(indices, k, (b + 1) << BLOCK_BITS) - first);
    }
}

ROWS_KERNEL topk_starts(const uint32* __restrict__ counts, int64* __restrict__ starts, int64 blocks)
{
    FOR_ROWS(one, 1) {
        const int64 all = running_sums(
            blocks, [&](int64 b) { return (int64)counts[b]; },
            [&](int64 b, int64 sum) { starts[b] = sum; });
        if (LANE_LEADER) starts[blocks] = all;
    }
}

ELEMENTS_KERNEL topk_add(const real* __restrict__ entries, const uint16* __restrict__ offsets,
                         const int64* __restrict__ starts, wide* __restrict__ y, wide factor,
                         int64 k, int64 blocks, int64 n)
{
    GRID_STRIDE(j, k) {
        const int64 i = (block_of(starts, blocks, j) << BLOCK_BITS) + offsets[j];
        if (i < n) y[i] = y[i] + factor * (wide)entries[j];
    }
}

ELEMENTS_KERNEL topk_mask(const real* __restrict__ entries, const uint16* __restrict__ offsets,
                          const int64* __restrict__ starts, const wide* __restrict__ left,
                          wide* __restrict__ u, int64 k, int64 blocks, int64 n)
{
    GRID_STRIDE(j, k) {
        const int64 i = (block_of(starts, blocks, j) << BLOCK_BITS) + offsets[j];
        const wide entry = real_abs((wide)entries[j]);
        if (i < n && entry > 0 && 2 * real_abs(left[i]) <= entry) u[i] = 0;
    }
}

ELEMENTS_KERNEL keep_residual(const wide* residual, const wide* __restrict__ g, wide* x, int64 n)
{
    GRID_STRIDE(i, n) {
        const wide sum = residual[i] + g[i];
        x[i] = is_finite(sum) ? sum : residual[i];
    }
}

ELEMENTS_KERNEL keep_momentum(const wide* residual, const wide* __restrict__ g,
                              wide* __restrict__ u, wide* x, wide momentum, int64 n)
{
    GRID_STRIDE(i, n) {
        const wide mine = momentum * u[i] + g[i], sum = residual[i] + mine;
        const bool fine = is_finite(mine) && is_finite(sum);
        u[i] = fine ? mine : u[i];
        x[i] = fine ? sum : residual[i];
    }
}

ROWS_KERNEL pieces_take(wide* __restrict__ x, const int64* __restrict__ begins,
                        const int64* __restrict__ starts, wide* __restrict__ y, int64 pieces)
{
    FOR_ROWS(p, pieces) {
        const int64 count = starts[p + 1] - starts[p];
        wide* __restrict__ from = x + begins[p];
        wide* __restrict__ to = y + starts[p];
        FOR_LANES(j, count) {
            to[j] = from[j];
            from[j] = 0;
        }
    }
}

ROWS_KERNEL pieces_put(const wide* __restrict__ y, const int64* __restrict__ begins,
                       const int64* __restrict__ starts, wide* __restrict__ x, int64 pieces)
{
    FOR_ROWS(p, pieces) {
        const int64 count = starts[p + 1] - starts[p];
        wide* __restrict__ to = x + begins[p];
        if (y) {
            const wide* __restrict__ from = y + starts[p];
            FOR_LANES(j, count) to[j] = from[j];
        } else {
            FOR_LANES(j, count) to[j] = 0;
        }
    }
}
