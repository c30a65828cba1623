// The inner loops of matrix products: a tile of up to TILE_ROWS rows times a panel of up to PANEL_VECTORS vectors of columns,
// summed in registers.
//
// Rows are stored in groups of LANES words (operands.hpp): word g * LANES + i of row m is at[(g * rows + m) * LANES + i]. Results
// of one product are thus stored by whole vectors, and if a word is a float, they are at once the rows of the next product. A
// panel has its columns side by side.
#pragma once

#include "operands.hpp"

namespace wk {
namespace WK_NAMESPACE {

// All sums of a tile, a vector of each column and one factor must fit into the registers.
// NEON keeps some registers for addresses of scalars; without fused multiply-add, products need room.
constexpr int TILE_ROWS = WK_REGISTERS >= 32 ? (LANES > 4 ? 14 : 12) : LANES > 4 ? 6 : 4;
constexpr int PANEL_VECTORS = 2;
constexpr int64_t PANEL = PANEL_VECTORS * LANES;
// Words are added in groups of this number; missing channels are zero.
constexpr int64_t UNROLLED = 4;
WK_INLINE constexpr int64_t lines_for(int64_t channels) { return ceil_div(channels, UNROLLED * WORD) * UNROLLED; }
// In words.
constexpr int64_t CACHE_LINE = 16;

// Memory to fetch into the second-level cache: `each` words in every step of a product.
struct Fetch {
    const float *at;
    int64_t each;
};

// One more word: `a` is that of the first row, `b` the panel's columns. Rows are STEP words apart.
template <int ROWS, int VECTORS, int STEP = LANES> WK_INLINE void add_word(Vec (&sum)[ROWS][VECTORS], const float *a, const float *b) {
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

// c = or += rows × panel. `a` has `depth` words of ROWS rows, `b` as many lines of VECTORS vectors; `depth` is a multiple of
// UNROLLED. `scales` are the vectors after the words of the rows, if words are scaled. `c` has groups of ROWS rows.
template <int ROWS, int VECTORS>
void tile_product(const float *a, const float *b, int64_t depth, const Vec *scales, Vec *c, bool add, Fetch later) {
    Vec sum[ROWS][VECTORS];
    unroll<ROWS>([&](auto m) { unroll<VECTORS>([&](auto v) { sum[m][v] = Vec{}; }); });
    // One nest of loops: between two, the compiler would move all sums to memory and back.
    for (; depth > 0; depth -= LANES, a += ROWS * LANES) {
        const float *word = a, *end = a + least(LANES, depth);
        do {
            for (int64_t i = 0; i < later.each; i += CACHE_LINE) __builtin_prefetch(later.at + i, 0, 2);
            later.at += later.each;
            unroll<UNROLLED>([&](auto i) { add_word(sum, word + i, b + i * VECTORS * LANES); });
            word += UNROLLED, b += UNROLLED * VECTORS * LANES;
        } while (word < end);
    }
    // Inside this function: another one would need the address of the sums, which would then be in memory.
    unroll<VECTORS>([&](auto v) __attribute__((always_inline)) {
        unroll<ROWS>([&](auto m) __attribute__((always_inline)) {
            Vec &to = c[v * ROWS + m];
            const Vec value = value_of(sum[m][v], scales + m, b + v * LANES, VECTORS * LANES);
            to = add ? to + value : value;
        });
    });
}

typedef void (*TileProduct)(const float *a, const float *b, int64_t depth, const Vec *scales, Vec *c, bool add, Fetch later);

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
