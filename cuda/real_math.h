// real_math.h -- exp, log, tanh, sqrt, fma, abs for float and double, the same bits on every target.
//
//     real_exp  real_log  real_tanh  real_sqrt  real_fma  real_abs
//
// The C library's functions do not vectorize without -ffast-math and differ between machines. These
// are polynomials with explicit fma, free of branches and tables, so that a loop over them becomes
// vector code. Largest error measured, in units in the last place (float: 250 million arguments of
// all sizes, double: 14 million; tests/test_kernels_real_math.py holds them):
//
//              float   double
//     exp       1.00    1.04
//     log       0.83    0.83
//     tanh      2.6     2.7
//
// NaN stays NaN; exp(-inf) = 0, exp(inf) = inf, log(0) = -inf, log(inf) = inf, log of less than 0 is
// NaN; results and arguments below the smallest normal number are right, except float on a GPU, where
// CuPy compiles with -ftz=true: there they are 0. Rounding must be to nearest.
//
// Method     exp, tanh: x = k ln 2 + r, |r| <= ln 2 / 2, e^r = 1 + r + r^2 q(r).
//            log: x = 2^k m, sqrt(1/2) <= m < sqrt(2), s = (m - 1) / (m + 1), a series in s^2
//            (W. Cody and W. Waite, Software Manual for the Elementary Functions, 1980; the formula
//            with f - (f^2/2 - s (f^2/2 + R)) after K. C. Ng). Coefficients: minimax by Remez.
#pragma once

template <class T> struct Format;
template <> struct Format<float> {
    typedef uint32 Bits;
    static constexpr int MANTISSA = 23, BIAS = 127;
    static constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
    static constexpr Bits SQRT_HALF = 0x3f3504f3u, INF = 0x7f800000u, NOT_A_NUMBER = 0x7fc00000u;
    static constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
    static constexpr float EXP_LOWEST = -104, EXP_HIGHEST = 89, TANH_ONE = 10;
};
template <> struct Format<double> {
    typedef uint64 Bits;
    static constexpr int MANTISSA = 52, BIAS = 1023;
    static constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double SMALLEST_NORMAL = 2.2250738585072014e-308;
    static constexpr Bits SQRT_HALF = 0x3fe6a09e667f3bcdull, INF = 0x7ff0000000000000ull;
    static constexpr Bits NOT_A_NUMBER = 0x7ff8000000000000ull;
    static constexpr double LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45;
    static constexpr double EXP_LOWEST = -746, EXP_HIGHEST = 710, TANH_ONE = 20;
};

