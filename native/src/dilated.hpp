// The direct algorithm for dilated kernels: a few adjacent outputs stay in registers while the taps pass by.
//
// No two neighboring taps meet neighboring pixels, so a row of the kernel does not slide over the image as in `Correlation`.
// Instead, every multiply-add reads a pixel from memory, which costs no more as long as that is the first-level cache.
#pragma once

#include "direct.hpp"

namespace wk {
namespace WK_NAMESPACE {

// out[t] += Σ_n Σ_v x[n][v][t] · w[n][v]   for 0 ≤ n < repeats, 0 ≤ v < steps
//
// Without `add`, `out` is replaced. Strides are in vectors; the steps of a row of w are adjacent.
struct Gathering {
    Vec *out;
    bool add;
    int64_t repeats, steps;
    const Vec *x;
    int64_t x_repeat, x_step, x_column;
    const Vec *w;
    int64_t w_repeat;
};

// Enough independent sums for two multiply-add units of latency four.
constexpr int INDEPENDENT_SUMS = 7;

// T outputs, whose pixels are adjacent if `ADJACENT`, else `x_column` apart.
template <int T, bool ADJACENT> __attribute__((noinline)) void gather(const Gathering &g) {
    constexpr int PHASES = T >= INDEPENDENT_SUMS ? 1 : (INDEPENDENT_SUMS + T - 1) / T;
    Vec sum[PHASES][T];
    unroll<PHASES>([&](auto p) { unroll<T>([&](auto t) { sum[p][t] = Vec{}; }); });
    const int64_t column = ADJACENT ? 1 : g.x_column, step = g.x_step, steps = g.steps;
    for (int64_t n = 0; n < g.repeats; n++) {
        const Vec *x = g.x + n * g.x_repeat, *w = g.w + n * g.w_repeat, *end = w + steps;
        for (; w + PHASES <= end; w += PHASES, x += PHASES * step)
            unroll<PHASES>([&](auto p) {
                Vec tap = w[p];
                hold(tap);
                unroll<T>([&](auto t) { sum[p][t] = multiply_add(sum[p][t], tap, x + p * step + t * column); });
            });
        for (; w < end; w++, x += step) {
            Vec tap = *w;
            hold(tap);
            unroll<T>([&](auto t) { sum[0][t] = multiply_add(sum[0][t], tap, x + t * column); });
        }
    }
    unroll<PHASES - 1>([&](auto p) { unroll<T>([&](auto t) { sum[0][t] += sum[p + 1][t]; }); });
    if (g.add)
        unroll<T>([&](auto t) { g.out[t] += sum[0][t]; });
    else
        unroll<T>([&](auto t) { g.out[t] = sum[0][t]; });
}

typedef void (*Gather)(const Gathering &);

template <bool ADJACENT, int... T> constexpr Gather gather_by_width(int64_t width, std::integer_sequence<int, T...>) {
    constexpr Gather table[] = {gather<T + 1, ADJACENT>...};
    return table[width - 1];
}

template <bool ADJACENT> inline Gather gather_for(int64_t width) {
    return gather_by_width<ADJACENT>(width, std::make_integer_sequence<int, WIDEST_TILE>{});
}

// Calls run(start, width, kernel) for tiles that cover `columns`, as equal as possible.
template <bool ADJACENT, class Run> WK_INLINE void each_tile(int64_t columns, Run &&run) {
    const int64_t tiles = ceil_div(columns, WIDEST_TILE), narrow = columns / tiles, wider = columns % tiles;
    const Gather short_one = gather_for<ADJACENT>(narrow), long_one = wider ? gather_for<ADJACENT>(narrow + 1) : short_one;
    for (int64_t tile = 0, at = 0; tile < tiles; tile++) {
        run(at, tile < wider ? long_one : short_one);
        at += narrow + (tile < wider);
    }
}

// A dilated kernel: extent, anchor, and distance of neighboring taps in pixels. Along the columns, zeros as far as the kernel
// reaches lie in memory on both sides of x. Output row a lies on row a + shift of x.
struct Dilated {
    Extent taps, anchor;
    int64_t dilation, shift;

    // Pixels from an output to its tap (i, j).
    int64_t down(int64_t i) const { return shift + (i - anchor.rows) * dilation; }
    int64_t right(int64_t j) const { return (j - anchor.columns) * dilation; }

    // The correlation of x with the window; it is added to `out` if `add`, else replaces it.
    void sum(const Plane &out, const Extent &outputs, const Plane &x, const Extent &size, const Vec *window, bool add) const {
        Gathering g;
        g.add = add, g.steps = taps.columns;
        g.x_repeat = dilation * x.row, g.x_step = dilation, g.x_column = 1, g.w_repeat = taps.columns;
        for (int64_t a = 0; a < outputs.rows; a++) {
            // The rows of the kernel that meet the image.
            const int64_t top = a + down(0), first = top < 0 ? ceil_div(-top, dilation) : 0;
            const int64_t last = least(taps.rows, top < size.rows ? (size.rows - 1 - top) / dilation + 1 : 0);
            g.repeats = most(0, last - first);
            g.w = window + first * taps.columns;
            each_tile<true>(outputs.columns, [&](int64_t b, Gather run) {
                g.out = out.at + a * out.row + b;
                g.x = x.at + (a + down(first)) * x.row + b + right(0);
                run(g);
            });
        }
    }

    // Add the gradient in the taps to `out`; `window` is the gradient of the outputs.
    void weight_grad(Vec *out, const Vec *window, const Extent &outputs, const Plane &x, const Extent &size) const {
        Gathering g;
        g.add = true, g.steps = outputs.columns;
        g.x_repeat = x.row, g.x_step = 1, g.x_column = dilation, g.w_repeat = outputs.columns;
        for (int64_t i = 0; i < taps.rows; i++) {
            // The rows of the outputs for which this row of the kernel meets the image.
            const int64_t first = most(0, -down(i)), last = least(outputs.rows, size.rows - down(i));
            g.repeats = most(0, last - first);
            g.w = window + first * outputs.columns;
            each_tile<false>(taps.columns, [&](int64_t j, Gather run) {
                g.out = out + i * taps.columns + j;
                g.x = x.at + (first + down(i)) * x.row + right(j);
                run(g);
            });
        }
    }
};

}  // namespace WK_NAMESPACE
}  // namespace wk
