// simt.h -- what a kernel file needs from CUDA when it is compiled for the SIMT simulator.
//
// Every CUDA thread is a fiber of one host thread, with real blocks, barriers and shuffles. The file
// is compiled with -fsanitize=thread, which puts a call before every memory access; the functions
// called are defined here, not in libtsan, and hand the access to the runtime (simt_runtime.h).
// -fsanitize=bounds,integer-divide-by-zero are answered in the same way.
//
// Supported: threadIdx, blockIdx, blockDim, gridDim; static __shared__ arrays outside templates;
// __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, __any_sync, __all_sync; integer atomics.
// Not: dynamic shared memory, __activemask, order made by __threadfence.
#pragma once

#if defined(__clang__) || !defined(__GNUC__)
#error "the SIMT simulator answers the calls that g++ puts into the code: set CXX=g++"
#endif

#include "simt_hooks.h"

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __forceinline__ inline
#define __restrict__
// All shared variables of a file lie in one section, so that it can be told where they are.
#define __shared__ static __attribute__((section("simt_shared")))

// Code of the simulator inside a kernel's library: its own accesses are not checked.
#define SIMT_PLAIN __attribute__((no_sanitize("thread", "bounds"), no_sanitize_coverage, noinline))

static const SimtHooks* simt_hooks;
static unsigned simt_blocks;  // of code, run since the runtime was told

extern "C" {
extern char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

SIMT_PLAIN __global__ void simt_attach(const SimtHooks* hooks, char** shared_begin,
                                       char** shared_end)
{
    simt_hooks = hooks;
    *shared_begin = __start_simt_shared;
    *shared_end = __stop_simt_shared;
}

// The calls that -fsanitize=thread puts into the code.
#define SIMT_ACCESS(bytes)                                                                     \
    SIMT_PLAIN void __tsan_read##bytes(void* p)                                                \
    {                                                                                          \
        simt_hooks->access(p, bytes, SIMT_READ, true, __builtin_return_address(0));            \
    }                                                                                          \
    SIMT_PLAIN void __tsan_write##bytes(void* p)                                               \
    {                                                                                          \
        simt_hooks->access(p, bytes, SIMT_WRITE, true, __builtin_return_address(0));           \
    }                                                                                          \
    SIMT_PLAIN void __tsan_unaligned_read##bytes(void* p)                                      \
    {                                                                                          \
        simt_hooks->access(p, bytes, SIMT_READ, false, __builtin_return_address(0));           \
    }                                                                                          \
    SIMT_PLAIN void __tsan_unaligned_write##bytes(void* p)                                     \
    {                                                                                          \
        simt_hooks->access(p, bytes, SIMT_WRITE, false, __builtin_return_address(0));          \
    }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
#undef SIMT_ACCESS

SIMT_PLAIN void __tsan_read_range(void* p, unsigned long bytes)
{
    simt_hooks->access(p, bytes, SIMT_READ, false, __builtin_return_address(0));
}
SIMT_PLAIN void __tsan_write_range(void* p, unsigned long bytes)
{
    simt_hooks->access(p, bytes, SIMT_WRITE, false, __builtin_return_address(0));
}
SIMT_PLAIN void __tsan_func_entry(void*)
{
    if (simt_hooks) simt_hooks->enter(__builtin_frame_address(0));  // not yet in what runs on loading
}
SIMT_PLAIN void __tsan_func_exit() {}
SIMT_PLAIN void __tsan_init() {}

// The call that -fsanitize-coverage=trace-pc puts into every block of code: a loop that does nothing
// but turn is noticed as well.
SIMT_PLAIN void __sanitizer_cov_trace_pc()
{
    if (++simt_blocks < 4096) return;
    simt_blocks = 0;
    simt_hooks->tick(4096);
}

// The compiler turns copies of structures into these; no instrumentation is put before them. The
// library is linked with -Bsymbolic-functions, so that it calls these and not the C library's.
SIMT_PLAIN void* memset(void* p, int value, unsigned long bytes)
{
    simt_hooks->access(p, bytes, SIMT_WRITE, false, __builtin_return_address(0));
    for (unsigned long i = 0; i < bytes; i++) ((volatile char*)p)[i] = (char)value;
    return p;
}
SIMT_PLAIN static void* simt_copy(void* to, const void* from, unsigned long bytes, const void* pc)
{
    simt_hooks->access(from, bytes, SIMT_READ, false, pc);
    simt_hooks->access(to, bytes, SIMT_WRITE, false, pc);
    volatile char* target = (volatile char*)to;
    const volatile char* source = (const volatile char*)from;
    if (to < from)
        for (unsigned long i = 0; i < bytes; i++) target[i] = source[i];
    else
        for (unsigned long i = bytes; i-- > 0;) target[i] = source[i];
    return to;
}
SIMT_PLAIN void* memmove(void* to, const void* from, unsigned long bytes)
{
    return simt_copy(to, from, bytes, __builtin_return_address(0));
}
SIMT_PLAIN void* memcpy(void* to, const void* from, unsigned long bytes)
{
    return simt_copy(to, from, bytes, __builtin_return_address(0));
}

// The calls that -fsanitize=bounds,integer-divide-by-zero put into the code.
struct SimtType {
    unsigned short kind, info;
    char name[1];
};
struct SimtBounds {
    const char* file;
    unsigned line, column;
    const SimtType *array, *index;
};
SIMT_PLAIN void __ubsan_handle_out_of_bounds(SimtBounds* what, unsigned long index)
{
    simt_hooks->fault("out of bounds", what->array->name, index, __builtin_return_address(0));
}
SIMT_PLAIN void __ubsan_handle_divrem_overflow(void*, unsigned long, unsigned long)
{
    simt_hooks->fault("division by zero", "", 0, __builtin_return_address(0));
}
}  // extern "C"

