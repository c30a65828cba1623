// Activations of hidden units.
//
// GELU is x · Φ(x) = max(x, 0) - a · Φ(-a) with a = |x|, where Φ is the normal distribution, or the sigmoid that the tanh form puts
// in its place. The logarithm of the tail Φ(-a) is smooth, so it is a polynomial in a, and the tail is 2 to its power: without a
// division, a branch or the cancellation of 1 + erf(x/√2) for negative x. The coefficients are weighted minimax fits (Lawson's
// iteration over Chebyshev nodes, in 40 digits), where the weight is the tail itself: what counts is the error of Φ. It is below
// 0.25 · 2^-24, and 2 · 2^-24 with all rounding, where the erf form in float32 rounds to multiples of 2^-24.
#pragma once

#include "simd.hpp"
#include "widekernel.h"

namespace wk {
namespace WK_NAMESPACE {

// log2 of the tail for a in 0 … `end`, by ascending powers. Beyond `end` the tail is constant, less than 1e-10.
template <int DEGREE> struct Tail {
    float end;
    float power[DEGREE + 1];
};

constexpr Tail<9> ERF_TAIL{10.0f,
                           {-0.99999994f, -1.15110672f, -0.459195703f, -0.0525368452f, 0.00712510757f, -0.000183132564f,
                            -0.000170666681f, 3.86487918e-05f, -3.59158457e-06f, 1.24697436e-07f}};
constexpr Tail<10> TANH_TAIL{6.0f,
                             {-1.0f, -1.1511035f, -0.459219366f, -0.0515581146f, 0.00806036498f, -0.000903699605f,
                              0.000649771828f, -0.00080403802f, 0.000270173041f, -3.79990634e-05f, 1.98638827e-06f}};
// 2^f for |f| ≤ 1/2, exact at 0; the relative error is 2e-9.
constexpr float POWER_OF_TWO[] = {1.0f,           0.693147203f,   0.240226479f,  0.0555033247f,
                                  0.00961843736f, 0.00133988753f, 0.000153533633f};

template <int DEGREE> WK_INLINE Vec polynomial(const float (&power)[DEGREE + 1], const Vec &x) {
    Vec sum = all(power[DEGREE]);
    unroll<DEGREE>([&](auto i) { sum = sum * x + all(power[DEGREE - 1 - i]); });
    return sum;
}

// Written so that NaN stays NaN.
WK_INLINE Vec relu(const Vec &x) { return x < Vec{} ? Vec{} : x; }

template <int DEGREE> WK_INLINE Vec gelu(const Tail<DEGREE> &tail, const Vec &x) {
    const Vec end = all(tail.end);
    Vec a = (Vec)((Bits)x & 0x7fffffffu);
    a = a < end ? a : end;
    const Vec logarithm = polynomial<DEGREE>(tail.power, a);
    // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits.
    const Vec shifted = logarithm + 12582912.0f, fraction = logarithm - (shifted - 12582912.0f);
    const Vec power = polynomial<6>(POWER_OF_TWO, fraction);
    return relu(x) - a * (Vec)((Bits)power + ((Bits)shifted << 23));
}

template <class Function> WK_INLINE void map_vectors(Vec *at, int64_t count, Function &&function) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        Vec value[4];
        unroll<4>([&](auto j) { value[j] = function(at[i + j]); });
        unroll<4>([&](auto j) { at[i + j] = value[j]; });
    }
    for (; i < count; i++) at[i] = function(at[i]);
}

// Adds a bias and applies an activation (`wk_activation`), in place.
inline void activate(int32_t activation, const Vec &bias, Vec *at, int64_t count) {
    const Vec shift = bias;
    switch (activation) {
    case WK_RELU: map_vectors(at, count, [shift](const Vec &x) { return relu(x + shift); }); return;
    case WK_GELU: map_vectors(at, count, [shift](const Vec &x) { return gelu(ERF_TAIL, x + shift); }); return;
    case WK_GELU_TANH: map_vectors(at, count, [shift](const Vec &x) { return gelu(TANH_TAIL, x + shift); }); return;
    default: map_vectors(at, count, [shift](const Vec &x) { return x + shift; });
    }
}

}  // namespace WK_NAMESPACE
}  // namespace wk
