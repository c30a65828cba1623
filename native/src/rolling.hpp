// The direct algorithm for kernels of few rows, which takes the image in the order of memory.
//
// Where channels are adjacent, lanes are channels. The image is read in place: a few rows of outputs at a time, and there pixel
// by pixel, each with many neighboring channels. If caches handle its strides badly, or it is not of vectors of float32, its rows
// pass through a small buffer instead, which is filled in turn. A row is copied once and stays until all outputs that read it are
// computed. Where pixels are adjacent, rows pass through such a buffer, lanes are pixels, and nothing is transposed. Neither the
// image nor the result is packed as a whole.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// The buffers of neighboring blocks, a part of the second-level cache.
constexpr int64_t ROLLING_VECTORS = (int64_t{9} << 16) / static_cast<int64_t>(sizeof(Vec));
// Otherwise, images of kernels of up to this many rows pass through a buffer, those of up to FEW_ROWS if the image has at least so
// many numbers (16 MiB), which the caches do not hold. In the caches, copying rows costs more than it saves (measured on an AMD Zen 5).
constexpr int64_t ALWAYS_ROLLING_ROWS = WK_REGISTERS >= 32 ? 5 : 0, ROLLING_NUMBERS = int64_t{4} << 20;

// Kernels whose images are read in place (the rules were measured on an AMD Zen 4): those of up to FEW_ROWS rows, and those of more,
// in turns, if they have more than FEW_TAPS taps, with which Sum would pack the image. Larger ones gain more from packing.
constexpr int64_t IN_ORDER_ROWS = WK_REGISTERS >= 32 ? 13 : 0, IN_ORDER_TAPS = 91;
// Neighboring blocks that are read in place together: 2 KiB of each pixel.
constexpr int64_t IN_ORDER_BLOCKS = 2048 / static_cast<int64_t>(sizeof(Vec));
// At distances of so many bytes, pixels or rows compete for a few sets, or a single one, of a first-level cache.
constexpr int64_t FEW_SETS = 2048, SAME_SET = 4096;

constexpr int64_t MOST_ROWS_IN_TURNS = most(FEW_ROWS, IN_ORDER_ROWS);

// Bytes from a pixel of an image to the next one in a row, and in a column.
struct Distances {
    int64_t column = 0, row = 0;
};

// The sizes of a call. Tasks take some rows of outputs: at least FEW_HIGH.
struct Rolling {
    Extent taps{}, anchor{};
    int64_t height = 0, width = 0;
    bool pixels = false;    // lanes are pixels
    bool in_order = false;  // whole blocks are read in place

    Rolling() = default;
    // The distances are 0 unless lanes are channels of float32.
    Rolling(Extent of_taps, Extent of_anchor, Extent image, bool lanes_are_pixels, Distances apart)
        : taps(of_taps), anchor(of_anchor), height(image.rows), width(image.columns), pixels(lanes_are_pixels) {
        const bool fits = taps.area() <= IN_ORDER_TAPS &&
                          taps.rows <= (taps.area() > FEW_TAPS ? IN_ORDER_ROWS : least(IN_ORDER_ROWS, FEW_ROWS));
        const bool competes = apart.column % SAME_SET == 0 || (apart.column % FEW_SETS == 0 && taps.columns > 3);
        // What the alternatives of the larger kernels do not suffer from: rows that compete, and the last tile's overlap.
        const bool larger = taps.rows > ALWAYS_ROLLING_ROWS;
        const bool overlaps = 10 * FEW_HIGH * ceil_div(height, FEW_HIGH) > 11 * height;
        in_order = apart.column > 0 && fits && !competes && !(larger && (overlaps || apart.row % SAME_SET == 0));
    }

    // Whether the kernel is small enough for an image of so many numbers, and the outputs fill a tile.
    bool pays(int64_t numbers) const {
        return (in_order || taps.rows <= (numbers < ROLLING_NUMBERS ? ALWAYS_ROLLING_ROWS : FEW_ROWS)) && height >= FEW_HIGH &&
               width >= (pixels ? LANES : FEW_WIDE);
    }

