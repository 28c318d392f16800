// winograd.cu -- transforms for 3 x 3 convolution with 4/9 of the multiplications: F(2x2, 3x3).
//
//     A 2 x 2 tile y of the output comes from a 4 x 4 patch d of the input and the taps g:
//         y = A^T [(G g G^T) * (B^T d B)] A      * elementwise, summed over channels by products
//     winograd_weights           u <- G g G^T      for every filter and channel
//     winograd_weights_flipped   u <- G g' G^T     g'[i, j] = g[2 - i, 2 - j]
//     winograd_input             v <- B^T d B      for a run of tiles, 0 outside the image
//     winograd_output            y <- A^T m A + bias?
//     winograd_output_backward   dm <- A dy A^T    0 outside the image
//     winograd_weights_backward  dg <- G^T du G
//     A^T = (1 1 1 0; 0 1 -1 -1),  B^T = (1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1),
//     G = (1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1).
//
// Buffers    x (images, height, width, channels), y, dy (images, out_height, out_width, filters),
//            w, dw (filters, 3, 3, channels), bias (filters,) or absent. Tiles first .. first + tiles - 1
//            of (images, tiles_h, tiles_w): v (16, tiles, channels), m, dm (16, tiles, filters).
//            u (16, channels, filters), or flipped (16, filters, channels); du (16, filters, channels).
//            Nothing overlaps.
// Launch     ROWS, any grid and block: work = tiles; filters (winograd_weights_flipped and
//            _backward); ceil(channels / 32) ceil(filters / 16) (winograd_weights).
// Cost       v, m and dm are 4 elements per pixel and channel: with the pixels, 20 bytes in float32.
//            Pixels are read again by neighbouring tiles, from the cache: a block has neighbours.
//            Weights: 9 read, 16 written, 100 bytes a filter and channel. At most 32 additions a
//            patch and channel.
// Exactness  no sums over lanes: the same bits for every launch shape and split. Of the method in
//            float, against a sum of products: rms error 0.9 times with 32 channels, 1.25 with 128.
// Source     Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv 1509.09308.
// Reference  tests/reference_images.py    Test  tests/test_kernels_winograd.py

#include "channels.h"

#define FILTERS 16  // filters of a warp in winograd_weights: a cache line of u

