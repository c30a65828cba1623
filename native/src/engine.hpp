// Runs whole calls: cuts them into blocks of channels and bands of rows, packs, computes and unpacks.
#pragma once

#include "dilated.hpp"
#include "hybrid.hpp"
#include "kernels.hpp"
#include "threads.hpp"
#include "workspace.hpp"

namespace wk {
namespace WK_NAMESPACE {

// A block and its results should stay in the second-level cache.
constexpr int64_t CACHED_VECTORS = (int64_t{5} << 18) / static_cast<int64_t>(sizeof(Vec));
// Blocks that are packed together when channels are adjacent; transforms and branches need room in the cache, too.
constexpr int64_t MOST_TOGETHER = 8, MOST_TOGETHER_HYBRID = 4;

// A pass as computed: tall kernels are transposed, so that the micro-kernels slide along the long axis.
struct Step {
    Extent taps, anchor;  // transposed, if `turned`
    int64_t dilation;
    bool turned, hybrid;
    Tiling tiling;
    Tables tables;
    Vec *packed;  // kernels of all blocks, or their spectra, or (weight gradient) the sums
    int64_t packed_block;

    static Step of(const wk_pass &pass) {
        Step step{};
        step.hybrid = pass.method != WK_DIRECT, step.dilation = pass.dilation;
        step.turned = step.hybrid ? pass.method == WK_HYBRID_ALONG_COLUMNS : !step.dilated() && pass.rows > pass.columns;
        step.taps = {pass.rows, pass.columns}, step.anchor = {pass.row, pass.column};
        if (step.turned) step.taps = step.taps.transposed(), step.anchor = step.anchor.transposed();
        return step;
    }
    Plane seen(const Plane &plane) const { return turned ? plane.transposed() : plane; }
    Field seen(const Field &field) const { return turned ? field.transposed() : field; }
    Extent seen(const Extent &extent) const { return turned ? extent.transposed() : extent; }
    int64_t spectrum_column() const { return taps.rows | 1; }
    bool dilated() const { return dilation > 1; }
    Dilated dilated_from(int64_t shift) const { return {taps, anchor, dilation, shift}; }

    // How far the pass reaches above and below an output, and the zeros that it needs beside the input.
    static int64_t above(const wk_pass &pass) { return int64_t{pass.row} * pass.dilation; }
    static int64_t below(const wk_pass &pass) { return int64_t{pass.rows - 1 - pass.row} * pass.dilation; }
    int64_t margin() const {
        return dilated() ? dilation * most(anchor.columns, taps.columns - 1 - anchor.columns) : MARGIN;
    }
};

// Output rows that are computed together, with the rows of the input that they depend on.
struct Band {
    int64_t begin, end, from, to;
    Extent outputs, inputs;

    // Bands begin at multiples of `unit` rows, of which there must be `count`.
    static Band of(int64_t index, int64_t count, int64_t height, int64_t width, int64_t above, int64_t below, int64_t unit = 1) {
        const int64_t units = height / unit;
        Band band;
        band.begin = units * index / count * unit, band.end = index + 1 < count ? units * (index + 1) / count * unit : height;
        band.from = most(0, band.begin - above), band.to = least(height, band.end + below);
        band.outputs = {band.end - band.begin, width}, band.inputs = {band.to - band.from, width};
        return band;
    }
    // Where an output row lies in the packed input.
    int64_t shift() const { return begin - from; }
};

template <class Type>
Block<Type> block_of(const wk_tensor &tensor, int64_t image, int64_t channel, int64_t row, int64_t channels) {
    typedef typename Type::Stored Stored;
    Stored *at = static_cast<Stored *>(tensor.data) + image * tensor.image + channel * tensor.channel + row * tensor.row;
    return {at, tensor.channel, tensor.row, tensor.column, static_cast<int>(least(LANES, channels - channel))};
}

// An input plane has a margin of zeros on each side, which lets the rows of a tile share their kernel rows. Beside the plane, it
// is as wide as dilated kernels need it.
struct Padded {
    int64_t rows, columns, margin, pitch;
    Padded(Extent extent, int64_t beside)
        : rows(extent.rows), columns(extent.columns), margin(beside), pitch((extent.columns + 2 * beside) | 1) {}
    int64_t room() const { return (rows + 2 * MARGIN) * pitch; }

    // The plane in that memory, with its margin cleared.
    Plane plane(Vec *at) const {
        clear(at, MARGIN * pitch);
        clear(at + (rows + MARGIN) * pitch, MARGIN * pitch);
        for (int64_t i = MARGIN; i < rows + MARGIN; i++) {
            clear(at + i * pitch, margin);
            clear(at + i * pitch + columns + margin, margin);
        }
        return {at + MARGIN * pitch + margin, pitch, 1};
    }
};

// Number of blocks in a group: as large as possible while there is work for all threads, and even.
inline int64_t blocks_together(bool adjoin, bool hybrid, int64_t blocks, int64_t images, int64_t threads) {
    int64_t together = !adjoin ? 1 : hybrid ? MOST_TOGETHER_HYBRID : MOST_TOGETHER;
    while (together > 1 && images * ceil_div(blocks, together) < 2 * threads) together /= 2;
    return ceil_div(blocks, ceil_div(blocks, together));
}

// Number of bands: few enough rows for the cache, and enough pieces of work for all threads.
inline int64_t bands_for(int64_t pieces, int64_t threads, int64_t height, int64_t vectors_a_row, bool hybrid) {
    int64_t bands = ceil_div(height * vectors_a_row, CACHED_VECTORS);
    if (threads > 1 && pieces < 4 * threads) {
        int64_t wanted = hybrid ? (pieces < threads ? ceil_div(threads, pieces) : 1) : ceil_div(4 * threads, pieces);
        bands = most(bands, least(wanted, most(1, hybrid ? ceil_div(height, 8) : height / FEW_HIGH)));
    }
    return least(most(bands, 1), height);
}

// Kernels with at most this many taps are computed in place if the image's channels are adjacent: packing would take as long.
constexpr int64_t FEW_TAPS = 64, NARROW_MAP = 40;
// Results with at least this many numbers (32 MiB) are written past the caches, which would not keep them for their reader.
constexpr int64_t STREAMED_NUMBERS = int64_t{8} << 20;
inline bool is_aligned(const wk_tensor &tensor, bool pixels) {
    const int64_t strides = tensor.image | tensor.row | (pixels ? tensor.channel : tensor.column);
    return reinterpret_cast<uintptr_t>(tensor.data) % sizeof(Vec) == 0 && strides % LANES == 0;
}
inline int lanes_of(int64_t block, int64_t channels) { return static_cast<int>(least(LANES, channels - block * LANES)); }

// Pack `blocks` neighboring blocks, of which `from` is the first, into planes of the same strides.
template <class Type>
void pack_blocks(const Plane *planes, int64_t blocks, const Block<Type> &from, int last_lanes, const Extent &extent) {
    if (blocks == 1) {
        pack<Type>(planes[0], from, extent.rows, extent.columns);
        return;
    }
    Vec *at[MOST_TOGETHER];
    for (int64_t b = 0; b < blocks; b++) at[b] = planes[b].at;
    pack_together<Type>(at, planes[0].row, planes[0].column, from, blocks, last_lanes, extent.rows, extent.columns);
}

}  // namespace WK_NAMESPACE
}  // namespace wk
