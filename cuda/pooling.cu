// pooling.cu -- maximum and average over windows of images.
//
//     max_pool_forward       y[o, c] <- max of x[p, c] over the pixels p of window o; argmax: which p
//     max_pool_backward      dx[p, c] <- sum of dy[o, c] over the windows o with argmax[o, c] = p
//     average_pool_forward   y[o, c] <- mean of x[p, c] over the pixels p of window o
//     average_pool_backward  dx[p, c] <- sum over the windows o that hold p of dy[o, c] / pixels of o
//     where window (oh, ow) holds the pixels oh stride_h - pad_h + i, ow stride_w - pad_w + j that lie
//     in the image, i < kernel_h, j < kernel_w.
//
// Buffers    x, dx (images, height, width, channels); y, dy, argmax (images, out_height, out_width,
//            channels); argmax int32 holds h width + w. lines: rows of pixels of all images, of y in
//            the forward and of x in the backward kernels. Every window holds a pixel (pad < kernel
//            and the caller's output size). NaN counts as the largest, of equals the first is taken.
// Launch     ROWS, work = lines * ceil(channels / 32), any grid and block.
// Cost       bytes in float32: every input 4 an element, once where windows are no larger than the
//            cache, and every output 4.
// Exactness  gather form: each output is one sum, over window pixels or windows in ascending order.
// Source     elementary.
// Reference  tests/reference_images.py    Test  tests/test_kernels_pooling.py

#include "channels.h"

// Pixels [begin, end) of a window along one dim, cut to the image.
struct Span {
    int64 begin, end;
    DEVICE_MEMBER Span(int64 out, int64 kernel, int64 stride, int64 pad, int64 size)
        : begin(higher(out * stride - pad, 0)), end(lower(out * stride - pad + kernel, size))
    {
    }
    DEVICE_MEMBER int64 size() const { return end - begin; }
};

// Windows [begin, end) that hold a pixel, along one dim. The quotients are of small numbers.
struct Holders {
    int64 begin, end;
    DEVICE_MEMBER Holders(int64 in, int64 kernel, int64 stride, int64 pad, int64 out_size)
    {
        const uint32 place = (uint32)(in + pad), step = (uint32)stride;
        begin = place < (uint32)kernel ? 0 : (place - (uint32)kernel) / step + 1;
        end = lower(place / step + 1, out_size);
    }
};

// Line `unit / tiles` and the tile of its channels.
struct Line {
    int64 image, line, channel, width;
    DEVICE_MEMBER Line(int64 unit, int64 lines_per_image, int64 channels)
    {
        const int64 tiles = channel_tiles(channels);
        image = unit / tiles / lines_per_image;
        line = unit / tiles % lines_per_image;
        channel = unit % tiles * LANES;
        width = lower(channels - channel, LANES);
    }
};

ROWS_KERNEL max_pool_forward(const real* __restrict__ x, real* __restrict__ y,
                             int32* __restrict__ argmax, int64 lines, int64 height, int64 width,
                             int64 channels, int64 out_height, int64 out_width, int64 kernel_h,
                             int64 kernel_w, int64 stride_h, int64 stride_w, int64 pad_h, int64 pad_w)
{
    FOR_ROWS(unit, lines * channel_tiles(channels)) {
        const Line at(unit, out_height, channels);
        const Span rows(at.line, kernel_h, stride_h, pad_h, height);
        const real* __restrict__ in = x + at.image * height * width * channels + at.channel;
        const int64 start = (at.image * out_height + at.line) * out_width * channels + at.channel;
        with_width(at.width, [&](auto w) {
            for (int64 ow = 0; ow < out_width; ow++) {
                const Span cols(ow, kernel_w, stride_w, pad_w, width);
                Lanes<wide> best(-from_bits(Format<wide>::INF));
                Lanes<int32> where((int32)(rows.begin * width + cols.begin));
                for (int64 i = rows.begin; i < rows.end; i++)
                    ROLLED for (int64 j = cols.begin; j < cols.end; j++)
                        w.each(best, [&](int c, wide& top) {
                            const wide value = in[(i * width + j) * channels + c];
                            const bool larger = value > top || value != value;
                            where[c] = larger ? (int32)(i * width + j) : where[c];
                            top = larger ? value : top;
                        });
                w.each(best, [&](int c, wide& top) {
                    y[start + ow * channels + c] = top;
                    argmax[start + ow * channels + c] = where[c];
                });
            }
        });
    }
}

