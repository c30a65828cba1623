// Packed activations of several pixels, and conversion from and to the caller's tensors.
#pragma once

#include "pack.hpp"
#include "product.hpp"
#include "rounding.hpp"
#include "widekernel.h"

namespace wk {
namespace WK_NAMESPACE {

// Pixels whose channels adjoin are fetched before their turn by so many pixels.
constexpr int64_t PIXELS_AHEAD = 4;

// The pixels of a tensor (image, channel, row, column), numbered image by image and row by row; any strides.
struct Pixels {
    float *at;
    int64_t channel, column, row, image;  // strides
    int64_t width, rows;                  // pixels of a run at constant distance, and runs of an image

    Pixels(const wk_tensor &tensor, int64_t images, int64_t height, int64_t columns)
        : at(static_cast<float *>(tensor.data)), channel(tensor.channel), column(tensor.column), row(tensor.row),
          image(tensor.image), width(columns), rows(height) {
        if (width == 1) column = row, width = rows, rows = 1;
        if (rows == 1 || row == column * width) width *= rows, rows = 1;
        if (rows == 1 && width == 1) column = image, width = images;
        if (rows == 1 && (images == 1 || image == column * width)) width *= images;
    }

    WK_INLINE bool columns_adjoin() const { return column == 1 && channel != 1; }
    float *pixel(int64_t index) const {
        const int64_t run = index / width;
        return at + run / rows * image + run % rows * row + index % width * column;
    }
    // How many pixels from this one on lie at constant distance.
    int64_t run_from(int64_t index) const { return width - index % width; }
};

// `count` numbers at that distance; the other lanes are zero or not written.
WK_INLINE Vec gather(const float *from, int64_t stride, int count) {
    if (stride == 1) return count == LANES ? Float32::load(from) : load_some<Float32>(from, count);
    Vec value{};
    for (int i = 0; i < count; i++) value[i] = from[i * stride];
    return value;
}

WK_INLINE void scatter(float *to, int64_t stride, const Vec &value, int count) {
    if (stride != 1)
        for (int i = 0; i < count; i++) to[i * stride] = value[i];
    else if (count == LANES)
        Float32::store(to, value);
    else
        store_some<Float32>(to, value, count);
}

template <int... I> WK_INLINE Vec even_lanes(const Vec &a, const Vec &b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...);
}

// `count` pixels in tiles, the rows of products or their sums; see product.hpp for the order within a tile. Tiles differ by at most
// one row, the larger ones first: a tile of one or two rows would wait for its sums and take almost as long as one of six.
struct Stack {
    Vec *at;
    int64_t count, groups, number, each, larger;  // `each` rows, and one more in the first `larger` of `number` tiles

    Stack() = default;
    Stack(Vec *first, int64_t pixels, int64_t groups_of_each, int64_t most_rows)
        : at(first), count(pixels), groups(groups_of_each), number(ceil_div(pixels, most_rows)), each(pixels / most(number, 1)),
          larger(pixels - each * number) {}

    int64_t tiles() const { return number; }
    int64_t rows(int64_t tile) const { return each + (tile < larger); }
    // The first pixel of a tile.
    int64_t begin(int64_t tile) const { return tile * each + least(tile, larger); }
    Vec *tile(int64_t index) const { return at + begin(index) * groups; }
    int64_t tile_of(int64_t pixel) const {
        const int64_t small = pixel - larger * (each + 1);
        return small < 0 ? pixel / (each + 1) : larger + small / each;
    }
    Stack only(int64_t index) const { return {tile(index), rows(index), groups, rows(index)}; }
};

// One pixel of a stack: group g is at[g * step].
struct Slot {
    Vec *at;
    int64_t step;