    int64_t slots() const { return FEW_HIGH + taps.rows - 1; }
    // Vectors of a row in the buffer, and of its results. Odd, so that rows do not compete for the same part of a cache.
    int64_t pitch() const { return (pixels ? ceil_div(width + taps.columns - 1, LANES) : width) | 1; }
    int64_t out_pitch() const { return (pixels ? ceil_div(width, LANES) : width) | 1; }
    // Working memory of a block in the buffer, in vectors.
    int64_t room() const { return slots() * pitch() + FEW_HIGH * out_pitch(); }
    // How many of the blocks in a group need it: those that are not read in place.
    int64_t buffered(int64_t together, int64_t channels) const { return !in_order ? together : channels % LANES == 0 ? 0 : 1; }

    // Number of blocks in a group.
    int64_t together(int64_t blocks, int64_t images, int64_t threads) const {
        if (!in_order) {
            const int64_t fitting = pixels ? 1 : most(1, least(MOST_TOGETHER, ROLLING_VECTORS / room()));
            return least(blocks_together(!pixels, false, blocks, images, threads), fitting);
        }
        const int64_t bands = images * (height / FEW_HIGH);
        const int64_t groups = most(ceil_div(blocks, IN_ORDER_BLOCKS), least(blocks, ceil_div(4 * threads, bands)));
        return ceil_div(blocks, groups);
    }
};

