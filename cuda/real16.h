// real16.h -- 16-bit floating point as storage: bfloat16 and float16, read and written as float.
//
//     bfloat16   8 bits of exponent, 7 of mantissa: the range of float, 2 to 3 digits
//     float16    5 bits of exponent, 10 of mantissa: 6e-8 to 65504, 3 to 4 digits
//
// Nothing is computed in them: a value becomes a float when it is read, exactly, and is rounded to
// nearest, ties to even, when it is written; too large becomes infinite, NaN stays NaN, and numbers
// below the smallest normal one are kept as far as the format has them. The bit code below is free
// of branches, so that loops over it become vector code, and gives the same bits on every target; GPUs
// have instructions for it. NVRTC needs no header of CUDA's.
#pragma once

DEVICE uint32 all_ones(bool condition) { return (uint32)0 - (uint32)condition; }

DEVICE uint16 bfloat16_bits(float x)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32 bits = bits_of(x), nan = all_ones((bits & 0x7fffffffu) > 0x7f800000u);
    const uint32 rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (uint16)((rounded & ~nan) | ((bits >> 16 | 0x40u) & nan));
#endif
}

DEVICE uint16 float16_bits(float x)
{
#if defined(__CUDA_ARCH__)
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32 sign = bits_of(x) >> 16 & 0x8000u, size = bits_of(x) & 0x7fffffffu;
    const uint32 rounded = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
    const uint32 normal = rounded < 0x7c00u ? rounded : 0x7c00u;
    // adding 0.5, whose last bit is worth 2^-24, rounds to a multiple of the smallest float16
    const uint32 tiny = bits_of(from_bits(size) + 0.5f) - 0x3f000000u;
    const uint32 is_tiny = all_ones(size < 0x38800000u);  // 2^-14
    const uint32 quiet = all_ones(size > 0x7f800000u) & 0x200u;
    return (uint16)(sign | (normal & ~is_tiny) | (tiny & is_tiny) | quiet);
#endif
}

DEVICE float float16_value(uint16 bits)
{
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const uint32 size = bits & 0x7fffu, sign = (uint32)(bits & 0x8000u) << 16;
    const uint32 scaled = bits_of(from_bits(size << 13) * 0x1p112f);  // exact, subnormals too
    return from_bits(sign | scaled | (all_ones(size >= 0x7c00u) & 0x7f800000u));
#endif
}

struct bfloat16 {
    uint16 bits;
    bfloat16() = default;
    DEVICE_MEMBER bfloat16(float x) : bits(bfloat16_bits(x)) {}
    DEVICE_MEMBER operator float() const { return from_bits((uint32)bits << 16); }
};

struct float16 {
    uint16 bits;
    float16() = default;
    DEVICE_MEMBER float16(float x) : bits(float16_bits(x)) {}
    DEVICE_MEMBER operator float() const { return float16_value(bits); }
};

// The type of every value that is computed with.
template <class T> struct WideOf { typedef float Type; };
template <> struct WideOf<double> { typedef double Type; };