#if defined(__CUDACC__)
DEVICE float real_fma(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double real_fma(double a, double b, double c) { return fma(a, b, c); }
DEVICE float real_sqrt(float x) { return sqrtf(x); }
DEVICE double real_sqrt(double x) { return sqrt(x); }
DEVICE float real_abs(float x) { return fabsf(x); }
DEVICE double real_abs(double x) { return fabs(x); }
DEVICE uint32 bits_of(float x) { return __float_as_uint(x); }
DEVICE uint64 bits_of(double x) { return (uint64)__double_as_longlong(x); }
DEVICE float from_bits(uint32 bits) { return __uint_as_float(bits); }
DEVICE double from_bits(uint64 bits) { return __longlong_as_double((int64)bits); }
#else
DEVICE float real_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE double real_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEVICE float real_sqrt(float x) { return __builtin_sqrtf(x); }
DEVICE double real_sqrt(double x) { return __builtin_sqrt(x); }
DEVICE float real_abs(float x) { return __builtin_fabsf(x); }
DEVICE double real_abs(double x) { return __builtin_fabs(x); }
DEVICE uint32 bits_of(float x) { uint32 bits; __builtin_memcpy(&bits, &x, sizeof x); return bits; }
DEVICE uint64 bits_of(double x) { uint64 bits; __builtin_memcpy(&bits, &x, sizeof x); return bits; }
DEVICE float from_bits(uint32 bits) { float x; __builtin_memcpy(&x, &bits, sizeof x); return x; }
DEVICE double from_bits(uint64 bits) { double x; __builtin_memcpy(&x, &bits, sizeof x); return x; }
#endif

// x where the condition holds, else 0; not by a branch, which would keep 16-bit loops scalar.
template <class T> DEVICE T kept(bool condition, T x)
{
    return from_bits(bits_of(x) & (typename Format<T>::Bits)0 - (typename Format<T>::Bits)condition);
}

// c0 + x (c1 + x (c2 + ...)), one fma a coefficient.
template <class T> DEVICE T polynomial(T, double c0) { return (T)c0; }
template <class T, class... More> DEVICE T polynomial(T x, double c0, More... more)
{
    return real_fma(x, polynomial(x, more...), (T)c0);
}

// q with e^r = 1 + r + r^2 q(r) for |r| <= ln 2 / 2
DEVICE float exp_series(float r)
{
    return polynomial(r, 0.4999999344906884662, 0.16666520634792009988, 0.041668387561830717135,
                      0.0083687166802856571521, 0.0013814630673773933464);
}
DEVICE double exp_series(double r)
{
    return polynomial(r, 0.50000000000000106203, 0.16666666666666412601, 0.041666666666530224602,
                      0.0083333333334944448446, 0.001388888894361126885, 0.0001984126950654542634,
                      0.000024801493119366656318, 2.755758646120427388e-6,
                      2.763024093518217076e-7, 2.500001799623288316e-8);
}

// P with ln((1 + s) / (1 - s)) = 2 s + s^3 P(s^2) for |s| <= (sqrt(2) - 1) / (sqrt(2) + 1)
DEVICE float log_series(float z)
{
    return polynomial(z, 0.66666776716878252753, 0.39977495616757968446, 0.29873072405495273949);
}
DEVICE double log_series(double z)
{
    return polynomial(z, 0.66666666666667349327, 0.39999999999410903711, 0.28571428743296727256,
                      0.2222219847303999039, 0.18183569872332385777, 0.15313900257136881165,
                      0.1479753445497280653);
}

// x = k ln 2 + r: gives e^r - 1, and k + 2 BIAS in `power`; |k| < BIAS + MANTISSA.
template <class T> DEVICE T exp_reduced(T x, typename Format<T>::Bits& power)
{
    typedef Format<T> F;
    const T shifted = real_fma(x, (T)1.4426950408889634074, F::ROUND);
    const T k = shifted - F::ROUND;
    const T r = real_fma(-k, F::LN2_LOW, real_fma(-k, F::LN2_HIGH, x));
    power = bits_of(shifted) - bits_of(F::ROUND) + 2 * F::BIAS;
    return real_fma(r * r, exp_series(r), r);
}

template <class T> DEVICE T real_exp(T x)
{
    typedef Format<T> F;
    x = x > F::EXP_HIGHEST ? F::EXP_HIGHEST : x;
    x = x < F::EXP_LOWEST ? F::EXP_LOWEST : x;
    typename F::Bits power;
    const T less_one = exp_reduced(x, power);
    // 2^k as a product of two normal numbers, so that only the last product rounds
    const typename F::Bits half = power >> 1;
    const T first = from_bits(half << F::MANTISSA);
    const T second = from_bits((power - half) << F::MANTISSA);
    return (1 + less_one) * first * second;
}

template <class T> DEVICE T real_tanh(T x)
{
    typedef Format<T> F;
    T twice = 2 * real_abs(x);
    twice = twice > 2 * F::TANH_ONE ? 2 * F::TANH_ONE : twice;
    typename F::Bits power;
    const T reduced = exp_reduced(twice, power);
    const T scale = from_bits((power - F::BIAS) << F::MANTISSA);
    const T less_one = real_fma(scale, reduced, scale - 1);  // e^2|x| - 1
    const T size = less_one / (less_one + 2);
    return from_bits(bits_of(size) | (bits_of(x) & bits_of((T)-0.0)));
}

template <class T> DEVICE T real_log(T x)
{
    typedef Format<T> F;
    typedef typename F::Bits Bits;
    const Bits one = bits_of((T)1), mantissa = ((Bits)1 << F::MANTISSA) - 1;
    const bool tiny = x < F::SMALLEST_NORMAL;
    const T normal = tiny ? x * (T)((int64)1 << F::MANTISSA) : x;
    // m in [sqrt(1/2), sqrt(2)) and k, without a comparison: the carry moves the exponent
    const Bits shifted = bits_of(normal) + (one - F::SQRT_HALF);
    const T m = from_bits((shifted & mantissa) + F::SQRT_HALF);
    const Bits biased = shifted >> F::MANTISSA;
    const T bias = (T)(tiny ? F::BIAS + F::MANTISSA : F::BIAS);
    // k as a number: an integer in the low bits of 1.5 * 2^MANTISSA
    const T k = from_bits(bits_of(F::ROUND) + biased) - F::ROUND - bias;
    const T f = m - 1;
    const T s = f / (f + 2), z = s * s, square = (T)0.5 * f * f;
    const T low = real_fma(s, square + z * log_series(z), k * F::LN2_LOW);
    T result = real_fma(k, F::LN2_HIGH, f - (square - low));
    result = x < from_bits(F::INF) ? result : x;  // inf and NaN
    result = x < 0 ? from_bits(F::NOT_A_NUMBER) : result;
    return x == 0 ? -from_bits(F::INF) : result;
}
