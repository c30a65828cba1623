// The hybrid algorithm: a Fourier transform along one axis, and for each frequency a direct correlation along the other.
//
// Written for a transform along the columns of a plane; the other orientation uses transposed planes.
#pragma once

#include "direct.hpp"
#include "fourier.hpp"

namespace wk {
namespace WK_NAMESPACE {

// How the transformed axis is cut into tiles, and how far the three signals extend from the center of a tile.
struct Tiling {
    int64_t tiles, tile, length;
    int64_t reach_in, reach_out, reach_taps;

    WK_INLINE int64_t frequencies() const { return length / 2 + 1; }
    WK_INLINE int64_t longest_reach() const { return most(reach_in, reach_taps); }
};

inline Tiling tiling_of(int64_t tiles, int64_t outputs, int64_t inputs, int64_t taps, int64_t anchor) {
    Tiling t;
    t.tiles = tiles;
    t.tile = ceil_div(outputs, tiles);
    t.reach_taps = most(anchor, taps - 1 - anchor);
    t.reach_out = t.tile / 2;
    // The part of the input that a tile sees. The transform is circular: it must be so long that values wrap around to the outside.
    int64_t seen = tiles == 1 ? inputs : least(inputs, t.tile + 2 * t.reach_taps);
    t.reach_in = tiles == 1 && inputs == outputs ? t.tile / 2 : t.tile / 2 + t.reach_taps;
    int64_t wrapped = tiles == 1 && inputs == outputs ? seen + t.reach_taps : t.tile + 2 * t.reach_taps;
    t.length = 4 * ceil_div(most(wrapped, 4), 4);
    return t;
}

// Multiply-adds of transforming and correlating one plane; they determine the number of tiles.
inline double hybrid_cost(const Tiling &t, int64_t lines_in, int64_t lines_out, int64_t window) {
    double there = double(lines_in) * double(t.length / 4 + 1) * double(2 * t.reach_in + 1);
    double back = double(lines_out) * double(t.length / 4 + 1) * double(2 * t.reach_out + 1);
    double between = 3.0 * double(t.frequencies()) * double(lines_out) * double(window);
    return double(t.tiles) * (there + back + between);
}

inline Tiling best_tiling(int64_t outputs, int64_t inputs, int64_t taps, int64_t anchor, int64_t lines, int64_t window) {
    Tiling best = tiling_of(1, outputs, inputs, taps, anchor);
    for (int64_t tiles = 2; tiles <= outputs && (tiles <= 8 || best.length > LONGEST_TRANSFORM); tiles++) {
        Tiling other = tiling_of(tiles, outputs, inputs, taps, anchor);
        if (best.length > LONGEST_TRANSFORM || hybrid_cost(other, lines, lines, window) < hybrid_cost(best, lines, lines, window))
            best = other;
    }
    return best;
}

// The tables of all three transforms, or their sizes.
struct Tables {
    Transform input, window, output;

    static int64_t room(const Tiling &t) {
        return coefficients_needed(t.length, t.reach_in) + coefficients_needed(t.length, t.reach_out) +
               coefficients_needed(t.length, t.reach_taps);
    }

