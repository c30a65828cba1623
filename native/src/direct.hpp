// The direct algorithm: a two-dimensional correlation, a few rows of outputs at a time.
#pragma once

#include "correlate.hpp"
#include "few_rows.hpp"
#include "narrow.hpp"
#include "pack.hpp"

namespace wk {
namespace WK_NAMESPACE {

constexpr int64_t MARGIN = MOST_ROWS - 1;

struct Extent {
    int64_t rows, columns;
    WK_INLINE Extent transposed() const { return {columns, rows}; }
    WK_INLINE int64_t area() const { return rows * columns; }
};

// The columns of a tile row: the first `wider` tiles are one pixel wider than the others.
struct Tiles {
    int64_t count, narrow, wider;
    Tiles(int64_t columns, int64_t taps)
        : count(ceil_div(columns, widest_tile(taps))), narrow(columns / count), wider(columns % count) {}
};

// out[a][b] = start + Σ_ij x[a + i - anchor.rows][b + j - anchor.columns] · window[i][j], pixels outside x being zero, where
// start is the content of `out` if `add`, else the given vector.
//
// With `margin`, MARGIN rows of zeros lie in memory above and below x, and both rows of a tile run over the union of their
// kernel rows. Without it, they run together over the rows that they have in common, and the rest is added row by row.
struct Direct {
    Field out;
    Extent outputs;
    Field x;
    Extent size;
    const Vec *window;
    Extent taps, anchor;
    bool add, margin;
    Vec start;

    bool few_rows = false;  // whether to use the kernels for windows of few rows, where they fit

    // Tiles of outputs overlap at the ends, which excludes adding to them.
    bool has_few_rows() const {
        return few_rows && !add && taps.rows <= FEW_ROWS && outputs.rows >= FEW_HIGH && outputs.columns >= FEW_WIDE;
    }

    void run() const {
        if (has_few_rows())
            rows_of_few();
        else
            for (int64_t a = 0; a < outputs.rows; a += MOST_ROWS) rows(a);
    }

    // Output rows a … a + MOST_ROWS - 1, as far as there are any.
    void rows(int64_t a) const {
        if (outputs.columns == size.columns && outputs.columns <= WIDEST_NARROW)
            narrow_rows(a);
        else
            rows_of_many(Tiles(outputs.columns, taps.columns), a);
    }

  private:
    void rows_of_few() const {
        const FewRowsTurns<FEW_WIDE, false> turns(taps.rows);
        const float *rows[FEW_HIGH + FEW_ROWS - 1];
        FewRows c;
        c.out_row = out.row, c.out_tile = out.column;
        c.x_tap = c.x_tile = x.column;
        c.w = reinterpret_cast<const float *>(window), c.columns = taps.columns;
        c.rows = rows, c.start = start, c.relu = c.stream = false;
        for (int64_t row = 0; row < outputs.rows; row += FEW_HIGH) {
            const int64_t a = least(row, outputs.rows - FEW_HIGH);
            c.top = anchor.rows - a, c.bottom = size.rows + anchor.rows - a;
            for (int64_t v = 0; v < FEW_HIGH + taps.rows - 1; v++) rows[v] = x.pixel(a - anchor.rows + v, 0);
            for (int64_t column = 0; column < outputs.columns; column += FEW_WIDE) {
                const int64_t b = least(column, outputs.columns - FEW_WIDE);
                c.x = (b - anchor.columns) * x.column;
                c.left = anchor.columns - b, c.right = size.columns + anchor.columns - b;
                c.out = out.pixel(a, b);
                turns.run(c);
            }
        }
    }

    void narrow_rows(int64_t a) const {
        const CorrelateNarrow correlate = narrow_by_width(size.columns, std::make_integer_sequence<int, WIDEST_NARROW>{});
        NarrowRow c;
        c.out_column = out.column, c.add = add, c.start = start;
        c.x_row = x.row, c.x_column = x.column, c.taps = taps.columns, c.anchor = anchor.columns;
        for (const int64_t end = least(a + MOST_ROWS, outputs.rows); a < end; a++) {
            // The kernel rows that meet the image.
            const int64_t first = most(0, anchor.rows - a);
            c.rows = least(taps.rows, size.rows + anchor.rows - a) - first;
            c.out = out.pixel(a, 0), c.x = x.pixel(a + first - anchor.rows, 0), c.w = window + first * taps.columns;
            correlate(c);
        }
    }

    void rows_of_many(const Tiles &tiles, int64_t a) const {
        const int64_t count = least(MOST_ROWS, outputs.rows - a);
        // The kernel rows that meet the image from row a, and from the last of these rows.
        const int64_t first = most(0, anchor.rows - a), last = least(taps.rows, size.rows + anchor.rows - a);
        const int64_t above = most(0, first - (count - 1)), below = least(taps.rows, size.rows + anchor.rows - a - (count - 1));
        if (margin || count == 1) {
            stripe(tiles, a, count, margin ? above : first, last, add);
            return;
        }
        stripe(tiles, a, count, first, most(first, below), add);
        if (below < last) stripe(tiles, a, 1, most(first, below), last, true);
        if (above < first && above < below) stripe(tiles, a + 1, 1, above, least(first, below), true);
    }

    // `count` rows from the window's rows first … last - 1.
    void stripe(const Tiles &tiles, int64_t a, int64_t count, int64_t first, int64_t last, bool on_top) const {
        Correlation c;
        c.out_row = out.row, c.out_column = out.column, c.add = on_top, c.start = start;
        c.repeats = most(0, last - first);
        c.x_repeat = c.x_row = x.row, c.x_column = x.column;
        c.w = window + first * taps.columns, c.w_repeat = taps.columns, c.taps = taps.columns;
        const Correlate narrow = kernel_for(count, tiles.narrow, taps.columns);
        const Correlate wider = tiles.wider ? kernel_for(count, tiles.narrow + 1, taps.columns) : narrow;
        for (int64_t tile = 0, b = 0; tile < tiles.count; tile++) {
            const bool is_wider = tile < tiles.wider;
            const int64_t width = tiles.narrow + is_wider;
            c.out = out.pixel(a, b);
            c.x = x.pixel(a + first - anchor.rows, b - anchor.columns);
            c.lo = most(0, anchor.columns - b);
            c.hi = least(width + taps.columns - 1, size.columns + anchor.columns - b);
            (is_wider ? wider : narrow)(c);
            b += width;
        }
    }
};

}  // namespace WK_NAMESPACE
}  // namespace wk
