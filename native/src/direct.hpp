// The direct algorithm: a two-dimensional correlation, a few rows of outputs at a time.
#pragma once

#include "correlate.hpp"
#include "pack.hpp"

namespace wk {
namespace WK_NAMESPACE {

constexpr int64_t MARGIN = MOST_ROWS - 1;

struct Extent {
    int64_t rows, columns;
    WK_INLINE Extent transposed() const { return {columns, rows}; }
    WK_INLINE int64_t area() const { return rows * columns; }
};

// out[a][b] (+)= Σ_ij x[a + i - anchor.rows][b + j - anchor.columns] · window[i][j], pixels outside x being zero.
//
// MARGIN rows of zeros lie in memory above and below x: the rows of a tile all run over the union of their kernel rows.
inline void direct(Plane out, Extent outputs, Plane x, Extent size, const Vec *window, Extent taps, Extent anchor,
                   bool add) {
    const int64_t tiles = ceil_div(outputs.columns, widest_tile(taps.columns));
    const int64_t narrow = outputs.columns / tiles, wider = outputs.columns % tiles;
    for (int64_t a = 0; a < outputs.rows; a += MOST_ROWS) {
        const int64_t rows = least(MOST_ROWS, outputs.rows - a);
        const int64_t first = most(0, anchor.rows - a - (rows - 1));
        const int64_t last = least(taps.rows, size.rows + anchor.rows - a);
        Correlation c;
        c.out_row = out.row, c.out_column = out.column, c.add = add;
        c.repeats = most(0, last - first);
        c.x_repeat = c.x_row = x.row, c.x_column = x.column;
        c.w = window + first * taps.columns, c.w_repeat = taps.columns, c.taps = taps.columns;
        // The first `wider` tiles are one pixel wider than the others.
        Correlate narrow_kernel = kernel_for(rows, narrow, taps.columns);
        Correlate wider_kernel = wider ? kernel_for(rows, narrow + 1, taps.columns) : narrow_kernel;
        for (int64_t tile = 0, b = 0; tile < tiles; tile++) {
            const bool is_wider = tile < wider;
            const int64_t width = narrow + is_wider;
            c.out = out.from(a, b).at;
            c.x = x.from(a + first - anchor.rows, b - anchor.columns).at;
            c.lo = most(0, anchor.columns - b);
            c.hi = least(width + taps.columns - 1, size.columns + anchor.columns - b);
            (is_wider ? wider_kernel : narrow_kernel)(c);
            b += width;
        }
    }
}

}  // namespace WK_NAMESPACE
}  // namespace wk
