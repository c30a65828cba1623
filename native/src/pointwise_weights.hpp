// Weights of pointwise products in the order in which they are used.
#pragma once

#include "kernels.hpp"
#include "product.hpp"
#include "workspace.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Hidden units that are computed together: they stay in the cache until the second product has used them.
constexpr int64_t HIDDEN_CHUNK = ceil_div(256, PANEL) * PANEL * least(WORD, 2);
// Input channels whose products are summed in registers.
constexpr int64_t DEPTH_BLOCK = 512 * WORD;
// Units of a chunk fill whole panels and whole vectors of words.
constexpr int64_t CHUNK_UNIT = most(PANEL, GROUP);
static_assert(CHUNK_UNIT % PANEL == 0 && CHUNK_UNIT % GROUP == 0);

// `length` items in `count` equal pieces of whole `unit`s.
struct Pieces {
    int64_t length, size;

    Pieces(int64_t all, int64_t largest, int64_t unit)
        : length(all), size(ceil_div(ceil_div(all, ceil_div(all, largest)), unit) * unit) {}
    int64_t count() const { return ceil_div(length, size); }
    int64_t begin(int64_t index) const { return index * size; }
    int64_t in(int64_t index) const { return least(size, length - index * size); }
};

// Vectors of so many channels, and of their words.
inline int64_t vectors_for(int64_t channels) { return ceil_div(channels, LANES); }
inline int64_t words_for(int64_t channels) { return ceil_div(channels, GROUP); }
inline int64_t panels_for(int64_t channels) { return ceil_div(channels, PANEL); }

// The weights as packed. The first product's lie by chunk of hidden units, block of inputs, panel of hidden units; the second's by
// chunk of hidden units, panel of outputs. Within a panel, one line of columns follows another, and then those with its scales.
struct Weights {
    const wk_pointwise &of;
    Pieces chunks, blocks;

    explicit Weights(const wk_pointwise &packed)
        : of(packed), chunks(packed.hidden, HIDDEN_CHUNK, CHUNK_UNIT), blocks(packed.inputs, DEPTH_BLOCK, GROUP) {}

    float *first(int64_t chunk, int64_t block, int64_t panel) const {
        const int64_t columns = vectors_for(chunks.in(chunk)) * LANES;
        return of.first + chunks.begin(chunk) * first_lines() + (blocks.begin(block) / WORD + block * SCALE_LINES) * columns +
               panel * PANEL * (lines_for(blocks.in(block)) + SCALE_LINES);
    }
    float *second(int64_t chunk, int64_t panel) const {
        const int64_t columns = vectors_for(of.outputs) * LANES;
        return of.second + (chunks.begin(chunk) / WORD + chunk * SCALE_LINES) * columns +
               panel * PANEL * (lines_for(chunks.in(chunk)) + SCALE_LINES);
    }
    // Lines of all blocks, and of all chunks.
    int64_t first_lines() const { return lines_for(of.inputs) + blocks.count() * SCALE_LINES; }
    int64_t second_lines() const { return lines_for(of.hidden) + chunks.count() * SCALE_LINES; }
    // Vectors for the words of so many hidden units, from the beginning of a chunk on. If they are scaled, each chunk is.
    int64_t unit_words(int64_t units) const {
        return SCALED ? ceil_div(units, chunks.size) * (words_for(chunks.size) + SCALE_VECTORS) : words_for(units);
    }
    // Hidden units that exist at the same time: a norm needs all of a pixel.
    int64_t units() const { return of.normalize_after ? of.hidden : chunks.size; }
    static int64_t vectors(int64_t panel, int64_t channels) {
        return least(PANEL_VECTORS, vectors_for(channels) - panel * PANEL_VECTORS);
    }
};

// One panel, whose columns are numbers [begin, begin + depth) of rows of a matrix with `row` numbers each; those beyond `columns`
// are zero.
inline void pack_panel(const float *from, int64_t row, int64_t begin, int64_t columns, int64_t depth, int64_t vectors, float *to) {
    const int64_t lanes = vectors * LANES, lines = lines_for(depth);
    for (int64_t c = 0; c < lanes; c++) {
        const float *weight = from + c * row;
        const float scale = c < columns ? scale_of(weight, row) : 0.0f;
        for (int64_t k = 0; k < lines; k++)
            to[k * lanes + c] = word_of(weight + begin + k * WORD, c < columns ? depth - k * WORD : 0, scale);
        if constexpr (SCALED) {
            const int32_t sum = sum_of_words(to + c, lines, lanes);
            write(to + lines * lanes + c, sum);
            to[(lines + 1) * lanes + c] = scale;
        }
    }
}

