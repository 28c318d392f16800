// compaction.h -- what a warp does in order: taking what passes a threshold, running sums, counting.
//
//     take_in_order   gives write(p, j) the p-th of the j in 0 .. n - 1 that pass, ascending
//     running_sums    gives write(j, f(0) + ... + f(j - 1)), and returns the sum of all
//     count_digits    histogram[digit(j)] += 1 for every j with a digit >= 0
//     warp_fence      what lanes wrote before it, the warp's other lanes may read after it
//
// All lanes of a warp call them together, and `write` runs on one lane for each j. Counters are
// integers, so atomics on them give the same on every run.
#pragma once

// The absolute value as an integer: as large as the value is; infinity above numbers, NaN above it.
DEVICE uint32 magnitude(float x) { return bits_of(x) & 0x7fffffffu; }
DEVICE uint64 magnitude(double x) { return bits_of(x) & 0x7fffffffffffffffull; }

struct Passed {
    int64 above, equal;  // how many were larger than the threshold, and how many as large
};

#if defined(__CUDACC__) || defined(HPCTRAIN_SIMT)

#if defined(__CUDACC__)
DEVICE int32 count_bits(uint32 mask) { return __popc(mask); }
#else
DEVICE int32 count_bits(uint32 mask) { return __builtin_popcount(mask); }
#endif

DEVICE void warp_fence() { __syncwarp(); }

// What is larger than the threshold passes, and the first `ties` of what is as large.
template <class T, class Key, class Write>
DEVICE Passed take_in_order(int64 n, T threshold, int64 ties, Key key, Write write)
{
    const int32 lane = threadIdx.x % LANES;
    const uint32 lower = (1u << lane) - 1;
    int64 taken = 0, above = 0, equal = 0;
    for (int64 first = 0; first < n; first += LANES) {
        const int64 j = first + lane;
        const bool inside = j < n;
        const T mine = inside ? key(j) : (T)0;
        const bool larger = inside && mine > threshold, same = inside && mine == threshold;
        const uint32 all_larger = __ballot_sync(0xffffffffu, larger);
        const uint32 all_same = __ballot_sync(0xffffffffu, same);
        const bool passes = larger || (same && equal + count_bits(all_same & lower) < ties);
        const uint32 all = __ballot_sync(0xffffffffu, passes);
        if (passes) write(taken + count_bits(all & lower), j);
        taken += count_bits(all);
        above += count_bits(all_larger);
        equal += count_bits(all_same);
    }
    return {above, equal};
}

template <class F, class Write> DEVICE int64 running_sums(int64 n, F f, Write write)
{
    const int32 lane = threadIdx.x % LANES;
    int64 before = 0;
    for (int64 first = 0; first < n; first += LANES) {
        const int64 j = first + lane, mine = j < n ? f(j) : 0;
        int64 sum = mine;
        for (int apart = 1; apart < LANES; apart *= 2) {
            const int64 other = __shfl_up_sync(0xffffffffu, sum, apart);
            if (lane >= apart) sum += other;
        }
        if (j < n) write(j, before + sum - mine);
        before += __shfl_sync(0xffffffffu, sum, LANES - 1);
    }
    return before;
}

// Neighbours often have the same digit: each lane counts a run of them before it adds.
template <class Digit> DEVICE void count_digits(int64 n, Digit digit, uint32* histogram)
{
    int32 last = -1;
    uint32 run = 0;
    FOR_LANES(j, n) {
        const int32 mine = digit(j);
        if (mine == last) {
            run++;
        } else {
            if (last >= 0) atomicAdd(histogram + last, run);
            last = mine;
            run = 1;
        }
    }
    if (last >= 0) atomicAdd(histogram + last, run);
}

#else  // host: one thread

DEVICE void warp_fence() {}

// Few pass: the loop looks at GROUP elements at once, and one by one only where one of them may.
#define GROUP 64

template <class T, class Key, class Write>
DEVICE Passed take_in_order(int64 n, T threshold, int64 ties, Key key, Write write)
{
    int64 taken = 0, above = 0, equal = 0;
    const auto look = [&](int64 j) {
        const T mine = key(j);
        if (mine < threshold) return;
        const bool same = mine == threshold;
        if (!same || equal < ties) write(taken++, j);
        above += !same;
        equal += same;
    };
    const int64 whole = n / GROUP * GROUP;
    for (int64 first = 0; first < whole; first += GROUP) {
        T most = 0;
        for (int64 j = 0; j < GROUP; j++) most = key(first + j) > most ? key(first + j) : most;
        if (most < threshold) continue;
        for (int64 part = first; part < first + GROUP; part += LANES) {
            uint32 mask = 0;
            for (int l = 0; l < LANES; l++) mask |= (uint32)(key(part + l) >= threshold) << l;
            for (; mask; mask &= mask - 1) look(part + __builtin_ctz(mask));
        }
    }
    for (int64 j = whole; j < n; j++) look(j);
    return {above, equal};
}

template <class F, class Write> DEVICE int64 running_sums(int64 n, F f, Write write)
{
    int64 before = 0;
    for (int64 j = 0; j < n; j++) {
        const int64 mine = f(j);
        write(j, before);
        before += mine;
    }
    return before;
}

template <class Digit> DEVICE void count_digits(int64 n, Digit digit, uint32* histogram)
{
    for (int64 j = 0; j < n; j++) {
        const int32 mine = digit(j);
        if (mine >= 0) histogram[mine]++;
    }
}

#endif
