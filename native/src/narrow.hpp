// A micro-kernel for rows of narrow maps: a row of outputs and a row of the image stay in registers, and meet every tap of a row of
// the window that lies on the image. Padding costs nothing.
#pragma once

#include "simd.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Both rows and a tap must fit into the registers. Not used where there are more of them: there, it has not been timed.
constexpr int WIDEST_NARROW = WK_REGISTERS >= 32 ? 0 : 7;

// out[t] = start + Σ_n Σ_v x[n][v] · w[n][v - t + anchor]   for 0 ≤ n < rows, 0 ≤ v < W, 0 ≤ v - t + anchor < taps
//
// for all W outputs of a row, where start is the content of `out` if `add`, else the given vector. Strides of `out` and `x`, which
// need not be aligned, are in floats; the taps of a row of the window are adjacent.
struct NarrowRow {
    float *out;
    int64_t out_column;
    bool add;
    Vec start;
    int64_t rows;
    const float *x;
    int64_t x_row, x_column;
    const Vec *w;
    int64_t taps, anchor;
};

template <int W> __attribute__((noinline)) void correlate_narrow(const NarrowRow &c) {
    Vec sum[W];
    unroll<W>([&](auto t) { sum[t] = c.add ? Vec(*reinterpret_cast<const Loose *>(c.out + t * c.out_column)) : c.start; });
    const int64_t taps = c.taps, anchor = c.anchor, x_row = c.x_row, x_column = c.x_column;
    const float *x = c.x;
    const Vec *w = c.w;
    for (int64_t n = c.rows; n > 0; n--, x += x_row, w += taps) {
        Vec pixel[W];
        unroll<W>([&](auto v) { pixel[v] = *reinterpret_cast<const Loose *>(x + v * x_column); });
        unroll<2 * W - 1>([&](auto i) {
            // The distance from an output to the pixel under the tap.
            constexpr int apart = i - (W - 1), first = apart < 0 ? -apart : 0, last = apart < 0 ? W : W - apart;
            if (0 <= anchor + apart && anchor + apart < taps) {
                Vec tap = w[anchor + apart];
                hold(tap);
                unroll<last - first>([&](auto t) { sum[first + t] += pixel[first + t + apart] * tap; });
            }
        });
    }
    unroll<W>([&](auto t) { *reinterpret_cast<Loose *>(c.out + t * c.out_column) = sum[t]; });
}

typedef void (*CorrelateNarrow)(const NarrowRow &);

template <int... W> constexpr CorrelateNarrow narrow_by_width(int64_t width, std::integer_sequence<int, W...>) {
    constexpr CorrelateNarrow table[] = {nullptr, correlate_narrow<W + 1>...};
    return table[width];
}

}  // namespace WK_NAMESPACE
}  // namespace wk
