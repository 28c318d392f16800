// waits.cu -- kernels with planted mistakes in barriers, warp operations and loops
// (tests/test_simt.py).

#include "kernel.h"

ELEMENTS_KERNEL barrier_in_branch(real* y, int64 n)
{
    if (threadIdx.x < 16) __syncthreads();
    if (threadIdx.x < n) y[threadIdx.x] = 1;
}

ELEMENTS_KERNEL barrier_after_return(real* y, int64 n)
{
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    __syncthreads();
    y[i] = 1;
}

// Each half has a barrier of its own.
ELEMENTS_KERNEL two_barriers(real* y, int64 n)
{
    if (threadIdx.x % 2)
        __syncthreads();
    else
        __syncthreads();
    if (threadIdx.x < n) y[threadIdx.x] = 1;
}

ELEMENTS_KERNEL shuffle_in_branch(const real* x, real* y, int64 n)
{
    const unsigned t = threadIdx.x;
    real value = x[t];
    if (t % LANES < 20) value += __shfl_xor_sync(0xffffffffu, value, 1);
    if (t < n) y[t] = value;
}

ELEMENTS_KERNEL shuffle_outside_mask(const real* x, real* y, int64 n)
{
    const unsigned t = threadIdx.x;
    const real value = __shfl_down_sync(0x0000ffffu, x[t], 1);
    if (t < n) y[t] = value;
}

// Lanes 0-15 take part, but lane 15 asks for the value of lane 16.
ELEMENTS_KERNEL shuffle_from_outside(const real* x, real* y, int64 n)
{
    const unsigned t = threadIdx.x;
    real value = x[t];
    if (t % LANES < 16) value = __shfl_down_sync(0x0000ffffu, value, 1);
    if (t < n) y[t] = value;
}

// The shuffles of CUDA on one warp, and a vote: out has 5 rows of 32.
ELEMENTS_KERNEL warp_operations(const real* x, real* out, int64 n)
{
    const unsigned t = threadIdx.x;
    const unsigned all = 0xffffffffu;
    const real value = x[t];
    const real rows[5] = {__shfl_sync(all, value, 3, 8), __shfl_xor_sync(all, value, 5),
                          __shfl_up_sync(all, value, 2), __shfl_down_sync(all, value, 4, 16),
                          (real)__ballot_sync(0xffffffffu, t % 3 == 0)};
    for (int k = 0; k < 5; k++)
        if (t < n) out[k * LANES + t] = rows[k];
}

ELEMENTS_KERNEL endless_loop(real* y, int64 n)
{
    for (int64 i = threadIdx.x; i < n; i += 0) y[i] += 1;
}

ELEMENTS_KERNEL endless_barriers(real* y, int64 n)
{
    for (int64 i = 0; i < n; i += 0) __syncthreads();
    y[threadIdx.x] = 1;
}

// Thread 0 waits for a flag that the last thread raises.
ELEMENTS_KERNEL wait_for_flag(int32* flag, real* y, int64 n)
{
    if (threadIdx.x + 1 == n) atomicExch(flag, 1);
    if (threadIdx.x == 0)
        while (atomicAdd(flag, 0) == 0) {}
    y[threadIdx.x] = 1;
}

// Element i tells when its thread had its turn.
ELEMENTS_KERNEL take_turns(int32* counter, int32* turn, const real* like, int64 n)
{
    GRID_STRIDE(i, n) if (like[i] > 0) turn[i] = atomicAdd(counter, 1);
}

// n turns of every thread: what a switch costs.
ELEMENTS_KERNEL many_warp_syncs(real* y, int64 n)
{
    for (int64 i = 0; i < n; i++) __syncwarp();
    y[threadIdx.x] = 1;
}

ELEMENTS_KERNEL many_barriers(real* y, int64 n)
{
    for (int64 i = 0; i < n; i++) __syncthreads();
    y[threadIdx.x] = 1;
}