// Constant during the life of a fiber, so that calls may be merged and hoisted.
SIMT_PLAIN __attribute__((const)) static inline SimtDim simt_thread() { return simt_hooks->thread(); }
SIMT_PLAIN __attribute__((const)) static inline SimtDim simt_block() { return simt_hooks->block(); }
SIMT_PLAIN __attribute__((const)) static inline SimtDim simt_block_dim()
{
    return simt_hooks->block_dim();
}
SIMT_PLAIN __attribute__((const)) static inline SimtDim simt_grid_dim()
{
    return simt_hooks->grid_dim();
}
#define threadIdx simt_thread()
#define blockIdx simt_block()
#define blockDim simt_block_dim()
#define gridDim simt_grid_dim()

SIMT_PLAIN static inline void simt_barrier(int line) { simt_hooks->barrier(line); }

template <class T>
SIMT_PLAIN T simt_warp(int line, int operation, unsigned mask, T value, int argument,
                       int width = 32)
{
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = simt_hooks->warp(operation, mask, bits, argument, width, line);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}

#define __syncthreads() simt_barrier(__LINE__)
#define __syncwarp SimtSync{__LINE__}
#define __shfl_sync(mask, value, ...) simt_warp(__LINE__, SIMT_SHFL, mask, value, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...)                                                      \
    simt_warp(__LINE__, SIMT_SHFL_XOR, mask, value, __VA_ARGS__)
#define __shfl_up_sync(mask, value, ...) simt_warp(__LINE__, SIMT_SHFL_UP, mask, value, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...)                                                     \
    simt_warp(__LINE__, SIMT_SHFL_DOWN, mask, value, __VA_ARGS__)
#define __ballot_sync(mask, predicate)                                                         \
    simt_warp(__LINE__, SIMT_BALLOT, mask, (unsigned)((predicate) != 0), 0)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))

struct SimtSync {
    int line;
    SIMT_PLAIN void operator()(unsigned mask = 0xffffffffu) const
    {
        simt_hooks->warp(SIMT_SYNC, mask, 0, 0, 32, line);
    }
};

// Atomic operations on integers: the value that was there before. Kernels use no float atomics.
template <class T, class F> SIMT_PLAIN T simt_atomic(T* p, F change)
{
    static_assert((T)0.5 == (T)0, "atomics are for integers: the order of float additions is fixed");
    simt_hooks->access(p, sizeof(T), SIMT_ATOMIC, true, __builtin_return_address(0));
    const T old = *p;
    *p = change(old);
    simt_hooks->yield();
    return old;
}
#define SIMT_CHANGE(expression) [=](T old) { return (T)(expression); }
template <class T, class V> T atomicAdd(T* p, V v) { return simt_atomic(p, SIMT_CHANGE(old + v)); }
template <class T, class V> T atomicOr(T* p, V v) { return simt_atomic(p, SIMT_CHANGE(old | v)); }
template <class T, class V> T atomicExch(T* p, V v)
{
    return simt_atomic(p, [=](T) { return (T)v; });
}
template <class T, class V> T atomicMin(T* p, V v)
{
    return simt_atomic(p, SIMT_CHANGE((T)v < old ? v : old));
}
template <class T, class V> T atomicMax(T* p, V v)
{
    return simt_atomic(p, SIMT_CHANGE((T)v > old ? v : old));
}
template <class T, class V> T atomicCAS(T* p, V expected, V v)
{
    return simt_atomic(p, SIMT_CHANGE(old == (T)expected ? v : old));
}
#undef SIMT_CHANGE

// The arguments of a launch come as 8-byte slots; the generated entry of a kernel unpacks them.
template <class T> SIMT_PLAIN T simt_argument(const unsigned long long* slot)
{
    T value;
    __builtin_memcpy(&value, slot, sizeof(T));
    return value;
}
