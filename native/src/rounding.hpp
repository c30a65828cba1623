// How the channels of a pixel, or a part of them, become factors of products.
#pragma once

#include "operands.hpp"

namespace wk {
namespace WK_NAMESPACE {

#if WK_WORD == 4

// In int8, a number n from 0 to 255 stands for scale · (n - zero). The scale is that with which the range of the channels, and 0,
// takes 255 steps. The zero is a whole number, so that 0 is exact.
class Rounding {
  public:
    // Vectors that `decide` takes into account. NaN and infinity count as large.
    WK_INLINE void see(const Vec &channels) {
        // Among the bits of floats, those of numbers below zero are the largest without a sign, and the smallest with one.
        lowest_ = larger(lowest_, (Bits)channels), highest_ = larger(highest_, (Ints)channels);
    }

    WK_INLINE void decide() {
        unroll<4>([&](auto i) {
            constexpr int D = LANES >> (i + 1);
            lowest_ = larger(lowest_, swapped<D>(lowest_)), highest_ = larger(highest_, swapped<D>(highest_));
        });
        const float low = lowest_[0] >> 31 ? ((Vec)lowest_)[0] : 0.0f, high = ((Vec)highest_)[0];
        const float step = high * (1.0f / 255) - low * (1.0f / 255);
        // Subtracting a number that is not finite from itself makes the scale, and so all results, NaN.
        scale_ = step < NEGLIGIBLE ? 0.0f : step + ((high - high) + (low - low));
        const float inverse = step < NEGLIGIBLE ? 0.0f : 1.0f / step;
        zero_ = _mm_cvtss_si32(_mm_set_ss(-low * inverse));
        inverse_ = all(inverse), shift_ = all(static_cast<float>(zero_));
    }

    // Rounded to the nearest number, ties to even; packing limits them to 0 … 255.
    WK_INLINE Vec words_of(const Vec (&channels)[WORD]) const {
#if WK_AVX512
        __m512i number[WORD];
        unroll<WORD>([&](auto i) { number[i] = _mm512_cvtps_epi32((__m512)(channels[i] * inverse_ + shift_)); });
        const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(number[0], number[1]), _mm512_packs_epi32(number[2], number[3]));
        // Packing works within quarters of vectors.
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return (Vec)_mm512_permutexvar_epi32(order, bytes);
#else
        typedef uint8_t Bytes __attribute__((vector_size(LANES)));
        Vec words{};
        unroll<WORD>([&](auto i) {
            const Vec number = channels[i] * inverse_ + shift_;
            // What has no place among the 32-bit numbers, like NaN, becomes the smallest of them.
            const Bits known = (Bits)(number > 0.0f) & (Bits)(number < 2147483648.0f);
            // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits.
            const Bits rounded = (Bits)(at_most(number, all(255)) + 12582912.0f) & known & 0xff;
            write(reinterpret_cast<char *>(&words) + i * LANES, __builtin_convertvector(rounded, Bytes));
        });
        return words;
#endif
    }

    WK_INLINE Vec as_vector() const {
        Vec both{scale_};
        write(reinterpret_cast<char *>(&both) + sizeof(float), zero_);
        return both;
    }

  private:
    template <class Lanes> static WK_INLINE Lanes larger(const Lanes &a, const Lanes &b) { return a > b ? a : b; }
    template <int D, class Lanes> static WK_INLINE Lanes swapped(const Lanes &value) {
        return exchanged<D>(value, std::make_integer_sequence<int, LANES>{});
    }
    template <int D, class Lanes, int... I> static WK_INLINE Lanes exchanged(const Lanes &value, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(value, value, (I ^ D)...);
    }

    Bits lowest_{};
    Ints highest_{};
    Vec inverse_, shift_;
    float scale_;
    int32_t zero_;
};

#else

struct Rounding {
    WK_INLINE void see(const Vec &) {}
    WK_INLINE void decide() {}
    // A vector of words from WORD vectors of channels, which are rounded to the nearest factor.
    WK_INLINE Vec words_of(const Vec (&channels)[WORD]) const {
#if WK_WORD == 2 && WK_AVX512
        return (Vec)_mm512_cvtne2ps_pbh((__m512)channels[1], (__m512)channels[0]);
#elif WK_WORD == 2
        Vec words{};
        unroll<WORD>([&](auto i) { BFloat16::store(reinterpret_cast<uint16_t *>(&words) + i * LANES, channels[i]); });
        return words;
#else
        return channels[0];
#endif
    }
    WK_INLINE Vec as_vector() const { return Vec{}; }
};

#endif

}  // namespace WK_NAMESPACE
}  // namespace wk
