// Activations of hidden units.
//
// GELU is x · Φ(x) = max(x, 0) - a · Φ(-a) with a = |x|, where Φ is the normal distribution, or the sigmoid that the tanh form puts
// in its place. The logarithm of the tail Φ(-a) is smooth, so it is a polynomial in a, and the tail is 2 to its power: without a
// division, a branch or the cancellation of 1 + erf(x/√2) for negative x. The coefficients are weighted minimax fits (Lawson's
// iteration over Chebyshev nodes, in 40 digits), where the weight is the tail itself: what counts is the error of Φ. It is below
// 0.25 · 2^-24, and 2 · 2^-24 with all rounding, where the erf form in float32 rounds to multiples of 2^-24.
#pragma once

#include "gelu_tables.hpp"
#include "product.hpp"
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

// Vectors that are computed in step: a single one is a chain of operations that wait for each other. All of a tile, if it is small.
constexpr int IN_STEP = TILE_ROWS <= 6 ? TILE_ROWS : 4;

template <int N, int DEGREE> WK_INLINE void polynomial(const float (&power)[DEGREE + 1], const Vec (&x)[N], Vec (&sum)[N]) {
    const Vec first = all(power[DEGREE]);
    unroll<N>([&](auto j) { sum[j] = first; });
    unroll<DEGREE>([&](auto i) {
        const Vec next = all(power[DEGREE - 1 - i]);
        unroll<N>([&](auto j) { sum[j] = sum[j] * x[j] + next; });
    });
}

template <int N, int DEGREE> WK_INLINE void gelu(const Tail<DEGREE> &tail, Vec (&x)[N]) {
    Vec a[N], logarithm[N], shifted[N], power[N];
    unroll<N>([&](auto j) { a[j] = at_most((Vec)((Bits)x[j] & 0x7fffffffu), all(tail.end)); });
    polynomial<N, DEGREE>(tail.power, a, logarithm);
    // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits.
    unroll<N>([&](auto j) { shifted[j] = logarithm[j] + 12582912.0f; });
    unroll<N>([&](auto j) { logarithm[j] -= shifted[j] - 12582912.0f; });
    polynomial<N, 6>(POWER_OF_TWO, logarithm, power);
    unroll<N>([&](auto j) { x[j] = relu(x[j]) - a[j] * (Vec)((Bits)power[j] + ((Bits)shifted[j] << 23)); });
}

#if WK_LANES == 16
// Of 32 values, those whose numbers stand in the lowest five bits of the lanes.
WK_INLINE Vec look_up(const float *values, const Vec &numbers) {
#if WK_AVX512
    return (Vec)_mm512_permutex2var_ps(_mm512_load_ps(values), (__m512i)numbers, _mm512_load_ps(values + 16));
#else
    Vec found;
    for (int i = 0; i < LANES; i++) found[i] = values[((Bits)numbers)[i] & 31];
    return found;
#endif
}

// The same with a polynomial of degree 4 for each of 32 intervals, whose coefficients are looked up in registers; half the work.
template <int N> WK_INLINE void gelu(const TailTable &table, Vec (&x)[N]) {
    constexpr float WIDTH = 3.0f / 16;
    Vec a[N], interval[N], tail[N];
    unroll<N>([&](auto j) { a[j] = at_most((Vec)((Bits)x[j] & 0x7fffffffu), all(31 * WIDTH)); });
    // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits.
    unroll<N>([&](auto j) { interval[j] = a[j] * (1 / WIDTH) + 12582912.0f; });
    unroll<5>([&](auto i) {
        const float *power = table.power[4 - i];
        unroll<N>([&](auto j) {
            const Vec coefficient = look_up(power, interval[j]);
            const Vec r = a[j] - (interval[j] - 12582912.0f) * WIDTH;
            if constexpr (i == 0)
                tail[j] = coefficient;
            else
                tail[j] = tail[j] * r + coefficient;
        });
    });
    unroll<N>([&](auto j) { x[j] = relu(x[j]) - a[j] * tail[j]; });
}
#endif

#if WK_LANES == 16
constexpr const TailTable &ERF = ERF_TABLE, &TANH = TANH_TABLE;
#else
constexpr const Tail<9> &ERF = ERF_TAIL;
constexpr const Tail<10> &TANH = TANH_TAIL;
#endif

template <int N, class Function> WK_INLINE void map_vectors(Vec *at, const Vec &bias, Function &&function) {
    Vec value[N];
    unroll<N>([&](auto j) { value[j] = at[j] + bias; });
    function(value);
    unroll<N>([&](auto j) { at[j] = value[j]; });
}

template <class Function> WK_INLINE void map_all(Vec *at, int64_t count, const Vec &bias, Function &&function) {
    int64_t i = 0;
    for (; i + IN_STEP <= count; i += IN_STEP) map_vectors<IN_STEP>(at + i, bias, function);
    for (; i + 2 <= count; i += 2) map_vectors<2>(at + i, bias, function);
    for (; i < count; i++) map_vectors<1>(at + i, bias, function);
}

// Adds a bias and applies an activation (`wk_activation`), in place.
inline void activate(int32_t activation, const Vec &bias, Vec *at, int64_t count) {
    const Vec shift = bias;
    switch (activation) {
    case WK_RELU:
        map_all(at, count, shift, [](auto &x) {
            for (Vec &value : x) value = relu(value);
        });
        return;
    case WK_GELU: map_all(at, count, shift, [](auto &x) { gelu(ERF, x); }); return;
    case WK_GELU_TANH: map_all(at, count, shift, [](auto &x) { gelu(TANH, x); }); return;
    default: map_all(at, count, shift, [](auto &) {});
    }
}

}  // namespace WK_NAMESPACE
}  // namespace wk
