// Real Fourier transforms of short signals, written as small matrix products: scalar coefficient × vector of channels.
//
// A transform of length L over signals that extend at most `reach` pixels to each side of their center. Cosines are even and
// sines odd about the center, and frequency L/2 - f differs from f only in the sign of the odd pixels. So four sums, each over
// a quarter of the terms, yield both frequencies. No fast Fourier transform takes fewer operations at these lengths, and
// L may be any multiple of 4.
#pragma once

#include "pack.hpp"

extern "C" double cos(double);

namespace wk {
namespace WK_NAMESPACE {

// Lengths above this are not used: images are cut into tiles first.
constexpr int64_t LONGEST_TRANSFORM = 256;

struct Circle {
    int64_t length;
    double cosine[LONGEST_TRANSFORM];

    explicit Circle(int64_t n) : length(n) {
        for (int64_t i = 0; i < n; i++) cosine[i] = cos(2 * 3.14159265358979323846 * static_cast<double>(i) / double(n));
    }
    WK_INLINE double cosine_of(int64_t step) const { return cosine[step % length]; }
    // A quarter turn, length / 4 steps, turns cosines into sines.
    WK_INLINE double sine_of(int64_t step) const { return cosine[(step + 3 * length / 4) % length]; }
};

// Coefficients of one of the four sums, in tiles of WIDEST_WAVES outputs: at[tile][input][output].
struct Coefficients {
    const float *at;
    int64_t outputs, inputs;
    WK_INLINE const float *tile(int64_t first) const { return at + first * inputs; }
};

struct Transform {
    int64_t length, reach;
    Coefficients cos_even, cos_odd, sin_even, sin_odd;

