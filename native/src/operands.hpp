// The factors of matrix products, and the instruction that multiplies and adds them.
//
// A lane of an operand is a word of 32 bits: one float32, or WK_WORD = 2 channels in bfloat16, the even one in the lower half.
// Sums are float32 in both cases, so a product of words has the same lanes and the same order of memory.
#pragma once

#include "simd.hpp"

#ifndef WK_WORD
#define WK_WORD 1
#endif

namespace wk {
namespace WK_NAMESPACE {

// Channels of a word, and of a vector of words.
constexpr int64_t WORD = WK_WORD, GROUP = LANES * WORD;

// The value at an address in every lane (NEON: in the first one). The compiler would fold it into each product that uses it, and
// loads would be the limit.
WK_INLINE Vec spread(const float *at) {
#if defined(__AVX__)
    Vec value;
    asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*at));
    return value;
#elif defined(__aarch64__)
    Vec value;
    asm volatile("ldr %s0, %1" : "=w"(value) : "m"(*at));  // in this order: otherwise all loads come first and are spilled
    return value;
#else
    Vec value = all(*at);
    hold(value);
    return value;
#endif
}

// sum += a · b, where `a` comes from `spread`. In place: otherwise the compiler renames the sums and spills them.
WK_INLINE void add_product(Vec &sum, const Vec &a, const Vec &b) {
#if WK_WORD == 2
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__aarch64__)
    asm volatile("fmla %0.4s, %2.4s, %1.s[0]" : "+w"(sum) : "w"(a), "w"(b));
#else
    sum += a * b;
#endif
}

// The word of `weight[0]` and, if it has more than one channel, those after it; weights from `count` on are zero.
WK_INLINE float word_of(const float *weight, int64_t count) {
#if WK_WORD == 2
    const uint32_t even = count > 0 ? BFloat16::back(weight[0]) : 0, odd = count > 1 ? BFloat16::back(weight[1]) : 0;
    const uint32_t both = odd << 16 | even;
    return read<float>(&both);
#else
    return count > 0 ? weight[0] : 0.0f;
#endif
}

// A vector of words from WORD vectors of channels, which are rounded to the nearest factor.
WK_INLINE Vec words_of(const Vec (&channels)[WORD]) {
#if WK_WORD == 2
    return (Vec)_mm512_cvtne2ps_pbh((__m512)channels[1], (__m512)channels[0]);
#else
    return channels[0];
#endif
}

}  // namespace WK_NAMESPACE
}  // namespace wk