ROWS_KERNEL max_pool_backward(const real* __restrict__ dy, const int32* __restrict__ argmax,
                              real* __restrict__ dx, int64 lines, int64 height, int64 width,
                              int64 channels, int64 out_height, int64 out_width, int64 kernel_h,
                              int64 kernel_w, int64 stride_h, int64 stride_w, int64 pad_h,
                              int64 pad_w)
{
    FOR_ROWS(unit, lines * channel_tiles(channels)) {
        const Line at(unit, height, channels);
        const Holders rows(at.line, kernel_h, stride_h, pad_h, out_height);
        const int64 first = at.image * out_height * out_width * channels + at.channel;
        real* __restrict__ out = dx + (at.image * height + at.line) * width * channels + at.channel;
        with_width(at.width, [&](auto w) {
            for (int64 column = 0; column < width; column++) {
                const Holders cols(column, kernel_w, stride_w, pad_w, out_width);
                const int32 pixel = (int32)(at.line * width + column);
                Lanes<wide> sum(0);
                for (int64 oh = rows.begin; oh < rows.end; oh++)
                    ROLLED for (int64 ow = cols.begin; ow < cols.end; ow++)
                        w.each(sum, [&](int c, wide& s) {
                            const int64 from = first + (oh * out_width + ow) * channels + c;
                            s += argmax[from] == pixel ? (wide)dy[from] : (wide)0;
                        });
                w.each(sum, [&](int c, wide& s) { out[column * channels + c] = s; });
            }
        });
    }
}

ROWS_KERNEL average_pool_forward(const real* __restrict__ x, real* __restrict__ y, int64 lines,
                                 int64 height, int64 width, int64 channels, int64 out_height,
                                 int64 out_width, int64 kernel_h, int64 kernel_w, int64 stride_h,
                                 int64 stride_w, int64 pad_h, int64 pad_w)
{
    FOR_ROWS(unit, lines * channel_tiles(channels)) {
        const Line at(unit, out_height, channels);
        const Span rows(at.line, kernel_h, stride_h, pad_h, height);
        const real* __restrict__ in = x + at.image * height * width * channels + at.channel;
        real* __restrict__ out =
            y + (at.image * out_height + at.line) * out_width * channels + at.channel;
        with_width(at.width, [&](auto w) {
            for (int64 ow = 0; ow < out_width; ow++) {
                const Span cols(ow, kernel_w, stride_w, pad_w, width);
                Lanes<wide> sum(0);
                for (int64 i = rows.begin; i < rows.end; i++)
                    ROLLED for (int64 j = cols.begin; j < cols.end; j++)
                        w.each(sum, [&](int c, wide& s) {
                            s += in[(i * width + j) * channels + c];
                        });
                const wide count = (wide)(rows.size() * cols.size());
                w.each(sum, [&](int c, wide& s) { out[ow * channels + c] = s / count; });
            }
        });
    }
}

ROWS_KERNEL average_pool_backward(const real* __restrict__ dy, real* __restrict__ dx, int64 lines,
                                  int64 height, int64 width, int64 channels, int64 out_height,
                                  int64 out_width, int64 kernel_h, int64 kernel_w, int64 stride_h,
                                  int64 stride_w, int64 pad_h, int64 pad_w)
{
    FOR_ROWS(unit, lines * channel_tiles(channels)) {
        const Line at(unit, height, channels);
        const Holders rows(at.line, kernel_h, stride_h, pad_h, out_height);
        const real* __restrict__ in = dy + at.image * out_height * out_width * channels + at.channel;
        real* __restrict__ out = dx + (at.image * height + at.line) * width * channels + at.channel;
        with_width(at.width, [&](auto w) {
            for (int64 column = 0; column < width; column++) {
                const Holders cols(column, kernel_w, stride_w, pad_w, out_width);
                Lanes<wide> sum(0);
                for (int64 oh = rows.begin; oh < rows.end; oh++) {
                    const int64 tall = Span(oh, kernel_h, stride_h, pad_h, height).size();
                    ROLLED for (int64 ow = cols.begin; ow < cols.end; ow++) {
                        const int64 broad = Span(ow, kernel_w, stride_w, pad_w, width).size();
                        const wide share = (wide)1 / (wide)(tall * broad);
                        w.each(sum, [&](int c, wide& s) {
                            s += in[(oh * out_width + ow) * channels + c] * share;
                        });
                    }
                }
                w.each(sum, [&](int c, wide& s) { out[column * channels + c] = s; });
            }
        });
    }
}
