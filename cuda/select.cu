// select.cu -- the k elements of an array with the largest absolute values, in order of index.
//
//     select_sample      sample[j] <- an element of the j-th of `count` equal parts of x
//     select_histogram   histogram[d] += 1 for each x[i] whose key begins as state[0] does, where d is
//                        bits shift .. shift + bits - 1 of its key
//     select_digit       the d where the need-th largest key lies goes into these bits of state[0];
//                        state[1] <- how many keys are still needed from there on; histogram <- 0
//     select_loosen      to <- a threshold lower than from's by `slack`, at which all ties are taken
//     select_count       counts[t] <- how many keys of tile t are above the threshold, how many equal
//                        it; slots[t] <- where the first 128 of them are
//     select_scan        starts[t] <- sums of counts before t; found <- how many are taken;
//                        again <- size where these are fewer than `least` or more than `most`, else 0
//     select_pack        values, indices <- what is taken, ascending by index
//
// A key is the absolute value's bits as an integer: larger numbers have larger keys, infinity and then
// NaN the largest. Taken is what has a key above the threshold state[0], and of the keys that equal
// it the first state[1]. histogram + digit for the digits of a key, from the highest on, with
// need = k, give the threshold and the ties of the k largest.
//
// Buffers    x (n,) with n = size[0], or 0 for a launch that is to do nothing: it is read on the
//            device, so that no launch has to wait for the host. A tile is 4096 elements. histogram
//            (2048,), zero before the first launch; state (2,); counts, starts (tiles, 2); slots
//            (tiles, 128); found, again (1,), again may be absent; values, indices (most,). `places`
//            gives x[i] the index places[i] instead of i; it may be absent. Nothing overlaps.
// Launch     ROWS: select_histogram, select_count, select_pack work = tiles; select_digit,
//            select_loosen, select_scan 1. ELEMENTS: select_sample work = count.
// Cost       select_histogram and select_count read x once, 4 bytes an element in float32:
//            bandwidth. select_pack reads only tiles again that more than 128 are taken from.
// Exactness  integers: the same for every launch shape.
// Source     P. Alabi et al., "Fast k-selection algorithms for graphics processing units", ACM JEA 17,
//            2012 (radix select); the sample and the tiles are elementary.
// Reference  tests/cases_select.py    Test  tests/test_kernels_select.py

#include "kernel.h"

#include "compaction.h"

#define TILE 4096
#define SLOTS 128
#define BINS 2048

typedef Format<wide>::Bits Key;

DEVICE int64 tiles_of(const int64* size) { return (size[0] + TILE - 1) / TILE; }

DEVICE int64 tile_length(int64 n, int64 tile)
{
    return n - tile * TILE < TILE ? n - tile * TILE : TILE;
}

ELEMENTS_KERNEL select_sample(const wide* __restrict__ x, wide* __restrict__ sample, int64 n,
                              int64 count)
{
    GRID_STRIDE(j, count) {
        const int64 first = j * n / count, length = (j + 1) * n / count - first;
        const uint32 mixed = (uint32)j * 2654435761u;  // no fixed stride: rows may have one too
        sample[j] = x[first + (length > 1 ? (int64)(mixed >> 8) % length : 0)];
    }
}

ROWS_KERNEL select_histogram(const wide* __restrict__ x, const int64* __restrict__ size,
                             const int64* __restrict__ state, uint32* histogram, int32 shift,
                             int32 bits)
{
    const int64 n = size[0], tiles = tiles_of(size);
    const Key top = (Key)state[0] >> (shift + bits), mask = ((Key)1 << bits) - 1;
    FOR_ROWS(tile, tiles) {
        const wide* __restrict__ part = x + tile * TILE;
        count_digits(tile_length(n, tile), [&](int64 j) {
            const Key key = magnitude(part[j]);
            return key >> (shift + bits) == top ? (int32)(key >> shift & mask) : -1;
        }, histogram);
    }
}

