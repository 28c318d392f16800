// in_range.h -- rounding to a storage type without ever making an infinity of a number.
#pragma once

template <class T> struct Largest;
template <> struct Largest<float> { static constexpr float VALUE = 0x1.fffffep127f; };
template <> struct Largest<double> { static constexpr double VALUE = 0x1.fffffffffffffp1023; };
template <> struct Largest<bfloat16> { static constexpr float VALUE = 0x1.fep127f; };
template <> struct Largest<float16> { static constexpr float VALUE = 65504.0f; };

// What is beyond the largest finite `real` becomes that; NaN stays.
DEVICE wide in_range(wide x)
{
    const wide most = Largest<real>::VALUE;
    return x > most ? most : x < -most ? -most : x;
}