// What a task of a call needs: the image and the result from row 0, and the kernels of the blocks.
template <class Type> struct RollingTask {
    const Rolling &shape;
    Block<Type> x, y;
    int64_t begin, end;  // rows of outputs
    int64_t blocks;
    int last;  // lanes of the last block
    const Vec *window;
    int64_t window_block;
    const float *shift;  // null for zeros
    bool relu, stream;
    Vec *room;

    void run() const {
        if (shape.pixels) {
            clear(room, shape.slots() * shape.pitch());  // no pixel is ever written beside the image
            for (int lane = 0; lane < x.channels; lane++) run_pixels(lane);
        } else if constexpr (FLOATS) {
            const int64_t whole = !shape.in_order ? 0 : last == LANES ? blocks : blocks - 1;
            if (whole > 0) run_in_order(whole);
            if (whole < blocks) run_channels(whole);
        } else {
            run_channels(0);
        }
        if (stream) finish_writes();
    }

  private:
    static constexpr bool FLOATS = sizeof(typename Type::Stored) == sizeof(float);

    // Calls `pack(row, slot)` once for every row that the task reads, with its place in the buffer, and `compute(c, a, next)` for
    // FEW_HIGH rows of outputs from row a. The rows from `next` are packed later.
    template <class Pack, class Compute> void roll(const float *buffer, Pack &&pack, Compute &&compute) const {
        const int64_t above = shape.anchor.rows, slots = shape.slots(), pitch = shape.pitch() * LANES;
        const float *rows[FEW_HIGH + MOST_ROWS_IN_TURNS - 1];
        FewRows c;
        c.rows = rows, c.columns = shape.taps.columns, c.relu = relu, c.stream = stream;
        int64_t packed = most(0, begin - above), slot = packed % slots;
        for (int64_t tile = begin; tile < end; tile += FEW_HIGH) {
            const int64_t a = least(tile, end - FEW_HIGH), next = least(shape.height, a + slots - above);
            for (; packed < next; packed++, slot = slot + 1 < slots ? slot + 1 : 0) pack(packed, slot);
            c.top = above - a, c.bottom = shape.height + above - a;
            const float *row = buffer + (a - above + slots) % slots * pitch, *end_of_buffer = buffer + slots * pitch;
            for (int64_t v = 0; v < slots; v++) {
                rows[v] = row;
                row = row + pitch < end_of_buffer ? row + pitch : buffer;
            }
            compute(c, a, next);
        }
    }

    Vec start_of(int64_t block) const {
        return shift ? load_some<Float32>(shift + block * LANES, block == blocks - 1 ? last : LANES) : Vec{};
    }

    // Blocks 0 … whole - 1, which have a channel in every lane.
    void run_in_order(int64_t whole) const {
        const int64_t width = shape.width, above = shape.anchor.rows, slots = shape.slots();
        const FewRowsTurns<FEW_WIDE, false> turns(shape.taps.rows);
        const float *rows[FEW_HIGH + MOST_ROWS_IN_TURNS - 1];
        FewRows c;
        c.rows = rows, c.columns = shape.taps.columns, c.relu = relu, c.stream = stream;
        c.x_tap = c.x_tile = x.column, c.out_row = y.row, c.out_tile = y.column;
        for (int64_t tile = begin; tile < end; tile += FEW_HIGH) {
            const int64_t a = least(tile, end - FEW_HIGH), next = a - above + slots;
            const int64_t ahead = least(FEW_HIGH, shape.height - next);
            c.top = above - a, c.bottom = shape.height + above - a;
            for (int64_t v = 0; v < slots; v++) rows[v] = x.at + (a - above + v) * x.row;
            for (int64_t column = 0; column < width; column += FEW_WIDE) {
                const int64_t at = least(column, width - FEW_WIDE), first = at - shape.anchor.columns;
                c.left = -first, c.right = width - first;
                for (int64_t b = 0; b < whole; b++) {
                    for (int64_t i = 0; i < ahead; i++)
                        for (int64_t t = 0; t < FEW_WIDE; t++)
                            __builtin_prefetch(x.at + (next + i) * x.row + (at + t) * x.column + b * LANES, 0, 2);
                    c.x = first * x.column + b * LANES;
                    c.w = reinterpret_cast<const float *>(window + b * window_block), c.start = start_of(b);
                    c.out = y.at + a * y.row + at * y.column + b * LANES;
                    turns.run(c);
                }
            }
        }
    }

    // The blocks from `from`, through the buffer.
    void run_channels(int64_t from) const {
        const int64_t width = shape.width, slots = shape.slots(), pitch = shape.pitch(), out_pitch = shape.out_pitch();
        const int64_t count = blocks - from;
        Vec *outputs[MOST_TOGETHER], start[MOST_TOGETHER];
        for (int64_t b = 0; b < count; b++) {
            outputs[b] = room + count * slots * pitch + b * FEW_HIGH * out_pitch;
            start[b] = start_of(from + b);
        }
        const Block<Type> image = block_from(x, from), result = block_from(y, from);
        const Vec *const windows = window + from * window_block;
        const bool direct = FLOATS && last == LANES;
        const FewRowsTurns<FEW_WIDE, false> turns(shape.taps.rows);
        auto pack_row = [&](int64_t row, int64_t slot) {
            Plane planes[MOST_TOGETHER];
            for (int64_t b = 0; b < count; b++) planes[b] = {room + (b * slots + slot) * pitch, pitch, 1};
            pack_blocks<Type>(planes, count, rows_from(image, row), last, {1, width});
        };
        roll(reinterpret_cast<float *>(room), pack_row, [&](FewRows &c, int64_t a, int64_t next) {
            const int64_t ahead = least(FEW_HIGH, shape.height - next);
            c.x_tap = c.x_tile = LANES;
            c.out_row = direct ? y.row : out_pitch * LANES, c.out_tile = direct ? y.column : LANES;
            for (int64_t column = 0; column < width; column += FEW_WIDE) {
                const int64_t at = least(column, width - FEW_WIDE), first = at - shape.anchor.columns;
                c.left = -first, c.right = width - first;
                for (int64_t b = 0; b < count; b++) {
                    for (int64_t i = 0; i < ahead; i++)
                        for (int64_t t = 0; t < FEW_WIDE; t++)
                            __builtin_prefetch(image.at + (next + i) * x.row + (at + t) * x.column + b * LANES, 0, 2);
                    c.x = first * LANES + b * slots * pitch * LANES;
                    c.w = reinterpret_cast<const float *>(windows + b * window_block), c.start = start[b];
                    c.out = direct ? reinterpret_cast<float *>(result.at + a * y.row + at * y.column + b * LANES)
                                   : reinterpret_cast<float *>(outputs[b] + at);
                    turns.run(c);
                }
            }
            if (direct) return;
            if (count == 1)
                unpack<Type>(rows_from(result, a), {outputs[0], out_pitch, 1}, FEW_HIGH, width, [](Vec v) { return v; });
            else
                unpack_together<Type>(rows_from(result, a), count, last, outputs, out_pitch, FEW_HIGH, width,
                                      [](Vec v, int64_t) { return v; });
        });
    }

    void run_pixels(int lane) const {
        constexpr int64_t LINE = 64 / sizeof(typename Type::Stored), AHEAD = 64 * LINE;
        const int64_t width = shape.width, slots = shape.slots(), pitch = shape.pitch() * LANES;
        const int64_t out_pitch = shape.out_pitch() * LANES;
        float *buffer = reinterpret_cast<float *>(room), *outputs = buffer + slots * pitch;
        const FewRowsTurns<FEW_WIDE, true> wide(shape.taps.rows);
        const FewRowsTurns<1, true> narrow(shape.taps.rows);
        const typename Type::Stored *from = x.at + lane * x.channel;
        typename Type::Stored *to = y.at + lane * y.channel;
        auto pack_row = [&](int64_t row, int64_t slot) {
            const typename Type::Stored *at = from + row * x.row;
            for (int64_t p = 0; p < width; p += LINE) __builtin_prefetch(at + AHEAD + p, 0, 2);
            copy_row(buffer + slot * pitch + shape.anchor.columns, at,
                     [](float *out, const typename Type::Stored *in) { write(out, Type::load(in)); });
        };
        roll(buffer, pack_row, [&](FewRows &c, int64_t a, int64_t) {
            c.x_tap = 1, c.x_tile = c.out_tile = LANES;
            c.left = 0, c.right = 0;
            c.out_row = FLOATS ? y.row : out_pitch;
            c.w = reinterpret_cast<const float *>(window) + lane;
            c.start = shift ? all(shift[lane]) : Vec{};
            for (int64_t column = 0; column < width;) {
                const bool two = width - column > LANES && width >= FEW_WIDE * LANES;
                const int64_t covered = two ? FEW_WIDE * LANES : LANES, at = least(column, width - covered);
                c.x = at;
                c.out = FLOATS ? reinterpret_cast<float *>(to + a * y.row + at) : outputs + at;
                if (two)
                    wide.run(c);
                else
                    narrow.run(c);
                column += covered;
            }
            if (FLOATS) return;
            for (int64_t r = 0; r < FEW_HIGH; r++)
                copy_row(to + (a + r) * y.row, outputs + r * out_pitch,
                         [](typename Type::Stored *out, const float *in) { Type::store(out, read<Vec>(in)); });
        });
    }

    // Copies the pixels of a row by whole vectors, the last of which may overlap the one before.
    template <class To, class From, class Copy> void copy_row(To *to, const From *from, Copy &&copy) const {
        for (int64_t at = 0; at < shape.width; at += LANES) {
            const int64_t p = least(at, shape.width - LANES);
            copy(to + p, from + p);
        }
    }

    Block<Type> block_from(const Block<Type> &first, int64_t block) const {
        const int channels = block == blocks - 1 ? last : static_cast<int>(LANES);
        return {first.at + block * LANES * first.channel, first.channel, first.row, first.column, channels};
    }
    static Block<Type> rows_from(const Block<Type> &block, int64_t row) {
        return {block.at + row * block.row, block.channel, block.row, block.column, block.channels};
    }
};

}  // namespace WK_NAMESPACE
}  // namespace wk
