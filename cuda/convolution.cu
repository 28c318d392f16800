// convolution.cu -- columns of images for convolution as tiles of a matrix product, and the way back.
//
//     columns            cols[(n, oh, ow), (i, j, c)] <- x[n, h, w, c]     0 outside the image
//     columns_backward   dx[n, h, w, c] <- dx[n, h, w, c] + sum of the cols that `columns` would have
//                        copied from there, in the order of their rows
//     weight_columns     f[(i, j, c), k] <- w[k, i, j, c]
//     weight_flip        f[(i, j, k), c] <- w[k, I-1-i, J-1-j, c]
//     weight_flip_back   w[k, i, j, c] <- f[(I-1-i, J-1-j, k), c]
//     where h = oh stride_h - pad_h + i, w = ow stride_w - pad_w + j, i < I = kernel_h, j < J = kernel_w.
//
// Buffers    x, dx (images, height, width, channels). cols (rows, kernel_h kernel_w channels): a part
//            of the matrix that has one row per output pixel of all images. columns: output lines
//            first .. first + rows - 1 of the batch, out_width pixels each. columns_backward: output
//            pixels first .. first + rows - 1, and only pixels first_pixel .. first_pixel + pixels - 1
//            of dx. w (filters, kernel_h, kernel_w, channels); window = kernel_h kernel_w channels,
//            positions = kernel_h kernel_w. Nothing overlaps.
// Launch     ROWS, any grid and block: work = rows kernel_h (columns), pixels (columns_backward),
//            window (weight_columns), filters positions (weight_flip, weight_flip_back).
// Cost       bytes in float32: columns 4 for an element of cols and of x, which is read kernel_h
//            kernel_w times, from the cache. columns_backward 4 for an element of cols and 8 for one of
//            dx. The others 8 for a weight; the lanes of weight_columns read a row apart, 32 bytes
//            each. No flops but the sums.
// Exactness  columns_backward adds to dx in ascending order of rows, so a matrix given whole or in
//            any pieces, first to last, yields the same bits. The others only copy.
// Source     Chellapilla, Puri and Simard, "High performance convolutional neural networks for
//            document processing", 2006, section 3.1.
// Reference  tests/reference_images.py    Test  tests/test_kernels_convolution.py

#include "kernel.h"

// The part [begin, end) of a strip of kernel_w pixels from column w0 on that lies inside the image.
DEVICE int64 strip_begin(int64 w0, int64 channels) { return w0 < 0 ? -w0 * channels : 0; }
DEVICE int64 strip_end(int64 w0, int64 kernel_w, int64 width, int64 channels)
{
    return (w0 + kernel_w > width ? width - w0 : kernel_w) * channels;
}

ROWS_KERNEL columns(const real* __restrict__ x, real* __restrict__ cols, int64 first, int64 rows,
                    int64 height, int64 width, int64 channels, int64 out_height, int64 out_width,
                    int64 kernel_h, int64 kernel_w, int64 stride_h, int64 stride_w, int64 pad_h,
                    int64 pad_w)
{
    const int64 strip = kernel_w * channels;  // contiguous in x as well as in cols
    const int64 window = kernel_h * strip;
    FOR_ROWS(line, rows * kernel_h) {
        const int64 row = line / kernel_h, i = line % kernel_h;
        const int64 image = (first + row) / out_height;
        const int64 h = (first + row) % out_height * stride_h - pad_h + i;
        const bool outside = h < 0 || h >= height;
        const real* __restrict__ in = x + ((image * height + h) * width - pad_w) * channels;
        real* __restrict__ out = cols + row * out_width * window + i * strip;
        if (strip < LANES) {  // a lane for each pixel
            ROLLED for (int64 j = 0; j < strip; j++) {
                const int64 w0 = j / channels - pad_w;
                ROLLED FOR_LANES(ow, out_width) {
                    const int64 w = ow * stride_w + w0;
                    const bool inside = !outside && w >= 0 && w < width;
                    out[ow * window + j] = inside ? (wide)in[ow * stride_w * channels + j] : (wide)0;
                }
            }
            continue;
        }
        ROLLED for (int64 ow = 0; ow < out_width; ow++, out += window, in += stride_w * channels) {
            const int64 begin = strip_begin(ow * stride_w - pad_w, channels);
            const int64 end = strip_end(ow * stride_w - pad_w, kernel_w, width, channels);
            if (outside) {
                ROLLED FOR_LANES(j, strip) out[j] = 0;
            } else if (begin == 0 && end == strip) {
                ROLLED FOR_LANES(j, strip) out[j] = in[j];
            } else {
                ROLLED FOR_LANES(j, strip) out[j] = j >= begin && j < end ? (wide)in[j] : (wide)0;
            }
        }
    }
}

ROWS_KERNEL columns_backward(const real* __restrict__ cols, wide* __restrict__ dx, int64 first,
                             int64 rows, int64 first_pixel, int64 pixels, int64 height, int64 width,
                             int64 channels, int64 out_height, int64 out_width, int64 kernel_h,
                             int64 kernel_w, int64 stride_h, int64 stride_w, int64 pad_h,
                             int64 pad_w)
{
    const int64 strip = kernel_w * channels;
    FOR_ROWS(index, pixels) {
        const int64 image = (first_pixel + index) / (height * width);
        const int64 inside = first_pixel + index - image * height * width;
        const int64 h = inside / width + pad_h, w = inside % width + pad_w;
        wide* __restrict__ out = dx + (first_pixel + index) * channels;
        for (int64 i = kernel_h - 1; i >= 0; i--) {
            const int64 oh = (h - i) / stride_h;
            if (h < i || oh >= out_height || oh * stride_h != h - i) continue;
            for (int64 j = kernel_w - 1; j >= 0; j--) {
                const int64 ow = (w - j) / stride_w;
                if (w < j || ow >= out_width || ow * stride_w != w - j) continue;
                const int64 row = (image * out_height + oh) * out_width + ow - first;
                if (row < 0 || row >= rows) continue;
                const real* __restrict__ in = cols + (row * kernel_h + i) * strip + j * channels;
                FOR_LANES(c, channels) out[c] += in[c];
            }
        }
    }
}

ROWS_KERNEL weight_columns(const real* __restrict__ w, real* __restrict__ f, int64 filters,
                           int64 window)
{
    FOR_ROWS(row, window) {
        FOR_LANES(k, filters) f[row * filters + k] = w[k * window + row];
    }
}

ROWS_KERNEL weight_flip(const real* __restrict__ w, real* __restrict__ f, int64 filters,
                        int64 positions, int64 channels)
{
    FOR_ROWS(row, filters * positions) {
        const int64 k = row / positions, position = positions - 1 - row % positions;
        real* __restrict__ out = f + (position * filters + k) * channels;
        FOR_LANES(c, channels) out[c] = w[row * channels + c];
    }
}

ROWS_KERNEL weight_flip_back(const real* __restrict__ f, real* __restrict__ w, int64 filters,
                             int64 positions, int64 channels)
{
    FOR_ROWS(row, filters * positions) {
        const int64 k = row / positions, position = positions - 1 - row % positions;
        const real* __restrict__ in = f + (position * filters + k) * channels;
        FOR_LANES(c, channels) w[row * channels + c] = in[c];
    }
}
