// Depthwise convolutions of small kernels with any stride, on images whose channels are adjacent: y = relu(Σ taps · x + shift).
//
// The image is read, and the result written, in place. With a stride, neighboring outputs share few pixels, so every
// multiply-add reads its pixel from the caches, and only the outputs stay in registers.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Adjacent outputs of a row that are computed together: enough independent sums for two multiply-add units of latency four.
constexpr int CONV_WIDE = WK_REGISTERS >= 32 ? 8 : 6;
// Neighboring blocks that are computed together: 2 KiB of each pixel.
constexpr int64_t CONV_BLOCKS = 2048 / static_cast<int64_t>(sizeof(Vec));

// out[t] = start + Σ_i Σ_j x[i][j + t · stride] · w[i][j]   for 0 ≤ i < rows, 0 ≤ j < columns
//
// Strides are in floats; nothing needs to be aligned.
struct ConvTile {
    float *out;
    int64_t out_tile;
    const float *x;
    int64_t x_row, x_column, x_tile;  // from a tap to the next, down and to the right, and from an output to the next
    const float *w;
    int64_t w_row, w_column;
    int64_t rows, columns;
    Vec start;
    bool relu;
    int lanes;  // that have a channel
};

// T outputs. `WHOLE` is whether there is a channel in every lane.
template <int T, bool WHOLE> __attribute__((noinline)) void convolve(const ConvTile &c) {
    const auto load = [&](const float *from) { return WHOLE ? Float32::load(from) : load_some<Float32>(from, c.lanes); };
    Vec sum[T];
    unroll<T>([&](auto t) { sum[t] = c.start; });
    const int64_t tile = c.x_tile, x_column = c.x_column, w_column = c.w_column, columns = c.columns;
    for (int64_t i = 0; i < c.rows; i++) {
        const float *x = c.x + i * c.x_row, *w = c.w + i * c.w_row;
        for (int64_t j = 0; j < columns; j++, x += x_column, w += w_column) {
            Vec tap = load(w);
            hold(tap);
            unroll<T>([&](auto t) { sum[t] += load(x + t * tile) * tap; });
        }
    }
    unroll<T>([&](auto t) {
        const Vec value = c.relu ? relu(sum[t]) : sum[t];
        if (WHOLE)
            Float32::store(c.out + t * c.out_tile, value);
        else
            store_some<Float32>(c.out + t * c.out_tile, value, c.lanes);
    });
}

typedef void (*Convolve)(const ConvTile &);

template <bool WHOLE, int... T> constexpr Convolve convolve_by_width(int64_t width, std::integer_sequence<int, T...>) {
    constexpr Convolve table[] = {convolve<T + 1, WHOLE>...};
    return table[width - 1];
}

// One call.
class DepthwiseConv {
  public:
    explicit DepthwiseConv(const wk_depthwise_conv &call)
        : call_(call), patch_(call.patch), blocks_(ceil_div(call.channels, LANES)), groups_(ceil_div(blocks_, CONV_BLOCKS)) {
        const int64_t numbers = int64_t{call.images} * call.channels * call.x_height * call.x_width;
        threads_ = static_cast<int32_t>(least(call.threads, 1 + numbers / WORTH_READING));
        const int64_t pieces = call.images * groups_;
        bands_ = threads_ == 1 ? 1 : least(call.height, ceil_div(4 * threads_, pieces));
        // The columns of outputs for which all taps lie on pixels.
        const int64_t room = int64_t{call.x_width} + patch_.left - patch_.columns;
        inner_ = least(call.width, ceil_div(patch_.left, patch_.column_stride));
        outer_ = most(inner_, least(call.width, room < 0 ? 0 : room / patch_.column_stride + 1));
    }

    int32_t run() {
        parallel(threads_, call_.images * groups_ * bands_, start, this);
        return WK_OK;
    }

  private:
    // Below this number of floats for each thread, waking it would take longer than its share.
    static constexpr int64_t WORTH_READING = 1 << 15;

