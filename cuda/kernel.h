// kernel.h -- the portable part of every kernel: types, launch loops, lanes and their sums.
//
// A kernel file is compiled for every REAL: float, double, bfloat16 and float16 (real16.h). It has
// two types: `real` is what activations, weights and gradients are stored in; `wide` is float, or
// double where real is, and is what everything is computed and summed in, and what is stored where
// 16 bits are not enough: statistics, losses, partial sums, master weights, optimizer state.
// Numbers are passed as `wide`. The targets:
//   GPU    NVRTC or nvcc (__CUDACC__): real blocks and warps.
//   SIMT   HPCTRAIN_SIMT: the host's C++ compiler, one fiber per thread (simt.h). Tests.
//   host   otherwise: the host's C++ compiler, one block of one thread that plays all 32 lanes of its
//          warp, so that launch loops are plain loops which the compiler vectorizes.
//
// Two kinds of kernel, told apart by the word that begins their definition:
//   ELEMENTS_KERNEL  thread i handles elements i, i + threads, ...: GRID_STRIDE(i, n) { }
//   ROWS_KERNEL      warp w handles rows (or tiles) w, w + warps, ...: FOR_ROWS(row, rows) { }
// Both must be right for any grid and any block that is a multiple of 32 threads.
//
// Sums have one order of additions on all targets: lane l adds elements l, l + 32, l + 64, ... and a
// tree adds the 32 lanes (16, 8, 4, 2, 1 apart). There are no float atomics.
#pragma once

typedef long long int64;
typedef unsigned long long uint64;
typedef int int32;
typedef unsigned int uint32;
typedef unsigned short uint16;
typedef unsigned char uint8;

#define LANES 32

#if defined(__CUDACC__)
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#elif defined(HPCTRAIN_SIMT)
#include "simt.h"
#define DEVICE static inline
#define DEVICE_MEMBER inline
#else
#include "host.h"
#define DEVICE static inline __attribute__((always_inline))
#define DEVICE_MEMBER inline __attribute__((always_inline))
#endif

#include "real_math.h"
#include "real16.h"

typedef REAL real;
typedef WideOf<real>::Type wide;

// A GPU's registers are shared by its threads: a kernel that takes more than 64 leaves half of them
// idle. ROLLED stands before a loop with a long body, which is not to be copied. fresh(x) is x, but
// the compiler does not know: addresses made from it are computed anew in each turn of a loop.
#if defined(__CUDACC__)
#define ROLLED _Pragma("unroll 1")
DEVICE int64 fresh(int64 x)
{
    asm volatile("" : "+l"(x));
    return x;
}
#else
#define ROLLED
DEVICE int64 fresh(int64 x) { return x; }
#endif

#define ELEMENTS_KERNEL extern "C" __global__ void
#define ROWS_KERNEL extern "C" __global__ void

#if defined(__CUDACC__) || defined(HPCTRAIN_SIMT)

