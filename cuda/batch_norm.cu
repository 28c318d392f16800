// batch_norm.cu -- batch normalization over groups of rows, with an optional addition and ReLU.
//
//     batch_moments     (count, mean, squares) of a chunk of rows, by channel
//     batch_merge       the chunks' moments, merged in order: mean and biased variance of a group
//     batch_averages    sum of count mean and of count unbiased variance over the groups
//     batch_forward     y <- relu?(gamma (x - mean) / sqrt(variance + epsilon) + beta + shortcut?)
//     batch_sums        of a chunk: sum of dz, sum of dz xhat;  dz = dy where y > 0 or without ReLU
//     batch_merge_sums  the chunks' sums, added in order
//     batch_backward    dx <- gamma rstd (dz - (sum dz + xhat sum dz xhat) / count), dshortcut <- dz
//     where xhat = (x - mean) rstd, rstd = 1 / sqrt(variance + epsilon), squares = sum (x - mean)^2.
//
// Buffers    x, y, dy, dx, shortcut (rows, channels): rows are pixels of images. All statistics and
//            sums are wide. offsets int64
//            (groups + 1,): group g is rows offsets[g] up to offsets[g + 1]. Chunk q of a group is its
//            rows q chunk_rows up to (q + 1) chunk_rows, as far as there are; chunk results are
//            (groups, chunks, channels) and zero for empty chunks, group results (groups, channels).
//            shortcut and dshortcut may be absent. dx may be dy. No other overlap.
// Launch     ROWS: work = groups chunks tiles, or groups tiles (batch_merge, batch_merge_sums), or
//            tiles (batch_averages), where tiles = ceil(channels / 32).
// Cost       bytes in float32, n = rows channels: batch_moments 4 n, batch_forward 8 n (12 n with
//            a shortcut), batch_sums 8 n, batch_backward 12 n (20 n with a shortcut); the rest a few
//            numbers per chunk and channel. batch_moments reads x twice, the second time from the cache.
//            The ReLU's mask is computed again from x: no mask and no y is kept or read. Bandwidth.
// Exactness  sums go through a chunk in order of rows, then through the chunks in order: they depend
//            on chunk_rows alone. The mean is subtracted before squaring, chunks are merged by
//            Chan's formula: no cancellation.
// Source     Ioffe and Szegedy, "Batch normalization", arXiv 1502.03167; Chan, Golub and LeVeque,
//            "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
// Reference  tests/reference_images.py    Test  tests/test_kernels_batch_norm.py

#include "channels.h"

// A tile of channels of a chunk of one group's rows.
struct Chunk {
    int64 group, row, rows;        // first row and their number, 0 for an empty chunk
    int64 channel, width;          // first channel and their number, at most 32
    int64 in_chunks, in_groups;    // where the first channel is in chunk results, group results

    DEVICE_MEMBER Chunk(int64 unit, const int64* offsets, int64 chunks, int64 channels,
                        int64 chunk_rows)
    {
        const int64 tiles = channel_tiles(channels), chunk = unit / tiles;
        group = chunk / chunks;
        row = offsets[group] + chunk % chunks * chunk_rows;
        rows = higher(lower(chunk_rows, offsets[group + 1] - row), 0);
        channel = unit % tiles * LANES;
        width = lower(channels - channel, LANES);
        in_chunks = chunk * channels + channel;
        in_groups = group * channels + channel;
    }
};

#define FOR_CHUNKS(unit) FOR_ROWS(unit, groups * chunks * channel_tiles(channels))

// The affine map of a tile of channels, z = (x - mean) slope + beta, with slope = gamma rstd.
struct Affine {
    Lanes<wide> mean, rstd, slope, beta;

    template <class W>
    DEVICE_MEMBER Affine(W w, const Chunk& k, const wide* group_mean, const wide* group_variance,
                         const real* gamma, const real* shift, wide epsilon)
        : mean(0), rstd(0), slope(0), beta(0)
    {
        w.each(mean, [&](int c, wide& m) {
            m = group_mean[k.in_groups + c];
            rstd[c] = (wide)1 / real_sqrt(group_variance[k.in_groups + c] + epsilon);
            slope[c] = gamma[k.channel + c] * rstd[c];
            beta[c] = shift[k.channel + c];
        });
    }
    DEVICE_MEMBER wide operator()(int c, wide x) { return (x - mean[c]) * slope[c] + beta[c]; }
    DEVICE_MEMBER wide normalized(int c, wide x) { return (x - mean[c]) * rstd[c]; }
};