ROWS_KERNEL select_digit(const int64* __restrict__ size, int64* __restrict__ state,
                         uint32* __restrict__ histogram, int64 need, int32 shift, int32 bits,
                         int32 begins)
{
    FOR_ROWS(one, size[0] > 0 ? 1 : 0) {
        if (LANE_LEADER) {
            const int64 wanted = begins ? need : state[1];
            const int64 before = begins ? 0 : state[0];
            int64 above = 0, digit = 0, left = wanted;
            for (int64 d = ((int64)1 << bits) - 1; d >= 0; d--) {
                const int64 count = histogram[d];
                const bool here = above < wanted && above + count >= wanted;
                digit = here ? d : digit;
                left = here ? wanted - above : left;
                above += count;
            }
            const int64 known = before >> (shift + bits) << (shift + bits);
            state[0] = known | digit << shift;
            state[1] = left;
        }
        warp_fence();
        FOR_LANES(d, BINS) histogram[d] = 0;
    }
}

ROWS_KERNEL select_loosen(const int64* from, int64* to, int64 slack)
{
    FOR_ROWS(one, 1) {
        if (LANE_LEADER) {
            to[0] = from[0] > slack ? from[0] - slack : 0;
            to[1] = 0x7fffffffffffffffll;
        }
    }
}

ROWS_KERNEL select_count(const wide* __restrict__ x, const int64* __restrict__ size,
                         const int64* __restrict__ state, int64* __restrict__ counts,
                         uint16* __restrict__ slots)
{
    const int64 n = size[0], tiles = tiles_of(size);
    const Key threshold = (Key)state[0];
    FOR_ROWS(tile, tiles) {
        const wide* __restrict__ part = x + tile * TILE;
        uint16* __restrict__ mine = slots + tile * SLOTS;
        const Passed passed = take_in_order(
            tile_length(n, tile), threshold, (int64)TILE,
            [&](int64 j) { return magnitude(part[j]); },
            [&](int64 p, int64 j) {
                if (p < SLOTS) mine[p] = (uint16)j;
            });
        if (LANE_LEADER) {
            counts[2 * tile] = passed.above;
            counts[2 * tile + 1] = passed.equal;
        }
    }
}

ROWS_KERNEL select_scan(const int64* __restrict__ size, const int64* __restrict__ state,
                        const int64* __restrict__ counts, int64* __restrict__ starts,
                        int64* __restrict__ found, int64* __restrict__ again, int64 least,
                        int64 most)
{
    const int64 tiles = tiles_of(size), ties = state[1];
    FOR_ROWS(one, tiles > 0 ? 1 : 0) {
        const int64 above = running_sums(
            tiles, [&](int64 t) { return counts[2 * t]; },
            [&](int64 t, int64 sum) { starts[2 * t] = sum; });
        const int64 equal = running_sums(
            tiles, [&](int64 t) { return counts[2 * t + 1]; },
            [&](int64 t, int64 sum) { starts[2 * t + 1] = sum; });
        if (LANE_LEADER) {
            const int64 taken = above + (equal < ties ? equal : ties);
            found[0] = taken;
            if (again) again[0] = taken < least || taken > most ? size[0] : 0;
        }
    }
}

ROWS_KERNEL select_pack(const wide* __restrict__ x, const int64* __restrict__ places,
                        const int64* __restrict__ size, const int64* __restrict__ state,
                        const int64* __restrict__ counts, const int64* __restrict__ starts,
                        const uint16* __restrict__ slots, const int64* __restrict__ found,
                        int64 most, wide* __restrict__ values, int64* __restrict__ indices)
{
    const int64 n = size[0], tiles = found[0] <= most ? tiles_of(size) : 0;
    const Key threshold = (Key)state[0];
    const int64 all_ties = state[1];
    FOR_ROWS(tile, tiles) {
        const int64 first = tile * TILE, earlier = starts[2 * tile + 1];
        const int64 ties = all_ties > earlier ? all_ties - earlier : 0;
        const int64 at = starts[2 * tile] + (earlier < all_ties ? earlier : all_ties);
        const int64 passed = counts[2 * tile] + counts[2 * tile + 1];
        const auto write = [&](int64 p, int64 i) {
            values[at + p] = x[i];
            indices[at + p] = places ? places[i] : i;
        };
        const uint16* __restrict__ mine = slots + tile * SLOTS;
        if (passed <= SLOTS)
            take_in_order(passed, threshold, ties,
                          [&](int64 s) { return magnitude(x[first + mine[s]]); },
                          [&](int64 p, int64 s) { write(p, first + mine[s]); });
        else
            take_in_order(tile_length(n, tile), threshold, ties,
                          [&](int64 j) { return magnitude(x[first + j]); },
                          [&](int64 p, int64 j) { write(p, first + j); });
    }
}
