// channels.h -- tiles of neighbouring channels, for kernels on arrays whose last dim is channels.
//
// A warp takes a tile of 32 channels, lane c the channel `first + c`. On the host the lanes of a
// tile are a loop, which is best when its length is known to the compiler: with_width() hands
// its function the width as a constant for 32 and 16 channels, else as a number.
#pragma once

#include "kernel.h"

DEVICE int64 channel_tiles(int64 channels) { return (channels + LANES - 1) / LANES; }

DEVICE int64 lower(int64 a, int64 b) { return a < b ? a : b; }
DEVICE int64 higher(int64 a, int64 b) { return a > b ? a : b; }

template <int N> struct Width {
    int64 count;
    // f(c, lanes[c]) on the lanes that have a channel
    template <class T, class F> DEVICE_MEMBER void each(Lanes<T>& lanes, F f) const
    {
        if (N == LANES) lanes.each(f);
        else lanes.first(N ? N : count, f);
    }
};

template <class F> DEVICE void with_width(int64 width, F f)
{
#if defined(HPCTRAIN_HOST)
    if (width == 32) f(Width<32>{width});
    else if (width == 16) f(Width<16>{width});
    else f(Width<0>{width});
#else
    f(Width<0>{width});  // no loop whose length could be known; one copy takes fewer registers
#endif
}
