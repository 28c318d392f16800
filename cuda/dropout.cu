// dropout.cu -- zeroing elements at random, the same ones wherever a sample is computed.
//
//     dropout    y[s, e] <- x[s, e] / keep where word(sample s, e) < keep 2^32, else 0
//     where word is one of the four words of Philox4x32-10 with key `seed` and counter (sample_keys[s],
//     q): elements 128 b + 32 w + l of a sample take word w of q = 32 b + l.
//
// Buffers    x, y (samples, per_sample), may be the same array; sample_keys int64 (samples,).
//            The gradient is the same kernel: dx = dropout(dy).
// Launch     ROWS, work = samples * ceil(per_sample / 128), any grid and block.
// Cost       8 bytes an element in float32; 10 rounds of two 32 x 32 bit products for four elements.
// Exactness  an element depends on seed, sample key and its index in the sample alone. The mask is
//            the same for float and double.
// Source     Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
//            Srivastava et al., "Dropout", JMLR 15, 2014.
// Reference  tests/reference_images.py    Test  tests/test_kernels_dropout.py

#include "kernel.h"

#define BLOCK (4 * LANES)  // elements of a warp

struct Words {
    uint32 word[4];
};

// Philox4x32-10: four random words for a 128-bit counter and a 64-bit key.
DEVICE Words philox(uint64 low, uint64 high, uint64 key)
{
    uint32 c0 = (uint32)low, c1 = (uint32)(low >> 32), c2 = (uint32)high, c3 = (uint32)(high >> 32);
    uint32 k0 = (uint32)key, k1 = (uint32)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64 first = (uint64)0xD2511F53u * c0, second = (uint64)0xCD9E8D57u * c2;
        c0 = (uint32)(second >> 32) ^ c1 ^ k0;
        c2 = (uint32)(first >> 32) ^ c3 ^ k1;
        c1 = (uint32)second;
        c3 = (uint32)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

ROWS_KERNEL dropout(const real* x, real* y, const int64* __restrict__ sample_keys, int64 samples,
                    int64 per_sample, double keep, uint64 seed)
{
    const int64 blocks = (per_sample + BLOCK - 1) / BLOCK;
    const double limit = keep * 4294967296.0;
    const uint32 last = limit >= 4294967296.0 ? 0xFFFFFFFFu : (uint32)((uint64)limit - 1);
    const wide scale = (wide)(1 / keep);
    FOR_ROWS(unit, samples * blocks) {
        const int64 sample = unit / blocks, block = unit % blocks;
        const uint64 key = (uint64)sample_keys[sample];
        const real* in = x + sample * per_sample + block * BLOCK;
        real* out = y + sample * per_sample + block * BLOCK;
        const int64 count = per_sample - block * BLOCK;
        if (count >= BLOCK) {
            FOR_LANES(l, LANES) {
                const Words random = philox(key, (uint64)(block * LANES + l), seed);
                for (int w = 0; w < 4; w++) {
                    const int64 e = w * LANES + l;
                    out[e] = random.word[w] <= last ? in[e] * scale : (wide)0;
                }
            }
        } else {
            FOR_LANES(l, LANES) {
                const Words random = philox(key, (uint64)(block * LANES + l), seed);
                for (int64 w = 0, e = l; w < 4 && e < count; w++, e += LANES)
                    out[e] = random.word[w] <= last ? in[e] * scale : (wide)0;
            }
        }
    }
}