ROWS_KERNEL batch_moments(const real* __restrict__ x, const int64* __restrict__ offsets,
                          wide* __restrict__ mean, wide* __restrict__ squares, int64 groups,
                          int64 chunks, int64 channels, int64 chunk_rows)
{
    FOR_CHUNKS(unit) {
        const Chunk k(unit, offsets, chunks, channels, chunk_rows);
        const real* __restrict__ in = x + k.row * channels + k.channel;
        with_width(k.width, [&](auto w) {
            Lanes<wide> sum(0), square(0);
            for (int64 r = 0; r < k.rows; r++)
                w.each(sum, [&](int c, wide& s) { s += in[r * channels + c]; });
            const wide count = (wide)higher(k.rows, 1);
            w.each(sum, [&](int c, wide& s) { mean[k.in_chunks + c] = s = s / count; });
            for (int64 r = 0; r < k.rows; r++)
                w.each(square, [&](int c, wide& s) {
                    const wide apart = in[r * channels + c] - sum[c];
                    s += apart * apart;
                });
            w.each(square, [&](int c, wide& s) { squares[k.in_chunks + c] = s; });
        });
    }
}

ROWS_KERNEL batch_merge(const wide* __restrict__ chunk_mean, const wide* __restrict__ squares,
                        const int64* __restrict__ offsets, wide* __restrict__ mean,
                        wide* __restrict__ variance, int64 groups, int64 chunks, int64 channels,
                        int64 chunk_rows)
{
    FOR_ROWS(unit, groups * channel_tiles(channels)) {
        const Chunk k(unit, offsets, 1, channels, 0);
        const int64 rows = offsets[k.group + 1] - offsets[k.group];
        Lanes<wide> total_mean(0), total(0);
        for (int64 q = 0, done = 0; done < rows; q++) {
            const int64 more = lower(chunk_rows, rows - done), at = (k.group * chunks + q) * channels;
            const wide share = (wide)more / (wide)(done + more);
            total.first(k.width, [&](int c, wide& s) {
                const wide apart = chunk_mean[at + k.channel + c] - total_mean[c];
                total_mean[c] += apart * share;
                s += squares[at + k.channel + c] + apart * apart * share * (wide)done;
            });
            done += more;
        }
        total.first(k.width, [&](int c, wide& s) {
            mean[k.in_groups + c] = total_mean[c];
            variance[k.in_groups + c] = s / (wide)higher(rows, 1);
        });
    }
}

ROWS_KERNEL batch_averages(const wide* __restrict__ mean, const wide* __restrict__ variance,
                           const int64* __restrict__ offsets, wide* __restrict__ mean_sum,
                           wide* __restrict__ variance_sum, int64 groups, int64 channels)
{
    FOR_ROWS(tile, channel_tiles(channels)) {
        const int64 first = tile * LANES, width = lower(channels - first, LANES);
        Lanes<wide> means(0), variances(0);
        int64 mean_weight = 0, variance_weight = 0;
        ROLLED for (int64 g = 0; g < groups; g++) {
            const int64 rows = offsets[g + 1] - offsets[g];
            const int64 weight = rows > 1 ? rows : 0;
            const wide unbiased = (wide)weight * ((wide)rows / (wide)higher(rows - 1, 1));
            mean_weight += rows;
            variance_weight += weight;
            means.first(width, [&](int c, wide& s) {
                s += (wide)rows * mean[g * channels + first + c];
                variances[c] += unbiased * variance[g * channels + first + c];
            });
        }
        means.first(width, [&](int c, wide& s) {
            mean_sum[first + c] = s;
            variance_sum[first + c] = variances[c];
        });
        if (tile == 0 && LANE_LEADER) {
            mean_sum[channels] = (wide)mean_weight;
            variance_sum[channels] = (wide)variance_weight;
        }
    }
}

ROWS_KERNEL batch_forward(const real* __restrict__ x, const real* __restrict__ shortcut,
                          const wide* __restrict__ mean, const wide* __restrict__ variance,
                          const real* __restrict__ gamma, const real* __restrict__ beta,
                          const int64* __restrict__ offsets, real* __restrict__ y, int64 groups,
                          int64 chunks, int64 channels, int64 chunk_rows, wide epsilon, int32 relu)
{
    FOR_CHUNKS(unit) {
        const Chunk k(unit, offsets, chunks, channels, chunk_rows);
        const real* __restrict__ in = x + k.row * channels + k.channel;
        const real* __restrict__ plus = shortcut ? shortcut + k.row * channels + k.channel : nullptr;
        real* __restrict__ out = y + k.row * channels + k.channel;
        const wide floor = relu ? (wide)0 : -from_bits(Format<wide>::INF);
        with_width(k.width, [&](auto w) {
            Affine map(w, k, mean, variance, gamma, beta, epsilon);
            for (int64 r = 0; r < k.rows; r++)
                w.each(map.mean, [&](int c, wide&) {
                    const int64 i = r * channels + c;
                    const wide z = map(c, in[i]) + (plus ? (wide)plus[i] : (wide)0);
                    out[i] = z < floor ? floor : z;
                });
        });
    }
}

