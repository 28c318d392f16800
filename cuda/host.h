// host.h -- what a kernel file needs from CUDA when it is compiled for the CPU: empty qualifiers.
//
// The launch is one block of one thread that plays all lanes of its warp (see kernel.h), so there
// is no index, no barrier and no shuffle: a kernel that needs one of them by name does not compile
// for this target, which keeps kernels to the portable loops.
#pragma once

#define HPCTRAIN_HOST

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