    // For a sum the kernel is the window and pixels are the output; for a weight gradient, it is the reverse.
    static Tables make(const Tiling &t, bool weight_grad, float *store) {
        Circle circle(t.length);
        Tables tables;
        tables.input = analysis(circle, t.reach_in, -1, store);
        store += coefficients_needed(t.length, t.reach_in);
        int64_t window = weight_grad ? t.reach_out : t.reach_taps, output = weight_grad ? t.reach_taps : t.reach_out;
        // The conjugate of the window's transform makes the product a correlation.
        tables.window = analysis(circle, window, 1, store);
        store += coefficients_needed(t.length, window);
        tables.output = synthesis(circle, output, store);
        return tables;
    }
};

struct Lines {
    int64_t outputs, inputs, taps, anchor;
};

inline int64_t complex_tiles(int64_t outputs, int64_t taps) { return ceil_div(outputs, least(WIDEST_TRIPLE, taps)); }

// For one frequency: out[a] (+)= Σ_i in[a + i - anchor] · window[i], complex, or real where the imaginary parts vanish.
inline void correlate_frequency(Vec *re, Vec *im, bool add, const Vec *xr, const Vec *xi, const Spectrum &window,
                                int64_t frequency, bool real, const Lines &lines) {
    const int64_t tiles = real ? ceil_div(lines.outputs, widest_tile(lines.taps)) : complex_tiles(lines.outputs, lines.taps);
    for (int64_t tile = 0, b = 0; tile < tiles; tile++) {
        const int64_t width = lines.outputs * (tile + 1) / tiles - b, at = b - lines.anchor;
        const int64_t lo = most(0, -at), hi = least(width + lines.taps - 1, lines.inputs - at);
        if (real) {
            const Field out(Plane{re + b, 0, 1}), in(Plane{const_cast<Vec *>(xr) + at, 0, 1});
            const Vec *taps = window.of(frequency, 0);
            Correlation c{out.at, 0, LANES, add, Vec{}, 1, in.at, 0, 0, LANES, taps, 0, lines.taps, lo, hi};
            kernel_for(1, width, lines.taps)(c);
        } else {
            ComplexCorrelation c{re + b, im + b, add, xr + at, xi + at, window.of(frequency, 0), window.of(frequency, 1),
                                 window.of(frequency, 2), lines.taps, lo, hi};
            complex_kernel_for(width)(c);
        }
        b += width;
    }
}

// Lines of working memory for a column of the input's spectrum: outputs overwrite inputs that lie `anchor` lines further on.
inline int64_t spectrum_lines(int64_t inputs, int64_t anchor) { return (inputs + anchor) | 1; }

// out[a][b] (+)= Σ_ij x[a + i - anchor.rows][b + j - anchor.columns] · window[i][j], the window given by its spectrum.
//
// `shift` is where output column 0 lies in x: the anchor of the transformed kernel is anchor.columns + shift.
template <bool ADD>
inline void hybrid_sum(Plane out, Extent outputs, Plane x, Extent size, const Spectrum &window, int64_t taps, int64_t anchor,
                       int64_t shift, const Tiling &tiling, const Tables &tables, Vec *room) {
    const Spectrum spectrum{room, spectrum_lines(size.rows, anchor), 2};
    Vec *folded = room + 2 * tiling.frequencies() * spectrum.column;
    const Lines lines{outputs.rows, size.rows, taps, anchor};
    for (int64_t tile = 0; tile < tiling.tiles; tile++) {
        const int64_t begin = outputs.columns * tile / tiling.tiles, end = outputs.columns * (tile + 1) / tiling.tiles;
        const int64_t middle = begin + (end - begin) / 2, center = middle + shift;
        analyze<2>(tables.input, x.from(0, center), size.rows, least(middle - begin + tiling.reach_taps, center),
                   least(end - 1 - middle + tiling.reach_taps, size.columns - 1 - center), spectrum, anchor, folded);
        for (int64_t f = 0; f < tiling.frequencies(); f++) {
            Vec *re = spectrum.of(f, 0), *im = spectrum.of(f, 1);
            bool real = f == 0 || f == tiling.length / 2;
            correlate_frequency(re, im, false, re + anchor, im + anchor, window, f, real, lines);
        }
        synthesize<ADD>(tables.output, spectrum, outputs.rows, out.from(0, middle), middle - begin, end - 1 - middle, folded);
    }
}

// Add to the spectrum of dw[i][j] = Σ_ab grad[a][b] · x[a + i - anchor.rows][b + j - anchor.columns], `shift` as above.
inline void hybrid_weight_grad(const Spectrum &sums, int64_t taps, Plane grad, Extent window, Plane x, Extent size,
                               int64_t anchor, int64_t shift, const Tiling &tiling, const Tables &tables, Vec *room) {
    const Spectrum input{room, size.rows | 1, 2};
    const Spectrum factors{room + 2 * tiling.frequencies() * input.column, window.rows | 1, 3};
    Vec *folded = factors.at + 3 * tiling.frequencies() * factors.column;
    const Lines lines{taps, size.rows, window.rows, anchor};
    for (int64_t tile = 0; tile < tiling.tiles; tile++) {
        const int64_t begin = window.columns * tile / tiling.tiles, end = window.columns * (tile + 1) / tiling.tiles;
        const int64_t middle = begin + (end - begin) / 2, center = middle + shift;
        analyze<2>(tables.input, x.from(0, center), size.rows, least(middle - begin + tiling.reach_taps, center),
                   least(end - 1 - middle + tiling.reach_taps, size.columns - 1 - center), input, 0, folded);
        analyze<3>(tables.window, grad.from(0, middle), window.rows, middle - begin, end - 1 - middle, factors, 0, folded);
        for (int64_t f = 0; f < tiling.frequencies(); f++) {
            bool real = f == 0 || f == tiling.length / 2;
            correlate_frequency(sums.of(f, 0), sums.of(f, 1), true, input.of(f, 0), input.of(f, 1), factors, f, real, lines);
        }
    }
}

}  // namespace WK_NAMESPACE
}  // namespace wk