ROWS_KERNEL batch_sums(const real* __restrict__ x, const real* __restrict__ shortcut,
                       const real* __restrict__ dy, const wide* __restrict__ mean,
                       const wide* __restrict__ variance, const real* __restrict__ gamma,
                       const real* __restrict__ beta, const int64* __restrict__ offsets,
                       wide* __restrict__ sum, wide* __restrict__ sum_xhat, int64 groups,
                       int64 chunks, int64 channels, int64 chunk_rows, wide epsilon, int32 relu)
{
    FOR_CHUNKS(unit) {
        const Chunk k(unit, offsets, chunks, channels, chunk_rows);
        const real* __restrict__ in = x + k.row * channels + k.channel;
        const real* __restrict__ plus = shortcut ? shortcut + k.row * channels + k.channel : nullptr;
        const real* __restrict__ up = dy + k.row * channels + k.channel;
        const wide floor = relu ? (wide)0 : -from_bits(Format<wide>::INF);
        with_width(k.width, [&](auto w) {
            Affine map(w, k, mean, variance, gamma, beta, epsilon);
            Lanes<wide> plain(0), weighted(0);
            ROLLED for (int64 r = 0; r < k.rows; r++)
                w.each(plain, [&](int c, wide& s) {
                    const int64 i = r * channels + c;
                    const wide z = map(c, in[i]) + (plus ? (wide)plus[i] : (wide)0);
                    const wide dz = z <= floor ? (wide)0 : (wide)up[i];
                    s += dz;
                    weighted[c] += dz * map.normalized(c, in[i]);
                });
            w.each(plain, [&](int c, wide& s) {
                sum[k.in_chunks + c] = s;
                sum_xhat[k.in_chunks + c] = weighted[c];
            });
        });
    }
}

ROWS_KERNEL batch_merge_sums(const wide* __restrict__ part, wide* __restrict__ total, int64 groups,
                             int64 chunks, int64 channels)
{
    FOR_ROWS(unit, groups * channel_tiles(channels)) {
        const int64 group = unit / channel_tiles(channels);
        const int64 first = unit % channel_tiles(channels) * LANES;
        const int64 width = lower(channels - first, LANES);
        Lanes<wide> sum(0);
        for (int64 q = group * chunks; q < (group + 1) * chunks; q++)
            sum.first(width, [&](int c, wide& s) { s += part[q * channels + first + c]; });
        sum.first(width, [&](int c, wide& s) { total[group * channels + first + c] = s; });
    }
}

ROWS_KERNEL batch_backward(const real* __restrict__ x, const real* __restrict__ shortcut,
                           const real* dy, const wide* __restrict__ mean,
                           const wide* __restrict__ variance, const real* __restrict__ gamma,
                           const real* __restrict__ beta, const int64* __restrict__ offsets,
                           const wide* __restrict__ sum, const wide* __restrict__ sum_xhat, real* dx,
                           real* __restrict__ dshortcut, int64 groups, int64 chunks, int64 channels,
                           int64 chunk_rows, int64 count, wide epsilon, int32 relu)
{
    FOR_CHUNKS(unit) {
        const Chunk k(unit, offsets, chunks, channels, chunk_rows);
        const int64 start = k.row * channels + k.channel;
        const real* __restrict__ in = x + start;
        const real* __restrict__ plus = shortcut ? shortcut + start : nullptr;
        real* __restrict__ dplus = dshortcut ? dshortcut + start : nullptr;
        const wide floor = relu ? (wide)0 : -from_bits(Format<wide>::INF);
        const int64 rows = count ? count : offsets[k.group + 1] - offsets[k.group];
        const wide share = (wide)1 / (wide)higher(rows, 1);
        with_width(k.width, [&](auto w) {
            Affine map(w, k, mean, variance, gamma, beta, epsilon);
            Lanes<wide> average(0), tilt(0);
            w.each(average, [&](int c, wide& s) {
                s = sum[k.in_groups + c] * share;
                tilt[c] = sum_xhat[k.in_groups + c] * share;
            });
            ROLLED for (int64 r = 0; r < k.rows; r++)
                w.each(average, [&](int c, wide& s) {
                    const int64 i = r * channels + c;
                    const wide z = map(c, in[i]) + (plus ? (wide)plus[i] : (wide)0);
                    const wide dz = z <= floor ? (wide)0 : (wide)dy[start + i];
                    if (dplus) dplus[i] = dz;
                    dx[start + i] = map.slope[c] * (dz - (s + map.normalized(c, in[i]) * tilt[c]));
                });
        });
    }
}