// FOR_ROWS with neighbouring tiles in a block: their patches overlap by half, and a block that has
// whole lines of tiles reads most pixels once.
#if defined(HPCTRAIN_HOST)
#define FOR_NEIGHBOURS(tile, tiles) FOR_ROWS(tile, tiles)
#else
#define FOR_NEIGHBOURS(tile, tiles)                                            \
    for (int64 tile##_share = ((tiles) + gridDim.x - 1) / gridDim.x,           \
               tile##_first = blockIdx.x * tile##_share,                       \
               tile##_stop = lower(tile##_first + tile##_share, tiles),        \
               tile = tile##_first + threadIdx.x / LANES;                      \
         tile < tile##_stop; tile += blockDim.x / LANES)
#endif

// A 2 x 2 tile of the output of one image.
struct Place {
    int64 image, h, w;  // of its first pixel
    DEVICE_MEMBER Place(int64 tile, int64 tiles_h, int64 tiles_w)
    {
        image = tile / (tiles_h * tiles_w);
        const uint32 inside = (uint32)(tile - image * tiles_h * tiles_w);
        h = inside / (uint32)tiles_w * 2;
        w = inside % (uint32)tiles_w * 2;
    }
};

DEVICE void weights_line(const wide (&g)[3], wide (&u)[4])
{
    const wide outer = (g[0] + g[2]) * (wide)0.5, inner = g[1] * (wide)0.5;
    u[0] = g[0];
    u[1] = outer + inner;
    u[2] = outer - inner;
    u[3] = g[2];
}

// u[p step] <- G g G^T of one filter and channel; g(i, j) are the taps.
template <class F> DEVICE void weights_transform(F g, real* __restrict__ u, int64 step)
{
    wide half[3][4];
    for (int i = 0; i < 3; i++) {
        const wide line[3] = {g(i, 0), g(i, 1), g(i, 2)};
        weights_line(line, half[i]);
    }
    for (int j = 0; j < 4; j++) {
        const wide column[3] = {half[0][j], half[1][j], half[2][j]};
        wide out[4];
        weights_line(column, out);
        for (int i = 0; i < 4; i++) u[(4 * i + j) * step] = out[i];
    }
}

// A few filters at a time, so that lines of w are read whole and lines of u written whole.
ROWS_KERNEL winograd_weights(const real* __restrict__ w, real* __restrict__ u, int64 filters,
                             int64 channels)
{
    const int64 blocks = (filters + FILTERS - 1) / FILTERS;
    FOR_ROWS(unit, channel_tiles(channels) * blocks) {
        const int64 first = unit / blocks * LANES, width = lower(channels - first, LANES);
        const int64 k0 = unit % blocks * FILTERS, k1 = lower(k0 + FILTERS, filters);
        for (int64 k = k0; k < k1; k++) {
            const real* __restrict__ in = w + k * 9 * channels + first;
            real* __restrict__ out = u + first * filters + k;
            ROLLED FOR_LANES(c, width) {
                const int64 step = fresh(channels);
                weights_transform([&](int i, int j) { return in[(3 * i + j) * step + c]; },
                                  out + c * filters, step * filters);
            }
        }
    }
}

ROWS_KERNEL winograd_weights_flipped(const real* __restrict__ w, real* __restrict__ u,
                                     int64 filters, int64 channels)
{
    FOR_ROWS(k, filters) {
        const real* __restrict__ in = w + k * 9 * channels;
        real* __restrict__ out = u + k * channels;
        ROLLED FOR_LANES(c, channels) {
            const int64 step = fresh(channels);
            weights_transform([&](int i, int j) { return in[(8 - 3 * i - j) * step + c]; },
                              out + c, filters * step);
        }
    }
}

ROWS_KERNEL winograd_weights_backward(const real* __restrict__ du, real* __restrict__ dw,
                                      int64 filters, int64 channels)
{
    FOR_ROWS(k, filters) {
        const real* __restrict__ in = du + k * channels;
        ROLLED FOR_LANES(c, channels) {
            const int64 step = fresh(filters * channels);
            wide half[3][4];
            for (int j = 0; j < 4; j++) {
                wide d[4];
                for (int i = 0; i < 4; i++) d[i] = in[(4 * i + j) * step + c];
                half[0][j] = d[0] + (d[1] + d[2]) * (wide)0.5;
                half[1][j] = (d[1] - d[2]) * (wide)0.5;
                half[2][j] = (d[1] + d[2]) * (wide)0.5 + d[3];
            }
            for (int i = 0; i < 3; i++) {
                const wide* d = half[i];
                real* __restrict__ out = dw + (k * 9 + 3 * i) * channels + c;
                out[0] = d[0] + (d[1] + d[2]) * (wide)0.5;
                out[channels] = (d[1] - d[2]) * (wide)0.5;
                out[2 * channels] = (d[1] + d[2]) * (wide)0.5 + d[3];
            }
        }
    }
}

// v[p step] <- B^T d B for one channel; d(i, j) is pixel (i, j) of the patch.
template <class F> DEVICE void input_transform(F d, real* __restrict__ v, int64 step)
{
    wide half[4][4];
    for (int j = 0; j < 4; j++) {
        const wide d0 = d(0, j), d1 = d(1, j), d2 = d(2, j), d3 = d(3, j);
        half[0][j] = d0 - d2;
        half[1][j] = d1 + d2;
        half[2][j] = d2 - d1;
        half[3][j] = d1 - d3;
    }
    for (int i = 0; i < 4; i++) {
        v[(4 * i) * step] = half[i][0] - half[i][2];
        v[(4 * i + 1) * step] = half[i][1] + half[i][2];
        v[(4 * i + 2) * step] = half[i][2] - half[i][1];
        v[(4 * i + 3) * step] = half[i][1] - half[i][3];
    }
}

// v[p step + c] <- B^T d B for the patch of one image whose first pixel is (h, w)
#if defined(HPCTRAIN_HOST)
DEVICE void input_tile(const real* __restrict__ x, real* __restrict__ v, int64 h, int64 w,
                       int64 height, int64 width, int64 channels, int64 step)
{
    if (h >= 0 && w >= 0 && h + 4 <= height && w + 4 <= width) {
        const real* __restrict__ in = x + (h * width + w) * channels;
        ROLLED FOR_LANES(c, channels)
            input_transform([&](int i, int j) { return in[(i * width + j) * channels + c]; }, v + c,
                            step);
        return;
    }
    wide row_inside[4], column_inside[4];  // numbers: a condition that becomes vector code
    int64 row[4], column[4];               // the nearest of the image: safe to load
    for (int i = 0; i < 4; i++) {
        row[i] = lower(higher(h + i, 0), height - 1);
        column[i] = lower(higher(w + i, 0), width - 1);
        row_inside[i] = row[i] == h + i;
        column_inside[i] = column[i] == w + i;
        row[i] *= width;
    }
    ROLLED FOR_LANES(c, channels)
        input_transform(
            [&](int i, int j) {
                const wide value = x[(row[i] + column[j]) * channels + c];
                return row_inside[i] * column_inside[j] > 0 ? value : (wide)0;
            },
            v + c, step);
}
#else
DEVICE void input_tile(const real* __restrict__ x, real* __restrict__ v, int64 h, int64 w,
                       int64 height, int64 width, int64 channels, int64 step)
{
    const int64 corner = (h * width + w) * channels;
    uint32 rows = 0, columns = 0;  // a bit for each of the patch that lies in the image
    for (int i = 0; i < 4; i++) {
        rows |= (uint32)(h + i >= 0 && h + i < height) << i;
        columns |= (uint32)(w + i >= 0 && w + i < width) << i;
    }
    ROLLED FOR_LANES(c, channels) {
        const int64 pixel = fresh(channels), line = fresh(width * channels);
        input_transform(
            [&](int i, int j) {
                const bool inside = rows >> i & columns >> j & 1;
                return inside ? (wide)x[corner + i * line + j * pixel + c] : (wide)0;
            },
            v + c, fresh(step));
    }
}
#endif

ROWS_KERNEL winograd_input(const real* __restrict__ x, real* __restrict__ v, int64 first,
                           int64 tiles, int64 height, int64 width, int64 channels, int64 tiles_h,
                           int64 tiles_w, int64 pad_h, int64 pad_w)
{
    FOR_NEIGHBOURS(tile, tiles) {
        const Place at(first + tile, tiles_h, tiles_w);
        input_tile(x + at.image * height * width * channels, v + tile * channels, at.h - pad_h,
                   at.w - pad_w, height, width, channels, tiles * channels);
    }
}

// A tile of the output; constants for two_rows and two_columns leave no branch in the loop.
DEVICE void output_tile(const real* __restrict__ m, const real* __restrict__ bias,
                        real* __restrict__ y, int64 plane, int64 line, int64 filters, bool two_rows,
                        bool two_columns)
{
    ROLLED FOR_LANES(k, filters) {
        const int64 step = fresh(plane);
        wide half[2][4];
        for (int j = 0; j < 4; j++) {
            const wide m0 = m[j * step + k], m1 = m[(4 + j) * step + k];
            const wide m2 = m[(8 + j) * step + k], m3 = m[(12 + j) * step + k];
            half[0][j] = m0 + m1 + m2;
            half[1][j] = m1 - m2 - m3;
        }
        const wide b = bias ? (wide)bias[k] : (wide)0;
        y[k] = half[0][0] + half[0][1] + half[0][2] + b;
        if (two_columns) y[filters + k] = half[0][1] - half[0][2] - half[0][3] + b;
        if (two_rows) y[line + k] = half[1][0] + half[1][1] + half[1][2] + b;
        if (two_rows && two_columns)
            y[line + filters + k] = half[1][1] - half[1][2] - half[1][3] + b;
    }
}

ROWS_KERNEL winograd_output(const real* __restrict__ m, const real* __restrict__ bias,
                            real* __restrict__ y, int64 first, int64 tiles, int64 out_height,
                            int64 out_width, int64 filters, int64 tiles_h, int64 tiles_w)
{
    const int64 step = tiles * filters, line = out_width * filters;
    FOR_ROWS(tile, tiles) {
        const Place at(first + tile, tiles_h, tiles_w);
        const bool two_rows = at.h + 1 < out_height, two_columns = at.w + 1 < out_width;
        const real* __restrict__ in = m + tile * filters;
        real* __restrict__ out = y + ((at.image * out_height + at.h) * out_width + at.w) * filters;
        if (two_rows && two_columns) output_tile(in, bias, out, step, line, filters, true, true);
        else output_tile(in, bias, out, step, line, filters, two_rows, two_columns);
    }
}

DEVICE void output_tile_backward(const real* __restrict__ dy, real* __restrict__ dm, int64 plane,
                                 int64 line, int64 filters, bool two_rows, bool two_columns)
{
    ROLLED FOR_LANES(k, filters) {
        const int64 step = fresh(plane);
        const wide d00 = dy[k], d01 = two_columns ? (wide)dy[filters + k] : (wide)0;
        const wide d10 = two_rows ? (wide)dy[line + k] : (wide)0;
        const wide d11 = two_rows && two_columns ? (wide)dy[line + filters + k] : (wide)0;
        const wide left[4] = {d00, d00 + d10, d00 - d10, -d10};
        const wide right[4] = {d01, d01 + d11, d01 - d11, -d11};
        for (int i = 0; i < 4; i++) {
            dm[(4 * i) * step + k] = left[i];
            dm[(4 * i + 1) * step + k] = left[i] + right[i];
            dm[(4 * i + 2) * step + k] = left[i] - right[i];
            dm[(4 * i + 3) * step + k] = -right[i];
        }
    }
}

ROWS_KERNEL winograd_output_backward(const real* __restrict__ dy, real* __restrict__ dm, int64 first,
                                     int64 tiles, int64 out_height, int64 out_width, int64 filters,
                                     int64 tiles_h, int64 tiles_w)
{
    const int64 step = tiles * filters, line = out_width * filters;
    FOR_ROWS(tile, tiles) {
        const Place at(first + tile, tiles_h, tiles_w);
        const bool two_rows = at.h + 1 < out_height, two_columns = at.w + 1 < out_width;
        const real* __restrict__ in =
            dy + ((at.image * out_height + at.h) * out_width + at.w) * filters;
        real* __restrict__ out = dm + tile * filters;
        if (two_rows && two_columns) output_tile_backward(in, out, step, line, filters, true, true);
        else output_tile_backward(in, out, step, line, filters, two_rows, two_columns);
    }
}
