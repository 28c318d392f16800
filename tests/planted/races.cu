// races.cu -- kernels with planted races, each beside its right counterpart (tests/test_simt.py).
//
// n is the number of threads of the launch, except where a comment says otherwise.

#include "kernel.h"

// Every block writes its number to y[0].
ELEMENTS_KERNEL race_between_blocks(real* y, int64 n)
{
    if (threadIdx.x == 0 && n > 0) y[0] = (real)blockIdx.x;
}

// The same value from every block is still a race.
ELEMENTS_KERNEL race_same_value(real* y, int64 n)
{
    if (threadIdx.x == 0 && n > 0) y[0] = 1;
}

ELEMENTS_KERNEL blocks_apart(real* y, int64 n)
{
    if (threadIdx.x == 0 && n > 0) y[blockIdx.x] = (real)blockIdx.x;
}

// In place although the neighbour's element is read: right only if threads run in order.
ELEMENTS_KERNEL race_in_place(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = i + 1 < n ? x[i + 1] : x[i];
}

// Sum over each block of at most 256 threads, in shared memory.
template <bool BARRIER> DEVICE void block_sum(const real* x, real* y, int64 n, real* part)
{
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0;
    for (unsigned half = blockDim.x / 2; half; half /= 2) {
        if (BARRIER) __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}

ELEMENTS_KERNEL block_sum_with_barriers(const real* x, real* y, int64 n)
{
    __shared__ real part[256];
    block_sum<true>(x, y, n, part);
}

ELEMENTS_KERNEL race_missing_barrier(const real* x, real* y, int64 n)
{
    __shared__ real part[256];
    block_sum<false>(x, y, n, part);
}

// Each lane passes its element to the next lane through memory.
ELEMENTS_KERNEL pass_on_in_warp(const real* x, real* y, int64 n)
{
    __shared__ real slot[1024];
    const unsigned t = threadIdx.x, lane = t % LANES;
    slot[t] = x[t];
    __syncwarp();
    if (t < n) y[t] = slot[t - lane + (lane + 1) % LANES];
}

ELEMENTS_KERNEL race_missing_syncwarp(const real* x, real* y, int64 n)
{
    __shared__ real slot[1024];
    const unsigned t = threadIdx.x, lane = t % LANES;
    slot[t] = x[t];
    if (t < n) y[t] = slot[t - lane + (lane + 1) % LANES];
}

// A shuffle in the right place moves a value, but does not order the writes before it.
ELEMENTS_KERNEL race_shuffle_is_no_fence(const real* x, real* y, int64 n)
{
    __shared__ real slot[1024];
    const unsigned t = threadIdx.x, lane = t % LANES;
    slot[t] = x[t];
    const real mine = __shfl_sync(0xffffffffu, x[t], lane);
    if (t < n) y[t] = mine + slot[t - lane + (lane + 1) % LANES];
}

// The halves of a warp wait for themselves only.
ELEMENTS_KERNEL race_half_warps(const real* x, real* y, int64 n)
{
    __shared__ real slot[1024];
    const unsigned t = threadIdx.x, lane = t % LANES;
    slot[t] = x[t];
    if (lane < 16) __syncwarp(0x0000ffffu);
    else __syncwarp(0xffff0000u);
    if (t < n) y[t] = slot[t ^ 16];
}

ELEMENTS_KERNEL swap_in_half_warps(const real* x, real* y, int64 n)
{
    __shared__ real slot[1024];
    const unsigned t = threadIdx.x, lane = t % LANES;
    slot[t] = x[t];
    if (lane < 16) __syncwarp(0x0000ffffu);
    else __syncwarp(0xffff0000u);
    if (t < n) y[t] = slot[t ^ 1];
}

// Many threads read x[0] before one thread of another warp writes it.
ELEMENTS_KERNEL race_write_after_reads(real* x, real* y, int64 n)
{
    const unsigned t = threadIdx.x;
    if (t < n) y[t] = x[0];
    if (t == 40) x[0] = 2;
}

ELEMENTS_KERNEL write_after_reads(real* x, real* y, int64 n)
{
    const unsigned t = threadIdx.x;
    if (t < n) y[t] = x[0];
    __syncthreads();
    if (t == 40) x[0] = 2;
}

// Counts the positive elements.
ELEMENTS_KERNEL race_counter(const real* x, int32* count, int64 n)
{
    GRID_STRIDE(i, n) if (x[i] > 0) count[0] += 1;
}

ELEMENTS_KERNEL atomic_counter(const real* x, int32* count, int64 n)
{
    GRID_STRIDE(i, n) if (x[i] > 0) atomicAdd(count, 1);
}

// Byte i of y by thread i: neighbours in one word do not race.
ELEMENTS_KERNEL bytes_side_by_side(const real* x, uint8* y, int64 n)
{
    GRID_STRIDE(i, n) y[i] = x[i] > 0;
}

// Every thread follows its row of the script, step by step: -1 __syncthreads, -2 __syncwarp,
// 0 nothing, 2 p + 1 reads memory[p], 2 p + 2 writes it.
ELEMENTS_KERNEL follow_script(const int32* script, real* memory, real* out, int64 steps, int64 n)
{
    const int64 me = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    real sum = 0;
    for (int64 step = 0; step < steps; step++) {
        const int32 code = script[me * steps + step];
        if (code == -1) __syncthreads();
        else if (code == -2) __syncwarp();
        else if (code > 0 && code % 2) sum += memory[code / 2];
        else if (code > 0) memory[code / 2 - 1] = 1;
    }
    if (me < n) out[me] = sum;
}