    WK_INLINE int64_t quarter() const { return length / 4 + 1; }
    WK_INLINE int64_t half() const { return length / 2; }
    WK_INLINE int64_t evens() const { return reach / 2 + 1; }
    WK_INLINE int64_t odds() const { return (reach + 1) / 2; }
};

inline int64_t coefficients_needed(int64_t length, int64_t reach) { return 2 * (length / 4 + 1) * (reach + 1); }

template <class F> Coefficients tabulate(float *&store, int64_t outputs, int64_t inputs, F &&value) {
    Coefficients table{store, outputs, inputs};
    for (int64_t first = 0; first < outputs; first += WIDEST_WAVES) {
        int64_t width = least(WIDEST_WAVES, outputs - first);
        for (int64_t in = 0; in < inputs; in++)
            for (int64_t out = first; out < first + width; out++) *store++ = static_cast<float>(value(out, in));
    }
    return table;
}

// Pixels to frequencies. The sign is that of the exponent.
inline Transform analysis(const Circle &circle, int64_t reach, int sign, float *store) {
    Transform t{circle.length, reach, {}, {}, {}, {}};
    t.cos_even = tabulate(store, t.quarter(), t.evens(), [&](int64_t f, int64_t i) { return circle.cosine_of(f * 2 * i); });
    t.cos_odd = tabulate(store, t.quarter(), t.odds(), [&](int64_t f, int64_t i) { return circle.cosine_of(f * (2 * i + 1)); });
    t.sin_even = tabulate(store, t.quarter(), t.evens(), [&](int64_t f, int64_t i) { return sign * circle.sine_of(f * 2 * i); });
    t.sin_odd =
        tabulate(store, t.quarter(), t.odds(), [&](int64_t f, int64_t i) { return sign * circle.sine_of(f * (2 * i + 1)); });
    return t;
}

// Frequencies to pixels: frequencies other than 0 and L/2 also represent their conjugates.
inline Transform synthesis(const Circle &circle, int64_t reach, float *store) {
    Transform t{circle.length, reach, {}, {}, {}, {}};
    auto scale = [&](int64_t f) { return (f == 0 ? 1.0 : 2.0) / double(circle.length); };
    int64_t n = t.quarter();
    t.cos_even = tabulate(store, t.evens(), n, [&](int64_t i, int64_t f) { return scale(f) * circle.cosine_of(f * 2 * i); });
    t.cos_odd = tabulate(store, t.odds(), n, [&](int64_t i, int64_t f) { return scale(f) * circle.cosine_of(f * (2 * i + 1)); });
    t.sin_even = tabulate(store, t.evens(), n, [&](int64_t i, int64_t f) { return -scale(f) * circle.sine_of(f * 2 * i); });
    t.sin_odd = tabulate(store, t.odds(), n, [&](int64_t i, int64_t f) { return -scale(f) * circle.sine_of(f * (2 * i + 1)); });
    return t;
}

// acc[m][r] = Σ_i table[i][m] · x[i][r]. The sums are local: Clang would write `acc` to memory in every round.
template <int M, int R> WK_INLINE void product(Vec (&acc)[M][R], const float *table, const Vec *x, int64_t inputs) {
    Vec sum[M][R];
    unroll<M>([&](auto m) { unroll<R>([&](auto r) { sum[m][r] = Vec{}; }); });
    for (int64_t i = 0; i < inputs; i++, table += M, x += R) {
        Vec pixel[R];
        unroll<R>([&](auto r) { pixel[r] = x[r]; });
        unroll<M>([&](auto m) {
            Vec coefficient = all(table[m]);
            unroll<R>([&](auto r) { sum[m][r] += coefficient * pixel[r]; });
        });
    }
    unroll<M>([&](auto m) { unroll<R>([&](auto r) { acc[m][r] = sum[m][r]; }); });
}

// Call `body` with the width of each tile of outputs as a compile-time number.
template <class F> WK_INLINE void for_tiles(int64_t outputs, F &&body) {
    int64_t first = 0;
    for (; first + WIDEST_WAVES <= outputs; first += WIDEST_WAVES)
        body(first, std::integral_constant<int, WIDEST_WAVES>{});
    switch (outputs - first) {
    case 4: body(first, std::integral_constant<int, 4>{}); break;
    case 3: body(first, std::integral_constant<int, 3>{}); break;
    case 2: body(first, std::integral_constant<int, 2>{}); break;
    case 1: body(first, std::integral_constant<int, 1>{}); break;
    default: break;
    }
}

// Where frequencies are kept: a spectrum has `planes` columns (the real and the imaginary part, or the three factors of
// ComplexCorrelation) for each frequency 0 … L/2, each with one vector a line.
struct Spectrum {
    Vec *at;
    int64_t column;  // vectors from one column to the next
    int planes;
    WK_INLINE Vec *of(int64_t frequency, int plane) const { return at + (frequency * planes + plane) * column; }
};

template <int PLANES> WK_INLINE void keep(const Spectrum &to, int64_t frequency, int64_t line, Vec re, Vec im) {
    Vec *out = to.of(frequency, 0) + line;
    if constexpr (PLANES == 2) {
        out[0] = re;
        out[to.column] = im;
    } else {
        out[0] = re;
        out[to.column] = im - re;
        out[2 * to.column] = re + im;
    }
}

// Transform R lines. Pixel s of line r is signal.at[s · column + r · row], -before ≤ s ≤ after; all others are zero.
template <int PLANES, int R>
__attribute__((noinline)) void analyse_lines(const Transform &t, const Plane &signal, int64_t before, int64_t after,
                                             const Spectrum &to, int64_t line, Vec *folded) {
    Vec *even_sum = folded, *odd_sum = even_sum + t.evens() * R, *even_difference = odd_sum + t.odds() * R,
        *odd_difference = even_difference + t.evens() * R;
    for (int64_t s = 0; s <= t.reach; s++) {
        Vec *sum = (s & 1 ? odd_sum : even_sum) + s / 2 * R, *difference = (s & 1 ? odd_difference : even_difference) + s / 2 * R;
        unroll<R>([&](auto r) {
            const Vec *pixel = signal.at + r * signal.row;
            Vec right = s <= after ? pixel[s * signal.column] : Vec{};
            Vec left = s <= before && s > 0 ? pixel[-s * signal.column] : Vec{};
            sum[r] = right + left;
            difference[r] = s > 0 ? right - left : Vec{};
        });
    }
    for_tiles(t.quarter(), [&](int64_t first, auto width) {
        constexpr int M = width;
        Vec a[M][R], b[M][R], near[M][R], far[M][R];
        product<M, R>(a, t.cos_even.tile(first), even_sum, t.evens());
        product<M, R>(b, t.cos_odd.tile(first), odd_sum, t.odds());
        unroll<M>([&](auto m) { unroll<R>([&](auto r) { near[m][r] = a[m][r] + b[m][r], far[m][r] = a[m][r] - b[m][r]; }); });
        product<M, R>(a, t.sin_even.tile(first), even_difference, t.evens());
        product<M, R>(b, t.sin_odd.tile(first), odd_difference, t.odds());
        unroll<M>([&](auto m) {
            const int64_t f = first + m, mirrored = t.half() - f;
            unroll<R>([&](auto r) {
                keep<PLANES>(to, f, line + r, near[m][r], a[m][r] + b[m][r]);
                if (mirrored != f) keep<PLANES>(to, mirrored, line + r, far[m][r], b[m][r] - a[m][r]);
            });
        });
    });
}

// The inverse: pixels -before … after of R lines, added to the existing values if ADD is set.
template <bool ADD, int R>
__attribute__((noinline)) void synthesise_lines(const Transform &t, const Spectrum &from, int64_t line, const Plane &signal,
                                                int64_t before, int64_t after, Vec *folded) {
    const int64_t n = t.quarter();
    Vec *re_sum = folded, *re_difference = re_sum + n * R, *im_sum = re_difference + n * R, *im_difference = im_sum + n * R;
    for (int64_t f = 0; f < n; f++) {
        const int64_t mirrored = t.half() - f;
        const Vec *near = from.of(f, 0) + line, *far = from.of(mirrored, 0) + line;
        unroll<R>([&](auto r) {
            Vec re = near[r], im = f ? near[from.column + r] : Vec{};
            Vec re_far = mirrored != f ? far[r] : Vec{}, im_far = mirrored != f && f ? far[from.column + r] : Vec{};
            re_sum[f * R + r] = re + re_far, re_difference[f * R + r] = re - re_far;
            im_sum[f * R + r] = im + im_far, im_difference[f * R + r] = im - im_far;
        });
    }
    auto put = [&](int64_t s, auto r, Vec value) {
        Vec &pixel = signal.at[s * signal.column + r * signal.row];
        pixel = ADD ? pixel + value : value;
    };
    auto pixels = [&](const Coefficients &cosines, const Coefficients &sines, const Vec *re, const Vec *im, int64_t parity) {
        for_tiles(cosines.outputs, [&](int64_t first, auto width) {
            constexpr int M = width;
            Vec even[M][R], odd[M][R];
            product<M, R>(even, cosines.tile(first), re, n);
            product<M, R>(odd, sines.tile(first), im, n);
            unroll<M>([&](auto m) {
                const int64_t s = 2 * (first + m) + parity;
                unroll<R>([&](auto r) {
                    if (s <= after) put(s, r, even[m][r] + odd[m][r]);
                    if (s > 0 && s <= before) put(-s, r, even[m][r] - odd[m][r]);
                });
            });
            });
    };
    pixels(t.cos_even, t.sin_even, re_sum, im_difference, 0);
    pixels(t.cos_odd, t.sin_odd, re_difference, im_sum, 1);
}

// Vectors of working memory that the two functions above need.
inline int64_t folding_room(int64_t length, int64_t reach) { return 4 * WIDEST_ROWS * most(length / 4 + 1, reach / 2 + 1); }

template <class F> WK_INLINE void for_lines(int64_t lines, F &&body) {
    int64_t line = 0;
    for (; line + WIDEST_ROWS <= lines; line += WIDEST_ROWS) body(line, std::integral_constant<int, WIDEST_ROWS>{});
    switch (lines - line) {
    case 3: body(line, std::integral_constant<int, 3>{}); break;
    case 2: body(line, std::integral_constant<int, 2>{}); break;
    case 1: body(line, std::integral_constant<int, 1>{}); break;
    default: break;
    }
}

template <int PLANES>
inline void analyze(const Transform &t, const Plane &signal, int64_t lines, int64_t before, int64_t after, const Spectrum &to,
                    int64_t offset, Vec *folded) {
    for_lines(lines, [&](int64_t line, auto rows) {
        analyse_lines<PLANES, rows>(t, signal.from(line, 0), before, after, to, offset + line, folded);
    });
}

template <bool ADD>
inline void synthesize(const Transform &t, const Spectrum &from, int64_t lines, const Plane &signal, int64_t before,
                       int64_t after, Vec *folded) {
    for_lines(lines, [&](int64_t line, auto rows) {
        synthesise_lines<ADD, rows>(t, from, line, signal.from(line, 0), before, after, folded);
    });
}

}  // namespace WK_NAMESPACE
}  // namespace wk
