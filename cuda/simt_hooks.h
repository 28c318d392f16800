// simt_hooks.h -- what a kernel library of the SIMT target and its runtime (simt_runtime.h) say to
// each other: the library calls the runtime through one table of functions, which it is handed
// when it is loaded, so that no symbol has to be found across libraries.
#pragma once

struct SimtDim {
    unsigned x, y, z;
};

enum SimtUse { SIMT_READ, SIMT_WRITE, SIMT_ATOMIC };
enum SimtWarp { SIMT_SYNC, SIMT_SHFL, SIMT_SHFL_XOR, SIMT_SHFL_UP, SIMT_SHFL_DOWN, SIMT_BALLOT };

struct SimtHooks {
    // where the running thread is
    SimtDim (*thread)();
    SimtDim (*block)();
    SimtDim (*block_dim)();
    SimtDim (*grid_dim)();
    // The running thread uses `bytes` at `address` (SimtUse). `pc` tells where in the code;
    // `aligned` that the access needs an address which is a multiple of its size.
    void (*access)(const void* address, unsigned long long bytes, int use, bool aligned,
                   const void* pc);
    // That many blocks of code were run.
    void (*tick)(unsigned blocks);
    // A function was entered whose frame ends at `frame`.
    void (*enter)(const void* frame);
    // __syncthreads, and the operations of a warp (SimtWarp): the value for this lane.
    void (*barrier)(int line);
    unsigned long long (*warp)(int operation, unsigned mask, unsigned long long value,
                               int argument, int width, int line);
    // After an atomic operation: other threads may run.
    void (*yield)();
    // An index outside a declared array, or a division by zero. Does not return.
    void (*fault)(const char* kind, const char* type, unsigned long long index, const void* pc);
};
