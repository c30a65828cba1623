// The factors of matrix products, and the instruction that multiplies and adds them.
//
// A lane of an operand is a word of 32 bits: one float32, WK_WORD = 2 channels in bfloat16, or WK_WORD = 4 in int8, the first one
// in the lowest bits. Sums have 32 bits in all cases, so a product of words has the same lanes and the same order of memory.
//
// In int8, channels of pixels are numbers n from 0 to 255 that stand for scale · (n - zero), with a scale and a zero of their own
// for the channels of each pixel; weights are numbers from -127 to 127, with a scale for each output. So a sum of products is
// scale · scale of weights · (Σ n · weight - zero · Σ weight), where both sums are whole numbers and exact. A vector after the words
// of a pixel has its scale and zero, and two lines after the words of a panel have the sums and scales of its columns.
#pragma once

#include "simd.hpp"

#ifndef WK_WORD
#define WK_WORD 1
#endif

namespace wk {
namespace WK_NAMESPACE {

// Channels of a word, and of a vector of words.
constexpr int64_t WORD = WK_WORD, GROUP = LANES * WORD;
// Whether words are scaled, and the vectors and lines that say how.
constexpr bool SCALED = WORD == 4;
constexpr int64_t SCALE_VECTORS = SCALED ? 1 : 0, SCALE_LINES = SCALED ? 2 : 0;

#if WK_WORD == 4
// Scales below this count as zero: their inverse would not be a number.
constexpr float NEGLIGIBLE = 1e-30f;

// The scale of an output's weights: the largest one becomes ±127. NaN if one of them is not finite; 0 if all are negligible.
inline float scale_of(const float *weight, int64_t count) {
    uint32_t largest = 0;  // among absolute values, whose order is that of their bits, with NaN at the end
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = read<uint32_t>(weight + i) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    const float value = read<float>(&largest), scale = value / 127;
    return scale < NEGLIGIBLE ? 0.0f : scale + (value - value);
}

// A weight divided by its scale, rounded to the nearest whole number, ties to even.
WK_INLINE int32_t whole_number(float weight, float scale) {
    return scale > 0 ? _mm_cvtss_si32(_mm_set_ss(weight / scale)) : 0;
}

// The sum of the weights in `count` words at distance `step`.
inline int32_t sum_of_words(const float *words, int64_t count, int64_t step) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0; i < WORD; i++) sum += read<int8_t>(reinterpret_cast<const char *>(words + k * step) + i);
    return sum;
}
#else
WK_INLINE float scale_of(const float *, int64_t) { return 1; }
WK_INLINE int32_t sum_of_words(const float *, int64_t, int64_t) { return 0; }
#endif

// The value at an address in every lane (NEON: in the first one). The compiler would fold it into each product that uses it, and
// loads would be the limit.
WK_INLINE Vec spread(const float *at) {
#if WK_AVX
    Vec value;
    asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*at));
    return value;
#elif defined(__aarch64__)
    Vec value;
    asm volatile("ldr %s0, %1" : "=w"(value) : "m"(*at));  // in this order: otherwise all loads come first and are spilled
    return value;
#else
    // The bits, since a word of several channels may look like a NaN, whose bits a subtraction may change.
    Vec value = WORD == 1 ? all(*at) : (Vec)(read<uint32_t>(at) - Bits{});
    hold(value);
    return value;
#endif
}

// sum += a · b, where `a` comes from `spread`. In place: otherwise the compiler renames the sums and spills them.
WK_INLINE void add_product(Vec &sum, const Vec &a, const Vec &b) {
#if WK_WORD == 2 && WK_AVX512
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif WK_WORD == 4 && WK_AVX512
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif WK_WORD == 2
    sum += (Vec)((Bits)a & 0xffff0000u) * (Vec)((Bits)b & 0xffff0000u);
    sum += (Vec)((Bits)a << 16) * (Vec)((Bits)b << 16);
#elif WK_WORD == 4
    // The numbers of `a` have no sign, those of `b` do.
    unroll<WORD>([&](auto i) {
        constexpr int FIRST = 8 * i, ABOVE = 24 - FIRST;
        sum = (Vec)((Ints)sum + (Ints)((Bits)a >> FIRST & 0xff) * ((Ints)((Bits)b << ABOVE) >> 24));
    });
#elif WK_AVX && __FMA__
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__aarch64__)
    asm volatile("fmla %0.4s, %2.4s, %1.s[0]" : "+w"(sum) : "w"(a), "w"(b));
#else
    sum += a * b;
#endif
}

// The word of `weight[0]` and, if it has more than one channel, those after it; weights from `count` on are zero. `scale` is that
// of `scale_of`.
WK_INLINE float word_of(const float *weight, int64_t count, float scale) {
#if WK_WORD == 4
    uint32_t word = 0;
    for (int64_t i = 0; i < WORD && i < count; i++) word |= uint32_t{static_cast<uint8_t>(whole_number(weight[i], scale))} << 8 * i;
    return read<float>(&word);
#elif WK_WORD == 2
    const uint32_t even = count > 0 ? BFloat16::back(weight[0]) : 0, odd = count > 1 ? BFloat16::back(weight[1]) : 0;
    const uint32_t both = odd << 16 | even;
    (void)scale;
    return read<float>(&both);
#else
    (void)scale;
    return count > 0 ? weight[0] : 0.0f;
#endif
}

// What a sum of words means. `row` is the vector after the words of its pixel, `column` the lines after those of its panel, which
// are `line` apart.
WK_INLINE Vec value_of(Vec sum, const Vec *row, const float *column, int64_t line) {
#if WK_WORD == 4
    const float *pixel = reinterpret_cast<const float *>(row);
    hold(sum);  // otherwise the compiler stores all sums in every step of a product, to read them as whole numbers here
    // Without a sign: the zero of a pixel that is not finite overflows. One scale after the other: their product may overflow.
    const Ints exact = (Ints)((Bits)sum - (Bits)spread(pixel + 1) * read<Bits>(column));
    Vec value = __builtin_convertvector(exact, Vec) * read<Vec>(column + line) * spread(pixel);
    hold(value);  // otherwise some tiles, but not all, would be rounded only after they are added
    return value;
#else
    (void)row, (void)column, (void)line;
    return sum;
#endif
}

}  // namespace WK_NAMESPACE
}  // namespace wk
