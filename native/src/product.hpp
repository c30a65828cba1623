// The inner loops of matrix products: a tile of up to TILE_ROWS rows times a panel of up to PANEL_VECTORS vectors of columns,
// summed in registers.
//
// Rows are stored in groups of LANES channels: channel g * LANES + i of row m is at[(g * rows + m) * LANES + i]. Results of one
// product are thus stored by whole vectors, and are at once the rows of the next product. A panel has its columns side by side.
#pragma once

#include "simd.hpp"

namespace wk {
namespace WK_NAMESPACE {

// All sums of a tile, a vector of each column and one factor must fit into the registers.
// NEON keeps some registers for addresses of scalars; without fused multiply-add, products need room.
constexpr int TILE_ROWS = WK_REGISTERS >= 32 ? (LANES > 4 ? 14 : 12) : LANES > 4 ? 6 : 4;
constexpr int PANEL_VECTORS = 2;
constexpr int64_t PANEL = PANEL_VECTORS * LANES;
// Channels are added in groups of this number; missing ones are zero.
constexpr int64_t UNROLLED = 4;
WK_INLINE constexpr int64_t lines_for(int64_t channels) { return ceil_div(channels, UNROLLED) * UNROLLED; }
// In floats.
constexpr int64_t CACHE_LINE = 16;

// The value at an address in every lane (NEON: in the first one). The compiler would fold it into each product that uses it, and
// loads would be the limit.
WK_INLINE Vec spread(const float *at) {
#if defined(__AVX__)
    Vec value;
    asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*at));
    return value;
#elif defined(__aarch64__)
    Vec value;
    asm volatile("ldr %s0, %1" : "=w"(value) : "m"(*at));  // in this order: otherwise all loads come first and are spilled
    return value;
#else
    Vec value = all(*at);
    hold(value);
    return value;
#endif
}

// sum += a · b, where `a` comes from `spread`. In place: otherwise the compiler renames the sums and spills them.
WK_INLINE void add_product(Vec &sum, const Vec &a, const Vec &b) {
#if defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__aarch64__)
    asm volatile("fmla %0.4s, %2.4s, %1.s[0]" : "+w"(sum) : "w"(a), "w"(b));
#else
    sum += a * b;
#endif
}

// Memory to fetch into the second-level cache: `each` floats in every step of a product.
struct Fetch {
    const float *at;
    int64_t each;
};

// One more channel: `a` is that channel of the first row, `b` the panel's columns. Rows are STEP floats apart.
template <int ROWS, int VECTORS, int STEP = LANES> WK_INLINE void add_channel(Vec (&sum)[ROWS][VECTORS], const float *a, const float *b) {
    Vec column[VECTORS];
    unroll<VECTORS>([&](auto v) {
        column[v] = read<Vec>(b + v * LANES);
#if defined(__aarch64__)
        asm volatile("" : "+w"(column[v]));
#else
        hold(column[v]);
#endif
    });
    unroll<ROWS>([&](auto m) {
        const Vec factor = spread(a + m * STEP);
        unroll<VECTORS>([&](auto v) { add_product(sum[m][v], factor, column[v]); });
    });
}

// c = or += rows × panel. `a` has `depth` channels of ROWS rows, `b` as many lines of VECTORS vectors; `depth` is a multiple of
// UNROLLED. `c` has groups of ROWS rows.
template <int ROWS, int VECTORS>
void tile_product(const float *a, const float *b, int64_t depth, Vec *c, bool add, Fetch later) {
    Vec sum[ROWS][VECTORS];
    unroll<ROWS>([&](auto m) { unroll<VECTORS>([&](auto v) { sum[m][v] = Vec{}; }); });
    // One nest of loops: between two, the compiler would move all sums to memory and back.
    for (; depth > 0; depth -= LANES, a += ROWS * LANES) {
        const float *channel = a, *end = a + least(LANES, depth);
        do {
            for (int64_t i = 0; i < later.each; i += CACHE_LINE) __builtin_prefetch(later.at + i, 0, 2);
            later.at += later.each;
            unroll<UNROLLED>([&](auto i) { add_channel(sum, channel + i, b + i * VECTORS * LANES); });
            channel += UNROLLED, b += UNROLLED * VECTORS * LANES;
        } while (channel < end);
    }
    unroll<VECTORS>([&](auto v) {
        unroll<ROWS>([&](auto m) {
            Vec &to = c[v * ROWS + m];
            to = add ? to + sum[m][v] : sum[m][v];
        });
    });
}

typedef void (*TileProduct)(const float *a, const float *b, int64_t depth, Vec *c, bool add, Fetch later);

// The function for each number of rows (from 1) and vectors.
struct TileProducts {
    TileProduct of[PANEL_VECTORS][TILE_ROWS];
    constexpr TileProducts() : of() {
        unroll<TILE_ROWS>([&](auto m) { unroll<PANEL_VECTORS>([&](auto v) { of[v][m] = tile_product<m + 1, v + 1>; }); });
    }
};

inline const TileProduct *tile_products(int64_t vectors) {
    static constexpr TileProducts products;
    return products.of[vectors - 1];
}

}  // namespace WK_NAMESPACE
}  // namespace wk