// The most numbers of a patch that are gathered one by one.
constexpr int64_t MOST_DENSE = 1024;

// Few channels would leave most of a vector for each tap empty.
inline void set_depth(wk_pointwise &packed) {
    const int64_t channels = packed.channels, taps = packed.patch.rows ? int64_t{packed.patch.rows} * packed.patch.columns : 1;
    const int64_t whole = vectors_for(channels) * LANES;
    packed.dense = !packed.normalize && 4 * channels < 3 * whole && channels * taps <= MOST_DENSE;
    packed.inputs = static_cast<int32_t>(!packed.patch.rows ? channels : taps * (packed.dense ? channels : whole));
}

// (hidden, channels, taps) -> (hidden, taps, channels), with zeros up to the next whole vector.
inline void order_by_tap(const float *from, const wk_pointwise &packed, float *to) {
    const int64_t channels = packed.channels, taps = int64_t{packed.patch.rows} * packed.patch.columns;
    const int64_t whole = packed.inputs / taps;
    for (int64_t h = 0; h < packed.hidden; h++, from += channels * taps, to += packed.inputs)
        for (int64_t t = 0; t < taps; t++)
            for (int64_t c = 0; c < whole; c++) to[t * whole + c] = c < channels ? from[c * taps + t] : 0.0f;
}

inline void pack_bias(const float *from, int64_t channels, float *to) {
    for (int64_t c = 0; c < vectors_for(channels) * LANES; c++) to[c] = from && c < channels ? from[c] : 0.0f;
}

// Allocates and fills the pieces of `packed`, whose sizes are set.
inline int32_t pointwise_pack(const wk_pointwise_weights &from, wk_pointwise &packed) {
    set_depth(packed);
    float *by_tap = nullptr;
    if (packed.patch.rows && !packed.dense) {
        by_tap = static_cast<float *>(std::malloc(sizeof(float) * static_cast<size_t>(packed.hidden) * static_cast<size_t>(packed.inputs)));
        if (!by_tap) return WK_OUT_OF_MEMORY;
        order_by_tap(from.first, packed, by_tap);
    }
    const float *first = by_tap ? by_tap : from.first;
    const int64_t hidden = vectors_for(packed.hidden) * LANES, outputs = vectors_for(packed.outputs) * LANES;
    const int64_t after = packed.normalize_after ? hidden : 0;
    const Weights weights(packed);
    auto carve = [&](Carver &carver) {
        packed.first = carver.take<float>(hidden * weights.first_lines());
        packed.first_bias = carver.take<float>(hidden);
        packed.second = carver.take<float>(outputs * weights.second_lines());
        packed.second_bias = carver.take<float>(outputs);
        packed.after_scale = carver.take<float>(after), packed.after_shift = carver.take<float>(after);
        packed.response = carver.take<float>(from.response ? hidden : 0);
    };
    Carver sizes{nullptr};
    carve(sizes);
    packed.bytes = sizes.used;
    packed.memory = allocate(packed.bytes);
    if (!packed.memory) {
        std::free(by_tap);
        return WK_OUT_OF_MEMORY;
    }
    Carver carver{static_cast<char *>(packed.memory)};
    carve(carver);
    for (int64_t c = 0; c < weights.chunks.count(); c++) {
        const int64_t unit = weights.chunks.begin(c), units = weights.chunks.in(c);
        for (int64_t b = 0; b < weights.blocks.count(); b++)
            for (int64_t p = 0; p < panels_for(units); p++)
                pack_panel(first + (unit + p * PANEL) * packed.inputs, packed.inputs, weights.blocks.begin(b), units - p * PANEL,
                           weights.blocks.in(b), weights.vectors(p, units), weights.first(c, b, p));
        for (int64_t p = 0; p < panels_for(packed.outputs); p++)
            pack_panel(from.second + p * PANEL * packed.hidden, packed.hidden, unit, packed.outputs - p * PANEL, units,
                       weights.vectors(p, packed.outputs), weights.second(c, p));
    }
    pack_bias(from.first_bias, packed.hidden, packed.first_bias);
    pack_bias(from.second_bias, packed.outputs, packed.second_bias);
    if (packed.normalize_after) {
        for (int64_t c = 0; c < hidden; c++)
            packed.after_scale[c] = c >= packed.hidden ? 0.0f : from.after_scale ? from.after_scale[c] : 1.0f;
        pack_bias(from.after_shift, packed.hidden, packed.after_shift);
    }
    if (from.response)
        pack_bias(from.response, packed.hidden, packed.response);
    else
        packed.response = nullptr;
    std::free(by_tap);
    return WK_OK;
}

}  // namespace WK_NAMESPACE
}  // namespace wk
