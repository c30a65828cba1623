// Micro-kernels for windows of few rows: the outputs of several rows stay in registers, and each pixel that is loaded meets every
// tap of a column of the window.
#pragma once

#include "simd.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Rows of outputs, as in the maps of most networks, which have a multiple of 7; columns of outputs.
constexpr int FEW_HIGH = WK_REGISTERS >= 32 ? 7 : 4, FEW_WIDE = 2;
// The taps of a column stay in registers, too: windows of more rows take several turns.
constexpr int FEW_ROWS = WK_REGISTERS >= 32 ? 7 : 5;

// out[r][t] = start + Σ_i Σ_j x[r + i][t + j] · w[i][j]   for 0 ≤ i < K, 0 ≤ j < columns
//
// where start is the content of `out` if `add`, else the given vector. Only pixels with top ≤ r + i < bottom and left ≤ t + j < right
// are read; the others count as zero. Strides and `x`, the position in a row of the pixel of output 0 under tap 0, are in floats;
// nothing but `w` needs to be aligned.
struct FewRows {
    float *out;
    int64_t out_row, out_tile;
    const float *const *rows;
    int64_t x, x_tap, x_tile;  // from a tap or an output to the next
    const float *w;
    int64_t columns;
    int64_t top, bottom, left, right;
    bool add;
    Vec start;
    bool relu, stream;
};

template <bool ALL, int K, int T>
WK_INLINE void add_column(Vec (&sum)[FEW_HIGH][T], const Vec (&tap)[K], const FewRows &c, int64_t x, int64_t tile, int64_t left,
                          int64_t right) {
    constexpr int R = FEW_HIGH;
    unroll<R + K - 1>([&](auto v) {
        if (ALL || (c.top <= v && v < c.bottom)) {
            const float *at = c.rows[v] + x;
            unroll<T>([&](auto t) {
                if (ALL || (left <= t && t < right)) {
                    constexpr int from = v - K + 1 > 0 ? v - K + 1 : 0, to = v + 1 < R ? v + 1 : R;
                    Vec pixel = *reinterpret_cast<const Loose *>(at + t * tile);
                    hold(pixel);
                    unroll<to - from>([&](auto i) { sum[from + i][t] += pixel * tap[v - from - i]; });
                }
            });
        }
    });
}

// Lanes are channels, or, with `PIXELS`, adjacent pixels of the channel of the first lane of each tap; rows then have zeros on both
// sides instead of `left` and `right`.
template <int K, int T, bool PIXELS> __attribute__((noinline)) void correlate_few_rows(const FewRows &c) {
    constexpr int R = FEW_HIGH;
    Vec sum[R][T];
    float *out = c.out;
    const int64_t out_row = c.out_row, out_tile = c.out_tile;
    const float *from = c.add ? out : reinterpret_cast<const float *>(&c.start);
    const int64_t from_row = c.add ? out_row : 0, from_tile = c.add ? out_tile : 0;
    unroll<R>([&](auto r) {
        unroll<T>([&](auto t) { sum[r][t] = *reinterpret_cast<const Loose *>(from + r * from_row + t * from_tile); });
    });
    const bool all_rows = c.top <= 0 && c.bottom >= R + K - 1;
    const int64_t left = c.left, right = c.right, columns = c.columns, x_tap = c.x_tap, tile = PIXELS ? LANES : c.x_tile;
    const int64_t first = PIXELS ? 0 : most(0, left - (T - 1)), last = PIXELS ? columns : least(columns, right);
    const float *w = c.w + first * LANES;
    int64_t x = c.x + first * x_tap;
    for (int64_t j = first; j < last; j++, x += x_tap, w += LANES) {
        Vec tap[K];
        unroll<K>([&](auto i) {
            const float *at = w + i * columns * LANES;
            tap[i] = PIXELS ? all(*at) : *reinterpret_cast<const Vec *>(at);
        });
        if (all_rows && (PIXELS || (left <= j && j + T <= right)))
            add_column<true>(sum, tap, c, x, tile, 0, T);
        else
            add_column<false>(sum, tap, c, x, tile, PIXELS ? 0 : left - j, PIXELS ? T : right - j);
    }
    if (c.relu) unroll<R>([&](auto r) { unroll<T>([&](auto t) { sum[r][t] = relu(sum[r][t]); }); });
    if (c.stream)
        unroll<R>([&](auto r) {
            unroll<T>([&](auto t) { write_past_caches(out + r * out_row + t * out_tile, sum[r][t]); });
        });
    else
        unroll<R>([&](auto r) {
            unroll<T>([&](auto t) { *reinterpret_cast<Loose *>(out + r * out_row + t * out_tile) = sum[r][t]; });
        });
}

typedef void (*CorrelateFewRows)(const FewRows &);

template <int T, bool PIXELS, int... K> constexpr CorrelateFewRows few_rows_by_number(int64_t rows, std::integer_sequence<int, K...>) {
    constexpr CorrelateFewRows table[] = {correlate_few_rows<K + 1, T, PIXELS>...};
    return table[rows - 1];
}

// A window of any number of rows, for FEW_HIGH × T outputs, where `c` describes the whole window.
template <int T, bool PIXELS> struct FewRowsTurns {
    int64_t rows, count;

    explicit FewRowsTurns(int64_t of_window) : rows(of_window), count(ceil_div(of_window, FEW_ROWS)) {}

    void run(const FewRows &whole) const {
        FewRows c = whole;
        for (int64_t turn = 0, first = 0; turn < count; turn++) {
            const int64_t end = rows * (turn + 1) / count;
            c.rows = whole.rows + first, c.w = whole.w + first * whole.columns * LANES;
            c.top = whole.top - first, c.bottom = whole.bottom - first;
            c.add = turn > 0, c.relu = whole.relu && turn == count - 1, c.stream = whole.stream && turn == count - 1;
            few_rows_by_number<T, PIXELS>(end - first, std::make_integer_sequence<int, FEW_ROWS>{})(c);
            first = end;
        }
    }
};

}  // namespace WK_NAMESPACE
}  // namespace wk
