// The direct algorithm for kernels of few rows: the rows of the image pass through a small buffer, which is filled in turn.
//
// A row is copied into the buffer once, in the order of memory, and stays until all outputs that read it are computed. The
// buffer fits into the caches, and neither the image nor the result is packed as a whole. Where channels are adjacent, lanes are
// channels; where pixels are adjacent, lanes are pixels, and nothing is transposed.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// The buffers of neighboring blocks, a part of the second-level cache.
constexpr int64_t ROLLING_VECTORS = (int64_t{9} << 16) / static_cast<int64_t>(sizeof(Vec));

// The most rows of a kernel. With 16 registers, the tiles of this algorithm are small.
constexpr int64_t ROLLING_ROWS = WK_REGISTERS >= 32 ? 13 : FEW_ROWS;
// Kernels of up to this many rows always take this way, others if the image has at least this many numbers (16 MiB), which the
// caches do not hold. In the caches, copying rows costs more than it saves (measured on an AMD Zen 5).
constexpr int64_t ALWAYS_ROLLING_ROWS = WK_REGISTERS >= 32 ? 5 : 0, ROLLING_NUMBERS = int64_t{4} << 20;

// The sizes of a call. Tasks take some rows of outputs: at least FEW_HIGH.
struct Rolling {
    Extent taps{}, anchor{};
    int64_t height = 0, width = 0;
    bool pixels = false;  // lanes are pixels

    // Whether the kernel has few enough rows for an image of so many numbers, and the outputs fill a tile.
    bool pays(int64_t numbers) const {
        return taps.rows <= (numbers < ROLLING_NUMBERS ? ALWAYS_ROLLING_ROWS : ROLLING_ROWS) && height >= FEW_HIGH &&
               width >= (pixels ? LANES : FEW_WIDE);
    }

    int64_t slots() const { return FEW_HIGH + taps.rows - 1; }
    // Vectors of a row in the buffer, and of its results. Odd, so that rows do not compete for the same part of a cache.
    int64_t pitch() const { return (pixels ? ceil_div(width + taps.columns - 1, LANES) : width) | 1; }
    int64_t out_pitch() const { return (pixels ? ceil_div(width, LANES) : width) | 1; }
    // Working memory of a block, in vectors.
    int64_t room() const { return slots() * pitch() + FEW_HIGH * out_pitch(); }
    int64_t most_together() const { return pixels ? 1 : most(1, least(MOST_TOGETHER, ROLLING_VECTORS / room())); }
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
        if (!shape.pixels) {
            run_channels();
            return;
        }
        clear(room, shape.slots() * shape.pitch());  // no pixel is ever written beside the image
        for (int lane = 0; lane < x.channels; lane++) run_pixels(lane);
    }

  private:
    static constexpr bool FLOATS = sizeof(typename Type::Stored) == sizeof(float);

    // Calls `pack(row, slot)` once for every row that the task reads, with its place in the buffer, and `compute(c, a, next)` for
    // FEW_HIGH rows of outputs from row a. The rows from `next` are packed later.
    template <class Pack, class Compute> void roll(const float *buffer, Pack &&pack, Compute &&compute) const {
        const int64_t above = shape.anchor.rows, slots = shape.slots(), pitch = shape.pitch() * LANES;
        const float *rows[FEW_HIGH + ROLLING_ROWS - 1];
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

    void run_channels() const {
        const int64_t width = shape.width, slots = shape.slots(), pitch = shape.pitch(), out_pitch = shape.out_pitch();
        Vec *outputs[MOST_TOGETHER], start[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) {
            outputs[b] = room + blocks * slots * pitch + b * FEW_HIGH * out_pitch;
            start[b] = shift ? load_some<Float32>(shift + b * LANES, b == blocks - 1 ? last : LANES) : Vec{};
        }
        const bool direct = FLOATS && last == LANES;
        const FewRowsTurns<FEW_WIDE, false> turns(shape.taps.rows);
        auto pack_row = [&](int64_t row, int64_t slot) {
            Plane planes[MOST_TOGETHER];
            for (int64_t b = 0; b < blocks; b++) planes[b] = {room + (b * slots + slot) * pitch, pitch, 1};
            pack_blocks<Type>(planes, blocks, rows_from(x, row), last, {1, width});
        };
        roll(reinterpret_cast<float *>(room), pack_row, [&](FewRows &c, int64_t a, int64_t next) {
            const int64_t ahead = least(FEW_HIGH, shape.height - next);
            c.x_tap = c.x_tile = LANES;
            c.out_row = direct ? y.row : out_pitch * LANES, c.out_tile = direct ? y.column : LANES;
            for (int64_t column = 0; column < width; column += FEW_WIDE) {
                const int64_t at = least(column, width - FEW_WIDE), first = at - shape.anchor.columns;
                c.left = -first, c.right = width - first;
                for (int64_t b = 0; b < blocks; b++) {
                    for (int64_t i = 0; i < ahead; i++)
                        for (int64_t t = 0; t < FEW_WIDE; t++)
                            __builtin_prefetch(x.at + (next + i) * x.row + (at + t) * x.column + b * LANES, 0, 2);
                    c.x = first * LANES + b * slots * pitch * LANES;
                    c.w = reinterpret_cast<const float *>(window + b * window_block), c.start = start[b];
                    c.out = direct ? reinterpret_cast<float *>(y.at + a * y.row + at * y.column + b * LANES)
                                   : reinterpret_cast<float *>(outputs[b] + at);
                    turns.run(c);
                }
            }
            if (direct) return;
            if (blocks == 1)
                unpack<Type>(rows_from(y, a), {outputs[0], out_pitch, 1}, FEW_HIGH, width, [](Vec v) { return v; });
            else
                unpack_together<Type>(rows_from(y, a), blocks, last, outputs, out_pitch, FEW_HIGH, width,
                                      [](Vec v, int64_t) { return v; });
        });
        if (stream) finish_writes();
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
        if (stream) finish_writes();
    }

    // Copies the pixels of a row by whole vectors, the last of which may overlap the one before.
    template <class To, class From, class Copy> void copy_row(To *to, const From *from, Copy &&copy) const {
        for (int64_t at = 0; at < shape.width; at += LANES) {
            const int64_t p = least(at, shape.width - LANES);
            copy(to + p, from + p);
        }
    }

    static Block<Type> rows_from(const Block<Type> &block, int64_t row) {
        return {block.at + row * block.row, block.channel, block.row, block.column, block.channels};
    }
};

}  // namespace WK_NAMESPACE
}  // namespace wk
