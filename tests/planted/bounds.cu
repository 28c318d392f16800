// bounds.cu -- kernels with planted accesses to memory that is not theirs (tests/test_simt.py).

#include "kernel.h"

// One element past the end: i <= n.
ELEMENTS_KERNEL write_past_end(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n + 1) y[i] = i < n ? x[i] : 0;
}

ELEMENTS_KERNEL read_past_end(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = x[i + 1] - x[i];
}

ELEMENTS_KERNEL read_before_start(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = x[i] - x[i - 1];
}

// Right, if every array of the table has n elements.
ELEMENTS_KERNEL add_peers(const real* const* peers, int64 count, real* y, int64 n)
{
    GRID_STRIDE(i, n) {
        real sum = 0;
        for (int64 p = 0; p < count; p++) sum += peers[p][i];
        y[i] = sum;
    }
}

// Does not look whether there is a mask.
ELEMENTS_KERNEL absent_mask(const real* x, const uint8* mask, real* y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = mask[i] ? x[i] : 0;
}

ELEMENTS_KERNEL write_to_const(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) {
        y[i] = x[i];
        const_cast<real*>(x)[i] = 0;
    }
}

// 64 elements of shared memory, block of at least 64 threads: the last is not written.
ELEMENTS_KERNEL uninitialized_shared(const real* x, real* y, int64 n)
{
    __shared__ real tile[64];
    const unsigned t = threadIdx.x;
    if (t < 63) tile[t] = x[t];
    __syncthreads();
    if (t < 64 && t < n) y[t] = tile[63 - t];
}

// Written by the block before; shared memory does not outlive a block.
ELEMENTS_KERNEL shared_of_other_block(real* y, int64 n)
{
    __shared__ real kept[1];
    if (threadIdx.x == 0) {
        if (blockIdx.x == 0) kept[0] = 7;
        else if (blockIdx.x < n) y[blockIdx.x] = kept[0];
    }
}

// Two arrays in shared memory: past the end of the one lies the other.
ELEMENTS_KERNEL shared_past_end(const real* x, real* y, int64 n)
{
    __shared__ real first[32];
    __shared__ real second[64];
    const unsigned t = threadIdx.x;
    second[t % 64] = 1;
    first[t] = x[t];
    if (t < n) y[t] = first[t] + second[t % 64];
}

// An array of one's own, indexed by data.
ELEMENTS_KERNEL local_past_end(const real* x, const int32* index, real* y, int64 n)
{
    GRID_STRIDE(i, n) {
        real own[4];
        for (int k = 0; k < 4; k++) own[k] = x[i] * k;
        y[i] = own[index[i]];
    }
}

// Thread 0 copies all, and one more.
ELEMENTS_KERNEL copy_too_much(const real* x, real* y, int64 n)
{
    if (threadIdx.x == 0) memcpy(y, x, (n + 1) * sizeof(real));
}

ELEMENTS_KERNEL copy(const real* x, real* y, int64 n)
{
    if (threadIdx.x == 0) {
        memset(y, 0, n * sizeof(real));
        memcpy(y + 1, x, (n - 1) * sizeof(real));
    }
}

ELEMENTS_KERNEL divide(const int32* x, const int32* d, int32* y, const real* like, int64 n)
{
    GRID_STRIDE(i, n) y[i] = x[i] / d[i] + (int32)like[i];
}

ELEMENTS_KERNEL misaligned(const real* x, real* y, int64 n)
{
    const real* odd = (const real*)((const uint8*)x + 2);
    GRID_STRIDE(i, n - 1) y[i] = odd[i];
}

// Calls itself once for every element up to i, with an array of 4 KiB (float) each time.
__attribute__((noinline)) static __device__ real sum_up_to(const real* x, int64 i)
{
    real own[1024];
    for (int k = 0; k < 1024; k++) own[k] = x[i];
    return i ? own[i] + sum_up_to(x, i - 1) : own[0];
}

ELEMENTS_KERNEL deep_recursion(const real* x, real* y, int64 depth, int64 n)
{
    GRID_STRIDE(i, n) y[i] = sum_up_to(x, i < depth ? i : depth);
}