    static void start(void *self, int64_t task) { static_cast<const DepthwiseConv *>(self)->compute(task); }

    // The bands of an image follow each other, because neighboring ones share rows of it.
    void compute(int64_t task) const {
        const int64_t band = task % bands_, group = task / bands_ % groups_, image = task / bands_ / groups_;
        const int64_t first = group * CONV_BLOCKS, last = least(blocks_, first + CONV_BLOCKS);
        for (int64_t row = call_.height * band / bands_; row < call_.height * (band + 1) / bands_; row++)
            compute_row(image, row, first, last);
    }

    void compute_row(int64_t image, int64_t row, int64_t first_block, int64_t last_block) const {
        const wk_tensor &x = call_.x, &y = call_.y;
        // The rows of the kernel that lie on the image.
        const int64_t top = row * patch_.row_stride - patch_.top;
        const int64_t above = least(patch_.rows, most(0, -top)), below = most(above, least(patch_.rows, call_.x_height - top));
        const float *from = static_cast<const float *>(x.data) + image * x.image + (top + above) * x.row;
        float *to = static_cast<float *>(y.data) + image * y.image + row * y.row;
        // What the next row of outputs reads, and this one does not.
        const int64_t next = top + patch_.rows, fetched = most(0, least(patch_.row_stride, call_.x_height - next));
        const float *ahead = static_cast<const float *>(x.data) + image * x.image + next * x.row;
        ConvTile c;
        c.out_tile = y.column, c.x_row = x.row, c.x_column = x.column, c.x_tile = patch_.column_stride * x.column;
        c.w_row = int64_t{patch_.columns} * call_.channels, c.w_column = call_.channels;
        c.rows = below - above, c.relu = call_.relu != 0;
        each_tile([&](int64_t b, int64_t width) {
            // The columns of the kernel that lie on the image: all of them, unless there is only one output.
            const int64_t left = b * patch_.column_stride - patch_.left;
            const int64_t before = least(patch_.columns, most(0, -left));
            c.columns = most(0, least(patch_.columns, call_.x_width - left) - before);
            const int64_t new_pixels = least(width * patch_.column_stride, call_.x_width - most(0, left));
            for (int64_t block = first_block; block < last_block; block++) {
                const int64_t channel = block * LANES;
                for (int64_t i = 0; i < fetched; i++)
                    for (int64_t p = 0; p < new_pixels; p++)
                        __builtin_prefetch(ahead + i * x.row + (most(0, left) + p) * x.column + channel, 0, 2);
                c.lanes = lanes_of(block, call_.channels);
                c.x = from + (left + before) * x.column + channel;
                c.w = call_.taps + above * c.w_row + before * c.w_column + channel;
                c.out = to + b * y.column + channel;
                c.start = call_.shift ? load_some<Float32>(call_.shift + channel, c.lanes) : Vec{};
                constexpr auto widths = std::make_integer_sequence<int, CONV_WIDE>{};
                (c.lanes == LANES ? convolve_by_width<true>(width, widths) : convolve_by_width<false>(width, widths))(c);
            }
        });
    }

    // Calls run(first, width) for all outputs of a row: one at a time where taps lie beside the image, else as many as possible, in
    // tiles of nearly equal width.
    template <class Run> WK_INLINE void each_tile(Run &&run) const {
        const int64_t columns = outer_ - inner_, tiles = ceil_div(columns, CONV_WIDE);
        for (int64_t b = 0; b < inner_; b++) run(b, 1);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t begin = columns * tile / tiles, end = columns * (tile + 1) / tiles;
            run(inner_ + begin, end - begin);
        }
        for (int64_t b = outer_; b < call_.width; b++) run(b, 1);
    }

    const wk_depthwise_conv &call_;
    const wk_patch &patch_;
    const int64_t blocks_, groups_;
    int32_t threads_;
    int64_t bands_, inner_, outer_;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
