// The direct algorithm: a two-dimensional correlation, two rows of outputs at a time.
#pragma once

#include "correlate.hpp"
#include "pack.hpp"

namespace wk {
namespace WK_NAMESPACE {

struct Extent {
    int64_t rows, columns;
    WK_INLINE Extent transposed() const { return {columns, rows}; }
    WK_INLINE int64_t area() const { return rows * columns; }
};

// Number of tiles that `direct` cuts its outputs into, for spreading out what is done beside them.
inline int64_t direct_tiles(Extent out, Extent window) {
    return ceil_div(out.rows, 2) * ceil_div(out.columns, widest_tile(window.columns));
}

// out[a][b] (+)= Σ_ij x[a + i - anchor.rows][b + j - anchor.columns] · window[i][j], pixels outside x being zero.
//
// Rows -1 and `size.rows` of x exist in memory and are zero: both rows of a pair run over the union of their kernel rows.
inline void direct(Plane out, Extent outputs, Plane x, Extent size, const Vec *window, Extent taps, Extent anchor, bool add,
                   Prefetch &next) {
    const int64_t tiles = ceil_div(outputs.columns, widest_tile(taps.columns));
    for (int64_t a = 0; a < outputs.rows; a += 2) {
        const int64_t rows = least(2, outputs.rows - a);
        const int64_t first = most(0, anchor.rows - a - (rows - 1));
        const int64_t last = least(taps.rows, size.rows + anchor.rows - a);
        for (int64_t tile = 0, b = 0; tile < tiles; tile++) {
            const int64_t width = outputs.columns * (tile + 1) / tiles - b;
            Correlation c;
            c.out = out.from(a, b).at, c.out_row = out.row, c.out_column = out.column, c.add = add;
            c.repeats = most(0, last - first);
            c.x = x.from(a + first - anchor.rows, b - anchor.columns).at;
            c.x_repeat = c.x_row = x.row, c.x_column = x.column;
            c.w = window + first * taps.columns, c.w_repeat = taps.columns, c.taps = taps.columns;
            c.lo = most(0, anchor.columns - b);
            c.hi = least(width + taps.columns - 1, size.columns + anchor.columns - b);
            kernel_for(rows, width, taps.columns)(c);
            next.step();
            b += width;
        }
    }
}

}  // namespace WK_NAMESPACE
}  // namespace wk