#define GRID_STRIDE(i, n)                                                      \
    for (int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x,               \
               i##_step = (int64)gridDim.x * blockDim.x;                       \
         i < (n); i += i##_step)
#define FOR_ROWS(row, rows)                                                    \
    for (int64 row = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / LANES,   \
               row##_step = (int64)gridDim.x * blockDim.x / LANES;             \
         row < (rows); row += row##_step)
// The lanes of a warp share the elements 0 .. n - 1 of a row.
#define FOR_LANES(j, n) for (int64 j = threadIdx.x % LANES; j < (n); j += LANES)
#define LANE_LEADER (threadIdx.x % LANES == 0)

// One value per lane of a warp. each(f) runs f(lane, value) on every lane; sum() and max() give
// every lane the result over all lanes.
template <class T> struct Lanes {
    T value;
    DEVICE_MEMBER explicit Lanes(T start) : value(start) {}
    DEVICE_MEMBER T& operator[](int) { return value; }  // of a lane, inside each() or first()
    template <class F> DEVICE_MEMBER void each(F f) { f((int)(threadIdx.x % LANES), value); }
    // each() over the first `count` lanes only
    template <class F> DEVICE_MEMBER void first(int64 count, F f) {
        if ((int64)(threadIdx.x % LANES) < count) f((int)(threadIdx.x % LANES), value);
    }
    DEVICE_MEMBER T& at(int) { return value; }  // inside each() or first() of another variable
    DEVICE_MEMBER T sum() const {
        T total = value;
        for (int apart = LANES / 2; apart; apart /= 2)
            total += __shfl_xor_sync(0xffffffffu, total, apart);
        return total;
    }
    DEVICE_MEMBER T max() const {
        T top = value;
        for (int apart = LANES / 2; apart; apart /= 2) {
            const T other = __shfl_xor_sync(0xffffffffu, top, apart);
            top = other > top ? other : top;
        }
        return top;
    }
};

// One value per column of a tile of COLUMNS neighbouring columns, for sums down a matrix: the host
// takes wide tiles, so that it reads rows in long stretches. A column's additions keep their order.
#define COLUMNS LANES
template <class T> using Columns = Lanes<T>;

#else  // host: one thread plays the 32 lanes in turn

#define GRID_STRIDE(i, n) _Pragma("GCC ivdep") for (int64 i = 0; i < (n); i++)
#define FOR_ROWS(row, rows) for (int64 row = 0; row < (rows); row++)
#define FOR_LANES(j, n) _Pragma("GCC ivdep") for (int64 j = 0; j < (n); j++)
#define LANE_LEADER true

template <class T> struct Lanes {
    T value[LANES];
    DEVICE_MEMBER explicit Lanes(T start) {
        for (int l = 0; l < LANES; l++) value[l] = start;
    }
    DEVICE_MEMBER T& operator[](int lane) { return value[lane]; }
    template <class F> DEVICE_MEMBER void each(F f) {
        _Pragma("GCC ivdep") for (int l = 0; l < LANES; l++) f(l, value[l]);
    }
    template <class F> DEVICE_MEMBER void first(int64 count, F f) {
        const int lanes = count < LANES ? (int)count : LANES;
        _Pragma("GCC ivdep") for (int l = 0; l < lanes; l++) f(l, value[l]);
    }
    DEVICE_MEMBER T& at(int l) { return value[l]; }
    DEVICE_MEMBER T sum() const {
        T part[LANES / 2];  // written out, since GCC leaves a loop over the halves scalar
        for (int l = 0; l < 16; l++) part[l] = value[l] + value[l + 16];
        for (int l = 0; l < 8; l++) part[l] += part[l + 8];
        for (int l = 0; l < 4; l++) part[l] += part[l + 4];
        part[0] += part[2];
        part[1] += part[3];
        return part[0] + part[1];
    }
    DEVICE_MEMBER T max() const {
        T top = value[0];
        for (int l = 1; l < LANES; l++) top = value[l] > top ? value[l] : top;
        return top;
    }
};

#define COLUMNS 1024
template <class T> struct Columns {
    T value[COLUMNS];
    DEVICE_MEMBER explicit Columns(T start) {
        for (int c = 0; c < COLUMNS; c++) value[c] = start;
    }
    template <class F> DEVICE_MEMBER void first(int64 count, F f) {
        const int columns = count < COLUMNS ? (int)count : COLUMNS;
        _Pragma("GCC ivdep") for (int c = 0; c < columns; c++) f(c, value[c]);
    }
    DEVICE_MEMBER T& at(int c) { return value[c]; }
};

#endif

// Sum of f(0) .. f(n - 1) over the lanes of a warp, on all lanes.
template <class F> DEVICE wide row_sum(int64 n, F f) {
    Lanes<wide> total(0);
    const int64 whole = n / LANES * LANES;
    for (int64 first = 0; first < whole; first += LANES)
        total.each([&](int lane, wide& sum) { sum += f(first + lane); });
    total.first(n - whole, [&](int lane, wide& sum) { sum += f(whole + lane); });
    return total.sum();
}

// row_sum of f and of g in one pass over the row.
template <class F, class G>
DEVICE void row_two_sums(int64 n, F f, G g, wide& f_total, wide& g_total) {
    Lanes<wide> f_sum(0), g_sum(0);
    const int64 whole = n / LANES * LANES;
    for (int64 first = 0; first < whole; first += LANES)
        f_sum.each([&](int lane, wide& sum) {
            sum += f(first + lane);
            g_sum.at(lane) += g(first + lane);
        });
    f_sum.first(n - whole, [&](int lane, wide& sum) {
        sum += f(whole + lane);
        g_sum.at(lane) += g(whole + lane);
    });
    f_total = f_sum.sum();
    g_total = g_sum.sum();
}

// Largest of f(0) .. f(n - 1), on all lanes; `start` where n is 0.
template <class F> DEVICE wide row_max(int64 n, wide start, F f) {
    Lanes<wide> best(start);
    const int64 whole = n / LANES * LANES;
    for (int64 first = 0; first < whole; first += LANES)
        best.each([&](int lane, wide& top) {
            const wide value = f(first + lane);
            top = value > top ? value : top;
        });
    best.first(n - whole, [&](int lane, wide& top) {
        const wide value = f(whole + lane);
        top = value > top ? value : top;
    });
    return best.max();
}

// For the columns c of one tile: y[c] <- sum of f(r, c), z[c] <- sum of g(r, c), over the rows
// first_row <= r < last_row in order. Four rows at a time, for more memory accesses in flight.
template <class F, class G>
DEVICE void sum_two_tiles(wide* y, wide* z, int64 tile, int64 cols, int64 first_row, int64 last_row,
                          F f, G g) {
    const int64 first = tile * COLUMNS, width = cols - first;  // first() stops at the tile's end
    Columns<wide> f_sum(0), g_sum(0);
    int64 row = first_row;
    ROLLED for (; row + 4 <= last_row; row += 4)
        f_sum.first(width, [&](int c, wide& sum) {
            const int64 col = first + c;
            sum = sum + f(row, col) + f(row + 1, col) + f(row + 2, col) + f(row + 3, col);
            g_sum.at(c) = g_sum.at(c) + g(row, col) + g(row + 1, col) + g(row + 2, col) +
                          g(row + 3, col);
        });
    ROLLED for (; row < last_row; row++)
        f_sum.first(width, [&](int c, wide& sum) {
            sum += f(row, first + c);
            g_sum.at(c) += g(row, first + c);
        });
    f_sum.first(width, [&](int c, wide& sum) { y[first + c] = sum; });
    g_sum.first(width, [&](int c, wide& sum) { z[first + c] = sum; });
}

// For the columns c of one tile: y[c] <- sum of f(r, c) over the rows first_row <= r < last_row.
template <class T, class F>
DEVICE void sum_tile(T* y, int64 tile, int64 cols, int64 first_row, int64 last_row, F f) {
    const int64 first = tile * COLUMNS, width = cols - first;
    Columns<wide> total(0);
    int64 row = first_row;
    for (; row + 4 <= last_row; row += 4)
        total.first(width, [&](int c, wide& sum) {
            const int64 col = first + c;
            sum = sum + f(row, col) + f(row + 1, col) + f(row + 2, col) + f(row + 3, col);
        });
    for (; row < last_row; row++)
        total.first(width, [&](int c, wide& sum) { sum += f(row, first + c); });
    total.first(width, [&](int c, wide& sum) { y[first + c] = sum; });
}
