// Conversion between the caller's tensors and packed blocks: LANES channels of one image, pixel by pixel, one vector each.
#pragma once

#include "simd.hpp"

namespace wk {
namespace WK_NAMESPACE {

// A packed plane: pixel (i, j) is at[i * row + j * column].
struct Plane {
    Vec *at;
    int64_t row, column;

    WK_INLINE Plane from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
    WK_INLINE Plane transposed() const { return {at, column, row}; }
};

// The same over any memory, a packed plane or a caller's tensor: strides are in floats.
struct Field {
    float *at = nullptr;
    int64_t row = 0, column = 0;

    Field() = default;
    WK_INLINE Field(float *start, int64_t down, int64_t right) : at(start), row(down), column(right) {}
    WK_INLINE Field(const Plane &plane)  // NOLINT: a plane is a field
        : at(reinterpret_cast<float *>(plane.at)), row(plane.row * LANES), column(plane.column * LANES) {}
    WK_INLINE float *pixel(int64_t i, int64_t j) const { return at + i * row + j * column; }
    WK_INLINE Field transposed() const { return {at, column, row}; }
};

// The part of a caller's tensor that one block covers: `channels` ≤ LANES of one image.
template <class Type> struct Block {
    typename Type::Stored *at;
    int64_t channel, row, column;  // strides
    int channels;
};

WK_INLINE int64_t absolute(int64_t value) { return value < 0 ? -value : value; }

// Whether the channels of a pixel are adjacent, so that pixels are read one after another.
template <class Type> WK_INLINE bool channels_adjoin(const Block<Type> &block) {
    return block.channel == 1 || block.channels == 1;
}

// Visits the pixels of a plane row by row. Rows may be only a few pixels long, so their ends cost no branch.
struct Walk {
    Vec *at;
    int64_t columns, column = 0, step, turn;

    Walk(const Plane &plane, int64_t width)
        : at(plane.at), columns(width), step(plane.column), turn(plane.row - (width - 1) * plane.column) {}

