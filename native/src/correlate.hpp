// The micro-kernels: windowed one-dimensional correlations of vectors, with their outputs kept in registers.
//
// All three passes of a depthwise convolution consist of them. The sliding window w is a row of the kernel (forward, input
// gradient) or of the output's gradient (weight gradient). Steps in which some outputs are outside the window are unrolled, so
// that padding costs nothing.
#pragma once

#include "simd.hpp"

namespace wk {
namespace WK_NAMESPACE {

// out[r][t] = start + Σ_n Σ_v x[n][r][v] · w[n][v - t]   for 0 ≤ n < repeats, lo ≤ v < hi, 0 ≤ v - t < taps
//
// where start is the content of `out` if `add`, else the given vector. Strides of `out` and `x`, which need not be aligned, are
// in floats; the taps of a row of the window are adjacent.
struct Correlation {
    float *out;
    int64_t out_row, out_column;
    bool add;
    Vec start;
    int64_t repeats;
    const float *x;
    int64_t x_repeat, x_row, x_column;
    const Vec *w;
    int64_t w_repeat;
    int64_t taps, lo, hi;
};

template <int R, int T> struct Accumulators {
    Vec sum[R][T];

    WK_INLINE void open(const Correlation &c) {
        if (c.add)
            unroll<R>([&](auto r) {
                unroll<T>([&](auto t) { sum[r][t] = *reinterpret_cast<const Loose *>(c.out + r * c.out_row + t * c.out_column); });
            });
        else
            unroll<R>([&](auto r) { unroll<T>([&](auto t) { sum[r][t] = c.start; }); });
    }

    WK_INLINE void close(const Correlation &c) {
        unroll<R>([&](auto r) {
            unroll<T>([&](auto t) { *reinterpret_cast<Loose *>(c.out + r * c.out_row + t * c.out_column) = sum[r][t]; });
        });
    }

    // One step v: output t, FIRST ≤ t < LAST, meets tap w[-t] relative to the step's own tap.
    template <int FIRST, int LAST> WK_INLINE void step(const float *x, int64_t x_row, const Vec *w) {
        Vec pixel[R];
        unroll<R>([&](auto r) { pixel[r] = *reinterpret_cast<const Loose *>(x + r * x_row); });
        unroll<LAST - FIRST>([&](auto i) {
            constexpr int t = FIRST + i;
            if constexpr (R == 1) {
                sum[0][t] = multiply_add(sum[0][t], pixel[0], w - t);
            } else {
                Vec tap = w[-t];
                hold(tap);
                unroll<R>([&](auto r) { sum[r][t] += pixel[r] * tap; });
            }
        });
    }
};

// Any number of taps ≥ T.
template <int R, int T> __attribute__((noinline)) void correlate(const Correlation &c) {
    Accumulators<R, T> acc;
    acc.open(c);
    const int64_t taps = c.taps, lo = c.lo, hi = c.hi, x_row = c.x_row, x_column = c.x_column;
    const int64_t start = most(lo, T - 1), stop = least(hi, taps);
    const float *x = c.x;
    const Vec *w = c.w;
    for (int64_t n = 0; n < c.repeats; n++, x += c.x_repeat, w += c.w_repeat) {
        if (lo < T - 1)
            unroll<T - 1>([&](auto v) {
                if (lo <= v && v < hi) acc.template step<0, v + 1>(x + v * x_column, x_row, w + v);
            });
        const float *xv = x + start * x_column;
        const Vec *wv = w + start, *end = w + stop;
        for (; wv < end; wv++, xv += x_column) acc.template step<0, T>(xv, x_row, wv);
        if (hi > taps)
            unroll<T - 1>([&](auto i) {
                constexpr int gone = i + 1;
                if (taps - 1 + gone < hi && taps - 1 + gone >= lo)
                    acc.template step<gone, T>(x + (taps - 1 + gone) * x_column, x_row, w + (taps - 1 + gone));
            });
    }
    acc.close(c);
}

// A number of taps K known at compile time, which may be below T.
template <int K, int R, int T> __attribute__((noinline)) void correlate_few(const Correlation &c) {
    Accumulators<R, T> acc;
    acc.open(c);
    const int64_t lo = c.lo, hi = c.hi, x_row = c.x_row, x_column = c.x_column;
    const float *x = c.x;
    const Vec *w = c.w;
    const bool whole = lo == 0 && hi == T + K - 1;
    for (int64_t n = 0; n < c.repeats; n++, x += c.x_repeat, w += c.w_repeat)
        unroll<T + K - 1>([&](auto v) {
            constexpr int first = v - K + 1 > 0 ? v - K + 1 : 0, last = v + 1 < T ? v + 1 : T;
            if (whole || (lo <= v && v < hi)) acc.template step<first, last>(x + v * x_column, x_row, w + v);
        });
    acc.close(c);
}

typedef void (*Correlate)(const Correlation &);

template <int R, int... T> constexpr Correlate correlate_by_width(int64_t width, std::integer_sequence<int, T...>) {
    constexpr Correlate table[] = {correlate<R, T + 1>...};
    return table[width - 1];
}

template <int K, int R, int... T> constexpr Correlate few_by_width(int64_t width, std::integer_sequence<int, T...>) {
    constexpr Correlate table[] = {correlate_few<K, R, T + 1>...};
    return table[width - 1];
}

template <int R> Correlate kernel_of_rows(int64_t width, int64_t taps) {
    constexpr auto widths = std::make_integer_sequence<int, WIDEST_TILE>{};
    switch (taps) {
    case 3: return few_by_width<3, R>(width, widths);
    case 5: return few_by_width<5, R>(width, widths);
    case 7: return few_by_width<7, R>(width, widths);
    default: return correlate_by_width<R>(width, widths);
    }
}

// The kernel for a tile of `rows` (1 or MOST_ROWS) × `width` outputs.
inline Correlate kernel_for(int64_t rows, int64_t width, int64_t taps) {
    return rows == 1 ? kernel_of_rows<1>(width, taps) : kernel_of_rows<MOST_ROWS>(width, taps);
}

// The widest tile that has a kernel.
WK_INLINE int64_t widest_tile(int64_t taps) {
    return taps == 3 || taps == 5 || taps == 7 ? WIDEST_TILE : least(WIDEST_TILE, taps);
}

// Three correlations in one loop, of a complex signal with a complex window in three real products (Gauss):
//
//     p = wr (xr + xi),  q = (wi - wr) xr,  s = (wr + wi) xi;   re = p - s,  im = p + q
//
// The window comes as its three factors. Outputs may overwrite the part of the signal that no later output needs.
struct ComplexCorrelation {
    Vec *re, *im;
    bool add;
    const Vec *xr, *xi;
    const Vec *sum_factor, *real_factor, *imaginary_factor;
    int64_t taps, lo, hi;
};

// One step v: outputs FIRST … LAST-1 meet tap v - t. The sums are separate arrays: as members of one object, the compiler would
// write them to memory at every step.
template <int FIRST, int LAST, int T>
WK_INLINE void complex_step(Vec (&p)[T], Vec (&q)[T], Vec (&s)[T], const Vec *xr, const Vec *xi, const Vec *wp, const Vec *wq,
                            const Vec *ws) {
    const Vec re = *xr, im = *xi, both = re + im;
    unroll<LAST - FIRST>([&](auto i) {
        constexpr int t = FIRST + i;
        p[t] = multiply_add(p[t], both, wp - t);
        q[t] = multiply_add(q[t], re, wq - t);
        s[t] = multiply_add(s[t], im, ws - t);
    });
}

// T steps in which every output meets a tap. The window stays in registers, and each step loads only the tap that enters it, which
// replaces the one that leaves: three loads per step instead of 3 T.
template <int T>
WK_INLINE void complex_steps(Vec (&p)[T], Vec (&q)[T], Vec (&s)[T], Vec (&in_p)[T], Vec (&in_q)[T], Vec (&in_s)[T], const Vec *xr,
                             const Vec *xi, const Vec *wp, const Vec *wq, const Vec *ws) {
    unroll<T>([&](auto u) {
        const Vec re = xr[u], im = xi[u], both = re + im;
        in_p[u] = wp[u], in_q[u] = wq[u], in_s[u] = ws[u];
        unroll<T>([&](auto t) {
            constexpr int tap = (u - t + T) % T;
            p[t] += both * in_p[tap];
            q[t] += re * in_q[tap];
            s[t] += im * in_s[tap];
        });
    });
}

// Any number of taps ≥ T.
template <int T> __attribute__((noinline)) void correlate_complex(const ComplexCorrelation &c) {
    Vec p[T], q[T], s[T];
    unroll<T>([&](auto t) { p[t] = q[t] = s[t] = Vec{}; });
    const int64_t taps = c.taps, lo = c.lo, hi = c.hi, stop = least(hi, taps);
    const Vec *xr = c.xr, *xi = c.xi, *wp = c.sum_factor, *wq = c.real_factor, *ws = c.imaginary_factor;
    if (lo < T - 1)
        unroll<T - 1>([&](auto v) {
            if (lo <= v && v < hi) complex_step<0, v + 1>(p, q, s, xr + v, xi + v, wp + v, wq + v, ws + v);
        });
    int64_t v = most(lo, T - 1);
    if (WK_REGISTERS >= 32 && v + T <= stop) {
        Vec in_p[T], in_q[T], in_s[T];
        unroll<T - 1>([&](auto i) {
            constexpr int back = i + 1;
            in_p[T - back] = wp[v - back], in_q[T - back] = wq[v - back], in_s[T - back] = ws[v - back];
        });
        for (; v + T <= stop; v += T) complex_steps<T>(p, q, s, in_p, in_q, in_s, xr + v, xi + v, wp + v, wq + v, ws + v);
    }
    for (; v < stop; v++) complex_step<0, T>(p, q, s, xr + v, xi + v, wp + v, wq + v, ws + v);
    if (hi > taps)
        unroll<T - 1>([&](auto i) {
            constexpr int gone = i + 1;
            const int64_t last = taps - 1 + gone;
            if (lo <= last && last < hi)
                complex_step<gone, T>(p, q, s, xr + last, xi + last, wp + last, wq + last, ws + last);
        });
    Vec *re = c.re, *im = c.im;
    if (c.add)
        unroll<T>([&](auto t) { re[t] += p[t] - s[t], im[t] += p[t] + q[t]; });
    else
        unroll<T>([&](auto t) { re[t] = p[t] - s[t], im[t] = p[t] + q[t]; });
}

typedef void (*CorrelateComplex)(const ComplexCorrelation &);

template <int... T> constexpr CorrelateComplex complex_by_width(int64_t width, std::integer_sequence<int, T...>) {
    constexpr CorrelateComplex table[] = {correlate_complex<T + 1>...};
    return table[width - 1];
}

inline CorrelateComplex complex_kernel_for(int64_t width) {
    return complex_by_width(width, std::make_integer_sequence<int, WIDEST_TRIPLE>{});
}

}  // namespace WK_NAMESPACE
}  // namespace wk