    Slot() = default;
    Slot(Vec *first, int64_t distance) : at(first), step(distance) {}
    Slot(const Stack &stack, int64_t pixel) {
        const int64_t tile = stack.tile_of(pixel);
        at = stack.tile(tile) + pixel - stack.begin(tile), step = stack.rows(tile);
    }
};

// Lanes below `count` are all ones.
WK_INLINE Bits lanes_below(int count) {
    Bits lane;
    for (int i = 0; i < LANES; i++) lane[i] = static_cast<uint32_t>(i);
    return (Bits)(lane < static_cast<uint32_t>(count));
}

template <int D, int... I> WK_INLINE Vec swapped(const Vec &value, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(value, value, (I ^ D)...);
}

template <int D = LANES / 2> WK_INLINE float sum_of_lanes(const Vec &value) {
    const Vec halves = value + swapped<D>(value, std::make_integer_sequence<int, LANES>{});
    if constexpr (D == 1)
        return halves[0];
    else
        return sum_of_lanes<D / 2>(halves);
}

// Layer norm over the channels of a pixel. The second pass also measures how far the mean of the first one is off: beside a large
// mean, its rounding would count. Lanes beyond the channels become zero, unless a channel is not finite.
inline void normalize(const Slot &slot, int64_t channels, float eps) {
    const int64_t groups = ceil_div(channels, LANES);
    const Bits last = lanes_below(static_cast<int>(channels - (groups - 1) * LANES));
    const float each = 1.0f / static_cast<float>(channels);
    Vec sum{}, rest{}, squares{};
    for (int64_t g = 0; g < groups; g++) sum += slot.at[g * slot.step];
    const Vec mean = all(sum_of_lanes(sum) * each);
    for (int64_t g = 0; g < groups; g++) {
        Vec &value = slot.at[g * slot.step];
        value -= mean;
        if (g == groups - 1) value = (Vec)((Bits)value & last);
        rest += value, squares += value * value;
    }
    const float off = sum_of_lanes(rest) * each, variance = sum_of_lanes(squares) * each - off * off;
    const Vec factor = all(1.0f / __builtin_sqrtf((variance > 0 ? variance : 0 * variance) + eps)), shift = all(off) * factor;
    for (int64_t g = 0; g < groups; g++) {
        Vec &value = slot.at[g * slot.step];
        value = value * factor - shift;
    }
    Vec &end = slot.at[(groups - 1) * slot.step];
    end = (Vec)((Bits)end & last);
}

// Multiplies the channels of a pixel by `factors`.
inline void multiply(const Slot &slot, const float *factors, int64_t channels) {
    for (int64_t g = 0; g * LANES < channels; g++)
        slot.at[g * slot.step] *= gather(factors + g * LANES, 1, static_cast<int>(least(LANES, channels - g * LANES)));
}

// Makes words of the channels of a pixel, and, if they are scaled, the vector that says how.
inline void convert(const Slot &from, int64_t vectors, const Slot &to) {
    Rounding rounding;
    for (int64_t v = 0; SCALED && v < vectors; v++) rounding.see(from.at[v * from.step]);
    rounding.decide();
    for (int64_t v = 0; v < vectors; v += WORD) {
        Vec channels[WORD];
        for (int64_t i = 0; i < WORD; i++) channels[i] = v + i < vectors ? from.at[(v + i) * from.step] : Vec{};
        to.at[v / WORD * to.step] = rounding.words_of(channels);
    }
    if constexpr (SCALED) to.at[ceil_div(vectors, WORD) * to.step] = rounding.as_vector();
}

// `count` numbers of a channel, at distance 1 or 2; `readable` floats may be read.
WK_INLINE Vec load_columns(const float *from, int64_t column, int count, int64_t readable) {
    if (column == 1) return readable >= LANES ? Float32::load(from) : load_some<Float32>(from, static_cast<int>(readable));
    if (readable >= 2 * LANES)
        return even_lanes(Float32::load(from), Float32::load(from + LANES), std::make_integer_sequence<int, LANES>{});
    return gather(from, column, count);
}

// Copies `count` ≤ LANES pixels at constant distance into slots, a vector for each LANES of their channels. Full vectors may read
// pixels that belong to somebody else, but only `readable` floats from the first one on.
inline void pack_run(const float *from, int64_t channel, int64_t column, int count, int64_t readable, int64_t channels,
                     const Slot *slots) {
    const int64_t groups = ceil_div(channels, LANES);
    const bool squares = channel != 1 && (column == 1 || column == 2);
    if (!squares)
        for (int j = 0; j < count; j++) {
            const float *pixel = from + j * column;
            const int64_t whole = channel == 1 ? channels / LANES : 0, step = slots[j].step;
            Vec *to = slots[j].at;
            for (int64_t g = 0; g < whole; g++, to += step) {
                __builtin_prefetch(pixel + g * LANES + PIXELS_AHEAD * column);
                *to = Float32::load(pixel + g * LANES);
            }
            for (int64_t g = whole; g < groups; g++, to += step)
                *to = gather(pixel + g * LANES * channel, channel, static_cast<int>(least(LANES, channels - g * LANES)));
        }
    for (int64_t g = 0; g < groups && squares; g++) {
        const float *group = from + g * LANES * channel;
        const int some = static_cast<int>(least(LANES, channels - g * LANES));
        Vec square[LANES];
        if (some == LANES && column == 1 && readable >= LANES)
            unroll<LANES>([&](auto c) { square[c] = Float32::load(group + c * channel); });
        else
            for (int c = 0; c < LANES; c++)
                square[c] = c < some ? load_columns(group + c * channel, column, count, readable) : Vec{};
        transpose(square);
        for (int j = 0; j < count; j++) slots[j].at[g * slots[j].step] = square[j];
    }
}

// Copies `pixels` pixels from `first` on, at most LANES at a time: pixel i, the j-th of these, into the slot `place(i, j)`. When it
// is complete, `finish` is called with the slot and i.
template <class Place, class Finish>
void pack_pixels(const Pixels &from, int64_t first, int64_t pixels, int64_t channels, Place &&place, Finish &&finish) {
    for (int64_t i = 0; i < pixels;) {
        const float *pixel = from.pixel(first + i);
        const int64_t run = from.run_from(first + i);
        const int count = static_cast<int>(least(least(LANES, pixels - i), run));
        Slot slots[LANES];
        for (int j = 0; j < count; j++) slots[j] = place(i + j, j);
        pack_run(pixel, from.channel, from.column, count, from.column == 1 ? run : 1, channels, slots);
        for (int j = 0; j < count; j++) finish(slots[j], i + j);
        i += count;
    }
}

// Where results go: `channels` of the tensors from `channel` on. `residual.at` may be null.
struct Target {
    Pixels y, residual;
    int64_t channel, channels;
};

// Groups [begin, end) of one pixel of a tensor whose columns do not adjoin; `y` and `added` are the addresses of the first one.
inline void unpack_pixel(const Slot &slot, int64_t begin, int64_t end, const Target &to, float *y, const float *added,
                         const Vec *bias) {
    const bool adjoin = to.y.channel == 1 && (!added || to.residual.channel == 1);
    const int64_t whole = adjoin ? least(end, to.channels / LANES) : begin;
    const Vec *from = slot.at + begin * slot.step;
    int64_t g = begin;
    for (; g < whole; g++, from += slot.step, y += LANES) {
        Vec value = *from;
        __builtin_prefetch(y + PIXELS_AHEAD * to.y.column, 1);
        if (bias) value += bias[g];
        if (added) {
            __builtin_prefetch(added + PIXELS_AHEAD * to.residual.column);
            value += Float32::load(added), added += LANES;
        }
        Float32::store(y, value);
    }
    for (; g < end; g++, from += slot.step, y += LANES * to.y.channel) {
        const int some = static_cast<int>(least(LANES, to.channels - g * LANES));
        Vec value = *from;
        if (bias) value += bias[g];
        if (added) value += gather(added, to.residual.channel, some), added += LANES * to.residual.channel;
        scatter(y, to.y.channel, value, some);
    }
}

// Writes groups [begin, end) of the stack, plus bias (one vector for each group, or null) plus residual.
inline void unpack_pixels(const Stack &from, int64_t begin, int64_t end, const Target &to, int64_t first, const Vec *bias) {
    const Pixels &y = to.y, &residual = to.residual;
    for (int64_t i = 0; i < from.count;) {
        int64_t run = least(least(LANES, from.count - i), y.run_from(first + i));
        if (residual.at) run = least(run, residual.run_from(first + i));
        const int count = static_cast<int>(run);
        const int64_t channel = to.channel + begin * LANES;
        float *pixel = y.pixel(first + i) + channel * y.channel;
        const float *added = residual.at ? residual.pixel(first + i) + channel * residual.channel : nullptr;
        Slot slots[LANES];
        for (int j = 0; j < count; j++) slots[j] = Slot(from, i + j);
        if (!y.columns_adjoin())
            for (int j = 0; j < count; j++)
                unpack_pixel(slots[j], begin, end, to, pixel + j * y.column, added ? added + j * residual.column : nullptr, bias);
        for (int64_t g = begin; g < end && y.columns_adjoin(); g++) {
            const Vec shift = bias ? bias[g] : Vec{};
            const int some = static_cast<int>(least(LANES, to.channels - g * LANES));
            Vec square[LANES];
            for (int j = 0; j < count; j++) square[j] = slots[j].at[g * slots[j].step] + shift;
            for (int j = count; j < LANES; j++) square[j] = Vec{};
            transpose(square);
            for (int c = 0; c < some; c++) {
                if (added) square[c] += gather(added + c * residual.channel, residual.column, count);
                scatter(pixel + c * y.channel, 1, square[c], count);
            }
            pixel += LANES * y.channel;
            if (added) added += LANES * residual.channel;
        }
        i += count;
    }
}

}  // namespace WK_NAMESPACE
}  // namespace wk