    WK_INLINE void next() {
        const bool ends = ++column == columns;
        at += ends ? turn : step;
        column = ends ? 0 : column;
    }
};

// Numbers in a block that are fetched while the block before is packed.
constexpr int64_t FETCHED_NUMBERS = 4096;

// Copy rows [0, rows) × columns [0, columns) of a block into a plane.
template <class Type> void pack(const Plane &to, const Block<Type> &from, int64_t rows, int64_t columns) {
    if (channels_adjoin(from)) {
        for (int64_t i = 0; i < rows; i++) {
            const typename Type::Stored *pixel = from.at + i * from.row;
            Vec *out = to.at + i * to.row;
            if (from.channels == LANES)
                for (int64_t j = 0; j < columns; j++, pixel += from.column) out[j * to.column] = Type::load(pixel);
            else
                for (int64_t j = 0; j < columns; j++, pixel += from.column)
                    out[j * to.column] = load_some<Type>(pixel, from.channels);
        }
        return;
    }
    // Columns are adjacent: squares of LANES channels × LANES pixels are transposed. Rows without a gap between them are read
    // as one; otherwise narrow maps would leave most of each square empty. A full square stays in registers.
    bool joined = from.row == columns;
    int64_t runs = joined ? 1 : rows, length = joined ? rows * columns : columns;
    // The block behind this one is probably next. In small maps, every row of a square starts another stream of addresses.
    const int64_t behind = absolute(from.channel) * LANES;
    const bool fetches = behind <= FETCHED_NUMBERS;
    for (int64_t run = 0; run < runs; run++) {
        Walk walk(to.from(run, 0), columns);
        for (int64_t p = 0; p < length; p += LANES) {
            int count = static_cast<int>(least(LANES, length - p));
            const typename Type::Stored *source = from.at + run * from.row + p;
            if (fetches)
                for (int c = 0; c < from.channels; c++) __builtin_prefetch(source + c * from.channel + behind, 0, 2);
            if (count == LANES && from.channels == LANES) {
                Vec square[LANES];
                unroll<LANES>([&](auto c) { square[c] = Type::load(source + c * from.channel); });
                transpose(square);
                unroll<LANES>([&](auto i) {
                    *walk.at = square[i];
                    walk.next();
                });
                continue;
            }
            Vec square[LANES];
            for (int c = 0; c < LANES; c++)
                square[c] = c < from.channels ? load_some<Type>(source + c * from.channel, count) : Vec{};
            transpose(square);
            for (int i = 0; i < count; i++) {
                *walk.at = square[i];
                walk.next();
            }
        }
    }
}

// Copy a plane into rows [0, rows) × columns [0, columns) of a block; `finish` maps each vector before it is stored.
template <class Type, class Finish>
void unpack(const Block<Type> &to, const Plane &from, int64_t rows, int64_t columns, Finish &&finish) {
    if (channels_adjoin(to)) {
        for (int64_t i = 0; i < rows; i++) {
            typename Type::Stored *pixel = to.at + i * to.row;
            const Vec *in = from.at + i * from.row;
            if (to.channels == LANES)
                for (int64_t j = 0; j < columns; j++, pixel += to.column) Type::store(pixel, finish(in[j * from.column]));
            else
                for (int64_t j = 0; j < columns; j++, pixel += to.column)
                    store_some<Type>(pixel, finish(in[j * from.column]), to.channels);
        }
        return;
    }
    bool joined = to.row == columns;
    int64_t runs = joined ? 1 : rows, length = joined ? rows * columns : columns;
    for (int64_t run = 0; run < runs; run++) {
        Walk walk(from.from(run, 0), columns);
        for (int64_t p = 0; p < length; p += LANES) {
            int count = static_cast<int>(least(LANES, length - p));
            typename Type::Stored *target = to.at + run * to.row + p;
            if (count == LANES && to.channels == LANES) {
                Vec square[LANES];
                unroll<LANES>([&](auto i) {
                    square[i] = finish(*walk.at);
                    walk.next();
                });
                transpose(square);
                unroll<LANES>([&](auto c) { Type::store(target + c * to.channel, square[c]); });
                continue;
            }
            Vec square[LANES];
            for (int i = 0; i < LANES; i++) {
                square[i] = i < count ? finish(*walk.at) : Vec{};
                if (i < count) walk.next();
            }
            transpose(square);
            for (int c = 0; c < to.channels; c++) store_some<Type>(target + c * to.channel, square[c], count);
        }
    }
}

// The same for several neighboring blocks whose channels are adjacent. A single block is a short piece of every pixel, which
// caches and prefetchers handle badly. Here, memory is read and written in address order.
template <class Type>
void pack_together(Vec *const *to, int64_t row, int64_t column, const Block<Type> &first, int64_t blocks, int last, int64_t rows,
                   int64_t columns) {
    const int64_t full = last == LANES ? blocks : blocks - 1;
    for (int64_t i = 0; i < rows; i++) {
        const typename Type::Stored *pixel = first.at + i * first.row;
        for (int64_t j = 0, at = i * row; j < columns; j++, at += column, pixel += first.column) {
            for (int64_t b = 0; b < full; b++) to[b][at] = Type::load(pixel + b * LANES);
            if (full < blocks) to[full][at] = load_some<Type>(pixel + full * LANES, last);
        }
    }
}

template <class Type, class Finish>
void unpack_together(const Block<Type> &first, int64_t blocks, int last, Vec *const *from, int64_t row, int64_t rows,
                     int64_t columns, Finish &&finish) {
    const int64_t full = last == LANES ? blocks : blocks - 1;
    for (int64_t i = 0; i < rows; i++) {
        typename Type::Stored *pixel = first.at + i * first.row;
        for (int64_t j = 0, at = i * row; j < columns; j++, at++, pixel += first.column) {
            for (int64_t b = 0; b < full; b++) Type::store(pixel + b * LANES, finish(from[b][at], b));
            if (full < blocks) store_some<Type>(pixel + full * LANES, finish(from[full][at], full), last);
        }
    }
}

WK_INLINE void clear(Vec *at, int64_t count) {
    for (int64_t i = 0; i < count; i++) at[i] = Vec{};
}

}  // namespace WK_NAMESPACE
}  // namespace wk
